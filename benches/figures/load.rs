//! What is measured, as processes on a node: `figures load NAME ARGS…` prints numbers as JSON.

use std::ffi::OsString;
use std::fs::{self, File};
use std::io::{Read, Write};
use std::net::TcpStream;
use std::os::unix::fs::FileExt;
use std::os::unix::net::UnixStream;
use std::path::Path;
use std::process::{Command, ExitCode, Stdio};
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, bail, ensure};
use lab::process::Task;
use lab::{Node, Result};
use nfs::address::Share;
use nfs::admin::{Admin, AdminSettings};
use rustix::fs::{Advice, fadvise};

pub(crate) const ROLE: &str = "load";
pub(crate) const MIB: u64 = 1 << 20;
const BLOCK: usize = 4096;
/// A load that takes longer has gone wrong.
const LIMIT: Duration = Duration::from_secs(280);

/// Runs a load on a node and answers its numbers.
pub(crate) fn on(node: &Node, args: &[&str]) -> Result<Vec<f64>> {
    let exe = std::env::current_exe()?;
    let exe = exe.to_str().context("the path is not UTF-8")?;
    let argv: Vec<&str> = [exe, ROLE]
        .into_iter()
        .chain(args.iter().copied())
        .collect();
    let task = Task {
        limit: Some(LIMIT),
        ..Task::new(&argv)
    };
    Ok(serde_json::from_str(&node.run_task(&task)?.ok()?)?)
}

/// The first number of a load.
pub(crate) fn one(node: &Node, args: &[&str]) -> Result<f64> {
    on(node, args)?.first().copied().context("no number")
}

/// How long a command takes on a node, in seconds.
pub(crate) fn command(node: &Node, argv: &[&str]) -> Result<f64> {
    let task = Task {
        limit: Some(LIMIT),
        ..Task::new(argv)
    };
    let output = node.run_task(&task)?;
    let took = output.took;
    output.ok()?;
    Ok(took.as_secs_f64())
}

pub(crate) fn main(args: &[String]) -> ExitCode {
    match run(args) {
        Ok(numbers) => {
            println!("{}", serde_json::json!(numbers));
            ExitCode::SUCCESS
        }
        Err(error) => {
            eprintln!("{args:?}: {error:#}");
            ExitCode::FAILURE
        }
    }
}

fn run(args: &[String]) -> Result<Vec<f64>> {
    let args: Vec<&str> = args.iter().map(String::as_str).collect();
    match args.as_slice() {
        ["write", path, megabytes] => write(Path::new(path), megabytes.parse()?),
        ["read", path] => read(open_cold(Path::new(path))?),
        ["read-warm", path] => read(File::open(path)?),
        ["random", path, readers, count] => {
            random(Path::new(path), readers.parse()?, count.parse()?)
        }
        ["sync", dir, writers, count] => sync(Path::new(dir), writers.parse()?, count.parse()?),
        ["create", dir, count] => create(Path::new(dir), count.parse()?),
        ["copy-synced", from, to] => {
            let start = Instant::now();
            copy_synced(Path::new(from), Path::new(to))?;
            Ok(vec![start.elapsed().as_secs_f64()])
        }
        ["cpu", pid, seconds] => cpu(pid.parse()?, seconds.parse()?),
        ["spent", pid] => Ok(vec![processor_time(pid.parse()?)?.as_secs_f64()]),
        ["memory", pid] => memory(pid.parse()?),
        ["start", socket, body, argv @ ..] => start(socket, body, argv),
        ["page", addr, path, tabs, rounds, pause] => page(
            &(*addr, *path),
            tabs.parse()?,
            rounds.parse()?,
            Duration::from_secs(pause.parse()?),
        ),
        ["renewals", dir, seconds] => {
            renewals(Path::new(dir), Duration::from_secs(seconds.parse()?))
        }
        ["rpc", share, count] => rpc(share, count.parse()?),
        ["docker", socket, script] => crate::docker::run(socket, script),
        _ => bail!("no such load"),
    }
}

/// Seconds to write a new file by calls of 1 MiB, with fsync.
fn write(path: &Path, megabytes: u64) -> Result<Vec<f64>> {
    let data: Vec<u8> = (0..MIB).map(|n| (n * 31 % 251) as u8).collect();
    let start = Instant::now();
    let mut file = File::create(path)?;
    for _ in 0..megabytes {
        file.write_all(&data)?;
    }
    file.sync_all()?;
    drop(file);
    Ok(vec![start.elapsed().as_secs_f64()])
}

/// A file whose pages this host's kernel does not hold. (The server's may: what is measured is
/// the way, not the disk.)
fn open_cold(path: &Path) -> Result<File> {
    let file = File::open(path)?;
    fadvise(&file, 0, None, Advice::DontNeed)?;
    Ok(file)
}

