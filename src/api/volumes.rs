//! Volumes, as every view of them shows them: inspect and Docker's Status, lists, the status page.

use std::collections::BTreeMap;
use std::net::IpAddr;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::Ask;
use super::daemon::Health;
use crate::sys::mountinfo::DeviceId;
use crate::volume::{Access, DataPath, OnRemove, VolumeName};
use nfs::address::{Share, SharePath};

/// `nfsvol ls`: the volumes of all hosts, by name.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Ls {}

impl Ask for Ls {
    const PATH: &'static str = "/Nfsvol.Ls";
    type Answer = Vec<VolumeLine>;
}

/// `nfsvol inspect`: one volume in full.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Inspect {
    pub name: String,
}

impl Ask for Inspect {
    const PATH: &'static str = "/Nfsvol.Inspect";
    type Answer = Inspected;
}

/// What a volume is, whatever is done with it: from a host's memory alone.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Facts {
    /// `None` where the volume names none and the host has no home share.
    pub share: Option<Share>,
    /// Below the share.
    pub data_dir: SharePath,
    pub access: Access,
    pub on_remove: OnRemove,
    /// The host that made it.
    pub created_by: String,
    /// As of mount(8), with the host's defaults.
    pub mount_options: String,
}

/// A line of [`Ls`]. Of a volume whose record could never be read nothing but its name is known.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VolumeLine {
    Known(Box<KnownLine>),
    Unread { name: VolumeName, warning: String },
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct KnownLine {
    pub name: VolumeName,
    /// RFC 3339, by the server's clock.
    pub created: String,
    #[serde(flatten)]
    pub facts: Facts,
    /// The hosts that hold it, with what holds it there, for people.
    pub held_by: String,
    /// Mounts that Docker holds on the answering host.
    pub attachments: usize,
    /// Where it is mounted on that host.
    pub mountpoint: Option<PathBuf>,
    /// What is wrong with its record on the share.
    pub warning: Option<String>,
}

impl VolumeLine {
    #[must_use]
    pub fn name(&self) -> &VolumeName {
        match self {
            Self::Known(line) => &line.name,
            Self::Unread { name, .. } => name,
        }
    }

    #[must_use]
    pub fn warning(&self) -> Option<&str> {
        match self {
            Self::Known(line) => line.warning.as_deref(),
            Self::Unread { warning, .. } => Some(warning),
        }
    }

    #[must_use]
    pub fn known(&self) -> Option<&KnownLine> {
        match self {
            Self::Known(line) => Some(line),
            Self::Unread { .. } => None,
        }
    }
}

/// The answer to [`Inspect`].
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct Inspected {
    pub name: VolumeName,
    /// RFC 3339, by the server's clock.
    pub created: String,
    /// Where it is mounted on the answering host.
    pub mountpoint: Option<PathBuf>,
    pub status: VolumeStatus,
}

/// What `docker volume inspect` shows under `Status`, and `nfsvol inspect` under `status`.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VolumeStatus {
    Known(Box<KnownStatus>),
    /// The host has no share for it.
    Nowhere {
        error: String,
    },
}

impl VolumeStatus {
    /// As Docker takes it.
    #[must_use]
    pub fn to_map(&self) -> Map<String, Value> {
        match serde_json::to_value(self) {
            Ok(Value::Object(map)) => map,
            // Such as a path that is not text: better without than no answer to a Get.
            _ => Map::new(),
        }
    }
}

/// A volume, and how it is on the host that answers.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct KnownStatus {
    #[serde(flatten)]
    pub facts: Facts,
    /// Whether the directory goes with the volume when that is removed.
    pub data_dir_made_by_driver: bool,
    /// As they were given to Create.
    pub options: BTreeMap<String, String>,
    pub scope: VolumeScope,
    pub health: Health,
    #[serde(flatten)]
    pub path: VolumePath,
    pub held_by_other_hosts: Vec<HeldBy>,
    #[serde(flatten, default, skip_serializing_if = "Option::is_none")]
    pub attached: Option<AttachedHere>,
    /// The process that serves it on the FUSE data path while it is attached.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub worker: Option<Heard<Worker>>,
    /// The process that would take it away on the kernel data path, of an exclusive volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub guard: Option<Heard<Guard>>,
    /// What the last guard did, of an exclusive volume.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub fenced: Option<Fenced>,
    /// What became of the data when the volume was made anew with other options, for people.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub restored: Option<String>,
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub warnings: Vec<String>,
}

/// Whether other hosts see a volume.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum VolumeScope {
    Global,
    Local,
}

