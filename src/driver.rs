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
//! | [`cluster`] | this host as one of several: its session, its holds |
//! | [`together`] | what calls do on the shares that other hosts see |
//! | [`elsewhere`] | what the other hosts hold, as of the last look |
//! | [`adopt`] | volumes of directories that are there |
//! | [`calls`], [`ask`] | the calls of the protocol, and of the command line |
//! | [`shares`] | reaching shares, their admin path and health |
//! | [`reconcile`] | what the kernel shows against what was written down |
//! | [`repair`] | putting back what is torn on the home share |
//! | [`rights`] | who on this host may look into what is ours |
//! | [`status`] | what people see |
//! | [`turns`] | taking turns with an exclusive volume |
//! | [`view`] | what operators see: metrics and the status page |
//! | [`tasks`] | polling, checking in the background |
//! | [`trash`] | emptying the trash, and sweeping what crashes left |

mod adopt;
mod ask;
mod attachments;
mod calls;
mod cluster;
mod config;
mod elsewhere;
mod error;
mod locks;
mod paths;
mod reconcile;
mod repair;
mod rights;
#[cfg(test)]
mod search;
mod shares;
mod status;
mod tasks;
mod together;
mod trash;
mod turns;
mod view;

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use self::attachments::Attachments;
pub use self::config::Config;
pub(crate) use self::config::host_name;
pub use self::error::DriverError;
use self::locks::Locks;
use self::paths::Paths;
use self::shares::{Contact, Shares};
use crate::docker::Calls;
use crate::fuse::FuseOptions;
use crate::home::{Catalog, CatalogError, Creation, Known, LOOKUP_WAIT};
use crate::kernel::MountError;
use crate::mutant::{self, Mutant};
use crate::nfs::address::{Share, SharePath};
use crate::nfs::admin::Admin;
use crate::volume::options::is_own_dir;
use crate::volume::{Access, DataPath, MountOptions, Record, Right, VolumeName, VolumeOptions};

/// How long before its deadline a Mount stops trying, so that its own error is the answer.
const MARGIN: Duration = Duration::from_secs(2);
/// Pauses between the tries of a Mount whose share does not answer: from the first to the last.
const FIRST_PAUSE: Duration = Duration::from_millis(200);
const LAST_PAUSE: Duration = Duration::from_secs(2);
/// How long a Mount waits for the home share's word on a volume whose data is on another share.
const HOME_WAIT: Duration = Duration::from_millis(250);

/// The driver of one host.
#[derive(Debug)]
pub struct Driver {
    config: Config,
    catalog: Catalog,
    shares: Shares,
    paths: Paths,
    attachments: Attachments,
    locks: Locks,
    cluster: cluster::Cluster,
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
        let cluster = cluster::Cluster::open(&config, &attachments, &catalog)?;
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

