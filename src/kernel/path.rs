//! The kernel data path: one NFS mount per share and options, one bind per volume.
//!
//! ```text
//! <root>/shares/<hash of share and options>    the share, mounted when first needed
//! <root>/shares/own.<name>                     the same, of an exclusive volume alone
//! <root>/volumes/<name>                        a bind of the volume's data directory
//! ```
//!
//! Invariants: nothing is remembered that /proc/self/mountinfo does not show, so a process that
//! was killed is continued by the next one; a volume's mount point shows either nothing or the
//! right directory; no async thread ever makes a call that may wait for a server, and what waits
//! is limited to a few threads per share (see `lane`).
//!
//! A share that is stale (ESTALE: the server was given another file system) is detached lazily
//! and mounted anew for the attachments that follow. Containers keep what they hold; the driver
//! finds them with [`crate::sys::holders`]. The propagation of the mount root is left as the host has
//! it: on a host whose `/` is shared the mounts are seen in every namespace that follows it.

use std::collections::HashMap;
use std::net::IpAddr;
use std::os::fd::{AsFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::sync::atomic::Ordering;
use std::time::{Duration, Instant};

use rustix::fs::{CWD, Mode, OFlags, openat};
use rustix::io::Errno;
use rustix::mount::{FsOpenFlags, fsconfig_create, fsopen};

use super::bind;
use super::error::{MountError, Step};
use super::lane::Ticket;
use super::own::own_key;
use super::share::{self, ShareMount};
use super::shares::{Round, ShareState, Shares, UNMOUNT_WAIT, local, share_key, until};
use super::stats::{self, MountStats};
use super::sys::{Aside, Call};
use crate::sys::holders::Mark;
use crate::sys::mountinfo::{DeviceId, MountEntry};
use crate::volume::{MountOptions, VolumeName};
use nfs::address::{Share, SharePath};

/// How long a share whose server has moved to another address may take to answer from the old one.
const MOVED_WAIT: Duration = Duration::from_secs(10);
/// A share that was found stale or gone is mounted again at most this often within one call.
const ROUNDS: usize = 3;
/// Between two tries to unmount what is busy.
const BUSY_PAUSE: Duration = Duration::from_millis(50);

/// Settings of the kernel data path.
#[derive(Debug, Clone)]
pub struct KernelSettings {
    /// How long a share that no volume uses stays mounted.
    pub idle_unmount: Duration,
    /// Read-ahead in KiB; `None` for 15 times the negotiated read size, 0 to leave the kernel's.
    pub read_ahead_kib: Option<u32>,
}

impl Default for KernelSettings {
    fn default() -> Self {
        Self {
            idle_unmount: Duration::from_secs(60),
            read_ahead_kib: None,
        }
    }
}

/// Where a share's server was reached, as the probe found out before any mount.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Endpoint {
    pub addr: IpAddr,
    pub nfs_port: u16,
    /// The port of mountd for NFSv3; `None` leaves it to the kernel to ask the port mapper.
    pub mount_port: Option<u16>,
    /// Whether the server answers NFSv3.
    pub v3: bool,
    /// Whether the server answers NFSv4.
    pub v4: bool,
}

/// What is to be attached.
#[derive(Debug, Clone)]
pub struct Attach {
    pub volume: VolumeName,
    pub share: Share,
    pub endpoint: Endpoint,
    pub options: MountOptions,
    /// The data directory below the share.
    pub dir: SharePath,
    pub readonly: bool,
    /// For an exclusive volume: by a superblock of its own, whose writes can be thrown away
    /// without touching those of other volumes.
    pub own: bool,
}

/// An attached volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Attached {
    pub mountpoint: PathBuf,
    /// The negotiated version: `4.2`.
    pub nfs_version: String,
    /// The address that the share is mounted from.
    pub addr: Option<IpAddr>,
    /// As mountinfo shows it in every namespace that holds the volume; see [`Mark::Source`].
    pub source: String,
    /// What a user should know: locks that stay on this host, and the like.
    pub warnings: Vec<String>,
}

/// A detached volume.
#[derive(Debug)]
pub struct Detached {
    /// Whether there was anything to take away.
    pub was_mounted: bool,
    /// Why not everything is known to have reached the server, if so.
    pub unflushed: Option<MountError>,
}

/// A volume that is mounted at its place, by mountinfo.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct MountedVolume {
    pub volume: VolumeName,
    pub source: String,
    pub fstype: String,
    /// Of the mount and of the superblock, in this order.
    pub options: String,
    pub dev: DeviceId,
}