/// What carries a volume, or would if it were mounted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum VolumePath {
    Mounted {
        data_path: DataPath,
        nfs_version: String,
        /// The server's.
        address: Option<IpAddr>,
    },
    Chosen {
        data_path: DataPath,
        data_path_reason: String,
    },
    None {
        data_path_error: String,
    },
}

/// A host that holds a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HeldBy {
    pub host: String,
    /// RFC 3339, by that host's clock.
    pub since: String,
    /// Containers and other processes, for people.
    pub holders: Vec<String>,
}

/// Who uses a volume on the host that answers.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct AttachedHere {
    pub attachments: Vec<Attachment>,
    pub holders: Vec<Holder>,
    /// Those that hold an earlier mount of the volume, such as one that the server no longer knows
    /// (ESTALE); and what to do about them.
    #[serde(default, skip_serializing_if = "Vec::is_empty")]
    pub stale_holders: Vec<Holder>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub stale_next: Option<String>,
}

/// One Mount call that no Unmount has answered yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Attachment {
    pub id: String,
    /// Seconds since 1970 by this host's clock.
    pub since: u64,
    /// Seconds since the boot.
    #[serde(default)]
    pub at: u64,
    /// Which start of the engine it belongs to, counted from 0.
    pub epoch: u64,
}

/// A process that holds a volume; one per mount namespace and place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Holder {
    pub pid: u32,
    /// The full id, where the process belongs to a container of Docker or Podman.
    pub container_id: Option<String>,
    pub comm: String,
    /// The file system that it holds.
    pub device: DeviceId,
    /// Where the volume is mounted in the process's namespace.
    pub mountpoint: PathBuf,
}

/// What one of nfsvol's own processes said when it was asked, if it answered within a moment.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Heard<T> {
    Said(T),
    Nothing(Silence),
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub enum Silence {
    #[serde(rename = "does not answer")]
    DoesNotAnswer,
}

impl<T> From<Option<T>> for Heard<T> {
    fn from(said: Option<T>) -> Self {
        said.map_or(Self::Nothing(Silence::DoesNotAnswer), Self::Said)
    }
}

/// The worker of a volume on the FUSE data path.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Worker {
    pub pid: u32,
    /// The process answers; `false` if only its mount is left.
    pub alive: bool,
    pub resident_bytes: u64,
    pub open_files: usize,
    /// What the server does not hold durably yet.
    pub unsaved_bytes: usize,
    /// Requests of the kernel so far, and those without an answer.
    pub requests: u64,
    pub requests_under_way: u64,
    pub last_error: Option<String>,
}

/// The guard of an exclusive volume on the kernel data path.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "kebab-case")]
pub enum Guard {
    Watching {
        device: DeviceId,
        /// When the host's right ends, in milliseconds since its boot.
        until: u64,
    },
    Fencing,
}

/// What a guard did.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Fenced {
    /// Seconds since 1970 by this host's clock.
    pub at: u64,
    /// The containers that were stopped.
    pub containers: Vec<String>,
    /// How many of their processes the guard itself had to kill.
    pub killed: usize,
    /// Until nothing could be sent for the volume any more, in milliseconds.
    pub took_ms: u64,
    /// Whether that was before another host may have taken the volume.
    pub in_time: bool,
    /// The host has its right again, and has started containers anew whose restart policy says so.
    #[serde(default)]
    pub settled: bool,
    /// What could not be done.
    pub troubles: Vec<String>,
}

/// `nfsvol abort`: frees every process that waits for a volume whose server is away.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Abort {
    pub name: String,
}

impl Ask for Abort {
    const PATH: &'static str = "/Nfsvol.Abort";
    type Answer = Aborted;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Aborted {
    pub aborted: VolumeName,
}

/// `nfsvol adopt`: makes a volume of a directory that is there, or says what keeps it from that. A
/// directory that is absent is not made.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Adopt {
    pub name: String,
    /// As Create's.
    #[serde(default)]
    pub opts: BTreeMap<String, String>,
    /// Whether the directory may be another volume's too, or lie in or above it.
    #[serde(default)]
    pub overlap: bool,
    /// Only look.
    #[serde(default)]
    pub dry_run: bool,
}

impl Ask for Adopt {
    const PATH: &'static str = "/Nfsvol.Adopt";
    type Answer = Adopted;
}

#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Adopted {
    pub name: VolumeName,
    pub share: Share,
    pub data_dir: SharePath,
    pub outcome: AdoptOutcome,
    /// In which options the volume that exists differs from those that were asked for, for people.
    pub differences: Vec<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum AdoptOutcome {
    Made,
    /// It was that volume's directory already.
    Exists,
    /// Only looked at: it would be made.
    Possible,
    /// Said by the command line, of what the daemon refused.
    Refused,
}
