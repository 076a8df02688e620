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
//! | `process` | commands, their output, the init and agent roles of the test binary |
//! | `node` | a computer of the lab: a namespaced machine or a User-Mode Linux guest |
//! | `calls` | calls on nfsvol's socket, timed on its node |
//! | `docker` | a real dockerd on a node, images, `nfsvol serve` beside it |
//! | `host` | a node with dockerd and nfsvol, driven by the docker command line |
//! | `fsx` | another's judge of reads and writes |
//! | `ganesha` | the user-space NFS server (v3, v4.0, v4.1) |
//! | `knfsd` | the Linux kernel's NFS server (v3, v4.0, v4.1, v4.2) in a guest |
//! | `liar` | a hostile server: a real one whose replies are turned into lies |
//! | `systemd` | a machine that is run by systemd, for units and packages |
//! | `proxy` | TCP between client and server: delays, drops, resets, counts calls |
//!
//! Addresses are 10.77.0.0/24 on a bridge of the lab's own network namespace; the test process
//! itself is 10.77.0.1 and can talk to every node.

pub mod calls;
pub mod docker;
pub mod fsx;
pub mod ganesha;
pub mod host;
pub mod knfsd;
pub mod liar;
pub mod node;
pub mod process;
pub mod proxy;
pub mod systemd;

use std::collections::HashMap;
use std::fmt;
use std::fs::{self, File};
use std::io::{Read, Seek, SeekFrom, Write};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Mutex, OnceLock, mpsc};
use std::thread;
use std::time::Duration;

use anyhow::{Context, anyhow, bail};
use libtest_mimic::{Arguments, Completion, Failed, Trial};

pub use calls::{Answer, Call};
pub use docker::Nfsvol;
pub use ganesha::{Export, Ganesha};
pub use host::{DataPath, Host};
pub use knfsd::Knfsd;
pub use node::{Linux, Node, Process};
pub use process::Output;
pub use proxy::Proxy;
pub use systemd::Systemd;

/// What every step of the lab answers.
pub type Result<T = ()> = anyhow::Result<T>;

/// Set to 1, trials run their long versions (`make test-long`).
const LONG: &str = "NFSVOL_TEST_LONG";
/// How many times as long the limits are then.
const LONG_TIMES: u32 = 6;
/// A trial that has not ended after this long hangs: it is reported as failed, the others go on. The
/// longest takes half of this on two processors.
const TRIAL_LIMIT: Duration = Duration::from_secs(600);
/// The whole lab ends after this long, whatever hangs.
const LAB_LIMIT: Duration = Duration::from_secs(25 * 60);
/// Trials that run at a time unless `--test-threads` says otherwise: most of what they do is wait.
const SIDE_BY_SIDE: usize = 4;
/// How long the processes of a lab may take to go: a guest of some hundred megabytes takes a moment,
/// and more on a busy machine.
const LEAVE_LIMIT: Duration = Duration::from_secs(60);
/// Lines of each daemon's log shown with a failed trial.
const LOG_LINES: usize = 40;
/// Where labs keep their files: on a disk, because servers need file handles.
const LABS: &str = "/var/tmp";
/// The root file system of Docker Engine 26.1, which crates/lab/setup makes.
pub const NEWER_ENGINE: &str = "/var/cache/nfsvol-lab/trixie";
const PREFIX: &str = "nfsvol-lab-";

/// What a test binary knows of the program that it tries: [`main!`] fills it in.
#[doc(hidden)]
#[derive(Clone, Copy, Debug)]
pub struct Tried {
    pub program: &'static str,
    pub checkout: &'static str,
}

static TRIED: OnceLock<Tried> = OnceLock::new();

fn tried() -> &'static Tried {
    TRIED.get().expect("main! is what starts a lab")
}

/// The checkout of the program that is tried.
pub fn checkout() -> &'static str {
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

