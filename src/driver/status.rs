//! What `docker volume inspect` and the command line show of a volume and of this host.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use super::Driver;
use super::elsewhere::Elsewhere;
use crate::api::daemon::{Chosen, DaemonStatus, ShareStatus};
use crate::api::volumes as shown;
use crate::api::volumes::{
    AttachedHere, Attachment, Facts, Fenced, Guard, Heard, KnownLine, KnownStatus, VolumeLine,
    VolumePath, VolumeScope, VolumeStatus, Worker,
};
use crate::fence::{self, State};
use crate::fuse::WorkerStatus;
use crate::host::{Attached, describe};
use crate::sys::holders::Holder;
use crate::volume::{Access, DataPath, Record, VolumeName};

/// How long a Get may wait for a volume's FUSE worker, which answers in microseconds.
const WORKER_WAIT: Duration = Duration::from_millis(100);
/// What to do about [`AttachedHere::stale_holders`].
const STALE_NEXT: &str = "restart these containers: they hold an earlier mount of the volume";
const SQUASHED: &str = "the server squashes root: Docker cannot copy image data into the empty volume; \
     mount it with :nocopy";

impl From<WorkerStatus> for Worker {
    fn from(worker: WorkerStatus) -> Self {
        Self {
            pid: worker.pid,
            alive: worker.alive,
            resident_bytes: worker.rss,
            open_files: worker.open_files,
            unsaved_bytes: worker.unsaved,
            requests: worker.requests,
            requests_under_way: worker.under_way,
            last_error: worker.last_error,
        }
    }
}

impl From<State> for Guard {
    fn from(state: State) -> Self {
        match state {
            State::Watching { device, until } => Self::Watching { device, until },
            State::Fencing => Self::Fencing,
        }
    }
}

impl From<fence::Fenced> for Fenced {
    fn from(fenced: fence::Fenced) -> Self {
        Self {
            at: fenced.at,
            containers: fenced.containers,
            killed: fenced.killed,
            took_ms: fenced.took_ms,
            in_time: fenced.in_time,
            settled: fenced.settled,
            troubles: fenced.troubles,
        }
    }
}

impl From<&Holder> for shown::Holder {
    fn from(holder: &Holder) -> Self {
        Self {
            pid: holder.pid,
            container_id: holder.container_id.clone(),
            comm: holder.comm.clone(),
            device: holder.device,
            mountpoint: holder.mountpoint.clone(),
        }
    }
}

impl Driver {
    /// What every view of a volume shows.
    pub(super) fn facts(&self, record: &Record) -> Facts {
        Facts {
            share: self.catalog.share_of(&record.options).ok().cloned(),
            data_dir: record.data_dir.clone(),
            access: record.options.access,
            on_remove: record.on_remove,
            created_by: record.created_by.clone(),
            mount_options: self.shares.mount_options(&record.options).to_string(),
        }
    }

    /// `Status` of a volume: from memory, and from /proc when it is attached.
    pub(super) async fn volume_status(&self, record: &Record) -> VolumeStatus {
        let facts = self.facts(record);
        let Some(share) = &facts.share else {
            return VolumeStatus::Nowhere {
                error: "the volume names no share and this host has no home share".to_owned(),
            };
        };
        let name = &record.name;
        let held = self.host.attachments().get(name);
        let health = self.shares.contact(share, &record.options).health();
        let is_global = self.config.share.is_some() && !self.catalog.is_only_here(name);
        let (worker, guard) = (
            self.worker_of(name, held.as_ref()).await,
            self.guard_of(record).await,
        );
        let is_exclusive = record.options.access == Access::Exclusive;
        let fenced = self.host.paths().fenced(name).filter(|_| is_exclusive);
        VolumeStatus::Known(Box::new(KnownStatus {
            facts,
            data_dir_made_by_driver: record.made.is_some(),
            options: record.options.to_map(),
            scope: match is_global {
                true => VolumeScope::Global,
                false => VolumeScope::Local,
            },
            health,
            path: self.path_of(record, held.as_ref()),
            held_by_other_hosts: self.membership.elsewhere().lines(name),
            attached: held.as_ref().map(|held| self.attached_here(record, held)),
            worker,
            guard,
            fenced: fenced.map(Into::into),
            restored: record.recreated.as_ref().map(|removed| {
                format!("data of the volume removed at {removed} was kept, its options changed")
            }),
            warnings: self.warnings_of(record, held).await,
        }))
    }

