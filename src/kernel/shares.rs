//! The share mounts below a mount root: their state in this process, and the calls on them that
//! may wait for a server. `kernel` decides when; here is how.

use std::collections::HashMap;
use std::collections::hash_map::Entry;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use rustix::mount::MountAttrFlags;
use tokio::sync::RwLock;

use super::bind::{self, WalkError};
use super::error::{MountError, Step};
use super::lane::{Lane, Ticket};
use super::own::is_own_key;
use super::path::{Attach, KernelSettings};
use super::share::{self, ShareMount};
use crate::sys::mountinfo::{MountEntry, MountInfo};
use crate::volume::{MountOptions, VolumeName};
use nfs::address::{Share, SharePath};

/// How long one unmount is waited for. It does not wait for the server, except the last one of a
/// superblock, whose mount is gone from its place by then.
pub(super) const UNMOUNT_WAIT: Duration = Duration::from_secs(5);
/// The share of the read size that is read ahead: the kernel's own factor before Linux 5.4, and
/// what nfsrahead(5) was made to bring back.
const READ_AHEAD_FACTOR: u32 = 15;

#[derive(Debug)]
pub(super) struct Shares {
    /// Where the shares are mounted.
    pub(super) shares: PathBuf,
    /// Where the volumes are mounted.
    pub(super) volumes: PathBuf,
    pub(super) settings: KernelSettings,
    states: Mutex<HashMap<String, Arc<ShareState>>>,
    locks: Mutex<HashMap<VolumeName, Arc<tokio::sync::Mutex<()>>>>,
}

/// What this process has under way on one share mount.
#[derive(Debug)]
pub(super) struct ShareState {
    /// Written while the share is mounted or unmounted, read while volumes are bound.
    pub(super) lock: RwLock<()>,
    pub(super) calls: Arc<Lane>,
    /// Apart from `calls`: writing back much data is slow, not stuck.
    pub(super) flushes: Arc<Lane>,
    pub(super) unmounts: Arc<Lane>,
    last_used: Mutex<Instant>,
    /// The address that volumes were last bound from.
    addr: Mutex<Option<IpAddr>>,
    /// What users of its volumes should know.
    warnings: Mutex<Vec<String>>,
    /// Whether the driver itself works on this mount, volumes or not.
    pub(super) pinned: AtomicBool,
}

impl ShareState {
    fn new(name: &str) -> Arc<Self> {
        Arc::new(Self {
            lock: RwLock::default(),
            calls: Lane::new(name),
            flushes: Lane::new(name),
            unmounts: Lane::patient(name),
            last_used: Mutex::new(Instant::now()),
            addr: Mutex::default(),
            warnings: Mutex::default(),
            pinned: AtomicBool::new(false),
        })
    }

    pub(super) fn touch(&self) {
        *lock(&self.last_used) = Instant::now();
    }

    /// What users of its volumes should know, since it was mounted by this process.
    pub(super) fn warnings(&self) -> Vec<String> {
        lock(&self.warnings).clone()
    }

    pub(super) fn bound_from(&self, addr: Option<IpAddr>) {
        *lock(&self.addr) = addr;
    }
}

/// The maps and times behind these locks are never left half changed.
pub(super) fn lock<T>(mutex: &Mutex<T>) -> MutexGuard<'_, T> {
    mutex.lock().unwrap_or_else(PoisonError::into_inner)
}

/// How one round of attaching ended.
pub(super) enum Round {
    Bound(Box<MountEntry>),
    NotMounted,
    /// The share of this mount id is stale.
    Stale(u64),
}

impl Shares {
    pub(super) fn new(root: &Path, settings: KernelSettings) -> Self {
        Self {
            shares: root.join("shares"),
            volumes: root.join("volumes"),
            settings,
            states: Mutex::default(),
            locks: Mutex::default(),
        }
    }

    /// Whether no call is under way on any volume.
    #[cfg(test)]
    pub(super) fn is_unlocked(&self) -> bool {
        lock(&self.locks).is_empty()
    }

    pub(super) fn mountinfo(&self) -> Result<MountInfo, MountError> {
        let root = self.volumes.parent().unwrap_or(&self.volumes);
        MountInfo::read_below(root).map_err(|source| MountError::Local {
            step: Step::Check,
            what: "reading /proc/self/mountinfo".to_owned(),
            source,
        })
    }