/// The body of a test binary's `main`: runs the trials that the closure answers in a lab of their
/// own, and answers as a test harness does.
///
/// The test binary is also the lab's init and the agent on its nodes: the closure is called only
/// where trials are listed or run.
#[macro_export]
macro_rules! main {
    ($trials:expr) => {
        $crate::main_of(
            $crate::Tried {
                program: env!("CARGO_BIN_EXE_nfsvol"),
                checkout: env!("CARGO_MANIFEST_DIR"),
            },
            $trials,
        )
    };
}

/// What [`main!`] calls.
#[doc(hidden)]
pub fn main_of(tried: Tried, trials: impl FnOnce() -> Vec<Trial>) -> ExitCode {
    TRIED.get_or_init(|| tried);
    // `cargo bench` says so, and the trials of a bench are run as any others.
    let args = std::env::args().skip(1).filter(|arg| arg != "--bench");
    let args: Vec<String> = args.collect();
    let role = args.first().map_or("", String::as_str);
    let outcome = match role {
        "lab-init" => process::init(&args[1..]),
        "lab-agent" => process::agent(&args[1..]),
        "lab-calls" => calls::main(&args[1..]),
        "lab-inside" => inside(&args[1..], trials()),
        "lab-sweep" => sweep().map(|()| ExitCode::SUCCESS),
        _ => {
            let parsed =
                Arguments::from_iter(std::iter::once("lab").chain(args.iter().map(String::as_str)));
            if parsed.list || missing(&[Part::Root]).is_some() {
                return libtest_mimic::run(&parsed, trials()).exit_code();
            }
            outside(&args)
        }
    };
    outcome.unwrap_or_else(|error| {
        eprintln!("the lab failed: {error:#}");
        ExitCode::FAILURE
    })
}

/// Whether the long versions of trials are asked for.
pub fn long() -> bool {
    std::env::var(LONG).is_ok_and(|value| value == "1")
}

fn patience(limit: Duration) -> Duration {
    if long() { limit * LONG_TIMES } else { limit }
}

/// What a trial needs from the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Root,
    Docker,
    Ganesha,
    Guest,
    Knfsd,
    NewerEngine,
    NewerLinux,
    Fuse,
    Podman,
    Compose,
    Services,
    Systemd,
    Browser,
    Prometheus,
    Judges,
    Soak,
    Before,
}

