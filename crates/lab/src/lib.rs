//! The lab: real Docker hosts, NFS servers and kernel NFS clients on one machine.
//!
//! A test binary with `harness = false` hands its trials to [`main!`]; one process then owns one
//! lab for all of them. That process runs in PID, mount, network, UTS and IPC namespaces of its
//! own, below an init that the outer process starts with a parent-death signal. So whatever
//! happens (a panic, a failed trial, SIGINT, SIGKILL of any of the three) the kernel ends every
//! daemon and guest with the PID namespace, and their mounts and networks vanish with them. Left
//! on the machine's side are one directory in /var/tmp and one cgroup, removed by the outer
//! process, or by the sweep at the start of the next run if that was killed too.
//!
//! | module | job |
//! |---|---|
//! | `life` | a lab's life, from its namespaces to the sweep; the roles of the test binary |
//! | `trial` | a named trial, its limit, parts that trials share |
//! | `part` | what a trial needs from the machine |
//! | [`process`] | commands, their output, the init and agent roles of the test binary |
//! | [`node`] | a computer of the lab: a namespaced machine or a User-Mode Linux guest |
//! | `node::boot` | what a node does from its start to its agent |
//! | `node::daemon` | a process on a node that goes on, and its log |
//! | [`calls`] | calls on nfsvol's socket, timed on its node |
//! | [`docker`] | a real dockerd on a node, images, `nfsvol serve` beside it |
//! | [`host`] | a node with dockerd and nfsvol, driven by the docker command line |
//! | [`fsx`] | another's judge of reads and writes |
//! | [`ganesha`] | the user-space NFS server (v3, v4.0, v4.1) |
//! | [`knfsd`] | the Linux kernel's NFS server (v3, v4.0, v4.1, v4.2) in a guest |
//! | [`liar`] | a hostile server: a real one whose replies are turned into lies |
//! | [`systemd`] | a machine that is run by systemd, for units and packages |
//! | [`proxy`] | TCP between client and server: delays, drops, resets, counts calls |
//!
//! Addresses are 10.77.0.0/24 on a bridge of the lab's own network namespace; the test process
//! itself is 10.77.0.1 and can talk to every node.
//!
//! Known limits: one lab a process; 246 addresses; what a node writes below the checkout or in
//! the lab's own directory is written on the machine.

pub mod calls;
pub mod docker;
pub mod fsx;
pub mod ganesha;
pub mod host;
pub mod knfsd;
pub mod liar;
mod life;
pub mod node;
mod part;
pub mod process;
pub mod proxy;
pub mod systemd;
mod trial;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};

pub use calls::{Answer, Call};
pub use docker::Nfsvol;
pub use ganesha::{Export, Ganesha};
pub use host::{DataPath, Host};
pub use knfsd::Knfsd;
#[doc(hidden)]
pub use life::main_of;
pub use node::{Linux, Node, Process};
pub use part::{NEWER_ENGINE, Part};
pub use process::Output;
pub use proxy::Proxy;
pub use systemd::Systemd;
pub use trial::{Shared, long, trial};

/// What every step of the lab answers.
pub type Result<T = ()> = anyhow::Result<T>;

/// How long anything is waited for that has to come. It guards against a hang only: far longer than what
/// is waited for takes, also when others use the machine too.
pub const PATIENCE: Duration = Duration::from_secs(600);
/// Lines of each daemon's log shown with a failed trial.
const LOG_LINES: usize = 40;

/// What a test binary knows of the program that it tries: [`tried!`] fills it in.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Tried {
    pub program: &'static str,
    pub checkout: &'static str,
}

static TRIED: OnceLock<Tried> = OnceLock::new();

fn tried() -> &'static Tried {
    TRIED.get().expect("main! or Lab::visit is what begins")
}

/// The checkout of the program that is tried.
pub(crate) fn checkout() -> &'static str {
    tried().checkout
}

/// A judge of file systems that others wrote, where the Makefile installs it.
pub fn tool(name: &str) -> String {
    format!("{}/target/tools/bin/{name}", checkout())
}

/// The program of BASELINE, an earlier commit, which `make baseline` builds.
pub fn before() -> String {
    format!("{}/target/bench/baseline/release/nfsvol", checkout())
}

/// What this test binary knows of the program that it tries.
#[macro_export]
macro_rules! tried {
    () => {
        $crate::Tried {
            program: env!("CARGO_BIN_EXE_nfsvol"),
            checkout: env!("CARGO_MANIFEST_DIR"),
        }
    };
}

/// The body of a test binary's `main`: runs the trials that the closure answers in a lab of their
/// own, and answers as a test harness does.
///
/// The test binary is also the lab's init and the agent on its nodes: the closure is called only
/// where trials are listed or run.
#[macro_export]
macro_rules! main {
    ($trials:expr) => {
        $crate::main_of($crate::tried!(), $trials)
    };
}

/// The lab that this process owns.
#[derive(Debug)]
pub struct Lab {
    dir: PathBuf,
    next_address: AtomicU8,
    logs: Mutex<Vec<(String, PathBuf)>>,
    hosts: Mutex<File>,
    notes: Mutex<Vec<String>>,
}

static LAB: OnceLock<Lab> = OnceLock::new();

