//! What fsync, O_SYNC and close promise, whatever the descriptor.

use std::fs::{self, File, OpenOptions};
use std::io::{IoSlice, Write};
use std::os::unix::fs::{FileExt, OpenOptionsExt};
use std::path::PathBuf;

use anyhow::ensure;
use libtest_mimic::Trial;
use rustix::fs::OFlags;
use rustix::io::ReadWriteFlags;

use crate::lab::{Lab, Result};
use crate::{EXPORT, Host, fuse_trial, nas};

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("fsync_is_about_the_file_not_the_descriptor", any_descriptor),
        fuse_trial("synchronous_writes_are_on_the_server", synchronous),
        fuse_trial("a_cleared_append_flag_appends_no_more", cleared_append),
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