    /// Whether a volume with these options may be made and mounted on this host.
    fn check_allowed(
        &self,
        options: &VolumeOptions,
        data_dir: &SharePath,
    ) -> Result<(), DriverError> {
        let share = self.catalog.share_of(options)?;
        if !self.config.allows(share) {
            return Err(DriverError::NotAllowed(share.clone()));
        }
        let refused = options.mount.as_ref();
        if let Some(word) = refused.and_then(|mount| self.config.refused_option(mount)) {
            return Err(DriverError::OptionNotAllowed(word));
        }
        // By whatever name of its server, and by whatever export and path.
        let parts = share.export().split('/').chain(data_dir.components());
        match parts.into_iter().any(is_own_dir) {
            true => Err(DriverError::OwnDirectory(share.clone(), data_dir.clone())),
            false => Ok(()),
        }
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

    /// Refuses options before any server is asked: they would be refused at every host.
    fn check_options(&self, name: &VolumeName, options: &VolumeOptions) -> Result<(), DriverError> {
        self.check_allowed(options, &options.data_dir(name)?)?;
        if options.access == Access::Exclusive && self.config.share.is_none() {
            return Err(CatalogError::NoHome("access=exclusive").into());
        }
        let by_fuse = options.access == Access::Exclusive
            && self.paths.asked(options.data_path) != DataPath::Kernel;
        if options.data_path == DataPath::Fuse || by_fuse {
            let words = self.mount_options(options).to_string();
            FuseOptions::from_words(words.split(',')).map_err(DriverError::FuseOptions)?;
        }
        Ok(())
    }

    async fn create_volume(
        &self,
        name: &VolumeName,
        options: VolumeOptions,
    ) -> Result<Creation, DriverError> {
        self.check_options(name, &options)?;
        let _lock = self.locks.lock(name).await;
        let home = self.scoped_home().await?;
        let on = self.scoped_data(home.as_ref(), &options).await?;
        let default = self.config.on_remove;
        let made = self.together();
        let made = made.make(home.as_ref(), &on, name, &options, default);
        let creation = made.await?;
        fail::fail_point!("create.kept", |_| crate::failpoint::die());
        let mut fresh = self.fresh.lock().unwrap_or_else(PoisonError::into_inner);
        match &creation {
            Creation::New(record) => fresh.insert(name.clone(), record.id.clone()),
            Creation::Existing(_) => fresh.remove(name),
        };
        Ok(creation)
    }

    async fn take_back(&self, name: &VolumeName) {
        let _lock = self.locks.lock(name).await;
        let id = self
            .fresh
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        let Some(record) = self
            .catalog
            .get(name)
            .filter(|r| Some(&r.id) == id.as_ref())
        else {
            return;
        };
        match (self.home().await, self.data_admin(&record.options).await) {
            (Ok(home), Ok(on)) => self.together().undo(home.as_ref(), &on, &record).await,
            (Err(error), _) | (_, Err(error)) => {
                tracing::warn!(volume = %name, %error, "a Create nobody heard of could not be undone");
            }
        }
    }

    async fn mount_volume(
        &self,
        name: &VolumeName,
        id: &str,
        deadline: Instant,
    ) -> Result<std::path::PathBuf, DriverError> {
        if id.is_empty() {
            return Err(DriverError::NoId);
        }
        let last_try = deadline.checked_sub(MARGIN).unwrap_or(deadline);
        let _lock = self.locks.lock(name).await;
        let mut pause = FIRST_PAUSE;
        let mut before = None;
        loop {
            let tried = self.try_mount(name, id, last_try);
            let tried = tokio::time::timeout_at((last_try + MARGIN / 2).into(), tried).await;
            let error = match tried {
                // The share fell silent in the middle of the last try, perhaps after the claim.
                Err(_) => {
                    self.cluster.changed.notify_one();
                    return Err(before.unwrap_or_else(|| DriverError::Late(name.clone())));
                }
                Ok(Err(error)) => error,
                Ok(Ok(mountpoint)) => {
                    self.fresh
                        .lock()
                        .unwrap_or_else(PoisonError::into_inner)
                        .remove(name);
                    return Ok(mountpoint);
                }
            };
            if !error.is_transient() || Instant::now() + pause >= last_try {
                return Err(error);
            }
            tracing::warn!(volume = %name, %error, "mount failed; trying again until the deadline");
            before = Some(error);
            tokio::time::sleep(pause).await;
            pause = (pause * 2).min(LAST_PAUSE);
        }
    }

    #[tracing::instrument(level = "debug", skip_all)]
    async fn try_mount(
        &self,
        name: &VolumeName,
        id: &str,
        deadline: Instant,
    ) -> Result<std::path::PathBuf, DriverError> {
        let record = self.find(name).await?;
        let record = record.ok_or_else(|| DriverError::Absent(name.clone()))?;
        let share = self.catalog.share_of(&record.options)?.clone();
        let (record, home) = self.current(record, &share).await?;
        // Whoever made the record: its host may allow more than this one.
        self.check_allowed(&record.options, &record.data_dir)?;
        let share = self.catalog.share_of(&record.options)?.clone();
        let fence = self.hold(home.as_ref(), &record, deadline).await?;
        let mountpoint = self.mount_held(&record, &share, id, fence, deadline).await;
        if mountpoint.is_err() {
            self.let_go(name).await;
        }
        self.cluster.changed.notify_one();
        mountpoint
    }

    /// Mounts a volume that the other hosts know this one to hold.
    async fn mount_held(
        &self,
        record: &Record,
        share: &Share,
        id: &str,
        fence: Option<Right>,
        deadline: Instant,
    ) -> Result<std::path::PathBuf, DriverError> {
        let name = &record.name;
        let contact = self.contact(share, &record.options);
        let reached = contact.reach().await?;
        let on = self.admin(&contact).await?;
        // The kernel looks for the data directory anyway, and says whether it is there.
        if self.paths.choose_for(&record.options)?.path == DataPath::Fuse {
            Catalog::ready(&on, record).await?;
        }
        fail::fail_point!("mount.ready", |_| crate::failpoint::die());
        let options = self.mount_options(&record.options);
        let attach = || {
            let options = options.clone();
            self.paths
                .attach(record, share, &reached, options, fence, deadline)
        };
        let attached = match attach().await {
            Err(DriverError::Mount(MountError::DataDirMissing { .. })) => {
                Catalog::ready(&on, record).await?;
                attach().await
            }
            // The server has changed its mind since it was reached: asked again, it says why.
            Err(refused @ DriverError::Mount(MountError::Refused { .. })) => {
                Catalog::ready(&on, record).await?;
                Err(refused)
            }
            attached => attached,
        };
        let how = attached.inspect_err(|_| contact.doubt())?;
        if fence.is_some() && how.data_path == DataPath::Fuse {
            self.prolong_one(name).await;
        }
        if let Some(fence) = fence.filter(|_| how.data_path == DataPath::Kernel)
            && let Err(error) = self.guard(name, fence).await
        {
            self.paths.detach(name, Duration::ZERO).await?;
            return Err(error);
        }
        fail::fail_point!("mount.attached", |_| crate::failpoint::die());
        let mountpoint = how.mountpoint.clone();
        if let Err(source) = self.attachments.add(name, how.clone(), id) {
            if self.attachments.get(name).is_none() {
                self.paths.detach(name, Duration::ZERO).await?;
            }
            return Err(DriverError::State {
                what: "writing the attachment",
                source,
            });
        }
        fail::fail_point!("mount.written", |_| crate::failpoint::die());
        Ok(mountpoint)
    }

    /// The record as the home share has it now. A volume whose data is on another share is not
    /// held up by the home share's troubles, unless it is exclusive: only its word that the volume
    /// is gone counts.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn current(
        &self,
        record: Arc<Record>,
        share: &Share,
    ) -> Result<(Arc<Record>, Option<Admin>), DriverError> {
        let Some(contact) = self.home_contact() else {
            return Ok((record, None));
        };
        let name = record.name.clone();
        let fetch = async {
            let home = self.admin(&contact).await?.scoped();
            Ok::<_, DriverError>((self.catalog.revalidate(&home, &name).await?, home))
        };
        // The right to an exclusive volume is on the home share, so its Mount waits for that one.
        let is_exclusive = record.options.access == Access::Exclusive;
        let waits = (is_exclusive && !mutant::is_on(Mutant::ExclusiveWaitsNoLonger))
            || *share == contact.share;
        let fetched = if waits {
            fetch.await
        } else if contact.is_down() {
            return Ok((record, None));
        } else {
            match tokio::time::timeout(HOME_WAIT, fetch).await {
                Ok(Ok(fetched)) => Ok(fetched),
                // Asked again when it has answered a poll: one Mount waits for it, not each.
                Ok(Err(_)) | Err(_) => {
                    contact.heard(false);
                    return Ok((record, None));
                }
            }
        };
        match fetched? {
            (Some(record), home) => Ok((record, Some(home))),
            (None, _) => Err(DriverError::Absent(name)),
        }
    }