impl Lab {
    /// The lab of this process; an error outside of one.
    pub(crate) fn get() -> Result<&'static Self> {
        LAB.get().context("no lab is up in this process")
    }

    /// Makes trials run on a node of a lab, as this process does, which use what they are told of.
    pub fn visit(tried: Tried, dir: &Path) -> Result {
        TRIED.get_or_init(|| tried);
        let lab = Self::in_dir(dir)?;
        LAB.set(lab).map_err(|_| anyhow!("the lab is up already"))
    }

    pub(crate) fn enter(dir: &Path) -> Result<Self> {
        for script in [
            "mount -t tmpfs -o mode=0755 tmpfs /run",
            "mkdir -p /run/netns /run/lock /run/uml",
            "ip link set lo up",
            // With a hardware address of its own: otherwise it takes the lowest of its ports', and
            // each node that boots may change it under those who talk to the test process.
            "ip link add br0 address 02:4e:46:53:00:01 type bridge forward_delay 0",
            "ip addr add 10.77.0.1/24 dev br0",
            "ip -6 addr add fd77::1/64 dev br0 nodad",
            "ip link set br0 up",
            // Where bridged frames are shown to iptables, dockerd's policy would drop them.
            "for call in /proc/sys/net/bridge/bridge-nf-call-*; do
                 if [ -w $call ]; then echo 0 > $call; fi
             done",
        ] {
            process::sh(script)?.ok()?;
        }
        Self::in_dir(dir)
    }

    fn in_dir(dir: &Path) -> Result<Self> {
        let hosts = dir.join("hosts");
        fs::write(&hosts, "127.0.0.1 localhost\n::1 localhost\n")?;
        let hosts = File::options().append(true).open(hosts)?;
        Ok(Self {
            dir: dir.to_owned(),
            next_address: AtomicU8::new(10),
            logs: Mutex::default(),
            hosts: Mutex::new(hosts),
            notes: Mutex::default(),
        })
    }

    /// A directory of the lab on the machine's disk; nodes see it at the same path.
    pub fn dir(&self) -> &Path {
        &self.dir
    }

    /// The cgroup below which every container of the lab runs.
    pub fn cgroup(&self) -> String {
        self.dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned())
            .unwrap_or_default()
    }

    /// A new address, known by `name` to every node that boots from now on.
    pub(crate) fn address(&self, name: &str) -> Result<Address> {
        let host = self.next_address.fetch_add(1, Ordering::Relaxed);
        if host == u8::MAX {
            bail!("the lab has no addresses left");
        }
        let address = Address(host);
        let mut hosts = self
            .hosts
            .lock()
            .map_err(|_| anyhow!("another trial panicked"))?;
        writeln!(hosts, "{} {name}\n{} {name}-6", address.v4(), address.v6())?;
        Ok(address)
    }

    /// Shows the log with a trial that fails.
    pub(crate) fn watch_log(&self, name: &str, path: &Path) {
        if let Ok(mut logs) = self.logs.lock() {
            logs.retain(|(_, known)| known != path);
            logs.push((name.to_owned(), path.to_owned()));
        }
    }

    pub(crate) fn log_sizes(&self) -> HashMap<PathBuf, u64> {
        let Ok(logs) = self.logs.lock() else {
            return HashMap::new();
        };
        logs.iter()
            .filter_map(|(_, path)| Some((path.clone(), fs::metadata(path).ok()?.len())))
            .collect()
    }

    pub(crate) fn logs_since(&self, before: &HashMap<PathBuf, u64>) -> String {
        let Ok(logs) = self.logs.lock() else {
            return String::new();
        };
        let mut shown = String::new();
        for (name, path) in logs.iter() {
            let mut bytes = Vec::new();
            let read = File::open(path).and_then(|mut file| {
                file.seek(SeekFrom::Start(before.get(path).copied().unwrap_or(0)))?;
                file.read_to_end(&mut bytes)
            });
            if read.is_err() || bytes.is_empty() {
                continue;
            }
            let text = String::from_utf8_lossy(&bytes);
            let lines: Vec<&str> = text.lines().collect();
            shown.push_str(&format!("---- {name}: {}\n", path.display()));
            for line in &lines[lines.len().saturating_sub(LOG_LINES)..] {
                shown.push_str(line);
                shown.push('\n');
            }
        }
        shown
    }
}

/// Keeps what a trial has to tell besides its outcome, such as a figure, to be shown after the last
/// one: printed at once, it could end up in the middle of an outcome's line.
pub fn note(text: impl fmt::Display) {
    let notes = LAB.get().map(|lab| lab.notes.lock());
    if let Some(Ok(mut notes)) = notes {
        notes.push(text.to_string());
    }
}

/// A node's address on the lab's bridge.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) struct Address(u8);

impl Address {
    pub(crate) fn v4(self) -> String {
        format!("10.77.0.{}", self.0)
    }

    pub(crate) fn v6(self) -> String {
        format!("fd77::{}", self.0)
    }

    /// The hardware address: the same after each boot, so that nobody sends to an old one.
    pub(crate) fn hardware(self) -> String {
        format!("02:4e:46:53:00:{:02x}", self.0)
    }
}

/// Waits until `ready` answers true, asking every 50 ms, for at most `limit`.
pub fn wait_for(what: &str, limit: Duration, mut ready: impl FnMut() -> bool) -> Result {
    let start = std::time::Instant::now();
    while !ready() {
        if start.elapsed() > limit {
            bail!("waited {limit:?} in vain for {what}");
        }
        thread::sleep(Duration::from_millis(50));
    }
    Ok(())
}
