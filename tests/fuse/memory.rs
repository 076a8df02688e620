//! A worker's memory has a bound, whatever programs do.

use std::fs::{self, File};
use std::io::Write;
use std::process::Command;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::process::Task;
use lab::proxy::Proxy;
use lab::{PATIENCE, Result, wait_for};
use libtest_mimic::Trial;

use crate::{EXPORT, Host, fuse_trial, nas};

/// What a worker may hold at most: its caches (docs/DESIGN.md) and what it is made of, in bytes.
pub(crate) const MEMORY: u64 = 96 << 20;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("known_files_are_bounded", |lab| {
            known_files_are_bounded(&Host::mount(nas(lab)?, "many", "")?, nas(lab)?)
        }),
        fuse_trial("waiting_writers_are_bounded", |lab| {
            let nas = nas(lab)?;
            let proxy = Proxy::start(lab, "writers-proxy", &nas.ip(), &[2049, 20048])?;
            let host = Host::mount_at(proxy.ip(), nas, "writers", "")?;
            waiting_writers_are_bounded(&host, &proxy)
        }),
        fuse_trial("the_oom_killer_spares_workers", |lab| {
            let host = Host::mount(nas(lab)?, "spared", "")?;
            let worker = host.status()?.pid;
            let score = fs::read_to_string(format!("/proc/{worker}/oom_score_adj"))?;
            if may_lower_scores()? {
                ensure!(score.trim() == "-900", "{score}");
            } else {
                let log = fs::read_to_string(host.path.log(&host.volume))?;
                ensure!(
                    log.contains("the OOM killer may take this process"),
                    "{log}"
                );
            }
            Ok(())
        }),
    ]
}

/// Whether this process has CAP_SYS_RESOURCE (capability 24).
fn may_lower_scores() -> Result<bool> {
    let status = fs::read_to_string("/proc/self/status")?;
    let line = status.lines().find_map(|line| line.strip_prefix("CapEff:"));
    let effective = u64::from_str_radix(line.context("no CapEff")?.trim(), 16)?;
    Ok(effective & 1 << 24 != 0)
}

/// The most memory that was ever resident, in bytes (proc_pid_status(5), VmHWM).
pub(crate) fn peak(pid: u32) -> Result<u64> {
    let status = fs::read_to_string(format!("/proc/{pid}/status"))?;
    let line = status.lines().find_map(|line| line.strip_prefix("VmHWM:"));
    let kilobytes = line.and_then(|line| line.split_whitespace().next());
    Ok(kilobytes.context("no VmHWM")?.parse::<u64>()? * 1024)
}

/// A walk over more files than may be known (5,000 in tests). What is in use stays: an open file,
/// and what is mounted inside the volume.
fn known_files_are_bounded(host: &Host, nas: &dyn crate::Served) -> Result {
    const DIRECTORIES: usize = 6;
    const FILES: usize = 1000;
    /// Files that may be known at the end: what was walked since, and a share of those to come.
    const KNOWN: usize = 3000;
    let files = files_to_walk(DIRECTORIES * FILES);
    let export = nas.local(EXPORT).join("many");
    for directory in 0..files / FILES {
        let directory = export.join(directory.to_string());
        fs::create_dir(&directory)?;
        for file in 0..FILES {
            File::create(directory.join(file.to_string()))?;
        }
    }
    fs::write(export.join("open"), "still open")?;
    let open = File::open(host.join("open"))?;
    let inside = host.join("0");
    Task::new(&[
        "mount",
        "-t",
        "tmpfs",
        "inside",
        &inside.display().to_string(),
    ])
    .run()?;
    fs::write(inside.join("file"), "mounted")?;

    let walk = Command::new("find")
        .args([
            &**host,
            "-xdev".as_ref(),
            "-printf".as_ref(),
            "%s\n".as_ref(),
        ])
        .output()?;
    // The kernel forgets when the worker finds the time to make it.
    let mut status = host.status()?;
    let few = wait_for("few files are known", PATIENCE, || {
        status = host.status().expect("a worker that answers");
        status.nodes < KNOWN
    });
    let peak = peak(status.pid)?;
    eprintln!("{} nodes, {peak} bytes at most", status.nodes);
    let found = fs::read_to_string(inside.join("file"));
    Task::new(&["umount", &inside.display().to_string()]).run()?;
    ensure!(
        found.is_ok_and(|text| text == "mounted"),
        "the mount inside is gone"
    );
    ensure!(std::io::read_to_string(open)? == "still open");
    let lines = walk.stdout.iter().filter(|&&byte| byte == b'\n').count();
    ensure!(
        lines > files - FILES && walk.stderr.is_empty(),
        "{lines} lines"
    );
    few.with_context(|| format!("{} files are known", status.nodes))?;
    ensure!(peak <= MEMORY, "{peak} bytes were resident");
    Ok(())
}

/// More writers wait for a server that is silent than there is memory for what they write.
fn waiting_writers_are_bounded(host: &Host, proxy: &Proxy) -> Result {
    const WRITERS: usize = 128;
    let data = vec![b'x'; 1 << 20];
    let files: std::io::Result<Vec<_>> = (0..WRITERS)
        .map(|n| File::create(host.join(n.to_string())))
        .collect();
    let files = files?;
    proxy.silence(true);
    let peak = std::thread::scope(|scope| {
        let writers: Vec<_> = files
            .iter()
            .map(|mut file| {
                scope.spawn({
                    let data = &data;
                    move || file.write_all(data)
                })
            })
            .collect();
        std::thread::sleep(Duration::from_secs(3));
        let peak = host.status().and_then(|status| peak(status.pid));
        proxy.silence(false);
        let written = writers
            .into_iter()
            .map(|writer| writer.join().expect("a writer"));
        written.collect::<std::io::Result<()>>()?;
        peak
    })?;
    ensure!(peak <= MEMORY, "{peak} bytes were resident");
    Ok(())
}

/// So many as a person asks for, who wants to see it with more.
fn files_to_walk(usual: usize) -> usize {
    let asked = std::env::var("NFSVOL_TEST_FILES").ok();
    asked.and_then(|files| files.parse().ok()).unwrap_or(usual)
}
