//! Servers that restart, reset and fall silent; daemons and programs that are killed.

use std::fs::{self, File, OpenOptions};
use std::io::{Read, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::Path;
use std::process::{Child, Command, Stdio};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Export, Ganesha, Lab, PATIENCE, Result, Shared, wait_for};
use libtest_mimic::Trial;
use nfsvol::doors::volume::Right;

use crate::{EXPORT, Host, fuse_trial};

/// A server of its own, because these trials stop it.
static NAS: Shared<Ganesha> = Shared::new();
/// A mount whose requests wait until somebody ends them: a trial that asks who does that would take an
/// `io_timeout` for an answer.
const FOR_EVER: &str = "io_timeout=0";
/// One fault at a time.
static TURN: std::sync::Mutex<()> = std::sync::Mutex::new(());

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("synced_data_survives_kills_of_the_server", server_kills),
        fuse_trial("silence_of_30_s_only_delays", silence),
        fuse_trial("a_request_fails_after_io_timeout", io_timeout),
        fuse_trial("sigkill_ends_processes_on_a_dead_server", sigkill),
        fuse_trial("a_killed_writer_that_waits_for_memory_ends", killed_in_line),
        fuse_trial("abort_frees_everyone", abort),
        fuse_trial("a_killed_daemon_is_not_noticed", killed_daemon),
        fuse_trial("a_dead_worker_is_replaced", dead_worker),
        fuse_trial("a_full_disk_is_told", full_disk),
        fuse_trial("a_right_prolonged_during_the_start_counts", late_right),
    ]
}

/// The server, and the right to break it.
fn turn(lab: &'static Lab) -> Result<(std::sync::MutexGuard<'static, ()>, &'static Ganesha)> {
    let turn = TURN.lock().unwrap_or_else(|e| e.into_inner());
    let nas = NAS.get(|| Ganesha::start(lab, "faultnas", &[Export::new(EXPORT)]))?;
    Ok((turn, nas))
}

/// Writes records and syncs some, and counts them; returns how many were acknowledged.
fn write_records(path: &Path, stop: &AtomicBool, written: &AtomicU64) -> Result<u64> {
    let file = File::create(path)?;
    let mut count = 0u64;
    while !stop.load(Ordering::Relaxed) {
        let record = vec![fill(count); 20_000];
        file.write_all_at(&record, count * 20_000)?;
        if count.is_multiple_of(3) {
            file.sync_data()?;
        }
        count += 1;
        written.store(count, Ordering::Relaxed);
    }
    file.sync_all()?;
    Ok(count)
}

/// The byte that a record is full of.
fn fill(record: u64) -> u8 {
    u8::try_from(record % 251).unwrap_or(0)
}

fn check_records(path: &Path, count: u64) -> Result {
    let bytes = fs::read(path)?;
    ensure!(
        bytes.len() as u64 == count * 20_000,
        "{} bytes for {count}",
        bytes.len()
    );
    for (index, record) in (0..).zip(bytes.chunks(20_000)) {
        let fill = fill(index);
        ensure!(
            record.iter().all(|b| *b == fill),
            "record {index} is damaged"
        );
    }
    Ok(())
}

/// Runs writers of several files while `fault` does its worst, then compares what the server's
/// disk has. `fault` is given a way to wait until each has written and synced some more.
fn writers_during(
    nas: &Ganesha,
    name: &str,
    options: &str,
    fault: impl FnOnce(&dyn Fn() -> Result) -> Result,
) -> Result {
    /// Every third is synced.
    const SOME: u64 = 7;
    let host = Host::mount(nas, name, options)?;
    let stop = AtomicBool::new(false);
    let written: [AtomicU64; 3] = Default::default();
    let go_on = || {
        let counts = || {
            written
                .each_ref()
                .map(|count| count.load(Ordering::Relaxed))
        };
        let before = counts();
        wait_for("all writers to go on", PATIENCE, || {
            let mut both = counts().into_iter().zip(before);
            both.all(|(now, before)| now >= before + SOME)
        })
    };
    let counts = std::thread::scope(|scope| -> Result<Vec<u64>> {
        let writers: Vec<_> = written
            .iter()
            .enumerate()
            .map(|(i, written)| {
                let (path, stop) = (host.join(format!("file{i}")), &stop);
                scope.spawn(move || write_records(&path, stop, written))
            })
            .collect();
        let outcome = fault(&go_on);
        stop.store(true, Ordering::Relaxed);
        let counts: Vec<_> = writers
            .into_iter()
            .map(|w| {
                w.join()
                    .unwrap_or_else(|_| Err(anyhow::anyhow!("a writer panicked")))
            })
            .collect();
        outcome?;
        counts.into_iter().collect()
    })?;
    let local = nas.local(EXPORT).join(name);
    for (i, count) in counts.iter().enumerate() {
        check_records(&host.join(format!("file{i}")), *count).context("through the mount")?;
        check_records(&local.join(format!("file{i}")), *count).context("on the server")?;
    }
    Ok(())
}

