//! The volume driver: what each call of Docker's protocol does.
//!
//! Invariants:
//! - Get, List, Path and Capabilities never wait for a server; Get asks the share only for a name
//!   that the local copy does not hold, and not for long.
//! - Calls for one volume follow each other ([`locks`]); no lock is held across another volume's
//!   I/O, but for the one document that tells the other hosts of several volumes.
//! - A Mount that fails leaves nothing behind; one that succeeded is on disk before it is answered.
//!
//! | module | job |
//! |---|---|
//! | [`config`] | what the administrator has decided for this host |
//! | [`attachments`] | who uses what on this host, on disk |
//! | [`paths`] | which data path carries a volume, and mounting by it |
//! | [`membership`] | this host as one of several: its session, its holds |
//! | [`elsewhere`] | what the other hosts hold, as of the last look |
//! | [`adopt`] | volumes of directories that are there |
//! | [`calls`], [`ask`] | the calls of the protocol, and of the command line |
//! | [`create`], [`mount`], [`remove`] | what they do to a volume |
//! | [`shares`] | reaching shares, their admin path and health |
//! | [`reconcile`] | what the kernel shows against what was written down |
//! | [`repair`] | putting back what is torn on the home share |
//! | [`rights`] | who on this host may look into what is ours |
//! | [`status`] | what people see |
//! | [`view`] | what operators see: metrics and the status page |
//! | [`tasks`] | polling, checking in the background |
//! | [`trash`] | emptying the trash, and sweeping what crashes left |

mod adopt;
mod ask;
mod attachments;
mod calls;
mod config;
mod create;
mod elsewhere;
mod error;
mod locks;
mod membership;
mod mount;
mod paths;
mod reconcile;
mod remove;
mod repair;
mod rights;
#[cfg(test)]
mod search;
mod shares;
mod status;
mod tasks;
mod trash;
mod view;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use self::attachments::Attachments;
pub use self::config::Config;
pub(crate) use self::config::host_name;
pub use self::error::DriverError;
use self::locks::Locks;
use self::paths::Paths;
use self::shares::{Contact, Shares};
use crate::docker::Calls;
use crate::home::{Catalog, Known, LOOKUP_WAIT};
use crate::mutant::{self, Mutant};
use crate::nfs::address::Share;
use crate::nfs::admin::Admin;
use crate::volume::{MountOptions, Record, VolumeName, VolumeOptions};

/// The driver of one host.
#[derive(Debug)]
pub struct Driver {
    config: Config,
    catalog: Catalog,
    shares: Shares,
    paths: Paths,
    attachments: Attachments,
    locks: Locks,
    cluster: membership::Cluster,
    holders: reconcile::HolderCache,
    /// Volumes that a Create has just made and nobody else has been told of, by record id: what
    /// may be taken back.
    fresh: Mutex<HashMap<VolumeName, String>>,
    /// Counts the polls of the home share.
    turn: std::sync::atomic::AtomicUsize,
    /// Wakes the task that looks at attachments, when the engine has started.
    engine_started: tokio::sync::Notify,
    /// What runs in the background.
    tasks: tokio_util::task::TaskTracker,
    calls: Calls,
    watch: view::Watch,
    /// Held as long as this daemon has the state directory.
    _lock: Option<std::fs::File>,
}

impl Driver {
    /// Opens the state directory and repairs what a crash left. Blocks; talks to no server.
    ///
    /// # Errors
    /// When the state directory or the mount root cannot be used.
    pub fn open(config: Config) -> Result<Self, DriverError> {
        let lock = rights::lock(&config)?;
        let catalog = Catalog::open(&config.state_dir, config.share.clone(), &config.host)?;
        let attachments =
            Attachments::open(&config.state_dir).map_err(|source| DriverError::State {
                what: "reading attachments",
                source,
            })?;
        let paths = Paths::open(&config)?;
        rights::close(&config)?;
        let cluster = membership::Cluster::open(&config, &attachments, &catalog)?;
        Ok(Self {
            shares: Shares::new(&config, &cluster.frame()),
            cluster,
            catalog,
            paths,
            attachments,
            locks: Locks::default(),
            holders: reconcile::HolderCache::default(),
            fresh: Mutex::default(),
            turn: std::sync::atomic::AtomicUsize::new(0),
            engine_started: tokio::sync::Notify::new(),
            tasks: tokio_util::task::TaskTracker::new(),
            calls: Calls::default(),
            watch: view::Watch::default(),
            _lock: lock,
            config,
        })
    }