    async fn unmount_volume(&self, name: &VolumeName, id: &str) -> Result<(), DriverError> {
        let _lock = self.locks.lock(name).await;
        let Some(held) = self.attachments.get(name) else {
            return Ok(());
        };
        let last = held.attachments.iter().filter(|a| a.id != id).count() == 0
            && held.attachments.len() == 1;
        // Unmounted first: after a crash in between, the attachment is still there to be let go.
        if last {
            let detached = self.paths.detach(name, self.config.flush_wait).await;
            if detached.is_err() && !mutant::is_on(Mutant::FailedUnmountStays) {
                // Docker does not ask again; `settle` and `reconcile` do.
                self.attachments.remove(name, id);
                self.cluster.changed.notify_one();
            }
            detached?;
            fail::fail_point!("unmount.detached", |_| crate::failpoint::die());
        }
        self.attachments.remove(name, id);
        fail::fail_point!("unmount.forgotten", |_| crate::failpoint::die());
        if last {
            self.let_go(name).await;
        }
        self.cluster.changed.notify_one();
        Ok(())
    }

    async fn remove_volume(&self, name: &VolumeName) -> Result<(), DriverError> {
        let _lock = self.locks.lock(name).await;
        let home = self.scoped_home().await?;
        let known = match &home {
            // What may be deleted is asked of the share, whatever the local copy says.
            Some(home) => self.catalog.fetch(home, name).await?,
            None => self.catalog.get(name),
        };
        self.fresh
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        let Some(record) = known else { return Ok(()) };
        self.check_free(&record).await?;
        let together = self.together();
        let on = together.data_to_move(home.as_ref(), &record).await?;
        // Also without an attachment: a Mount that a crash interrupted may have left a mount.
        self.paths.detach(name, self.config.flush_wait).await?;
        self.attachments.retain(name, |_| false);
        fail::fail_point!("remove.detached", |_| crate::failpoint::die());
        self.let_go(name).await;
        self.cluster.changed.notify_one();
        let removed = self.together();
        let entry = removed.remove(home.as_ref(), on.as_ref(), &record).await?;
        fail::fail_point!("remove.forgotten", |_| crate::failpoint::die());
        self.watch.trash_changed();
        if let Some(entry) = entry {
            self.purge_later(home, on, entry);
        }
        Ok(())
    }

    /// Deletes a trash entry without making the caller wait; a sweep finishes what fails.
    fn purge_later(&self, home: Option<Admin>, on: Option<Admin>, entry: String) {
        tokio::spawn(async move {
            if let Err(error) = Catalog::purge_both(home.as_ref(), on.as_ref(), &entry).await {
                tracing::warn!(entry, %error, "not deleted yet; the next sweep goes on");
            }
        });
    }

    /// Where a volume is mounted now.
    fn mountpoint(&self, name: &VolumeName) -> Option<std::path::PathBuf> {
        self.attachments.get(name).map(|held| held.how.mountpoint)
    }
}

#[cfg(test)]
mod tests;