fn server_kills(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    writers_during(nas, "kills", "", |go_on| {
        for _ in 0..3 {
            go_on()?;
            nas.restart(None)?;
        }
        go_on()
    })
}

fn silence(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    writers_during(nas, "silence", "", |go_on| {
        go_on()?;
        let frozen = Frozen::new(nas)?;
        std::thread::sleep(Duration::from_secs(30));
        drop(frozen);
        go_on()
    })
}

/// Thaws the server whatever happens.
struct Frozen<'a>(&'a Ganesha);

impl<'a> Frozen<'a> {
    fn new(nas: &'a Ganesha) -> Result<Self> {
        nas.freeze()?;
        Ok(Self(nas))
    }
}

impl Drop for Frozen<'_> {
    fn drop(&mut self) {
        let _ = self.0.thaw();
    }
}

fn io_timeout(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "timeout", "io_timeout=3")?;
    fs::write(host.join("file"), vec![1; 1 << 20])?;
    let mut writer = OpenOptions::new().write(true).open(host.join("file"))?;
    let frozen = Frozen::new(nas)?;
    let began = Instant::now();
    let read = File::open(host.join("other"));
    ensure!(read.is_err(), "a dead server answered");
    let took = began.elapsed();
    ensure!(took > Duration::from_secs(2), "{took:?}");
    writer.write_all(b"lost")?;
    let error = writer
        .sync_all()
        .err()
        .context("a lost write was not told")?;
    ensure!(error.raw_os_error() == Some(libc::ETIMEDOUT), "{error}");
    drop(frozen);
    // Told once, and then the file works again.
    writer.write_all(b"kept")?;
    writer.sync_all()?;
    Ok(())
}

/// Programs that wait for the server in different ways; answers once all of them do.
fn waiting(host: &Host) -> Result<Vec<(&'static str, Child)>> {
    let asked = host.status()?.under_way;
    let sh = |name, script: String| -> Result<(&'static str, Child)> {
        let mut command = Command::new("sh");
        command
            .args(["-c", &script])
            .current_dir("/")
            .stderr(Stdio::null())
            .stdout(Stdio::null());
        Ok((name, command.spawn()?))
    };
    let dir = host.display();
    let programs = vec![
        sh("buffered read", format!("exec cat {dir}/big"))?,
        sh(
            "direct read",
            format!("exec dd if={dir}/big of=/dev/null bs=1M iflag=direct"),
        )?,
        sh(
            "direct write",
            format!("exec dd if=/dev/zero of={dir}/direct bs=1M count=4 oflag=direct conv=notrunc"),
        )?,
        sh("write and close", format!("echo text >{dir}/closed"))?,
        sh(
            "fsync",
            format!("exec dd if=/dev/zero of={dir}/synced bs=4k count=1 conv=fsync,notrunc"),
        )?,
        sh("stat", format!("exec stat {dir}/nowhere"))?,
        sh("list", format!("exec ls -l {dir}/sub"))?,
    ];
    // Each has one call under way; the first may have several, as the kernel reads ahead.
    let all = asked + programs.len() as u64;
    wait_for("every program to wait", PATIENCE, || {
        host.status().is_ok_and(|status| status.under_way >= all)
    })?;
    Ok(programs)
}

fn ends(program: &mut Child) -> Result {
    wait_for("the program to end", PATIENCE, || {
        matches!(program.try_wait(), Ok(Some(_)))
    })
}