    /// The name of this host.
    #[must_use]
    pub fn host(&self) -> &str {
        &self.config.host
    }

    /// The mount options of a volume on this host.
    fn mount_options(&self, record: &VolumeOptions) -> MountOptions {
        record
            .mount
            .clone()
            .unwrap_or_else(|| self.config.mount_options.clone())
    }

    fn contact(&self, share: &Share, options: &VolumeOptions) -> Arc<Contact> {
        self.shares.contact(share, &self.mount_options(options))
    }

    fn home_contact(&self) -> Option<Arc<Contact>> {
        let home = self.config.share.as_ref()?;
        Some(self.shares.contact(home, &self.config.mount_options))
    }

    async fn admin(&self, contact: &Contact) -> Result<Admin, DriverError> {
        self.shares.admin(contact, &self.paths).await
    }

    /// The admin path to the home share, where there is one.
    async fn home(&self) -> Result<Option<Admin>, DriverError> {
        match self.home_contact() {
            Some(contact) => Ok(Some(self.admin(&contact).await?)),
            None => Ok(None),
        }
    }

    /// The admin path to the home share for one call.
    async fn scoped_home(&self) -> Result<Option<Admin>, DriverError> {
        Ok(self.home().await?.map(|home| home.scoped()))
    }

    /// The admin path to the share of a volume's data for the same call.
    async fn scoped_data(
        &self,
        home: Option<&Admin>,
        options: &VolumeOptions,
    ) -> Result<Admin, DriverError> {
        let on = self.data_admin(options).await?;
        Ok(match home.filter(|home| home.is_same_way(&on)) {
            Some(home) => home.clone(),
            None => on.scoped(),
        })
    }

    /// The admin path to the share of a volume's data.
    async fn data_admin(&self, options: &VolumeOptions) -> Result<Admin, DriverError> {
        let share = self.catalog.share_of(options)?;
        self.admin(&self.contact(share, options)).await
    }

    /// What is known of a name, asking the share if need be.
    async fn look_up(&self, name: &VolumeName) -> Known {
        if let Some(record) = self.catalog.get(name) {
            return Known::Here(record);
        }
        // One time for both: reaching the share, and asking it.
        let mut deadline = tokio::time::Instant::now() + LOOKUP_WAIT;
        let home = tokio::time::timeout_at(deadline, self.home()).await;
        let home = home.ok().and_then(Result::ok).flatten();
        if mutant::is_on(Mutant::GetWaitsTwice) {
            deadline = tokio::time::Instant::now() + LOOKUP_WAIT;
        }
        self.catalog.look_up(home.as_ref(), name, deadline).await
    }

    /// A volume that a call is for; where nothing is known of it, the share's own error says why.
    async fn find(&self, name: &VolumeName) -> Result<Option<Arc<Record>>, DriverError> {
        match self.look_up(name).await {
            Known::Here(record) => Ok(Some(record)),
            Known::Unknown if !mutant::is_on(Mutant::UnreadIsAbsent) => match self.home().await? {
                Some(home) => Ok(self.catalog.fetch(&home, name).await?),
                None => Ok(None),
            },
            Known::Unknown | Known::Absent => Ok(None),
        }
    }

    /// Where a volume is mounted now.
    fn mountpoint(&self, name: &VolumeName) -> Option<std::path::PathBuf> {
        self.attachments.get(name).map(|held| held.how.mountpoint)
    }
}

#[cfg(test)]
mod tests;