    async fn warnings_of(&self, record: &Record, held: Option<Attached>) -> Vec<String> {
        let mut warnings = held.map(|held| held.how.warnings).unwrap_or_default();
        warnings.extend(record.squashed.then(|| SQUASHED.to_owned()));
        warnings.extend(self.catalog.unread().await.remove(&record.name));
        warnings
    }

    /// What the worker of a volume that is attached by FUSE says.
    async fn worker_of(&self, name: &VolumeName, held: Option<&Attached>) -> Option<Heard<Worker>> {
        held.filter(|held| held.how.data_path == DataPath::Fuse)?;
        let asked = tokio::time::timeout(WORKER_WAIT, self.host.paths().worker(name));
        Some(asked.await.ok().flatten().map(Worker::from).into())
    }

    /// What the guard of an exclusive volume says that the kernel has mounted.
    async fn guard_of(&self, record: &Record) -> Option<Heard<Guard>> {
        let name = &record.name;
        if record.options.access != Access::Exclusive || !self.host.paths().is_own(name) {
            return None;
        }
        let asked = tokio::time::timeout(WORKER_WAIT, self.host.paths().guard_state(name));
        Some(asked.await.ok().flatten().map(Guard::from).into())
    }

    fn attached_here(&self, record: &Record, held: &Attached) -> AttachedHere {
        let attachments = held.attachments.iter().map(|attachment| Attachment {
            id: attachment.id.clone(),
            since: attachment.since,
            at: attachment.at,
            epoch: attachment.epoch,
        });
        let holders = self.host.recent_holders(record);
        let stale_holders = self.stale(&record.name, &holders);
        AttachedHere {
            attachments: attachments.collect(),
            holders: holders.iter().map(Into::into).collect(),
            stale_next: (!stale_holders.is_empty()).then(|| STALE_NEXT.to_owned()),
            stale_holders,
        }
    }

    /// The holders of an earlier mount, such as one that the server no longer knows (ESTALE): the
    /// volume was mounted anew since, and only what starts from now on gets the new mount.
    fn stale(&self, name: &VolumeName, holders: &[Holder]) -> Vec<shown::Holder> {
        if holders.is_empty() {
            return Vec::new();
        }
        let mounted = self.host.paths().mounted().unwrap_or_default();
        let now = mounted.iter().find(|m| m.volume == *name).map(|m| m.dev);
        let stale = holders
            .iter()
            .filter(|holder| now.is_some_and(|now| holder.device != now));
        stale.map(Into::into).collect()
    }

    fn path_of(&self, record: &Record, held: Option<&Attached>) -> VolumePath {
        match held {
            Some(Attached { how, .. }) => VolumePath::Mounted {
                data_path: how.data_path,
                nfs_version: how.nfs_version.clone(),
                address: how.address,
            },
            None => match self.host.paths().choose_for(&record.options) {
                Ok(choice) => VolumePath::Chosen {
                    data_path: choice.path,
                    data_path_reason: choice.reason.to_owned(),
                },
                Err(error) => VolumePath::None {
                    data_path_error: error.to_string(),
                },
            },
        }
    }