fn prepare(host: &Host) -> Result {
    fs::create_dir_all(host.join("sub"))?;
    for name in ["direct", "closed", "synced", "sub/file"] {
        fs::write(host.join(name), "x")?;
    }
    fs::write(host.join("big"), vec![1; 8 << 20])?;
    // So that reading it has to ask the server.
    let file = OpenOptions::new().read(true).open(host.join("big"))?;
    rustix::fs::fadvise(&file, 0, None, rustix::fs::Advice::DontNeed)?;
    Ok(())
}

fn sigkill(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "sigkill", FOR_EVER)?;
    prepare(&host)?;
    let frozen = Frozen::new(nas)?;
    let mut programs = waiting(&host)?;
    for (name, program) in &mut programs {
        ensure!(
            program.try_wait()?.is_none(),
            "{name} did not wait for the dead server"
        );
    }
    for (_, program) in &mut programs {
        program.kill()?;
    }
    // While the server is still silent.
    for (name, program) in &mut programs {
        ends(program).with_context(|| format!("{name}, after SIGKILL"))?;
    }
    drop(frozen);
    ensure!(fs::read_to_string(host.join("sub/file"))? == "x");
    Ok(())
}

/// Three writers of more than fits: one has the turn and waits for room, one waits for the turn of
/// its file, one for that of all files.
fn killed_in_line(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "killed-in-line", FOR_EVER)?;
    let mut writers = Vec::new();
    for name in ["one", "one", "other"] {
        // They open before the server falls silent, and write when they are told to.
        let file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(false)
            .open(host.join(name))?;
        let mut command = Command::new("sh");
        command
            .args(["-c", "read go; exec dd if=/dev/zero bs=1M count=100"])
            .stdin(Stdio::piped())
            .stdout(file)
            .stderr(Stdio::null());
        writers.push(command.spawn()?);
    }
    let frozen = Frozen::new(nas)?;
    for writer in &mut writers {
        let mut go = writer.stdin.take().context("no stdin")?;
        go.write_all(b"go\n")?;
    }
    wait_for("all memory to be taken", PATIENCE, || {
        host.status().is_ok_and(|status| status.unsaved >= 40 << 20)
    })?;
    std::thread::sleep(Duration::from_millis(500));
    for writer in &mut writers {
        ensure!(writer.try_wait()?.is_none(), "a writer did not wait");
    }
    for writer in &mut writers {
        writer.kill()?;
    }
    for writer in &mut writers {
        ends(writer).context("after SIGKILL")?;
    }
    drop(frozen);
    // Nobody is in line any more, and the room comes back.
    fs::write(host.join("other"), vec![1; 60 << 20])?;
    wait_for("no bytes to be held", PATIENCE, || {
        host.status().is_ok_and(|status| status.unsaved == 0)
    })
}

fn abort(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "abort", FOR_EVER)?;
    prepare(&host)?;
    let _frozen = Frozen::new(nas)?;
    let mut programs = waiting(&host)?;
    host.runtime.block_on(host.path.abort(&host.volume))?;
    for (name, program) in &mut programs {
        ends(program).with_context(|| (*name).to_owned())?;
    }
    ensure!(File::open(host.join("big")).is_err());
    Ok(())
}

/// The daemon's part here is a process that attaches, writes its pid, and is killed.
fn killed_daemon(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "daemon", "")?;
    let worker = host.status()?.pid;
    let stat = fs::read_to_string(format!("/proc/{worker}/stat"))?;
    let session = stat
        .rsplit_once(')')
        .and_then(|(_, rest)| rest.split_whitespace().nth(3));
    ensure!(
        session == Some(&worker.to_string()),
        "the worker is in another's session: {stat}"
    );
    // What `attach` needs of a daemon is gone with this runtime; another adopts.
    let mut file = File::create(host.join("file"))?;
    file.write_all(b"before")?;
    let again = nfsvol::doors::fuse::FusePath::new(
        host.parent()
            .and_then(Path::parent)
            .context("no mount root")?,
        host._state.path(),
        &std::env::current_exe()?,
    );
    let runtime = tokio::runtime::Runtime::new()?;
    let (alive, dead) = runtime.block_on(again.adopt());
    ensure!(alive.len() == 1 && dead.is_empty(), "{alive:?} {dead:?}");
    ensure!(alive[0].pid == worker);
    file.write_all(b" and after")?;
    file.sync_all()?;
    ensure!(fs::read_to_string(host.join("file"))? == "before and after");
    ensure!(alive[0].rss < 64 << 20, "{} bytes resident", alive[0].rss);
    Ok(())
}

