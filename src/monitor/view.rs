//! What operators see of a daemon at one moment: values, no I/O. Metrics and the status page are
//! two forms of it.
//!
//! Invariant: what becomes a label of a metric is limited in number by [`MAX_ATTACHED`] and by the
//! shares in use.

use serde::Serialize;

use crate::volume::{Access, OnRemove, VolumeName};

/// The most attached volumes that are told apart: a host has hundreds of containers, and each
/// volume has some ten series.
pub(crate) const MAX_ATTACHED: usize = 1000;
/// The most volumes that the status page lists at a time; it searches among all.
pub(crate) const MAX_ROWS: usize = 200;
/// The most entries of the trash that the status page lists.
pub(crate) const MAX_TRASH: usize = 100;

/// A daemon, from its memory and what /proc and its workers said within a moment.
#[derive(Debug, Clone, Default, Serialize)]
pub struct View {
    pub version: &'static str,
    pub host: String,
    /// Seconds since 1970 by this host's clock, as are all times without another word.
    pub now: u64,
    pub process: Process,
    pub home: Option<String>,
    /// Records that this host knows.
    pub volumes: usize,
    pub attachments: usize,
    pub shares: Vec<Share>,
    pub attached: Vec<Attached>,
    /// Attached volumes beyond [`MAX_ATTACHED`].
    pub left_out: usize,
    pub workers: Workers,
    pub mounts: Vec<Mount>,
    /// Where there is a home share.
    pub cluster: Option<Cluster>,
    /// Once the trash has been looked at.
    pub trash: Option<Trash>,
}

/// The daemon's process.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Process {
    /// Seconds since 1970.
    pub started: f64,
    /// Seconds of processor time.
    pub cpu: f64,
    /// Bytes.
    pub resident: u64,
    pub open_files: u64,
}

/// A share that this host has to do with.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Share {
    pub share: String,
    pub home: bool,
    /// It is the home share, or holds an attached volume: such ones are looked at every 30 s.
    pub in_use: bool,
    /// `None` before the first answer.
    pub up: Option<bool>,
    pub error: Option<String>,
    pub last_answer: Option<u64>,
    /// Seconds.
    pub rtt: Option<f64>,
    pub address: Option<String>,
    /// Bytes.
    pub size: Option<u64>,
    pub available: Option<u64>,
    /// Calls of the daemon itself, over NFSv3.
    pub rpcs: u64,
}

/// A volume that is attached on this host.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Attached {
    pub volume: String,
    pub share: String,
    /// `kernel` or `fuse`.
    pub data_path: String,
    pub nfs_version: String,
    pub attachments: usize,
    /// The file system's number, as in /proc/self/mountinfo.
    pub device: Option<String>,
    /// What its FUSE worker said, if it has one that answers.
    pub worker: Option<Worker>,
    /// `serving`, `silent` or `died`, on the FUSE data path.
    pub worker_state: Option<&'static str>,
}

/// What a FUSE worker has carried since it started, and how it is.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Worker {
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    pub others: u64,
    pub rpcs: u64,
    pub retransmits: u64,
    /// Requests without an answer.
    pub running: u64,
    pub interrupted: u64,
    pub open_files: usize,
    pub unsaved: usize,
    pub resident: u64,
    pub last_error: Option<String>,
}

/// The FUSE workers of attached volumes, by their state.
#[derive(Debug, Clone, Copy, Default, Serialize)]
pub struct Workers {
    pub serving: usize,
    /// The host has unmounted its volume; containers hold it.
    pub leaving: usize,
    /// It lives and does not answer.
    pub silent: usize,
    /// Its volume is attached, and no process serves it.
    pub died: usize,
}

/// An NFS mount of the kernel's client, which the volumes of one share have in common.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Mount {
    /// As the kernel names it: `nas:/export`.
    pub share: String,
    pub device: String,
    /// Attached volumes that are binds of it.
    pub volumes: usize,
    pub read_bytes: u64,
    pub written_bytes: u64,
    pub reads: u64,
    pub writes: u64,
    pub others: u64,
    pub retransmits: u64,
    pub timeouts: u64,
    /// Seconds, of all operations.
    pub rtt: f64,
}

impl Mount {
    #[must_use]
    pub fn rpcs(&self) -> u64 {
        self.reads + self.writes + self.others
    }
}

/// This host and the others.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Cluster {
    /// This host's session is good at this moment.
    pub session: bool,
    /// For how much longer without a renewal, in seconds.
    pub right: f64,
    /// Volumes that this host holds, and those of them that are exclusive.
    pub holds: usize,
    pub claims: usize,
    /// The hosts that live, this one first.
    pub hosts: Vec<String>,
}

/// Removed volumes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Trash {
    pub entries: usize,
    /// Seconds since 1970 by the server's clock.
    pub oldest: Option<u64>,
    /// The newest [`MAX_TRASH`].
    pub newest: Vec<Trashed>,
}

#[derive(Debug, Clone, Default, Serialize)]
pub struct Trashed {
    pub entry: String,
    pub volume: String,
    pub removed: u64,
}

/// What the status page shows: a view, and some of the volumes.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Page {
    #[serde(flatten)]
    pub view: View,
    /// Volumes whose name has what was searched for.
    pub found: usize,
    /// The first [`MAX_ROWS`] of them, those that a host holds before the others.
    pub rows: Vec<Row>,
}

/// A volume on all hosts.
#[derive(Debug, Clone, Serialize)]
pub struct Row {
    pub volume: VolumeName,
    pub share: String,
    /// As people write it: `.` for all of the share.
    pub dir: String,
    pub access: Access,
    pub on_remove: OnRemove,
    pub created: String,
    pub created_by: String,
    pub held: Vec<Held>,
}

/// A host that holds a volume; of an exclusive one, the host that has its claim.
#[derive(Debug, Clone, Default, Serialize)]
pub struct Held {
    pub host: String,
    /// Containers, and other processes.
    pub holders: Vec<String>,
}
