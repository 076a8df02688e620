//! This host: which volumes are attached and mounted here, by which data path, and which processes
//! hold them. Knows no catalog and no other host; whether a volume exists it is told.
//!
//! Invariants:
//! - An attachment is on disk before a Mount is answered, and what the kernel's mount namespaces show
//!   decides whether a volume is in use (docs/DESIGN.md, "On each host").
//! - Whoever changes what is mounted of a volume has its lock ([`Host::lock`]).
//!
//! | module | job |
//! |---|---|
//! | [`attachments`] | who uses what on this host, on disk |
//! | [`paths`] | which data path carries a volume, and mounting by it |
//! | [`holders`] | the processes that hold a volume |
//! | [`reconcile`] | what the kernel shows against what was written down |
//! | [`locks`] | one lock a volume |
//! | [`rights`] | who on this host may look into what is ours |

mod attachments;
mod error;
mod holders;
mod locks;
mod paths;
mod reconcile;
mod rights;

use std::fs::File;
use std::path::PathBuf;
use std::time::Duration;

use tokio::sync::{Notify, OwnedMutexGuard};

#[cfg(test)]
pub(crate) use self::attachments::How;
pub(crate) use self::attachments::{Attached, Attachments};
pub(crate) use self::error::HostError;
use self::holders::Recent;
pub(crate) use self::holders::describe;
use self::locks::Locks;
pub(crate) use self::paths::Paths;
#[cfg(test)]
pub(crate) use self::reconcile::PODMAN;
pub(crate) use self::reconcile::RECONCILE_EVERY;
use crate::volume::{DataPath, VolumeName};
use nfs::address::Share;

/// What the administrator has decided that matters here.
#[derive(Debug)]
pub(crate) struct Settings {
    pub(crate) state_dir: PathBuf,
    pub(crate) mount_root: PathBuf,
    /// Whether this is a daemon, and not somebody who only asks a share and changes nothing here.
    pub(crate) is_daemon: bool,
    /// The share of volumes that name none.
    pub(crate) home: Option<Share>,
    pub(crate) data_path: DataPath,
    pub(crate) idle_unmount: Duration,
    /// How long letting go of a volume waits for written data to reach the server.
    pub(crate) flush_wait: Duration,
    /// Where Docker's engine listens.
    pub(crate) docker_socket: PathBuf,
}

/// See the module.
#[derive(Debug)]
pub(crate) struct Host {
    settings: Settings,
    paths: Paths,
    attachments: Attachments,
    locks: Locks,
    recent: Recent,
    /// The engine has started: attachments are looked at anew.
    engine_started: Notify,
    /// Held as long as this daemon has the state directory.
    _lock: Option<File>,
}

impl Host {
    /// Takes the state directory, and reads what is attached. Blocks; talks to no server.
    ///
    /// # Errors
    /// When the state directory or the mount root cannot be used, or another daemon has it.
    pub(crate) fn open(settings: Settings) -> Result<Self, HostError> {
        let lock = rights::lock(&settings)?;
        let attachments = Attachments::open(&settings.state_dir);
        let attachments = attachments.map_err(HostError::state("reading attachments"))?;
        let paths = Paths::open(&settings)?;
        rights::close(&settings)?;
        Ok(Self {
            paths,
            attachments,
            locks: Locks::default(),
            recent: Recent::default(),
            engine_started: Notify::new(),
            _lock: lock,
            settings,
        })
    }

    /// The data paths.
    pub(crate) fn paths(&self) -> &Paths {
        &self.paths
    }

    /// Who uses what, as Docker told it.
    pub(crate) fn attachments(&self) -> &Attachments {
        &self.attachments
    }

    /// Waits for the calls before this one on the same volume.
    pub(crate) async fn lock(&self, name: &VolumeName) -> OwnedMutexGuard<()> {
        self.locks.lock(name).await
    }

    /// The same of two volumes; calls that lock the same ones never wait for each other for ever.
    pub(crate) async fn lock_both(
        &self,
        one: &VolumeName,
        other: &VolumeName,
    ) -> (OwnedMutexGuard<()>, Option<OwnedMutexGuard<()>>) {
        self.locks.lock_both(one, other).await
    }

    /// The lock of a volume, unless a call holds it.
    pub(crate) fn try_lock(&self, name: &VolumeName) -> Option<OwnedMutexGuard<()>> {
        self.locks.try_lock(name)
    }

    /// Where a volume is mounted now.
    pub(crate) fn mountpoint(&self, name: &VolumeName) -> Option<PathBuf> {
        self.attachments.get(name).map(|held| held.how.mountpoint)
    }

    /// Unmounts a volume, having flushed it for as long as the administrator allows.
    pub(crate) async fn detach(&self, name: &VolumeName) -> Result<(), HostError> {
        self.paths.detach(name, self.settings.flush_wait).await
    }

    /// The engine has (re)started. Writes a file durably.
    pub(crate) fn engine_started(&self) {
        tokio::task::block_in_place(|| self.attachments.engine_started());
        self.engine_started.notify_one();
    }
}

#[cfg(test)]
impl Settings {
    /// Of somebody who only asks, with the state below `dir`.
    fn aside(dir: &std::path::Path) -> Self {
        Self {
            state_dir: dir.to_owned(),
            mount_root: dir.join("mnt"),
            is_daemon: false,
            home: None,
            data_path: DataPath::default(),
            idle_unmount: Duration::ZERO,
            flush_wait: Duration::ZERO,
            docker_socket: PathBuf::new(),
        }
    }
}
