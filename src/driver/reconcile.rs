//! What the kernel's mount namespaces show, against what was written down.
//!
//! Docker's Mount and Unmount calls do not balance: a dockerd that was killed sends no Unmount,
//! and Mount again with the same ID (docs/DESIGN.md, "On each host"). So attachments of an earlier
//! engine that no process holds are dropped; one that a process holds is never dropped, and a
//! volume that a process holds is never removed.
//!
//! Known limit: only processes in `/proc` are seen, so the daemon must share the host's PID
//! namespace.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::attachments::Attachment;
use super::{Driver, DriverError};
use crate::kernel::holders::{self, Holder, Wanted};
use crate::kernel::{Held, MountedVolume};
use crate::mutant::{self, Mutant};
use crate::nfs::address::{Share, SharePath};
use crate::volume::{Record, VolumeName};

/// Between the answer to Mount and the container's own mount lie image set-up and runc: seconds
/// on a loaded host. For this long an attachment counts although no process shows it.
const START_GRACE: Duration = Duration::from_secs(20);
/// From the last unmount of a volume to the end of its FUSE worker, on a loaded host: for so long
/// a worker does not mean that a container holds the volume.
const WORKER_ENDS: Duration = Duration::from_secs(3);
/// How often it is looked whether the worker has ended.
const WORKER_LOOK: Duration = Duration::from_millis(50);
/// The ID of all mounts by Podman, which counts them itself. Each of its commands activates the
/// plugin, so that says nothing of an engine's start, and `podman volume mount` shows no process.
pub(super) const PODMAN: &str = "2f73349cfc4630255319c6c8dfc1b46a8996ace9d14d8e07563b165915918ec2";
/// How old the holders in Status may be: finding them reads all of /proc.
const HOLDERS_FRESH: Duration = Duration::from_secs(2);

/// What mountinfo shows as the source of a directory of a share; of the share itself there is no
/// slash at its end.
fn source(share: &Share, dir: &SharePath) -> String {
    let (share, dir) = (share.to_string(), dir.as_str());
    if dir.is_empty() || dir == "." {
        return share;
    }
    // `nas:/` ends in a slash by itself.
    format!("{}/{dir}", share.trim_end_matches('/'))
}

/// The last look at each volume's holders, for Status.
#[derive(Debug, Default)]
pub(super) struct HolderCache(Mutex<HashMap<VolumeName, (Instant, Vec<Holder>)>>);

impl Driver {
    /// By what a volume may be known in the namespaces of processes: as it is attached, and, for
    /// containers that outlived their attachment, as it would be.
    pub(super) fn marks(&self, record: &Record) -> Vec<Held> {
        let mut marks = Vec::new();
        marks.extend(self.attachments.get(&record.name).map(|held| held.how.held));
        if let Ok(share) = self.catalog.share_of(&record.options) {
            marks.push(Held::Source(source(share, &record.data_dir)));
        }
        marks.dedup();
        marks
    }

    /// The processes that hold a volume now.
    pub(super) fn holders(&self, name: &VolumeName, marks: Vec<Held>) -> io::Result<Vec<Holder>> {
        let wanted = Wanted {
            marks,
            own: self.paths.mountpoint(name),
            shares: self.paths.shares_dir(),
        };
        let found = tokio::task::block_in_place(|| holders::find_all(&[wanted]))?;
        Ok(found.into_iter().next().unwrap_or_default())
    }

    /// The processes that hold each of these volumes now, by one look at all of /proc.
    pub(super) fn holders_of_all(&self, records: &[Arc<Record>]) -> io::Result<Vec<Vec<Holder>>> {
        let wanted: Vec<Wanted> = records
            .iter()
            .map(|record| Wanted {
                marks: self.marks(record),
                own: self.paths.mountpoint(&record.name),
                shares: self.paths.shares_dir(),
            })
            .collect();
        tokio::task::block_in_place(|| holders::find_all(&wanted))
    }

    /// The processes that hold a volume, as of at most a moment ago.
    pub(super) fn recent_holders(&self, record: &Record) -> Vec<Holder> {
        {
            let cache = self
                .holders
                .0
                .lock()
                .unwrap_or_else(PoisonError::into_inner);
            if let Some((at, found)) = cache.get(&record.name)
                && at.elapsed() < HOLDERS_FRESH
            {
                return found.clone();
            }
        }
        let found = self
            .holders(&record.name, self.marks(record))
            .unwrap_or_default();
        let mut cache = self
            .holders
            .0
            .lock()
            .unwrap_or_else(PoisonError::into_inner);
        cache.retain(|_, (at, _)| at.elapsed() < HOLDERS_FRESH);
        cache.insert(record.name.clone(), (Instant::now(), found.clone()));
        found
    }

