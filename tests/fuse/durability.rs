//! What fsync, O_SYNC and close promise, whatever the descriptor, and that writes always end.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, AtomicU64, Ordering};
use std::sync::mpsc;
use std::thread;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::{Lab, PATIENCE, Proxy, Result, wait_for};
use libtest_mimic::Trial;
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

use crate::{EXPORT, Host, fuse_trial, nas};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("fsync_is_about_the_file_not_the_descriptor", any_descriptor),
        fuse_trial("synchronous_writes_are_on_the_server", synchronous),
        fuse_trial("a_cleared_append_flag_appends_no_more", cleared_append),
        fuse_trial("a_later_append_flag_appends_and_ends", later_append),
        fuse_trial("writes_beside_reads_of_one_file_all_end", beside_reads),
        fuse_trial("stat_and_close_end_while_others_overwrite", overwritten),
        fuse_trial("a_cached_reader_sees_what_was_appended", appended_page),
    ]
}

/// A directory of the share, mounted, and the same on the server.
fn mounted(lab: &'static Lab, name: &str, options: &str) -> Result<(Host, PathBuf)> {
    let nas = nas(lab)?;
    let host = Host::mount(nas, name, options)?;
    Ok((host, nas.local(EXPORT).join(name)))
}

fn any_descriptor(lab: &'static Lab) -> Result {
    let (host, server) = mounted(lab, "descriptor", "")?;
    for name in ["fsync", "fdatasync"] {
        let mut writer = File::create(host.join(name))?;
        let reader = File::open(host.join(name))?;
        writer.write_all(&[b'x'; 1000])?;
        match name {
            "fsync" => reader.sync_all()?,
            _ => reader.sync_data()?,
        }
        let there = fs::metadata(server.join(name))?.len();
        ensure!(there == 1000, "{name}: {there} bytes on the server");
    }
    Ok(())
}

fn synchronous(lab: &'static Lab) -> Result {
    for (name, options) in [("synchronous", ""), ("synchronous-noac", "actimeo=0")] {
        let (host, server) = mounted(lab, name, options)?;
        for flags in 0..16 {
            let flag = |bit: i32, flag: i32| if flags & bit == 0 { 0 } else { flag };
            let open = flag(1, libc::O_APPEND)
                | flag(2, libc::O_DIRECT)
                | flag(4, libc::O_DSYNC)
                | flag(8, libc::O_SYNC);
            let file = OpenOptions::new()
                .write(true)
                .create(true)
                .truncate(false)
                .custom_flags(open)
                .open(host.join(format!("file-{flags}")))?;
            // What the open does not ask for, the write does.
            let asked = flags & (2 | 4 | 8) != 0;
            let how = if asked {
                ReadWriteFlags::empty()
            } else {
                ReadWriteFlags::DSYNC
            };
            for round in 1..=3u64 {
                let data = [b'x'; 1000];
                let at = (round - 1) * 1000;
                let count = rustix::io::pwritev2(&file, &[IoSlice::new(&data)], at, how)?;
                let there = fs::metadata(server.join(format!("file-{flags}")))?.len();
                ensure!(
                    count == 1000 && there == round * 1000,
                    "{options} open flags {open:#o}, write {round}: {there} bytes on the server"
                );
            }
        }
    }
    Ok(())
}

fn cleared_append(lab: &'static Lab) -> Result {
    let (host, _) = mounted(lab, "cleared", "")?;
    let path = host.join("file");
    let mut file = OpenOptions::new().append(true).create(true).open(&path)?;
    file.write_all(b"0123456789")?;
    rustix::fs::fcntl_setfl(&file, OFlags::empty())?;
    file.write_all_at(b"X", 0)?;
    let text = fs::read_to_string(&path)?;
    ensure!(text == "X123456789", "{text}");
    rustix::fs::fcntl_setfl(&file, OFlags::APPEND)?;
    file.write_all(b"end")?;
    let text = fs::read_to_string(&path)?;
    ensure!(text == "X123456789end", "{text}");
    Ok(())
}

/// `make > log` with a reader beside it: make sets the flag on the descriptor that the shell opened.
/// The kernel appends by its page cache then, and locks the page meanwhile.
fn later_append(lab: &'static Lab) -> Result {
    let (host, server) = mounted(lab, "later", "")?;
    let path = host.join("log");
    let (done, progress) = mpsc::channel();
    let name = path.clone();
    thread::spawn(move || -> Result {
        let mut log = File::create(&name)?;
        log.write_all(b"made\n")?;
        let reader = File::open(&name)?;
        rustix::fs::fcntl_setfl(&log, OFlags::APPEND)?;
        let mut by_open = OpenOptions::new().append(true).open(&name)?;
        let mut expected = b"made\n".to_vec();
        for line in 0..60 {
            let text = format!("{line:0200}\n");
            let file = if line % 4 == 3 {
                &mut by_open
            } else {
                &mut log
            };
            file.write_all(text.as_bytes())?;
            expected.extend_from_slice(text.as_bytes());
            let mut seen = vec![0; expected.len() + 1];
            let count = reader.read_at(&mut seen, 0)?;
            ensure!(
                seen[..count] == expected[..],
                "after line {line}: {count} bytes"
            );
            done.send(expected.clone())?;
        }
        Ok(())
    });
    let mut expected = Vec::new();
    for line in 0..60 {
        match progress.recv_timeout(PATIENCE) {
            Ok(so_far) => expected = so_far,
            Err(error) => {
                // Whoever hangs is freed before the mount is taken away.
                host.runtime.block_on(host.path.abort(&host.volume))?;
                return Err(error).with_context(|| format!("line {line} is not written and read"));
            }
        }
    }
    File::open(&path)?.sync_all()?;
    ensure!(
        fs::read(server.join("log"))? == expected,
        "other bytes on the server"
    );
    Ok(())
}