/// Seconds to read a file by calls of 1 MiB.
fn read(mut file: File) -> Result<Vec<f64>> {
    let length = file.metadata()?.len();
    let mut data = vec![0; usize::try_from(MIB)?];
    let start = Instant::now();
    let mut got = 0;
    loop {
        match file.read(&mut data)? {
            0 => break,
            count => got += count as u64,
        }
    }
    ensure!(got == length && got > 0, "read {got} bytes of {length}");
    Ok(vec![start.elapsed().as_secs_f64()])
}

/// 4 KiB reads a second, each of another block, by `readers` threads.
fn random(path: &Path, readers: u64, count: u64) -> Result<Vec<f64>> {
    let file = open_cold(path)?;
    let blocks = file.metadata()?.len() / BLOCK as u64;
    ensure!(
        blocks.is_power_of_two() && count <= blocks,
        "{blocks} blocks"
    );
    let start = Instant::now();
    in_threads(readers, |reader| {
        let mut data = [0; BLOCK];
        for n in (reader..count).step_by(usize::try_from(readers)?) {
            // An odd factor visits each of a power of two once.
            let block = n.wrapping_mul(0x9e37_79b1) % blocks;
            file.read_exact_at(&mut data, block * BLOCK as u64)?;
        }
        Ok(())
    })?;
    Ok(vec![count as f64 / start.elapsed().as_secs_f64()])
}

/// 4 KiB writes with fsync a second, by `writers` threads with a file each.
fn sync(dir: &Path, writers: u64, count: u64) -> Result<Vec<f64>> {
    let start = Instant::now();
    in_threads(writers, |writer| {
        let file = File::create(dir.join(format!("log.{writer}")))?;
        for n in 0..count {
            file.write_all_at(&[7; BLOCK], n * BLOCK as u64)?;
            file.sync_all()?;
        }
        Ok(())
    })?;
    Ok(vec![
        (writers * count) as f64 / start.elapsed().as_secs_f64(),
    ])
}

fn in_threads(count: u64, work: impl Fn(u64) -> Result + Sync) -> Result {
    thread::scope(|scope| {
        let threads: Vec<_> = (0..count)
            .map(|n| {
                let work = &work;
                scope.spawn(move || work(n))
            })
            .collect();
        for thread in threads {
            thread.join().ok().context("a thread panicked")??;
        }
        Ok(())
    })
}

/// Seconds to create empty files in a new directory.
fn create(dir: &Path, count: u64) -> Result<Vec<f64>> {
    fs::create_dir(dir)?;
    let start = Instant::now();
    for n in 0..count {
        File::create_new(dir.join(format!("file.{n}")))?;
    }
    Ok(vec![start.elapsed().as_secs_f64()])
}

/// Copies a tree, with fsync of each file.
fn copy_synced(from: &Path, to: &Path) -> Result {
    fs::create_dir(to)?;
    for entry in fs::read_dir(from)? {
        let entry = entry?;
        let to = to.join(entry.file_name());
        if entry.file_type()?.is_dir() {
            copy_synced(&entry.path(), &to)?;
        } else {
            let mut file = File::create_new(to)?;
            file.write_all(&fs::read(entry.path())?)?;
            file.sync_all()?;
        }
    }
    Ok(())
}

/// Milliseconds of each of `count` FSSTATs, one at a time, on one connection.
fn rpc(share: &str, count: usize) -> Result<Vec<f64>> {
    let share: Share = share.parse()?;
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()?;
    runtime.block_on(async {
        let admin = Admin::v3(share, AdminSettings::default());
        admin.space().await?;
        let mut times = Vec::with_capacity(count);
        for _ in 0..count {
            let start = Instant::now();
            admin.space().await?;
            times.push(start.elapsed().as_secs_f64() * 1e3);
        }
        Ok(times)
    })
}

/// Percent of one processor that a process uses while it is left alone.
fn cpu(pid: u32, seconds: u64) -> Result<Vec<f64>> {
    let before = processor_time(pid)?;
    thread::sleep(Duration::from_secs(seconds));
    let used = processor_time(pid)?.saturating_sub(before);
    Ok(vec![used.as_secs_f64() / seconds as f64 * 100.0])
}

/// What the threads of a process have used of the processors.
fn processor_time(pid: u32) -> Result<Duration> {
    let mut nanos = 0;
    for thread in fs::read_dir(format!("/proc/{pid}/task"))? {
        let text = fs::read_to_string(thread?.path().join("schedstat"))?;
        let ran = text.split(' ').next().context("an empty schedstat")?;
        nanos += ran.parse::<u64>()?;
    }
    Ok(Duration::from_nanos(nanos))
}

