//! The processes of this host that hold a volume, whatever Docker has counted.
//!
//! Known limit: only processes in `/proc` are seen, so the daemon must share the host's PID
//! namespace.

use std::collections::HashMap;
use std::io;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use super::{Host, HostError};
use crate::sys::holders::{self, Holder, Mark, Wanted};
use crate::volume::{Record, VolumeName};
use nfs::address::{Share, SharePath};

/// Between the answer to Mount and the container's own mount lie image set-up and runc: seconds
/// on a loaded host. For this long an attachment counts although no process shows it.
pub(super) const START_GRACE: Duration = Duration::from_secs(20);
/// From the last unmount of a volume to the end of its FUSE worker, on a loaded host: for so long
/// a worker does not mean that a container holds the volume.
const WORKER_ENDS: Duration = Duration::from_secs(3);
/// How often it is looked whether the worker has ended.
const WORKER_LOOK: Duration = Duration::from_millis(50);
/// How old the holders in Status may be: finding them reads all of /proc.
const HOLDERS_FRESH: Duration = Duration::from_secs(2);

/// The last look at each volume's holders, for Status.
#[derive(Debug, Default)]
pub(super) struct Recent(Mutex<HashMap<VolumeName, (Instant, Vec<Holder>)>>);

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

/// How people know a process that holds a volume.
pub(crate) fn describe(holder: &Holder) -> String {
    match &holder.container_id {
        Some(id) => format!("container {}", id.get(..12).unwrap_or(id)),
        None => format!("process {} ({})", holder.pid, holder.comm),
    }
}

/// Each process once, for an error.
pub(super) fn names(holders: &[Holder]) -> String {
    let mut names: Vec<String> = holders.iter().map(describe).collect();
    names.sort();
    names.dedup();
    names.join(", ")
}

impl Host {
    /// By what a volume may be known in the namespaces of processes: as it is attached, and, for
    /// containers that outlived their attachment, as it would be.
    fn marks(&self, record: &Record) -> Vec<Mark> {
        let mut marks = Vec::new();
        marks.extend(self.attachments.get(&record.name).map(|held| held.how.held));
        if let Some(share) = record.share(self.settings.home.as_ref()) {
            marks.push(Mark::Source(source(share, &record.data_dir)));
        }
        marks.dedup();
        marks
    }

    fn wanted(&self, name: &VolumeName, marks: Vec<Mark>) -> Wanted {
        Wanted {
            marks,
            own: self.paths.mountpoint(name),
            shares: self.paths.shares_dir(),
        }
    }

    /// The processes that hold a volume by one of these marks now.
    pub(super) fn marked(&self, name: &VolumeName, marks: Vec<Mark>) -> io::Result<Vec<Holder>> {
        let wanted = self.wanted(name, marks);
        let found = tokio::task::block_in_place(|| holders::find_all(&[wanted]))?;
        Ok(found.into_iter().next().unwrap_or_default())
    }

    fn holders(&self, record: &Record) -> io::Result<Vec<Holder>> {
        self.marked(&record.name, self.marks(record))
    }

    /// The processes that hold each of these volumes now, by one look at all of /proc.
    pub(crate) fn holders_of_all(&self, records: &[Arc<Record>]) -> io::Result<Vec<Vec<Holder>>> {
        let wanted: Vec<Wanted> = records
            .iter()
            .map(|record| self.wanted(&record.name, self.marks(record)))
            .collect();
        tokio::task::block_in_place(|| holders::find_all(&wanted))
    }

    /// The processes that hold a volume, as of at most a moment ago.
    pub(crate) fn recent_holders(&self, record: &Record) -> Vec<Holder> {
        let all = || self.recent.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some((at, found)) = all().get(&record.name)
            && at.elapsed() < HOLDERS_FRESH
        {
            return found.clone();
        }
        let found = self.holders(record).unwrap_or_default();
        let mut recent = all();
        recent.retain(|_, (at, _)| at.elapsed() < HOLDERS_FRESH);
        recent.insert(record.name.clone(), (Instant::now(), found.clone()));
        found
    }

    /// Whether no process of this host has a volume, of which this record is known, if any.
    pub(crate) async fn is_free(&self, name: &VolumeName, record: Option<&Record>) -> bool {
        if self.paths.is_left_to_containers(name).await || self.paths.is_served(name) {
            return false;
        }
        record.is_none_or(|record| self.holders(record).is_ok_and(|found| found.is_empty()))
    }

    /// Refuses when something on this host uses the volume. Attachments alone do not count: only
    /// those of a container that is just being started.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn check_free(&self, record: &Record) -> Result<(), HostError> {
        let name = &record.name;
        let holders = self.holders(record);
        let holders = holders.map_err(HostError::state("reading /proc"))?;
        let own = self.paths.mountpoint(name);
        let other = holders.iter().find_map(|holder| {
            let is_volume = holder.mountpoint.parent() == own.parent();
            holder.mountpoint.file_name().filter(|_| is_volume)
        });
        if let Some(other) = other {
            return Err(HostError::SameDirectory {
                name: name.clone(),
                other: other.to_string_lossy().into_owned(),
            });
        }
        if !holders.is_empty() {
            return Err(HostError::InUse {
                name: name.clone(),
                holders,
            });
        }
        let ended = Instant::now() + WORKER_ENDS;
        while self.paths.is_left_to_containers(name).await {
            if Instant::now() >= ended {
                return Err(HostError::LeftToContainers(name.clone()));
            }
            tokio::time::sleep(WORKER_LOOK).await;
        }
        let epoch = self.attachments.epoch();
        let starting = self.attachments.get(name).is_some_and(|held| {
            held.attachments
                .iter()
                .any(|a| a.epoch == epoch && a.age() < START_GRACE)
        });
        match starting {
            true => Err(HostError::Starting(name.clone())),
            false => Ok(()),
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
