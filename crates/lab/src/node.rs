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

use std::fs;
use std::net::TcpStream;
use std::os::unix::fs::PermissionsExt;
use std::os::unix::net::UnixStream;
use std::os::unix::process::CommandExt;
use std::path::{Path, PathBuf};
use std::process::{Child, Command, Stdio};
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

use super::process::{self, LIMIT, Output, Task};
use super::{Address, Lab, Result, Shared, checkout, wait_for};

pub const UML: &str = "/usr/bin/linux.uml";
/// Where crates/lab/setup puts Linux 7.2, in the same places.
pub const NEWER_LINUX: &str = "/var/cache/nfsvol-lab/linux-7.2";
/// The agent's port on a guest.
const AGENT: u16 = 1023;
/// From the start of a node to its agent's first answer; a guest takes 2 s on an idle machine.
const BOOT_LIMIT: Duration = Duration::from_secs(60);
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
    pub fn guest_with(
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
        wait_for(&format!("{} to boot", self.name), BOOT_LIMIT, || {
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

    fn machine_command(&self, exe: &str, script: &Path) -> Result<Command> {
        let (name, link) = (&self.name, self.link());
        process::sh(&format!(
            "ip netns add {name}
             ip link add {link} type veth peer name eth0 address {hardware} netns {name}
             ip link set {link} master br0 up
             ip -n {name} link set lo up
             ip -n {name} addr add {v4}/24 dev eth0
             ip -n {name} -6 addr add {v6}/64 dev eth0 nodad
             ip -n {name} link set eth0 up
             ip -n {name} route add default via 10.77.0.1",
            v4 = self.ip(),
            v6 = self.ip6(),
            hardware = self.address.hardware(),
        ))?
        .ok()?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{name}"))
            .args([
                "unshare",
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args([
                "--mount-proc",
                "--propagation",
                "private",
                "--",
                exe,
                "lab-init",
                "sh",
                "-eu",
            ])
            .arg(script);
        Ok(command)
    }

    fn guest_command(
        &self,
        exe: &str,
        script: &Path,
        linux: Linux,
        (memory, disks): (&str, &[PathBuf]),
    ) -> Result<Command> {
        let link = self.link();
        process::sh(&format!(
            "ip tuntap add dev {link} mode tap && ip link set {link} master br0 up"
        ))?
        .ok()?;
        let mut command = Command::new("unshare");
        command
            .env("LD_PRELOAD", xstate_shim()?)
            .args(["--pid", "--fork", "--kill-child", "--", exe, "lab-init"])
            .arg(format!("{}{UML}", linux.root()))
            .arg(format!("mem={memory}"))
            .args([
                "root=/dev/root",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .args(["con=null", "con0=null,fd:1", "uml_dir=/run/uml"])
            .arg(format!(
                "umid={}-{}",
                self.name,
                self.boots.load(Ordering::Relaxed)
            ))
            .arg(format!("vec0:transport=tap,ifname={link},depth=128,gro=1"))
            .arg(format!("ubda={}", self.dir.join("disk.img").display()));
        if linux == Linux::V7_2 {
            command.arg("seccomp=on"); // six times as quick as ptrace; 6.1 does not have it
        }
        for (letter, disk) in ('b'..).zip(disks) {
            command.arg(format!("ubd{letter}={}", disk.display()));
        }
        command.arg(format!("init={}", script.display()));
        Ok(command)
    }

    /// What a node does first; ends as the agent.
    fn boot_script(&self, exe: &str) -> String {
        let dir = self.dir.display();
        let hosts = self.dir.with_file_name("hosts");
        let hosts = hosts.display();
        let checkout = checkout();
        // A checkout below /srv, /run or (in a guest) /tmp is seen through what is mounted there.
        let (kernel, disk, checkout_again, agent) = match self.kind {
            Kind::Machine => (
                String::new(),
                format!(
                    "disk={dir}/disk; mkdir -p $disk/checkout; rm -f {dir}/agent.sock
                     mount --bind {checkout} $disk/checkout"
                ),
                format!("mount --bind $disk/checkout {checkout}"),
                format!("exec {exe} lab-agent unix:{dir}/agent.sock"),
            ),
            Kind::Guest { linux, .. } => (
                self.guest_kernel(linux),
                // The node's directory is on the machine: logs are read there.
                format!(
                    "mount -t tmpfs tmpfs /mnt
                     mount -t hostfs -o {dir} none {dir}
                     mount /dev/ubda /mnt; disk=/mnt"
                ),
                format!("mount -t hostfs -o {checkout} none {checkout}"),
                format!("exec {exe} lab-init {exe} lab-agent {}:{AGENT}", self.ip()),
            ),
        };
        format!(
            "#!/bin/sh -eu
             export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
             {kernel}
             {disk}
             hostname {name}
             mount --make-rshared /
             for private in etc var/lib; do
                 mkdir -p $disk/$private.upper $disk/$private.work
                 upper=$disk/$private.upper,workdir=$disk/$private.work
                 mount -t overlay -o lowerdir=/$private,upperdir=$upper overlay /$private
             done
             for own in docker nfsvol; do
                 mkdir -p $disk/$own /var/lib/$own
                 mount --bind $disk/$own /var/lib/$own
             done
             mkdir -p $disk/srv
             mount --bind $disk/srv /srv
             mount --bind {hosts} /etc/hosts
             mount -t tmpfs -o mode=0755 tmpfs /run
             mkdir -p /run/lock /run/docker/plugins
             [ -e {checkout}/Cargo.toml ] || {{ mkdir -p {checkout}; {checkout_again}; }}
             {agent}
            ",
            name = self.name,
        )
    }

    /// What the machine has done already and a guest's kernel has not.
    fn guest_kernel(&self, linux: Linux) -> String {
        format!(
            "mount -t proc proc /proc
             mount -t sysfs sysfs /sys
             mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
             mkdir -p /dev/pts /dev/shm /dev/mqueue
             [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
             mount -t devpts -o mode=0600,ptmxmode=0666 devpts /dev/pts
             mount -t tmpfs tmpfs /dev/shm
             mount -t mqueue mqueue /dev/mqueue
             mount -t tmpfs -o mode=1777 tmpfs /tmp
             mount -t tmpfs -o mode=0755 tmpfs /sys/fs/cgroup
             while read -r name _ _ enabled; do
                 [ \"$enabled\" = 1 ] || continue
                 mkdir -p /sys/fs/cgroup/$name
                 mount -t cgroup -o $name cgroup /sys/fs/cgroup/$name
             done </proc/cgroups
             mkdir -p /tmp/modules/lib/modules
             ln -s {linux}/usr/lib/uml/modules/$(uname -r) /tmp/modules/lib/modules/$(uname -r)
             for module in overlay fuse nfsv3 nfsv4 bridge veth br_netfilter; do
                 modprobe -d /tmp/modules $module
             done
             ip link set lo up
             ip link set vec0 address {hardware}
             ip addr add {v4}/24 dev vec0
             ip -6 addr add {v6}/64 dev vec0 nodad
             ip link set vec0 up",
            linux = linux.root(),
            v4 = self.ip(),
            v6 = self.ip6(),
            hardware = self.address.hardware(),
        )
    }

    fn ask(&self, task: &Task) -> Result<Output> {
        let limit = task.limit.unwrap_or(LIMIT) + ANSWER_SLACK;
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

    /// Runs a command on the node to its end, for at most a minute.
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

/// What lets linux.uml run on processors with AMX (xstate.c), built once with the C compiler that
/// Rust links with.
fn xstate_shim() -> Result<PathBuf> {
    static SHIM: Shared<PathBuf> = Shared::new();
    let shim = SHIM.get(|| {
        let lab = Lab::get()?.dir();
        let (source, shim) = (lab.join("xstate.c"), lab.join("xstate.so"));
        fs::write(&source, include_str!("xstate.c"))?;
        let argv = ["cc", "-shared", "-fPIC", "-O2", "-o"].map(PathBuf::from);
        let argv: Vec<_> = argv
            .iter()
            .chain([&shim, &source])
            .filter_map(|arg| arg.to_str())
            .collect();
        process::run(&argv)?.ok()?;
        Ok(shim)
    })?;
    Ok(shim.clone())
}

/// A daemon on a node. Dropping it leaves it running: the lab's end is its end.
#[derive(Debug)]
pub struct Process<'a> {
    node: &'a Node,
    name: String,
    task: Task,
    log: PathBuf,
    /// Its process id, in which boot of the node.
    pid: Mutex<Option<(u32, u32)>>,
}

impl<'a> Process<'a> {
    /// A daemon that is not started yet.
    pub fn new(node: &'a Node, name: &str, task: Task) -> Result<Self> {
        let log = node.dir.join(format!("logs/{name}.log"));
        Lab::get()?.watch_log(&format!("{} {name}", node.name), &log);
        let task = Task {
            log: Some(log.clone()),
            ..task
        };
        Ok(Self {
            node,
            name: name.to_owned(),
            task,
            log,
            pid: Mutex::default(),
        })
    }

    pub fn node(&self) -> &'a Node {
        self.node
    }

    /// Starts it, again if it has ended.
    pub fn start(&self) -> Result {
        let pid = self.node.ask(&self.task)?.ok()?.parse()?;
        let boot = self.node.boots.load(Ordering::Relaxed);
        *self.pid.lock().map_err(|_| anyhow!("a trial panicked"))? = Some((pid, boot));
        Ok(())
    }

    /// Its process id on the node; an error if it was not started since the node booted.
    pub fn pid(&self) -> Result<u32> {
        let pid = *self.pid.lock().map_err(|_| anyhow!("a trial panicked"))?;
        pid.filter(|&(_, boot)| boot == self.node.boots.load(Ordering::Relaxed))
            .map(|(pid, _)| pid)
            .with_context(|| format!("{} was not started on {}", self.name, self.node.name))
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`, `KILL`.
    pub fn signal(&self, signal: &str) -> Result {
        self.node
            .ok(&["kill", "-s", signal, &self.pid()?.to_string()])?;
        Ok(())
    }

    /// Whether it runs; not if it was started before the node's last boot.
    pub fn is_running(&self) -> Result<bool> {
        let Ok(pid) = self.pid() else {
            return Ok(false);
        };
        Ok(self.node.run(&["kill", "-s", "0", &pid.to_string()])?.code == 0)
    }

    /// Waits until it has ended.
    pub fn wait(&self, limit: Duration) -> Result {
        let what = format!("{} on {} to end", self.name, self.node.name);
        wait_for(&what, limit, || {
            self.is_running().is_ok_and(|running| !running)
        })
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&self) -> Result {
        self.signal("KILL")?;
        self.wait(Duration::from_secs(10))
    }

    /// SIGTERM, and waits for the end for at most 20 s.
    pub fn stop(&self) -> Result {
        self.signal("TERM")?;
        self.wait(Duration::from_secs(20))
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until its log holds `text`.
    pub fn wait_log(&self, text: &str, limit: Duration) -> Result {
        let what = format!("`{text}` in the log of {} on {}", self.name, self.node.name);
        wait_for(&what, limit, || self.log().contains(text))
    }

    pub fn task_mut(&mut self) -> &mut Task {
        &mut self.task
    }
}