    /// Refuses when something on this host uses the volume. Attachments alone do not count: only
    /// those of a container that is just being started.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn check_free(&self, record: &Record) -> Result<(), DriverError> {
        let name = &record.name;
        let holders =
            self.holders(name, self.marks(record))
                .map_err(|source| DriverError::State {
                    what: "reading /proc",
                    source,
                })?;
        let own = self.paths.mountpoint(name);
        let other = holders.iter().find_map(|holder| {
            let is_volume = holder.mountpoint.parent() == own.parent();
            holder.mountpoint.file_name().filter(|_| is_volume)
        });
        if let Some(other) = other {
            return Err(DriverError::SameDirectory {
                name: name.clone(),
                other: other.to_string_lossy().into_owned(),
            });
        }
        if !holders.is_empty() {
            return Err(DriverError::InUse {
                name: name.clone(),
                holders,
            });
        }
        let ended = Instant::now() + WORKER_ENDS;
        while self.paths.is_left_to_containers(name).await {
            if Instant::now() >= ended {
                return Err(DriverError::LeftToContainers(name.clone()));
            }
            tokio::time::sleep(WORKER_LOOK).await;
        }
        let epoch = self.attachments.epoch();
        let starting = self.attachments.get(name).is_some_and(|held| {
            held.attachments
                .iter()
                .any(|a| a.epoch == epoch && a.age() < START_GRACE)
        });
        if starting {
            Err(DriverError::Starting(name.clone()))
        } else {
            Ok(())
        }
    }

    /// Drops attachments that nothing stands behind, unmounts volumes without attachments, and
    /// forgets those that are gone.
    pub(super) async fn reconcile(&self) {
        let epoch = self.attachments.epoch();
        for (name, held) in self.attachments.all() {
            // Docker sends no Unmount for a volume that it was told is gone.
            let gone = self.catalog.get(&name).is_none();
            let is_podmans =
                |a: &Attachment| a.id == PODMAN && !mutant::is_on(Mutant::CommandsAreEngines);
            let earlier = |a: &Attachment| a.epoch != epoch && !is_podmans(a);
            let stale = |a: &Attachment| (gone || earlier(a)) && a.age() >= START_GRACE;
            if !held.attachments.iter().any(stale) {
                continue;
            }
            // A call for the volume is under way: it knows better, and this comes again.
            let Some(_lock) = self.locks.try_lock(&name) else {
                continue;
            };
            let marks = vec![held.how.held];
            if !matches!(self.holders(&name, marks.clone()), Ok(found) if found.is_empty()) {
                continue;
            }
            // A copy by the engine, or a process that works in the volume by the host's own mount.
            let used = tokio::task::block_in_place(|| holders::in_use(&marks));
            if !matches!(used, Ok(false)) {
                continue;
            }
            let left = self.attachments.retain(&name, |a| !stale(a));
            tracing::info!(volume = %name, left, "attachments that nothing stands behind dropped");
            if left == 0 {
                self.unmount_unattached(&name).await;
            }
        }
        match self.paths.mounted() {
            Ok(mounted) => self.unmount_all_unattached(&mounted).await,
            Err(error) => tracing::warn!(%error, "mounts not looked at"),
        }
        self.forget_removed();
    }

    /// Removes what volumes that are gone have left in the state directory.
    fn forget_removed(&self) {
        let mut left = self.paths.logged();
        left.extend(self.guarded());
        for name in left {
            let Some(_lock) = self.locks.try_lock(&name) else {
                continue;
            };
            let used = self.attachments.get(&name).is_some() || self.paths.is_served(&name);
            if used || self.catalog.get(&name).is_some() {
                continue;
            }
            let of_guards = std::fs::remove_dir_all(self.paths.guards().run_dir(&name));
            for removed in [self.paths.forget(&name), of_guards] {
                if let Err(error) = removed
                    && error.kind() != io::ErrorKind::NotFound
                {
                    tracing::warn!(volume = %name, %error, "its processes' logs are not removed");
                }
            }
        }
    }

    /// Volumes that guards have written logs of.
    fn guarded(&self) -> Vec<VolumeName> {
        let entries = std::fs::read_dir(self.config.state_dir.join("guard"));
        let names = entries.into_iter().flatten().flatten();
        names
            .filter_map(|entry| entry.file_name().to_str()?.parse().ok())
            .collect()
    }

    async fn unmount_all_unattached(&self, mounted: &[MountedVolume]) {
        for MountedVolume { volume, .. } in mounted {
            if self.attachments.get(volume).is_some() {
                continue;
            }
            let Some(_lock) = self.locks.try_lock(volume) else {
                continue;
            };
            if self.attachments.get(volume).is_none() {
                tracing::info!(%volume, "mounted without an attachment: unmounted");
                self.unmount_unattached(volume).await;
            }
        }
    }

    async fn unmount_unattached(&self, name: &VolumeName) {
        if let Err(error) = self.paths.detach(name, self.config.flush_wait).await {
            tracing::warn!(volume = %name, %error, "not unmounted");
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_source_is_as_the_kernel_shows_it() {
        let of = |share: &str, dir: &str| {
            source(&share.parse().unwrap(), &SharePath::parse(dir).unwrap())
        };
        assert_eq!(of("nas:/export", "db"), "nas:/export/db");
        assert_eq!(of("nas:/export", "."), "nas:/export");
        assert_eq!(of("nas:/", "db"), "nas:/db");
    }
}