/// Bytes become durable while READ calls of the same file are under way, again and again: as many
/// as there is room for several times over.
fn beside_reads(lab: &'static Lab) -> Result {
    const BLOCKS: u64 = 64;
    const WRITES: u64 = 200;
    const BLOCK: usize = 1 << 20;
    let (host, _) = mounted(lab, "beside", "")?;
    let path = host.join("file");
    File::create(&path)?.set_len(BLOCKS * BLOCK as u64)?;
    let over = std::sync::Arc::new(AtomicBool::new(false));
    let readers: Vec<_> = (0..4)
        .map(|reader| {
            let (path, over) = (path.clone(), std::sync::Arc::clone(&over));
            thread::spawn(move || read_blocks(&path, reader, BLOCKS, &over))
        })
        .collect();
    let (done, progress) = mpsc::channel();
    thread::spawn(move || -> Result {
        let file = OpenOptions::new().write(true).open(path)?;
        let block = vec![7; BLOCK];
        for write in 0..WRITES {
            file.write_all_at(&block, write * 7 % BLOCKS * BLOCK as u64)?;
            file.sync_all()?;
            done.send(write)?;
        }
        Ok(())
    });
    let ended = (0..WRITES).try_for_each(|write| {
        let done = progress.recv_timeout(PATIENCE);
        done.map(|_| ()).with_context(|| format!("write {write}"))
    });
    over.store(true, Ordering::Relaxed);
    if ended.is_err() {
        // Whoever hangs is freed before the mount is taken away.
        host.runtime.block_on(host.path.abort(&host.volume))?;
    }
    for reader in readers {
        let read = reader.join().map_err(|_| anyhow::anyhow!("a panic"))?;
        if ended.is_ok() {
            read?;
        }
    }
    ended?;
    wait_for("no bytes to be held at rest", PATIENCE, || {
        host.status().is_ok_and(|status| status.unsaved == 0)
    })
}

/// Reads blocks here and there past the page cache.
fn read_blocks(path: &Path, seed: u64, blocks: u64, over: &AtomicBool) -> Result {
    let file = OpenOptions::new()
        .read(true)
        .custom_flags(libc::O_DIRECT)
        .open(path)?;
    let mut block = vec![0; 1 << 20];
    let mut at = seed;
    while !over.load(Ordering::Relaxed) {
        file.read_exact_at(&mut block, (at % blocks) << 20)?;
        at = at.wrapping_mul(6_364_136_223_846_793_005).wrapping_add(1) >> 3;
    }
    Ok(())
}

/// A block that is overwritten all the time: on a slow way each call finds its bytes overwritten.
fn overwritten(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let proxy = Proxy::start(lab, "overwritten-way", &nas.ip(), &[2049, 20048])?;
    let host = Host::mount_at(proxy.ip(), nas, "overwritten", "")?;
    // So long that each call finds its bytes overwritten, also on a busy machine.
    proxy.delay(Duration::from_millis(20));
    let path = host.join("file");
    let file = File::create(&path)?;
    let (over, written) = (AtomicBool::new(false), AtomicU64::new(0));
    let looked = thread::scope(|scope| {
        scope.spawn(|| {
            while !over.load(Ordering::Relaxed) {
                let _ = file.write_all_at(&[1; 4096], 0);
                written.fetch_add(1, Ordering::Relaxed);
            }
        });
        while written.load(Ordering::Relaxed) < 100 {
            thread::yield_now();
        }
        let (done, looks) = mpsc::channel();
        let path = path.clone();
        thread::spawn(move || -> Result {
            for _ in 0..5 {
                done.send(fs::metadata(&path)?.len())?;
            }
            let closed = OpenOptions::new().write(true).open(&path)?;
            drop(closed);
            done.send(0)?;
            Ok(())
        });
        let looked: Result = (0..6).try_for_each(|look| {
            let size = looks.recv_timeout(PATIENCE);
            let size = size.with_context(|| format!("look {look} does not end"))?;
            ensure!(size <= 4096, "{size}");
            Ok(())
        });
        over.store(true, Ordering::Relaxed);
        looked
    });
    proxy.delay(Duration::ZERO);
    looked
}

/// An append goes past the page cache, also past a page that is there.
fn appended_page(lab: &'static Lab) -> Result {
    let (host, _) = mounted(lab, "appended", "")?;
    let path = host.join("file");
    fs::write(&path, "a\n")?;
    let reader = File::open(&path)?;
    let mut log = OpenOptions::new().append(true).open(&path)?;
    let mut expected = b"a\n".to_vec();
    for _ in 0..100 {
        let mut seen = [0; 512];
        let count = reader.read_at(&mut seen, 0)?;
        ensure!(seen[..count] == expected[..], "{:?}", &seen[..count]);
        log.write_all(b"b\n")?;
        expected.extend_from_slice(b"b\n");
    }
    Ok(())
}