impl MountedVolume {
    /// By what other mounts of this volume are known.
    #[must_use]
    pub fn held(&self) -> Mark {
        if self.fstype.starts_with("nfs") {
            Mark::Source(self.source.clone())
        } else {
            Mark::Device(self.dev)
        }
    }
}

/// What one NFS mount has carried, for all volumes that are binds of it.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ShareTraffic {
    pub dev: DeviceId,
    pub stats: MountStats,
}

/// Whether a volume's mount answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Health {
    Ok,
    NotMounted,
    /// The server no longer knows the directory (ESTALE): it was removed, or the export replaced.
    Stale,
    /// No answer in time.
    Hung,
    Failed(Errno),
}

/// The kernel data path below one mount root. Cheap to clone.
#[derive(Debug, Clone)]
pub struct KernelPath(pub(super) Arc<Shares>);

impl KernelPath {
    /// Prepares the directories below a mount root; mounts nothing.
    ///
    /// # Errors
    /// [`MountError::Local`] when the directories cannot be made.
    pub fn new(mount_root: &Path, settings: KernelSettings) -> Result<Self, MountError> {
        let failed = |source| MountError::Local {
            step: Step::MountShare,
            what: format!("making the mount root {}", mount_root.display()),
            source,
        };
        for name in ["shares", "volumes"] {
            std::fs::create_dir_all(mount_root.join(name)).map_err(failed)?;
        }
        // mountinfo shows real paths.
        let root = mount_root.canonicalize().map_err(failed)?;
        Ok(Self(Arc::new(Shares::new(&root, settings))))
    }

    /// Whether this kernel has an NFS client, loading its module if there is one.
    ///
    /// # Errors
    /// [`MountError::NoKernelNfs`], which says what is missing.
    pub fn kernel_has_nfs() -> Result<(), MountError> {
        let listed = || {
            std::fs::read_to_string("/proc/filesystems").is_ok_and(|text| {
                text.lines()
                    .any(|line| matches!(line.trim_start_matches("nodev").trim(), "nfs" | "nfs4"))
            })
        };
        // Asking for the file system makes the kernel load its module.
        match fsopen("nfs", FsOpenFlags::FSOPEN_CLOEXEC) {
            // In a user namespace (an unprivileged container) a context can be had, and no mount. Of one
            // without a source the kernel asks no server: it refuses the caller (EPERM), or the context.
            Ok(context) => match fsconfig_create(&context) {
                Err(Errno::PERM) => Err(share::no_permission()),
                _ => Ok(()),
            },
            Err(_) if listed() => Ok(()),
            Err(Errno::PERM) => Err(share::no_permission()),
            Err(_) => Err(share::no_nfs()),
        }
    }

    /// Where a volume is, or would be, mounted.
    #[must_use]
    pub fn mountpoint(&self, volume: &VolumeName) -> PathBuf {
        self.0.volumes.join(volume.as_str())
    }

    /// Where shares are mounted.
    #[must_use]
    pub fn shares_dir(&self) -> PathBuf {
        self.0.shares.clone()
    }