    pub(super) fn volume_at(&self, entry: &MountEntry) -> Option<VolumeName> {
        let name = entry.mountpoint.strip_prefix(&self.volumes).ok()?;
        name.to_str()?.parse().ok()
    }

    /// The names of the share mounts below the mount root.
    pub(super) fn mounted_shares(&self, info: &MountInfo) -> Vec<String> {
        let name = |entry: &MountEntry| {
            Some(
                entry
                    .mountpoint
                    .strip_prefix(&self.shares)
                    .ok()?
                    .to_str()?
                    .to_owned(),
            )
        };
        let mut names: Vec<String> = info.entries.iter().filter_map(name).collect();
        names.sort_unstable();
        names.dedup();
        names
    }

    /// The share mount that a volume's mount was made from.
    pub(super) fn share_of(&self, info: &MountInfo, volume: &MountEntry) -> Option<String> {
        self.mounted_shares(info).into_iter().find(|name| {
            info.at(&self.shares.join(name))
                .is_some_and(|share| stems_from(volume, share))
        })
    }

    pub(super) fn state(&self, key: &str, name: &str) -> Arc<ShareState> {
        let mut states = lock(&self.states);
        match states.get(key) {
            Some(state) => state.clone(),
            None => {
                let state = ShareState::new(name);
                states.insert(key.to_owned(), state.clone());
                state
            }
        }
    }

