//! What can go wrong between a volume's name and its record and directory.

use std::io;
use std::sync::Arc;

use crate::volume::{OptionError, Record, RecordError, VolumeName};
use nfs::address::SharePath;
use nfs::admin::AdminError;

/// An error of the catalog; the text says what to do next.
#[derive(Debug, thiserror::Error)]
pub(crate) enum CatalogError {
    #[error(transparent)]
    Share(Box<AdminError>),
    #[error(transparent)]
    Options(#[from] OptionError),
    #[error(
        "volume {name} exists with other options ({}), made by {created_by} at {created}; \
         use it as it is, or remove it first", .differences.join("; ")
    )]
    Different {
        name: VolumeName,
        differences: Vec<String>,
        created_by: String,
        created: String,
    },
    #[error(
        "volume {name} was removed at {removed} with other options ({}), and this host makes no empty \
         one in its place (--recreate refuse); `nfsvol restore {entry}` brings it back as it was, \
         `nfsvol trash purge {entry}` deletes its data for good, and then it can be created anew",
        .differences.join("; ")
    )]
    RemovedLately {
        name: VolumeName,
        entry: String,
        removed: String,
        differences: Vec<String>,
    },
    #[error("another host has written to volume {0}")]
    Used(VolumeName),
    #[error("no such volume: {0}")]
    Absent(VolumeName),
    #[error(
        "volume {0} is being created, removed and created again faster than this host can follow; try again"
    )]
    Unsettled(VolumeName),
    /// The volume was made, but could not be finished; whoever knows the other hosts' holds takes
    /// it back.
    #[error("{source}")]
    HalfMade {
        record: Arc<Record>,
        source: Box<Self>,
    },
    /// Its removal has begun, and is to be finished before its name or directory is used anew.
    #[error("volume {} is being removed; try again", .0.name)]
    Removing(Arc<Record>),
    #[error("the record of volume {name} on the share: {source}{}", remedy(.source, .name))]
    Record {
        name: VolumeName,
        source: RecordError,
    },
    #[error(
        "the record of volume {name} in the state directory cannot be read ({reason}); \
         repair or delete its file there"
    )]
    LocalRecord { name: VolumeName, reason: String },
    #[error("share {share}: .nfsvol/format.json: {reason}")]
    Format { share: String, reason: String },
    #[error(
        "share {share}: .nfsvol/format.json is torn ({source}); on a host that knows the share, \
         nfsvol repair puts it back"
    )]
    Torn {
        share: String,
        source: serde_json::Error,
    },
    #[error("not put back: {0}")]
    Unproven(String),
    #[error(
        "share {share} is not the home share that this host knew (its id is {found}, expected \
         {expected}): is the right file system mounted on the server? To start over with the \
         new one, stop nfsvol and move {state} away"
    )]
    OtherShare {
        share: String,
        found: String,
        expected: String,
        state: String,
    },
    #[error("share {share}: {path} exists and is not a directory; name another subdir")]
    NotADirectory { share: String, path: SharePath },
    #[error(
        "share {share}: the server does not let the driver give {path} to uid {uid}, gid {gid}, \
         mode {mode:04o} (root_squash?): make the directory on the server, or leave uid, gid and \
         mode out and use the volume with :nocopy"
    )]
    Squashed {
        share: String,
        path: SharePath,
        uid: u32,
        gid: u32,
        mode: u32,
    },
    #[error(
        "volume {name}: its data directory {path} has gone from share {share}. No empty one is \
         made in its place, so that no service starts without its data: bring it back on the \
         server, or remove and create the volume"
    )]
    DataGone {
        name: VolumeName,
        share: String,
        path: SharePath,
    },
    #[error("volume {name} is not in the trash{}", .nearest.as_ref().map_or_else(String::new, |n| format!(" (did you mean {n}?)")))]
    NotInTrash {
        name: String,
        nearest: Option<String>,
    },
    #[error(
        "{0} is being restored by another call, here or on another host, or is no longer in the \
         trash; see docker volume ls, and restore it again if it is not there"
    )]
    RestoredElsewhere(String),
    #[error(
        "share {share}: the server does not let the driver delete {path} (root_squash?); delete it \
         on the server: {source}"
    )]
    NotDeletable {
        share: String,
        path: SharePath,
        source: Box<AdminError>,
    },
    #[error("volume {0} exists; restore under another name (--as NAME), or remove it first")]
    NameTaken(VolumeName),
    #[error(
        "share {share}: {path} is in the way; if it is no volume's directory (`nfsvol ls`), move it aside; \
         otherwise remove that volume first, or restore under another name (--as NAME)"
    )]
    PathTaken { share: String, path: SharePath },
    #[error(
        "share {share}: there is no directory {path} to make volume {name} of; give the path as it \
         is below the export"
    )]
    NoDirectory {
        name: VolumeName,
        share: String,
        path: SharePath,
    },
    #[error(
        "{path} overlaps with {other_path}, the directory of volume {other}, so each would show \
         files of the other; adopt another directory, or remove that volume first"
    )]
    Overlap {
        path: SharePath,
        other: VolumeName,
        other_path: SharePath,
    },
    #[error(
        "{path} overlaps with {other_path}, the directory of volume {other}, and of an exclusive \
         volume's data no other volume may write any; name another subdir, or give the volume that \
         only reads access=readonly"
    )]
    Excluded {
        path: SharePath,
        other: VolumeName,
        other_path: SharePath,
    },
    #[error("state directory: {what}: {source}; free space or repair it, then try again")]
    State { what: String, source: io::Error },
    #[error("share {0} holds no volumes of nfsvol (no .nfsvol directory): is it the right export?")]
    NoCatalog(String),
    #[error("{0} needs a home share: start nfsvol with --share SERVER:/EXPORT")]
    NoHome(&'static str),
    #[error(
        "option share is missing: this host has no home share (--share), so each volume names its own"
    )]
    NoShare,
}

/// What helps against a damaged record.
fn remedy(source: &RecordError, name: &VolumeName) -> String {
    match source.is_damage() {
        true => format!("; `nfsvol repair {name}` on a host that has used it puts it back"),
        false => String::new(),
    }
}

impl From<AdminError> for CatalogError {
    fn from(error: AdminError) -> Self {
        Self::Share(Box::new(error))
    }
}

impl CatalogError {
    pub(super) fn state(what: impl Into<String>) -> impl FnOnce(io::Error) -> Self {
        let what = what.into();
        move |source| Self::State { what, source }
    }

    /// Whether the same call may succeed later without anybody changing anything.
    #[must_use]
    pub(crate) fn is_transient(&self) -> bool {
        match self {
            Self::Share(error) => error.is_transient(),
            Self::HalfMade { source, .. } => source.is_transient(),
            Self::Unsettled(_) | Self::Removing(_) => true,
            _ => false,
        }
    }
}
