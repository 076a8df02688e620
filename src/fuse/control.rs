//! What the daemon and a worker say to each other, as attendants do (src/attendant.rs).
//!
//! The worker gets a [`Task`] and answers with one [`Started`]. After that it is asked one
//! [`Command`] for one [`Report`].

use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use crate::volume::VolumeName;
use nfs::address::{Share, SharePath};

use super::options::FuseOptions;
use crate::volume::Right;

/// What a worker is to serve.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Task {
    pub volume: VolumeName,
    pub share: Share,
    /// The volume's directory below the share.
    pub dir: SharePath,
    /// The server's address, already resolved.
    pub addr: IpAddr,
    pub nfs_port: u16,
    pub mount_port: u16,
    pub readonly: bool,
    pub options: FuseOptions,
    /// For an exclusive volume: until when to send anything.
    #[serde(default)]
    pub fence: Option<Right>,
    /// Where to mount.
    pub mountpoint: PathBuf,
    /// Where the worker keeps its socket.
    pub run_dir: PathBuf,
}

impl Task {
    /// Whether a worker of this task also serves that one. The server's address may differ: its
    /// name may have been resolved to another one meanwhile. So may the ports that it connects
    /// from: no program sees them, and a worker of before an upgrade did not heed `noresvport`.
    #[must_use]
    pub fn serves(&self, other: &Self) -> bool {
        let Self {
            volume,
            share,
            dir,
            readonly,
            options,
            mountpoint,
            fence,
            ..
        } = self;
        let options = FuseOptions {
            noresvport: other.options.noresvport,
            ..options.clone()
        };
        *volume == other.volume
            && *share == other.share
            && *dir == other.dir
            && *readonly == other.readonly
            && options == other.options
            && *mountpoint == other.mountpoint
            && fence.is_some() == other.fence.is_some()
    }
}

/// How a worker's start ended.
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Started {
    Ready {
        warnings: Vec<String>,
    },
    Failed {
        step: String,
        error: String,
        errno: i32,
    },
}

/// What the daemon asks of a worker.
#[derive(Debug, Clone, Copy, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Command {
    Status,
    /// Make everything durable that has been written.
    Flush,
    /// An exclusive volume may be used until this time (see [`Right::until`]).
    Prolong(u64),
    /// The mount is taken away on the host; serve those who still hold it.
    Leave,
    /// End at once; every request and every later one fails.
    Abort,
    /// Ask the server whether the volume's directory still is the one that is served.
    Check,
}

/// What a worker serves, by the server's word.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Served {
    /// The volume's directory.
    Current,
    /// One that the server no longer knows (ESTALE), or that another has replaced.
    Outdated,
    /// The server did not tell.
    Unknown,
}

/// What a worker reports.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct WorkerStatus {
    pub pid: u32,
    /// The process answers. `false` if only its mount is left.
    pub alive: bool,
    pub task: Task,
    /// The host has unmounted it; containers still hold it.
    pub leaving: bool,
    /// Resident memory, in bytes.
    pub rss: u64,
    /// Files and directories that the kernel knows.
    pub nodes: usize,
    pub open_files: usize,
    /// Bytes that the server does not hold durably yet.
    pub unsaved: usize,
    /// Requests so far, and those not answered yet.
    pub requests: u64,
    pub under_way: u64,
    /// Requests ended because their caller was killed.
    pub interrupted: u64,
    pub last_error: Option<String>,
    /// An earlier release's worker does not tell.
    #[serde(default)]
    pub traffic: Traffic,
}

/// What a worker has carried since it started.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Traffic {
    /// Requests of the kernel to read, and the bytes that they got. What the kernel had in its
    /// cache is not among them.
    pub reads: u64,
    pub read_bytes: u64,
    /// Requests of the kernel to write, and their bytes.
    pub writes: u64,
    pub written_bytes: u64,
    /// Calls to the server, and how often one of them had to be repeated.
    pub rpcs: u64,
    pub repeated_rpcs: u64,
}

/// The answer to a [`Command`].
#[derive(Debug, Clone, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub(crate) enum Report {
    Status(Box<WorkerStatus>),
    Served(Served),
    Done,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_serves_who_asks_for_other_ports_and_not_for_other_data() {
        let task = Task {
            volume: "v".parse().unwrap(),
            share: "nas:/export".parse().unwrap(),
            dir: SharePath::parse("v").unwrap(),
            addr: "192.0.2.1".parse().unwrap(),
            nfs_port: 2049,
            mount_port: 20048,
            readonly: false,
            options: FuseOptions::default(),
            fence: None,
            mountpoint: "/mnt/v".into(),
            run_dir: "/run/v".into(),
        };
        let mut other = task.clone();
        other.options.noresvport = true;
        assert!(task.serves(&other) && other.serves(&task));
        other.options.sync = true;
        assert!(!task.serves(&other));
    }
}