    pub(super) async fn lock_volume(
        &self,
        volume: &VolumeName,
        deadline: Instant,
    ) -> Result<VolumeLock<'_>, MountError> {
        let mutex = lock(&self.locks).entry(volume.clone()).or_default().clone();
        let guard = tokio::time::timeout_at(deadline.into(), mutex.lock_owned()).await;
        // Made in both cases: dropping it takes the entry out of the map.
        let held = VolumeLock {
            shares: self,
            volume: volume.clone(),
            guard: guard.ok(),
        };
        if held.guard.is_some() {
            Ok(held)
        } else {
            Err(MountError::Volume {
                volume: volume.clone(),
                what: "waiting for an earlier call on it",
                errno: Errno::TIMEDOUT,
                hint: "the call can be repeated",
            })
        }
    }

    /// Whether a share's server has another address now than the one it is mounted from.
    pub(super) fn moved(
        &self,
        key: &str,
        state: &ShareState,
        addr: IpAddr,
    ) -> Result<bool, MountError> {
        if *lock(&state.addr) == Some(addr) {
            return Ok(false);
        }
        let info = self.mountinfo()?;
        let mounted = info.at(&self.shares.join(key)).and_then(MountEntry::addr);
        Ok(mounted.is_some_and(|old| old != addr))
    }

    /// Detaches a share whose server has moved away, and forgets the calls that wait for it.
    pub(super) async fn set_aside(&self, key: &str, state: &Arc<ShareState>) {
        tracing::warn!(
            share = key,
            "the server has another address; mounting it from there"
        );
        let place = self.shares.join(key);
        let gone = state
            .unmounts
            .run(Step::Unmount, Instant::now() + UNMOUNT_WAIT, move |_| {
                bind::take_away(&place, true).map_err(|errno| local(Step::Unmount, &place, errno))
            });
        if let Err(error) = gone.await {
            tracing::warn!(%error, "the old mount of a share");
        }
        if let Entry::Occupied(entry) = lock(&self.states).entry(key.to_owned())
            && Arc::ptr_eq(entry.get(), state)
        {
            entry.remove();
        }
    }

    /// On a thread: opens the data directory and binds it.
    pub(super) fn bind(
        &self,
        share: &Path,
        request: &Attach,
        ticket: &Ticket,
    ) -> Result<Round, MountError> {
        let info = self.mountinfo()?;
        let Some(entry) = info.at(share) else {
            return Ok(Round::NotMounted);
        };
        if entry.source != share::source(&request.share, request.endpoint.addr, &SharePath::root())
        {
            return Ok(Round::Stale(entry.id)); // not ours, or an embedded server that has moved
        }
        let root = match bind::open_root(entry) {
            Ok(root) => root,
            Err(Errno::STALE) => return Ok(Round::Stale(entry.id)),
            Err(Errno::NODEV) => return Ok(Round::NotMounted),
            Err(errno) => return Err(directory(request, SharePath::root(), errno)),
        };
        let opened = match bind::open_below(root, &request.dir, ticket.deadline()) {
            Ok(opened) => opened,
            Err(WalkError::Stale) => return Ok(Round::Stale(entry.id)),
            Err(error) => return Err(refused(request, error)),
        };
        let mut attributes = request.options.attributes();
        if request.readonly {
            attributes |= MountAttrFlags::MOUNT_ATTR_RDONLY;
        }
        let target = self.volumes.join(request.volume.as_str());
        if let Some(old) = info.at(&target) {
            if bind::shows(old, &opened, attributes) {
                return Ok(Round::Bound(Box::new(entry.clone())));
            }
            tracing::warn!(volume = %request.volume, "replacing an outdated mount of it");
            bind::take_away(&target, true).map_err(|errno| local(Step::Bind, &target, errno))?;
        }
        bind::place(&opened, &target, attributes, ticket)
            .map_err(|errno| local(Step::Bind, &target, errno))?;
        Ok(Round::Bound(Box::new(entry.clone())))
    }

    /// On a thread: mounts the share at its place.
    pub(super) fn mount_share(
        &self,
        mount: &ShareMount<'_>,
        state: &ShareState,
        stale: Option<u64>,
        ticket: &Ticket,
    ) -> Result<(), MountError> {
        let place = mount.target;
        match self.mountinfo()?.at(place) {
            Some(entry) if Some(entry.id) == stale => {
                bind::take_away(place, true)
                    .map_err(|errno| local(Step::MountShare, place, errno))?;
            }
            Some(_) => return Ok(()), // another call was first
            None => {}
        }
        let began = Instant::now();
        let mut warnings: Vec<String> = mount.mount(ticket)?.into_iter().collect();
        fail::fail_point!("mount.share", |_| crate::failpoint::die());
        let Some(entry) = self.mountinfo()?.at(place).cloned() else {
            return Ok(()); // taken away at once; the next round sees it
        };
        tracing::info!(
            share = %mount.share, addr = %mount.endpoint.addr,
            version = entry.super_option("vers"), milliseconds = began.elapsed().as_millis(),
            "share mounted"
        );
        for warning in &warnings {
            tracing::warn!(share = %mount.share, "{warning}");
        }
        warnings.extend(self.set_read_ahead(&entry).err());
        *lock(&state.warnings) = warnings;
        Ok(())
    }

    /// Sets how far the kernel reads ahead on a share, as nfsrahead(8) does.
    fn set_read_ahead(&self, entry: &MountEntry) -> Result<(), String> {
        let negotiated = || {
            let bytes: u32 = entry.super_option("rsize")?.parse().ok()?;
            Some(bytes / 1024 * READ_AHEAD_FACTOR)
        };
        let kib = match self.settings.read_ahead_kib {
            Some(kib) => kib,
            None => negotiated().unwrap_or(0),
        };
        if kib == 0 {
            return Ok(());
        }
        let file = format!("/sys/class/bdi/{}/read_ahead_kb", entry.device);
        std::fs::write(&file, kib.to_string())
            .map_err(|error| format!("read-ahead stays at the kernel's default: {file}: {error}"))
    }

    /// Unmounts a share that no volume has used for `idle`; with zero, one that is pinned as well.
    /// Answers whether a call under way kept it from that.
    ///
    /// # Errors
    /// When the kernel refuses: something else is busy on the mount, or /proc cannot be read.
    pub(super) async fn unmount_share(
        self: &Arc<Self>,
        key: &str,
        idle: Duration,
    ) -> Result<bool, MountError> {
        let place = self.shares.join(key);
        let state = self.state(key, key);
        // An exclusive volume's goes with the volume.
        if is_own_key(key) {
            return Ok(false);
        }
        // Whoever has the lock is using the share.
        let Ok(_alone) = state.lock.try_write() else {
            return Ok(true);
        };
        let info = self.mountinfo()?;
        let Some(share) = info.at(&place) else {
            return Ok(false);
        };
        let used = info
            .entries
            .iter()
            .any(|entry| self.volume_at(entry).is_some() && stems_from(entry, share));
        let pinned = !idle.is_zero() && state.pinned.load(Ordering::Relaxed);
        if used || pinned || lock(&state.last_used).elapsed() < idle {
            return Ok(false);
        }
        // A thread that waits for a dead server keeps the mount busy; only a lazy one helps.
        let lazily = state.calls.stuck().is_some() || state.flushes.stuck().is_some();
        let target = place.clone();
        state
            .unmounts
            .run(Step::Unmount, Instant::now() + UNMOUNT_WAIT, move |_| {
                bind::take_away(&target, lazily)
                    .map_err(|errno| local(Step::Unmount, &target, errno))
            })
            .await?;
        let _ = std::fs::remove_dir(&place);
        tracing::info!(share = %share.source, "idle share unmounted");
        Ok(false)
    }
}