    /// The volumes that are mounted at their places, of any file system type.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn mounted(&self) -> Result<Vec<MountedVolume>, MountError> {
        let info = self.0.mountinfo()?;
        let mut volumes: HashMap<VolumeName, MountedVolume> = HashMap::new();
        for entry in info.entries {
            let Some(volume) = self.0.volume_at(&entry) else {
                continue;
            };
            // Of stacked mounts the last one is seen.
            volumes.insert(
                volume.clone(),
                MountedVolume {
                    volume,
                    options: format!("{},{}", entry.options, entry.super_options),
                    source: entry.source,
                    fstype: entry.fstype,
                    dev: entry.device,
                },
            );
        }
        let mut volumes: Vec<_> = volumes.into_values().collect();
        volumes.sort_by(|a, b| a.volume.cmp(&b.volume));
        Ok(volumes)
    }

    /// What the NFS mounts below the mount root have carried. Asks no server.
    ///
    /// # Errors
    /// When /proc cannot be read.
    pub fn traffic(&self) -> Result<Vec<ShareTraffic>, MountError> {
        let info = self.0.mountinfo()?;
        let text = std::fs::read_to_string("/proc/self/mountstats").map_err(|source| {
            MountError::Local {
                step: Step::Check,
                what: "reading /proc/self/mountstats".to_owned(),
                source,
            }
        })?;
        let mut found: Vec<ShareTraffic> = Vec::new();
        for stats in stats::parse(&text) {
            let place = Path::new(&stats.mountpoint);
            let Some(entry) = info.at(place).filter(|_| place.starts_with(&self.0.shares)) else {
                continue;
            };
            // Two mounts of one superblock have the same figures.
            if found.iter().all(|known| known.dev != entry.device) {
                let dev = entry.device;
                found.push(ShareTraffic { dev, stats });
            }
        }
        Ok(found)
    }

    /// Mounts a volume at its place; if it is there already, says so and changes nothing.
    ///
    /// The server must have been reached before, and the data directory made. What is not
    /// complete at the deadline is undone.
    ///
    /// # Errors
    /// See [`MountError`]; [`MountError::DataDirMissing`] when the directory is not there.
    pub async fn attach(&self, request: Attach, deadline: Instant) -> Result<Attached, MountError> {
        let _volume = self.0.lock_volume(&request.volume, deadline).await?;
        let key = if request.own {
            own_key(&request.volume)
        } else {
            share_key(&request.share, &request.options)
        };
        let request = Arc::new(request);
        for _ in 0..ROUNDS {
            let state = self.0.state(&key, &request.share.to_string());
            state.touch();
            let moved = self.0.moved(&key, &state, request.endpoint.addr)?;
            let patience = if moved {
                deadline.min(Instant::now() + MOVED_WAIT)
            } else {
                deadline
            };
            let round = match self.bind(&state, &key, &request, patience).await {
                Err(error) if moved && error.is_unresponsive() => {
                    self.0.set_aside(&key, &state).await;
                    continue;
                }
                round => round?,
            };
            match round {
                Round::Bound(entry) => {
                    state.touch();
                    state.bound_from(entry.addr());
                    return Ok(self.attached(&request, &entry, state.warnings()));
                }
                Round::NotMounted => {
                    self.mount_share(&state, &key, &request, None, deadline)
                        .await?;
                }
                Round::Stale(id) => {
                    tracing::warn!(share = %request.share, "stale; mounting it anew");
                    self.mount_share(&state, &key, &request, Some(id), deadline)
                        .await?;
                }
            }
        }
        Err(MountError::Stale {
            share: request.share.clone(),
        })
    }

    fn attached(
        &self,
        request: &Attach,
        share: &MountEntry,
        mut warnings: Vec<String>,
    ) -> Attached {
        let version = share.super_option("vers").unwrap_or("unknown").to_owned();
        if version == "3" && request.options.lock_word() == Some("nolock") {
            warnings.push(
                "NFSv3 without a lock manager: file locks hold between the containers of this \
                 host only; use NFSv4, or -o options=lock with rpc.statd on the host"
                    .to_owned(),
            );
        }
        for (name, asked) in request.options.of_the_first_mount() {
            let effective = share.super_option(name).unwrap_or("1");
            if effective != asked {
                warnings.push(format!(
                    "{name}={effective} is in effect in place of {asked}: the kernel goes by the \
                     first mount of this server"
                ));
            }
        }
        if request.options.is_soft() {
            warnings.push(
                "soft mount: a write can be lost when the server does not answer in time"
                    .to_owned(),
            );
        }
        Attached {
            mountpoint: self.mountpoint(&request.volume),
            nfs_version: version,
            addr: share.addr(),
            source: share::source(&request.share, request.endpoint.addr, &request.dir),
            warnings,
        }
    }

    #[tracing::instrument(level = "debug", skip_all)]
    async fn bind(
        &self,
        state: &ShareState,
        key: &str,
        request: &Arc<Attach>,
        deadline: Instant,
    ) -> Result<Round, MountError> {
        let _mounted = until(
            deadline,
            &request.share,
            Step::OpenDirectory,
            state.lock.read(),
        )
        .await?;
        let (inner, request) = (self.0.clone(), request.clone());
        let place = self.0.shares.join(key);
        state
            .calls
            .run(Step::OpenDirectory, deadline, move |ticket| {
                inner.bind(&place, &request, ticket)
            })
            .await
    }

    /// Mounts a share, unless another call has done so meanwhile. `stale` is the id of a mount to
    /// be put out of the way first.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn mount_share(
        &self,
        state: &Arc<ShareState>,
        key: &str,
        request: &Arc<Attach>,
        stale: Option<u64>,
        deadline: Instant,
    ) -> Result<(), MountError> {
        let _alone = until(
            deadline,
            &request.share,
            Step::MountShare,
            state.lock.write(),
        )
        .await?;
        let (inner, request) = (self.0.clone(), request.clone());
        let place = self.0.shares.join(key);
        let of = state.clone();
        state
            .calls
            .run(Step::MountShare, deadline, move |ticket| {
                let mount = ShareMount {
                    share: &request.share,
                    endpoint: request.endpoint,
                    options: &request.options,
                    target: &place,
                };
                inner.mount_share(&mount, &of, stale, ticket)
            })
            .await
    }

    /// Mounts a share for directory operations, not for a volume, and says where. It stays until
    /// [`shutdown`](Self::shutdown).
    ///
    /// # Errors
    /// See [`MountError`].
    pub async fn mount_for_admin(
        &self,
        share: &Share,
        endpoint: Endpoint,
        options: MountOptions,
        deadline: Instant,
    ) -> Result<PathBuf, MountError> {
        let key = share_key(share, &options);
        let place = self.0.shares.join(&key);
        let state = self.0.state(&key, &share.to_string());
        let _alone = until(deadline, share, Step::MountShare, state.lock.write()).await?;
        let (inner, share, target) = (self.0.clone(), share.clone(), place.clone());
        let of = state.clone();
        state
            .calls
            .run(Step::MountShare, deadline, move |ticket| {
                let mount = ShareMount {
                    share: &share,
                    endpoint,
                    options: &options,
                    target: &target,
                };
                let old = inner.mountinfo()?.at(&target).cloned();
                let stale = old.filter(|entry| {
                    let asked = bind::open_root(entry).and_then(bind::revalidate);
                    asked.is_err_and(|errno| errno == Errno::STALE)
                });
                inner.mount_share(&mount, &of, stale.map(|entry| entry.id), ticket)
            })
            .await?;
        state.pinned.store(true, Ordering::Relaxed);
        Ok(place)
    }

    /// Takes a volume's mount away, first writing back what is not yet on the server, for at most
    /// `flush`. Succeeds when nothing is mounted. Containers that still hold the volume keep it.
    ///
    /// # Errors
    /// When the kernel refuses to unmount, or does not answer.
    #[tracing::instrument(level = "debug", skip_all)]
    pub async fn detach(
        &self,
        volume: &VolumeName,
        flush: Duration,
    ) -> Result<Detached, MountError> {
        let deadline = Instant::now() + flush + UNMOUNT_WAIT;
        let _volume = self.0.lock_volume(volume, deadline).await?;
        let place = self.mountpoint(volume);
        let info = self.0.mountinfo()?;
        let Some(entry) = info.at(&place) else {
            let _ = std::fs::remove_dir(&place);
            return Ok(Detached {
                was_mounted: false,
                unflushed: None,
            });
        };
        let key = self.0.share_of(&info, entry);
        let state = self
            .0
            .state(key.as_deref().unwrap_or(&entry.source), &entry.source);
        let unflushed = self.flush(&state, volume, &place, flush).await.err();
        if let Some(error) = &unflushed {
            tracing::warn!(%volume, %error, "not everything is known to be on the server");
        }
        fail::fail_point!("unmount.flushed", |_| crate::failpoint::die());
        let target = place.clone();
        let unmounted = state
            .unmounts
            .run(Step::Unmount, Instant::now() + UNMOUNT_WAIT, move |_| {
                match bind::take_away(&target, false) {
                    Err(Errno::BUSY) => bind::take_away(&target, true),
                    result => result,
                }
                .map_err(|errno| local(Step::Unmount, &target, errno))
            })
            .await;
        if let Err(error) = unmounted {
            // The last unmount of a superblock may wait for the server after the mount has gone.
            if self.0.mountinfo()?.at(&place).is_some() {
                return Err(error);
            }
        }
        fail::fail_point!("unmount.taken", |_| crate::failpoint::die());
        let _ = std::fs::remove_dir(&place);
        if let Some(key) = key {
            state.touch();
            self.unmount_when_idle(key);
        }
        Ok(Detached {
            was_mounted: true,
            unflushed,
        })
    }

    pub(super) async fn flush(
        &self,
        state: &ShareState,
        volume: &VolumeName,
        place: &Path,
        flush: Duration,
    ) -> Result<(), MountError> {
        let (place, volume) = (place.to_owned(), volume.clone());
        let call = move |_: &Ticket| {
            let directory = OFlags::RDONLY | OFlags::DIRECTORY | OFlags::CLOEXEC;
            openat(CWD, &place, directory, Mode::empty())
                .and_then(sync)
                .map_err(|errno| MountError::Volume {
                    volume,
                    what: "writing back",
                    errno,
                    hint: "compare what the applications wrote last with what is on the server",
                })
        };
        state
            .flushes
            .run(Step::Flush, Instant::now() + flush, call)
            .await
    }

    /// Asks a volume's mount for an answer from the server.
    ///
    /// # Errors
    /// When /proc cannot be read; all else is [`Health`].
    pub async fn check(&self, volume: &VolumeName, within: Duration) -> Result<Health, MountError> {
        let info = self.0.mountinfo()?;
        let Some(entry) = info.at(&self.mountpoint(volume)) else {
            return Ok(Health::NotMounted);
        };
        let key = self.0.share_of(&info, entry);
        let state = self
            .0
            .state(key.as_deref().unwrap_or(&entry.source), &entry.source);
        let entry = entry.clone();
        let call = move |_: &Ticket| {
            bind::open_root(&entry)
                .and_then(bind::revalidate)
                .map(drop)
                .map_err(|errno| local(Step::Check, &entry.mountpoint, errno))
        };
        Ok(
            match state
                .calls
                .run(Step::Check, Instant::now() + within, call)
                .await
            {
                Ok(()) => Health::Ok,
                Err(error) if error.is_unresponsive() => Health::Hung,
                Err(error) => match error.errno() {
                    Some(Errno::STALE) => Health::Stale,
                    // Unmounted since the look into mountinfo.
                    Some(Errno::NODEV) => Health::NotMounted,
                    errno => Health::Failed(errno.unwrap_or(Errno::IO)),
                },
            },
        )
    }

    /// Unmounts, now, every share that no volume of this host uses; answers those that a call
    /// under way, or somebody else, keeps busy.
    pub async fn unmount_idle(&self) -> Vec<String> {
        let mut busy = Vec::new();
        let shares = self.0.mountinfo().map(|info| self.0.mounted_shares(&info));
        for key in shares.unwrap_or_default() {
            match self.0.unmount_share(&key, Duration::ZERO).await {
                Ok(false) => {}
                Ok(true) => busy.push(key),
                Err(error) => busy.push(error.to_string()),
            }
        }
        busy
    }

    /// Unmounts what no volume uses, trying again for a while what is busy: calls that nobody
    /// waits for any more may still be on their way out. Mounted volumes stay: containers use
    /// them, and the next process finds them.
    pub async fn shutdown(&self) {
        let mut busy = Vec::new();
        let tries = async {
            loop {
                busy = self.unmount_idle().await;
                if busy.is_empty() {
                    return;
                }
                tokio::time::sleep(BUSY_PAUSE).await;
            }
        };
        if tokio::time::timeout(2 * UNMOUNT_WAIT, tries).await.is_err() {
            tracing::warn!(?busy, "some idle shares are left mounted");
        }
    }

    fn unmount_when_idle(&self, key: String) {
        let inner = Arc::downgrade(&self.0);
        let idle = self.0.settings.idle_unmount;
        tokio::spawn(async move {
            tokio::time::sleep(idle).await;
            if let Some(inner) = inner.upgrade()
                && let Err(error) = inner.unmount_share(&key, idle).await
            {
                tracing::info!(share = key, %error, "idle share stays mounted");
            }
        });
    }
}

/// Writes back what a file system has, in a process that may have to wait for ever.
fn sync(root: OwnedFd) -> Result<(), Errno> {
    let started = Aside::start(Call::Sync, root.as_fd());
    // From here on that process alone keeps the file system busy.
    drop(root);
    let started = started.map_err(|error| Errno::from_io_error(&error).unwrap_or(Errno::IO))?;
    started.wait(None)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn what_is_not_mounted_is_detached_with_success() {
        let root = tempfile::tempdir().unwrap();
        let path = KernelPath::new(root.path(), KernelSettings::default()).unwrap();
        let db: VolumeName = "db".parse().unwrap();
        assert_eq!(path.mounted().unwrap(), []);
        let detached = path.detach(&db, Duration::ZERO).await.unwrap();
        assert!(!detached.was_mounted && detached.unflushed.is_none());
        assert_eq!(
            path.check(&db, Duration::from_secs(1)).await.unwrap(),
            Health::NotMounted
        );
        assert!(path.0.is_unlocked());
    }
}
