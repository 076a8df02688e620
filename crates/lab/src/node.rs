//! A computer of the lab, with an address, a disk and an agent that runs commands on it.
//!
//! - A *machine* is a process tree with PID, mount, network, UTS and IPC namespaces of its own
//!   on the machine's kernel: boots in a tenth of a second, has no kernel NFS client where that
//!   kernel has none.
//! - A *guest* is Linux, 6.1 or 7.2, as a process (User-Mode Linux) with the machine's root file system
//!   below: boots in about two seconds, has the kernel's NFS client and server.
//!
//! Both see the machine's programs, and nothing that they write reaches it: /etc and /var/lib
//! are overlays on the node's own directory or disk, /run, /tmp and /mnt are in memory. What is
//! below /var/lib survives [`Node::power_off`] and [`Node::boot`], as on a real computer.

mod boot;
mod daemon;

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use super::process::{self, Output, Task};
use super::{Address, Lab, PATIENCE, Result, wait_for};

pub use daemon::Process;

pub(crate) const UML: &str = "/usr/bin/linux.uml";
/// Where crates/lab/setup puts Linux 7.2, in the same places.
pub(crate) const NEWER_LINUX: &str = "/var/cache/nfsvol-lab/linux-7.2";
/// The agent's port on a guest.
const AGENT: u16 = 1023;
/// An answer may come this much later than the command's own limit.
const ANSWER_SLACK: Duration = Duration::from_secs(10);
/// Guests' disks are sparse files.
const DISK: &str = "8G";

#[derive(Debug)]
enum Kind {
    Machine,
    Guest {
        linux: Linux,
        memory: &'static str,
        disks: Vec<PathBuf>,
    },
}

/// The kernel of a guest.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Linux {
    /// Debian 12's.
    V6_1,
    /// Debian 14's, which needs a newer C library than the machine has.
    V7_2,
}

impl Linux {
    /// The newest that is there. A process starts in a third of the time of the older one, a container in a
    /// tenth.
    pub fn newest() -> Self {
        if Path::new(NEWER_LINUX).exists() {
            Self::V7_2
        } else {
            Self::V6_1
        }
    }

    /// Below which the kernel and its modules are, as packages have them below `/`.
    fn root(self) -> &'static str {
        match self {
            Self::V6_1 => "",
            Self::V7_2 => NEWER_LINUX,
        }
    }
}

/// A computer of the lab.
#[derive(Debug)]
pub struct Node {
    name: String,
    address: Address,
    dir: PathBuf,
    kind: Kind,
    supervisor: Mutex<Option<Child>>,
    /// Counts boots: a process id means something in its own one only.
    boots: AtomicU32,
}

impl Node {
    /// Boots a machine: namespaces on the machine's own kernel.
    pub fn machine(lab: &'static Lab, name: &str) -> Result<Self> {
        Self::new(lab, name, Kind::Machine)
    }

    /// Boots a guest with the kernel's NFS client.
    pub fn guest(lab: &'static Lab, name: &str) -> Result<Self> {
        Self::guest_with(lab, name, "1G", Vec::new())
    }

    /// Boots a guest with this much memory and further disk images, its /dev/ubdb and on.
    pub(crate) fn guest_with(
        lab: &'static Lab,
        name: &str,
        memory: &'static str,
        disks: Vec<PathBuf>,
    ) -> Result<Self> {
        let linux = Linux::V6_1;
        Self::new(
            lab,
            name,
            Kind::Guest {
                linux,
                memory,
                disks,
            },
        )
    }

    /// Boots a guest with this kernel.
    pub fn guest_of(lab: &'static Lab, name: &str, linux: Linux) -> Result<Self> {
        let kind = Kind::Guest {
            linux,
            memory: "1G",
            disks: Vec::new(),
        };
        Self::new(lab, name, kind)
    }

    fn new(lab: &'static Lab, name: &str, kind: Kind) -> Result<Self> {
        let dir = lab.dir().join(name);
        fs::create_dir(&dir).with_context(|| format!("a second node named {name}"))?;
        fs::create_dir(dir.join("logs"))?;
        let address = lab.address(name)?;
        if let Kind::Guest { .. } = kind {
            let disk = dir.join("disk.img");
            process::sh(&format!(
                "truncate -s {DISK} {0} && mkfs.ext4 -q -F -E lazy_itable_init=1 {0}",
                disk.display()
            ))?
            .ok()?;
        }
        let node = Self {
            name: name.to_owned(),
            address,
            dir,
            kind,
            supervisor: Mutex::default(),
            boots: AtomicU32::new(0),
        };
        lab.watch_log(&format!("{name} console"), &node.console());
        node.boot()?;
        Ok(node)
    }

    pub fn name(&self) -> &str {
        &self.name
    }

    /// The IPv4 address on the lab's bridge.
    pub fn ip(&self) -> String {
        self.address.v4()
    }

    /// The IPv6 address on the lab's bridge.
    pub fn ip6(&self) -> String {
        self.address.v6()
    }