fn dead_worker(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "deadworker", "")?;
    fs::write(host.join("file"), "text")?;
    fs::write(host.join("deleted"), "text")?;
    let _deleted = File::open(host.join("deleted"))?;
    fs::remove_file(host.join("deleted"))?;
    let local = nas.local(EXPORT).join("deadworker");
    let names = || -> Result<usize> { Ok(fs::read_dir(&local)?.count()) };
    ensure!(names()? == 2, "no hidden file");
    let worker = lab::process::pid(host.status()?.pid)?;
    rustix::process::kill_process(worker, rustix::process::Signal::KILL)?;
    wait_for("the mount to be dead", PATIENCE, || {
        fs::read(host.join("file")).is_err()
    })?;
    let (alive, dead) = host.runtime.block_on(host.path.adopt());
    ensure!(
        alive.is_empty() && dead == [host.volume.clone()],
        "{alive:?} {dead:?}"
    );
    let deadline = Instant::now() + crate::ATTACH;
    host.runtime
        .block_on(host.path.attach(host.attach.clone(), deadline))?;
    ensure!(fs::read_to_string(host.join("file"))? == "text");
    wait_for("the hidden file to go", PATIENCE, || {
        names().is_ok_and(|names| names == 1)
    })
}

fn full_disk(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    // A small disk below the export, on the server.
    nas.node().sh(&format!(
        "mkdir -p {EXPORT}/full; truncate -s 24M /srv/small; mkfs.ext4 -qF /srv/small
         mount -o loop /srv/small {EXPORT}/full; chmod 0777 {EXPORT}/full"
    ))?;
    nas.restart(None)?;
    let outcome = (|| {
        let host = Host::mount(nas, "full", "")?;
        let mut file = OpenOptions::new()
            .write(true)
            .create(true)
            .truncate(true)
            .mode(0o644)
            .open(host.join("file"))?;
        let mut told = None;
        for _ in 0..64 {
            if let Err(error) = file.write_all(&[5; 1 << 20]) {
                told = Some(error);
                break;
            }
        }
        let error = match told {
            Some(error) => error,
            None => file.sync_all().err().context("ENOSPC was swallowed")?,
        };
        ensure!(error.raw_os_error() == Some(libc::ENOSPC), "{error}");
        drop(file);
        fs::remove_file(host.join("file"))?;
        // And afterwards all is well.
        fs::write(host.join("small"), "fits")?;
        let mut text = String::new();
        File::open(host.join("small"))?.read_to_string(&mut text)?;
        ensure!(text == "fits");
        Ok(())
    })();
    nas.node().sh(&format!("umount -l {EXPORT}/full"))?;
    outcome
}

/// The start takes longer than the right with which it began.
fn late_right(lab: &'static Lab) -> Result {
    let (_turn, nas) = turn(lab)?;
    let host = Host::mount(nas, "late-right", "")?;
    host.detach()?;
    let mut attach = host.attach.clone();
    attach.fence = Some(Right {
        until: 0,
        under_way: 1000,
    });
    let an_hour = u64::try_from(Duration::from_secs(3600).as_nanos())?;
    let uptime = fs::read_to_string("/proc/uptime")?;
    let uptime: u64 = uptime.split('.').next().context("no uptime")?.parse()?;
    let until = uptime * 1_000_000_000 + an_hour;
    let attached = host.path.attach(attach, Instant::now() + crate::ATTACH);
    let prolonged = async {
        loop {
            host.path.prolong(&host.volume, until).await;
            tokio::time::sleep(Duration::from_millis(20)).await;
        }
    };
    host.runtime.block_on(async {
        tokio::select! {
            attached = attached => attached,
            () = prolonged => unreachable!("it has no end"),
        }
    })?;
    fs::write(host.join("file"), "written")?;
    Ok(())
}