    /// The hosts that hold a volume, with what holds it there, in one line.
    fn held_by(&self, record: &Record, here: Option<&[Holder]>, elsewhere: &Elsewhere) -> String {
        let mut hosts = Vec::new();
        if let Some(here) = here {
            let mut holders: Vec<String> = here.iter().map(describe).collect();
            holders.sort();
            holders.dedup();
            hosts.push((self.config.host.clone(), holders.join(", ")));
        }
        let others = elsewhere.of(&record.name);
        hosts.extend(others.map(|(host, hold)| (host.to_owned(), hold.holders.join(", "))));
        hosts.sort();
        let hosts = hosts.iter().map(|(host, holders)| match holders.as_str() {
            "" => host.clone(),
            holders => format!("{host} ({holders})"),
        });
        hosts.collect::<Vec<_>>().join(", ")
    }

    /// `nfsvol ls`: one look at /proc for all attached volumes, and one view of the other hosts. What
    /// cannot be read on the home share has a warning, and is shown also if nothing else is known of it.
    pub(super) fn volume_lines(&self, unread: &BTreeMap<VolumeName, String>) -> Vec<VolumeLine> {
        let records = self.catalog.list();
        let attached = self.host.attachments().names();
        let of_attached = records
            .iter()
            .filter(|record| attached.contains(&record.name));
        let of_attached: Vec<_> = of_attached.cloned().collect();
        let found = self.host.holders_of_all(&of_attached).unwrap_or_default();
        let names = of_attached.iter().map(|record| &record.name);
        let mut holders: HashMap<&VolumeName, Vec<Holder>> =
            names.clone().map(|n| (n, Vec::new())).collect();
        holders.extend(names.zip(found));
        let elsewhere = self.membership.elsewhere();
        let line = |record: &Arc<Record>| {
            let here = holders.get(&record.name).map(Vec::as_slice);
            let mut line = self.volume_line(record, here, &elsewhere);
            line.warning = unread.get(&record.name).cloned();
            VolumeLine::Known(Box::new(line))
        };
        let mut lines: Vec<VolumeLine> = records.iter().map(line).collect();
        let is_known = |name: &VolumeName| records.iter().any(|record| record.name == *name);
        let others = unread.iter().filter(|(name, _)| !is_known(name));
        lines.extend(others.map(|(name, warning)| VolumeLine::Unread {
            name: name.clone(),
            warning: warning.clone(),
        }));
        lines
    }

    fn volume_line(
        &self,
        record: &Record,
        here: Option<&[Holder]>,
        elsewhere: &Elsewhere,
    ) -> KnownLine {
        let held = self.host.attachments().get(&record.name);
        KnownLine {
            name: record.name.clone(),
            created: record.created.clone(),
            facts: self.facts(record),
            held_by: self.held_by(record, here, elsewhere),
            attachments: held.as_ref().map_or(0, |held| held.attachments.len()),
            mountpoint: held.map(|held| held.how.mountpoint),
            warning: None,
        }
    }

    /// `nfsvol status`.
    pub(super) fn daemon_status(&self) -> DaemonStatus {
        let shares = self.shares.all();
        let shares = shares.iter().map(|contact| ShareStatus {
            share: contact.share.clone(),
            home: self.config.share.as_ref() == Some(&contact.share),
            health: contact.health(),
        });
        DaemonStatus {
            version: env!("CARGO_PKG_VERSION").to_owned(),
            host: self.config.host.clone(),
            home_share: self.config.share.clone(),
            state_dir: self.config.state_dir.clone(),
            mount_root: self.config.mount_root.clone(),
            data_path: match self.host.paths().choose(DataPath::Auto) {
                Ok(choice) => Chosen::Path {
                    path: choice.path,
                    reason: choice.reason.to_owned(),
                },
                Err(error) => Chosen::None {
                    error: error.to_string(),
                },
            },
            volumes: self.catalog.len(),
            attachments: self.host.attachments().count(),
            hosts: self
                .membership
                .elsewhere()
                .hosts()
                .map(str::to_owned)
                .collect(),
            shares: shares.collect(),
        }
    }
}