/// MiB that a process holds now, and has held at most.
fn memory(pid: u32) -> Result<Vec<f64>> {
    let text = fs::read_to_string(format!("/proc/{pid}/status"))?;
    ["VmRSS:", "VmHWM:"]
        .iter()
        .map(|name| {
            let line = text.lines().find(|line| line.starts_with(name));
            let kib = line.and_then(|line| line.split_whitespace().nth(1));
            Ok(kib.context("no such line")?.parse::<f64>()? / 1024.0)
        })
        .collect()
}

/// Starts nfsvol and answers: seconds until its first answer, median seconds of that call after
/// it has settled, MiB it holds, percent of a processor it uses at rest. Ends it.
fn start(socket: &str, body: &str, argv: &[&str]) -> Result<Vec<f64>> {
    const ROUNDS: usize = 15;
    let (program, args) = argv.split_first().context("no program")?;
    let begun = Instant::now();
    let mut child = Command::new(program)
        .args(args)
        .stdin(Stdio::null())
        .stdout(Stdio::null())
        .stderr(File::create("/run/bench-start.log")?)
        .spawn()?;
    let measured = (|| {
        let (path, body) = body.split_once(' ').context("PATH BODY")?;
        while UnixStream::connect(socket).is_err() {
            ensure!(begun.elapsed() < LIMIT, "no socket");
            ensure!(child.try_wait()?.is_none(), "it ended");
            thread::sleep(Duration::from_millis(1));
        }
        let first = crate::docker::ask(socket, "POST", path, body)?;
        let ready = begun.elapsed().as_secs_f64();
        ensure!(first.len() > 2, "an empty answer");
        // What a start leaves to do is done by then.
        thread::sleep(Duration::from_secs(5));
        let mut times = Vec::new();
        for _ in 0..ROUNDS {
            let start = Instant::now();
            crate::docker::ask(socket, "POST", path, body)?;
            times.push(start.elapsed().as_secs_f64());
        }
        thread::sleep(Duration::from_secs(2));
        let used = cpu(child.id(), 30)?[0];
        let held = memory(child.id())?;
        let answer = crate::report::median(&times);
        Ok(vec![ready, answer, held[0], held[1], used])
    })();
    child.kill()?;
    child.wait()?;
    measured
}

/// Seconds that a page took, in each of `tabs` at a time.
fn page(at: &(&str, &str), tabs: usize, rounds: usize, pause: Duration) -> Result<Vec<f64>> {
    let tab = || -> Result<Vec<f64>> {
        let mut took = Vec::new();
        for _ in 0..rounds {
            let start = Instant::now();
            get(at)?;
            took.push(start.elapsed().as_secs_f64());
            thread::sleep(pause);
        }
        Ok(took)
    };
    thread::scope(|scope| {
        let tabs: Vec<_> = (0..tabs).map(|_| scope.spawn(tab)).collect();
        let mut all = Vec::new();
        for tab in tabs {
            all.extend(tab.join().ok().context("a thread panicked")??);
        }
        Ok(all)
    })
}

fn get(&(addr, path): &(&str, &str)) -> Result {
    let mut server = TcpStream::connect(addr)?;
    let head = format!("GET {path} HTTP/1.1\r\nHost: {addr}\r\nConnection: close\r\n\r\n");
    server.write_all(head.as_bytes())?;
    let mut answer = Vec::new();
    server.read_to_end(&mut answer)?;
    ensure!(
        answer.starts_with(b"HTTP/1.1 200"),
        "{}",
        String::from_utf8_lossy(&answer[..answer.len().min(200)])
    );
    Ok(())
}

/// The 99th percentile of the time between two renewals of a host, whose token in `dir` each renames.
fn renewals(dir: &Path, watched: Duration) -> Result<Vec<f64>> {
    let token = || -> Result<Option<OsString>> {
        let names = fs::read_dir(dir)?.map(|entry| Ok(entry?.file_name()));
        let names = names.collect::<std::io::Result<Vec<_>>>()?;
        let mut tokens = names.into_iter();
        Ok(tokens.find(|name| name.as_encoded_bytes().starts_with(b"alive")))
    };
    let (start, mut last, mut times) = (Instant::now(), token()?, Vec::new());
    while start.elapsed() < watched {
        let now = token()?;
        if now.is_some() && now != last {
            times.push(start.elapsed());
            last = now;
        }
        thread::sleep(Duration::from_millis(2));
    }
    let pairs = times
        .windows(2)
        .map(|pair| (pair[1] - pair[0]).as_secs_f64());
    let mut between: Vec<f64> = pairs.collect();
    between.sort_by(f64::total_cmp);
    let p99 = between.get(between.len() * 99 / 100);
    Ok(vec![*p99.context("no renewals")?])
}
