//! From which ports a worker's connections come.

use std::collections::BTreeSet;
use std::fs;

use anyhow::{Context, ensure};
use lab::{Lab, Result};
use libtest_mimic::Trial;

use crate::{Host, fuse_trial, nas};

pub(crate) fn trials() -> Vec<Trial> {
    vec![fuse_trial("noresvport_leaves_the_low_ports_to_others", low)]
}

/// `secure` exports trust no port above.
fn low(lab: &'static Lab) -> Result {
    for (dir, options, low) in [("low", "", true), ("any", "noresvport", false)] {
        let host = Host::mount(nas(lab)?, dir, options)?;
        fs::write(host.join("file"), "text")?;
        let ports = source_ports(host.status()?.pid)?;
        let all_are = ports.iter().all(|port| (*port < 1024) == low);
        ensure!(!ports.is_empty() && all_are, "{options:?}: {ports:?}");
    }
    Ok(())
}

/// The local ports of a process's TCP connections (proc_pid_net(5)).
fn source_ports(pid: u32) -> Result<Vec<u16>> {
    const ESTABLISHED: &str = "01";
    let mut sockets = BTreeSet::new();
    for entry in fs::read_dir(format!("/proc/{pid}/fd"))? {
        let target = fs::read_link(entry?.path())?.display().to_string();
        let inode = target
            .strip_prefix("socket:[")
            .map(|rest| rest.trim_end_matches(']'));
        sockets.extend(inode.map(str::to_owned));
    }
    let table = fs::read_to_string(format!("/proc/{pid}/net/tcp"))?;
    let mut ports = Vec::new();
    for line in table.lines().skip(1) {
        let fields: Vec<_> = line.split_ascii_whitespace().collect();
        let [_, local, _, state, .., inode] = fields.get(..10).context("a short line")? else {
            continue;
        };
        if *state == ESTABLISHED && sockets.contains(*inode) {
            let (_, port) = local.split_once(':').context("no port")?;
            ports.push(u16::from_str_radix(port, 16)?);
        }
    }
    Ok(ports)
}