/// Held while a call works on a volume's mount; the last holder takes the lock out of the map.
#[derive(Debug)]
pub(super) struct VolumeLock<'a> {
    shares: &'a Shares,
    volume: VolumeName,
    guard: Option<tokio::sync::OwnedMutexGuard<()>>,
}

impl Drop for VolumeLock<'_> {
    fn drop(&mut self) {
        let mut locks = lock(&self.shares.locks);
        self.guard = None;
        if locks
            .get(&self.volume)
            .is_some_and(|mutex| Arc::strong_count(mutex) == 1)
        {
            locks.remove(&self.volume);
        }
    }
}

/// Whether a volume's mount is a bind of something below a share's mount.
fn stems_from(volume: &MountEntry, share: &MountEntry) -> bool {
    volume.device == share.device
        && volume
            .source
            .strip_prefix(&share.source)
            .is_some_and(|rest| {
                rest.is_empty() || rest.starts_with('/') || share.source.ends_with('/')
            })
}

/// The name of a share's mount point: FNV-1a over what decides whether a mount can be common.
/// It must stay the same across builds, because the next process looks for it.
pub(super) fn share_key(share: &Share, options: &MountOptions) -> String {
    let text = format!("{share}\n{}", options.share_key());
    let hash = text.bytes().fold(0xcbf2_9ce4_8422_2325_u64, |hash, byte| {
        (hash ^ u64::from(byte)).wrapping_mul(0x0100_0000_01b3)
    });
    format!("{hash:016x}")
}

/// Waits for a lock of this module, but not beyond the deadline.
pub(super) async fn until<T>(
    deadline: Instant,
    share: &Share,
    step: Step,
    lock: impl Future<Output = T>,
) -> Result<T, MountError> {
    let began = Instant::now();
    let waited = tokio::time::timeout_at(deadline.into(), lock).await;
    waited.map_err(|_| MountError::Timeout {
        share: share.to_string(),
        step,
        after: began.elapsed(),
    })
}

pub(super) fn local(step: Step, place: &Path, errno: Errno) -> MountError {
    MountError::Local {
        step,
        what: place.display().to_string(),
        source: errno.into(),
    }
}

fn directory(request: &Attach, path: SharePath, errno: Errno) -> MountError {
    MountError::Directory {
        share: request.share.clone(),
        path,
        errno,
    }
}

fn refused(request: &Attach, error: WalkError) -> MountError {
    let share = request.share.clone();
    match error {
        WalkError::Symlink(path) => MountError::Symlink { share, path },
        WalkError::Nested(path) => MountError::NestedExport { share, path },
        WalkError::Missing(path) => MountError::DataDirMissing { share, path },
        WalkError::NotADirectory(path) => MountError::NotADirectory { share, path },
        WalkError::Stale => MountError::Stale { share },
        WalkError::Other(path, errno) => directory(request, path, errno),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn entry(mountpoint: &str, device: &str, source: &str) -> MountEntry {
        let line = format!("9 1 {device} / {mountpoint} rw - nfs4 {source} rw,addr=10.0.0.1");
        MountInfo::parse(&line).entries.remove(0)
    }

    #[test]
    fn binds_belong_to_the_share_that_they_were_cloned_from() {
        let share = entry("/s", "0:50", "nas:/export");
        assert!(stems_from(&entry("/v", "0:50", "nas:/export/db"), &share));
        assert!(stems_from(&entry("/v", "0:50", "nas:/export"), &share));
        assert!(!stems_from(&entry("/v", "0:50", "nas:/export2/db"), &share));
        assert!(!stems_from(&entry("/v", "0:51", "nas:/export/db"), &share));
        assert!(stems_from(
            &entry("/v", "0:50", "nas:/db"),
            &entry("/s", "0:50", "nas:/")
        ));
    }

    #[test]
    fn the_name_of_a_share_mount_stays_the_same_across_builds() {
        let share: Share = "nas:/export".parse().unwrap();
        let key = |options: &str| share_key(&share, &options.parse().unwrap());
        assert_eq!(key(""), "8e347d5ea62fa22f");
        assert_eq!(key("ro,noexec"), key(""));
        assert_ne!(key("nconnect=2"), key(""));
    }
}