    /// A directory that this node and the test process share at one path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    pub fn is_guest(&self) -> bool {
        matches!(self.kind, Kind::Guest { .. })
    }

    fn console(&self) -> PathBuf {
        self.dir.join("logs/console.log")
    }

    /// Switches the node on and waits for its agent. Its processes are those of a fresh boot.
    pub fn boot(&self) -> Result {
        let mut supervisor = self
            .supervisor
            .lock()
            .map_err(|_| anyhow!("a trial panicked"))?;
        if supervisor.is_some() {
            bail!("{} is on already", self.name);
        }
        self.boots.fetch_add(1, Ordering::Relaxed);
        let script = self.dir.join("boot.sh");
        let exe = std::env::current_exe()?;
        let exe = exe
            .to_str()
            .context("the test binary's path is not UTF-8")?;
        fs::write(&script, self.boot_script(exe))?;
        fs::set_permissions(&script, fs::Permissions::from_mode(0o755))?;
        let mut command = match &self.kind {
            Kind::Machine => self.machine_command(exe, &script)?,
            Kind::Guest {
                linux,
                memory,
                disks,
            } => self.guest_command(exe, &script, *linux, (memory, disks))?,
        };
        let console = fs::File::options()
            .create(true)
            .append(true)
            .open(self.console())?;
        let child = command
            .process_group(0)
            .stdin(Stdio::null())
            .stdout(console.try_clone()?)
            .stderr(console)
            .spawn()
            .with_context(|| format!("booting {}", self.name))?;
        let child = supervisor.insert(child);
        let ping = Task {
            limit: Some(Duration::from_secs(5)),
            ..Task::new(&["true"])
        };
        let mut dead = false;
        wait_for(&format!("{} to boot", self.name), PATIENCE, || {
            dead = matches!(child.try_wait(), Ok(Some(_)));
            dead || self.ask(&ping).is_ok_and(|output| output.code == 0)
        })?;
        if dead {
            bail!("{} ended while it booted:\n{}", self.name, self.tail());
        }
        Ok(())
    }

    fn tail(&self) -> String {
        let text = fs::read(self.console()).unwrap_or_default();
        let text = String::from_utf8_lossy(&text);
        let lines: Vec<&str> = text.lines().collect();
        lines[lines.len().saturating_sub(20)..].join("\n")
    }

    /// Pulls the plug: every process of the node is killed at once, nothing is written back.
    pub fn power_off(&self) -> Result {
        let mut supervisor = self
            .supervisor
            .lock()
            .map_err(|_| anyhow!("a trial panicked"))?;
        let mut child = supervisor
            .take()
            .with_context(|| format!("{} is off", self.name))?;
        // The kernel kills its PID namespace with it.
        child.kill()?;
        child.wait()?;
        let link = self.link();
        process::sh(&format!(
            "ip link del {link}; ip netns del {} 2>/dev/null || true",
            self.name
        ))?
        .ok()?;
        Ok(())
    }

    /// Off and on again.
    pub fn reboot(&self) -> Result {
        self.power_off()?;
        self.boot()
    }

    /// Cuts the node from the lab's network, or joins it again.
    pub fn set_network(&self, up: bool) -> Result {
        let state = if up { "up" } else { "down" };
        process::run(&["ip", "link", "set", &self.link(), state])?.ok()?;
        Ok(())
    }

    fn link(&self) -> String {
        format!("port{}", self.address.0)
    }

    fn ask(&self, task: &Task) -> Result<Output> {
        let limit = task.limit.unwrap_or(PATIENCE) + ANSWER_SLACK;
        match self.kind {
            Kind::Machine => {
                let stream = UnixStream::connect(self.dir.join("agent.sock"))?;
                stream.set_read_timeout(Some(limit))?;
                process::ask(stream, task)
            }
            Kind::Guest { .. } => {
                let address = format!("{}:{AGENT}", self.ip()).parse()?;
                let stream = TcpStream::connect_timeout(&address, ANSWER_SLACK)?;
                stream.set_read_timeout(Some(limit))?;
                process::ask(stream, task)
            }
        }
        .with_context(|| format!("on {}", self.name))
    }

    /// Runs a command on the node to its end, for at most [`PATIENCE`].
    pub fn run(&self, argv: &[&str]) -> Result<Output> {
        self.ask(&Task::new(argv))
    }

    /// Runs a command with this environment, input and limit.
    pub fn run_task(&self, task: &Task) -> Result<Output> {
        self.ask(task)
    }

    /// Runs a command and answers its output; an error if it failed.
    pub fn ok(&self, argv: &[&str]) -> Result<String> {
        self.run(argv)?
            .ok()
            .with_context(|| format!("on {}", self.name))
    }

    /// Runs a shell script and answers its output; an error if one of its commands failed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.ok(&["sh", "-euc", script])
    }

    /// Starts a daemon on the node; its log is shown with trials that fail.
    pub fn spawn<'a>(&'a self, name: &str, argv: &[&str]) -> Result<Process<'a>> {
        let process = Process::new(self, name, Task::new(argv))?;
        process.start()?;
        Ok(process)
    }
}
