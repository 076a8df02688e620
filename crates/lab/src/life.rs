//! The life of a lab, from its namespaces to the sweep, and what else the test binary can be: the
//! lab's init, and the agent on its nodes.

use std::fs::{self, File};
use std::os::unix::process::ExitStatusExt;
use std::path::{Path, PathBuf};
use std::process::{Command, ExitCode, Stdio};
use std::time::Duration;

use anyhow::{Context, anyhow};
use libtest_mimic::{Arguments, Trial};

use super::part::missing;
use super::trial::patience;
use super::{LAB, Lab, PATIENCE, Part, Result, TRIED, Tried, calls, process, wait_for};

/// The whole lab ends after this long, whatever hangs.
const LAB_LIMIT: Duration = Duration::from_secs(40 * 60);
/// Trials that run at a time unless `--test-threads` says otherwise: most of what they do is wait.
const SIDE_BY_SIDE: usize = 4;
/// Where labs keep their files: on a disk, because servers need file handles.
const LABS: &str = "/var/tmp";
const PREFIX: &str = "nfsvol-lab-";

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
    wait_for("the lab's processes to be gone", PATIENCE, || {
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
        PATIENCE,
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