/// A named trial. Skipped with the reason when the machine lacks one of its parts, or failed
/// when `NFSVOL_TEST_REQUIRE_ALL=1`.
pub fn trial<F>(name: impl Into<String>, needs: &'static [Part], body: F) -> Trial
where
    F: FnOnce(&'static Lab) -> Result + Send + 'static,
{
    let name = name.into();
    let shown = name.clone();
    Trial::ignorable_test(name, move || {
        let root: &[Part] = &[Part::Root];
        if let Some(reason) = missing(root).or_else(|| missing(needs)) {
            if std::env::var("NFSVOL_TEST_REQUIRE_ALL").is_ok_and(|value| value == "1") {
                return Err(Failed::from(format!("cannot run here: {reason}")));
            }
            return Ok(Completion::ignored_with(reason));
        }
        let lab = Lab::get()?;
        let before = lab.log_sizes();
        let outcome = within(patience(TRIAL_LIMIT), &shown, move || body(lab));
        match outcome {
            Ok(()) => Ok(Completion::Completed),
            Err(error) => Err(Failed::from(format!(
                "{error:#}\n{}",
                lab.logs_since(&before)
            ))),
        }
    })
}

/// Runs `body` in a thread of its own, so that what hangs is reported instead of waited for.
fn within(limit: Duration, name: &str, body: impl FnOnce() -> Result + Send + 'static) -> Result {
    let (sender, receiver) = mpsc::channel();
    let thread = thread::Builder::new()
        .name(name.to_owned())
        .spawn(move || {
            let outcome = body();
            // The receiver has gone when the limit passed first.
            let _ = sender.send(outcome);
        })?;
    match receiver.recv_timeout(limit) {
        Ok(outcome) => outcome,
        Err(mpsc::RecvTimeoutError::Timeout) => bail!("did not end within {limit:?}"),
        Err(mpsc::RecvTimeoutError::Disconnected) => match thread.join() {
            Err(panic) => Err(anyhow!(
                "panicked: {}",
                panic
                    .downcast_ref::<String>()
                    .map(String::as_str)
                    .or_else(|| panic.downcast_ref::<&str>().copied())
                    .unwrap_or("(no message)")
            )),
            Ok(()) => bail!("ended without an outcome"),
        },
    }
}

/// Why the machine cannot run these parts, if so.
pub fn missing(parts: &[Part]) -> Option<String> {
    let absent = |path: &str, package: &str| {
        (!Path::new(path).exists()).then(|| format!("{path} is absent (apt install {package})"))
    };
    parts.iter().find_map(|part| match part {
        Part::Root => (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned()),
        Part::Docker => absent(docker::DOCKERD, "docker.io")
            .or_else(|| absent(docker::BUSYBOX, "busybox-static")),
        Part::Ganesha => absent(ganesha::GANESHA, "nfs-ganesha nfs-ganesha-vfs")
            .or_else(|| absent(ganesha::RPCBIND, "rpcbind")),
        Part::Guest => absent(node::UML, "user-mode-linux")
            .or_else(|| absent("/dev/net/tun", "a kernel with tun")),
        Part::Knfsd => absent(knfsd::EXPORTFS, "nfs-kernel-server")
            .or_else(|| absent(knfsd::MKFS_XFS, "xfsprogs")),
        Part::Systemd => absent(systemd::SYSTEMD, "systemd"),
        Part::Services => absent("/usr/bin/redis-server", "redis-server")
            .or_else(|| absent("/usr/sbin/mariadbd", "mariadb-server"))
            .or_else(|| absent("/usr/lib/postgresql", "postgresql")),
        Part::Browser => absent("/usr/bin/chromium", "chromium")
            .or_else(|| absent("/usr/bin/chromedriver", "chromium-driver")),
        Part::Prometheus => absent("/usr/bin/prometheus", "prometheus"),
        Part::NewerEngine => (!Path::new(NEWER_ENGINE).exists())
            .then(|| format!("{NEWER_ENGINE} is absent (crates/lab/setup makes it)")),
        Part::NewerLinux => (!Path::new(node::NEWER_LINUX).exists()).then(|| {
            format!(
                "{} is absent (crates/lab/setup makes it)",
                node::NEWER_LINUX
            )
        }),
        Part::Compose => absent("/usr/bin/docker-compose", "docker-compose"),
        Part::Soak => absent("/usr/bin/fio", "fio")
            .or_else(|| absent("/usr/bin/stress-ng", "stress-ng"))
            .or_else(|| absent("/usr/bin/sqlite3", "sqlite3")),
        Part::Judges => ["pjdfstest", "fsx"]
            .map(tool)
            .into_iter()
            .find(|tool| !Path::new(tool).exists())
            .map(|tool| format!("{tool} is absent (`make judges` installs it)")),
        Part::Before => {
            let before = before();
            let is_absent = !Path::new(&before).exists();
            is_absent.then(|| format!("{before} is absent (`make baseline` builds it)"))
        }
        Part::Podman => absent("/usr/bin/podman", "podman crun"),
        Part::Fuse => absent("/dev/fuse", "a kernel with fuse")
            .or_else(|| absent("/usr/bin/fusermount3", "fuse3")),
    })
}

/// A part that several trials share: started by the first one that asks, and its failure told
/// to each of them.
#[derive(Debug)]
pub struct Shared<T>(OnceLock<std::result::Result<T, String>>);

impl<T> Shared<T> {
    #[allow(clippy::new_without_default)]
    pub const fn new() -> Self {
        Self(OnceLock::new())
    }

    /// The shared part, started now if it was not yet.
    pub fn get(&self, start: impl FnOnce() -> Result<T>) -> Result<&T> {
        self.0
            .get_or_init(|| start().map_err(|error| format!("{error:#}")))
            .as_ref()
            .map_err(|error| anyhow!("a shared part did not start: {error}"))
    }
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
    pub fn get() -> Result<&'static Self> {
        LAB.get().context("no lab is up in this process")
    }

    /// Makes trials run on a node of a lab, as this process does, which use what they are told of.
    pub fn visit(dir: &Path) -> Result {
        let lab = Self::in_dir(dir)?;
        LAB.set(lab).map_err(|_| anyhow!("the lab is up already"))
    }

    fn enter(dir: &Path) -> Result<Self> {
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
    pub fn address(&self, name: &str) -> Result<Address> {
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
    pub fn watch_log(&self, name: &str, path: &Path) {
        if let Ok(mut logs) = self.logs.lock() {
            logs.retain(|(_, known)| known != path);
            logs.push((name.to_owned(), path.to_owned()));
        }
    }

    fn log_sizes(&self) -> HashMap<PathBuf, u64> {
        let Ok(logs) = self.logs.lock() else {
            return HashMap::new();
        };
        logs.iter()
            .filter_map(|(_, path)| Some((path.clone(), fs::metadata(path).ok()?.len())))
            .collect()
    }

    fn logs_since(&self, before: &HashMap<PathBuf, u64>) -> String {
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
pub struct Address(u8);

impl Address {
    pub fn v4(self) -> String {
        format!("10.77.0.{}", self.0)
    }

    pub fn v6(self) -> String {
        format!("fd77::{}", self.0)
    }

    /// The hardware address: the same after each boot, so that nobody sends to an old one.
    pub fn hardware(self) -> String {
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

/// The outer process: starts the lab in its namespaces, waits, removes what is left.
fn outside(args: &[String]) -> Result<ExitCode> {
    sweep()?;
    let (dir, _lock) = own_dir().with_context(|| format!("making a directory in {LABS}"))?;
    let exe = std::env::current_exe()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    let outcome = runtime.block_on(async {
        use tokio::signal::unix::{SignalKind, signal};
        let mut interrupt = signal(SignalKind::interrupt())?;
        let mut terminate = signal(SignalKind::terminate())?;
        let mut hangup = signal(SignalKind::hangup())?;
        let mut child = Command::new("setpriv")
            .args(["--pdeathsig", "KILL", "unshare"])
            .args([
                "--mount",
                "--net",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args(["--mount-proc", "--propagation", "private", "--"])
            .arg(&exe)
            .arg("lab-init")
            .arg(&exe)
            .arg("lab-inside")
            .arg(&dir)
            .args(args)
            .stdin(Stdio::null())
            .spawn()
            .context("starting the lab's namespaces (setpriv, unshare)")?;
        let start = std::time::Instant::now();
        let mut tick = tokio::time::interval(Duration::from_millis(20));
        let ended = loop {
            if let Some(status) = child.try_wait()? {
                break Ok(status);
            }
            tokio::select! {
                _ = interrupt.recv() => break Err("interrupted"),
                _ = terminate.recv() => break Err("terminated"),
                _ = hangup.recv() => break Err("hung up"),
                _ = tick.tick() => {}
            }
            if start.elapsed() > patience(LAB_LIMIT) {
                break Err("stopped: the lab's time is up");
            }
        };
        if ended.is_err() {
            // Its child dies by parent-death signal, and with it the PID namespace.
            child.kill()?;
            child.wait()?;
        }
        anyhow::Ok(ended)
    });
    let removed = remove(&dir);
    let code = match outcome? {
        Ok(status) => status
            .code()
            .or_else(|| status.signal().map(|signal| 128 + signal))
            .and_then(|code| u8::try_from(code).ok())
            .map_or(ExitCode::FAILURE, ExitCode::from),
        Err(reason) => {
            eprintln!("the lab was {reason}");
            ExitCode::FAILURE
        }
    };
    removed?;
    Ok(code)
}

/// A directory for a lab, and its lock. It has its name only when it is locked, so that a sweep of
/// another lab, which may start at the same time, never takes it for one that was left.
fn own_dir() -> Result<(PathBuf, File)> {
    let new = tempfile::Builder::new()
        .prefix(&format!(".{PREFIX}"))
        .tempdir_in(LABS)?;
    let lock = File::create(new.path().join("lock"))?;
    lock.lock()?;
    let name = new.path().file_name().context("no name")?;
    let name = name.to_string_lossy().trim_start_matches('.').to_owned();
    let dir = Path::new(LABS).join(name);
    fs::rename(new.path(), &dir)?;
    let _ = new.keep();
    Ok((dir, lock))
}

/// Removes what earlier labs left whose owners are dead: a live one holds the lock.
fn sweep() -> Result {
    for entry in fs::read_dir(LABS)? {
        let dir = entry?.path();
        let name = dir
            .file_name()
            .map(|name| name.to_string_lossy().into_owned());
        if !name.is_some_and(|name| name.starts_with(PREFIX)) {
            continue;
        }
        if File::open(dir.join("lock")).is_ok_and(|lock| lock.try_lock().is_ok()) {
            remove(&dir)?;
        }
    }
    Ok(())
}

/// Removes a dead lab's cgroups and files.
fn remove(dir: &Path) -> Result {
    let name = dir.file_name().context("the lab's directory has no name")?;
    let root = Path::new("/sys/fs/cgroup");
    // Version 1 has one tree for each controller, version 2 one for all.
    let trees = fs::read_dir(root)
        .into_iter()
        .flatten()
        .flatten()
        .map(|entry| entry.path());
    for tree in trees.chain([root.to_owned()]) {
        remove_cgroup(&tree.join(name))?;
    }
    let lives = |pid: &Path| fs::read_link(pid.join("cwd")).is_ok_and(|at| at.starts_with(dir));
    wait_for("the lab's processes to be gone", LEAVE_LIMIT, || {
        fs::read_dir("/proc").is_ok_and(|all| !all.flatten().any(|pid| lives(&pid.path())))
    })?;
    fs::remove_dir_all(dir).with_context(|| format!("removing {}", dir.display()))
}

/// Removes a cgroup with those below it; the last process may take a moment to leave it.
fn remove_cgroup(dir: &Path) -> Result {
    let Ok(entries) = fs::read_dir(dir) else {
        return Ok(());
    };
    for entry in entries.flatten() {
        if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
            remove_cgroup(&entry.path())?;
        }
    }
    wait_for(
        &format!("cgroup {} to become empty", dir.display()),
        LEAVE_LIMIT,
        || fs::remove_dir(dir).is_ok() || !dir.exists(),
    )
}

/// The test process in the lab: runs the trials, then hands back its exit code.
fn inside(args: &[String], trials: Vec<Trial>) -> Result<ExitCode> {
    let (dir, rest) = args
        .split_first()
        .context("lab-inside needs the lab's directory")?;
    let dir = PathBuf::from(dir);
    std::env::set_current_dir(&dir)?;
    let lab = Lab::enter(&dir)?;
    LAB.set(lab).map_err(|_| anyhow!("the lab is up already"))?;
    let mut parsed =
        Arguments::from_iter(std::iter::once("lab".to_owned()).chain(rest.iter().cloned()));
    parsed.test_threads.get_or_insert(SIDE_BY_SIDE);
    let conclusion = libtest_mimic::run(&parsed, trials);
    for note in Lab::get()?
        .notes
        .lock()
        .iter()
        .flat_map(|notes| notes.iter())
    {
        println!("note: {note}");
    }
    Ok(conclusion.exit_code())
}
