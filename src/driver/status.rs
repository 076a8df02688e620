//! What `docker volume inspect` and the command line show of a volume and of this host.

use std::collections::{BTreeMap, HashMap};
use std::sync::Arc;
use std::time::Duration;

use serde_json::{Map, Value, json};

use super::Driver;
use super::attachments::Held;
use super::cluster::describe;
use super::elsewhere::Elsewhere;
use crate::fuse::WorkerStatus;
use crate::kernel::Holder;
use crate::volume::{Access, DataPath, Record, VolumeName};

/// How long a Get may wait for a volume's FUSE worker, which answers in microseconds.
const WORKER_WAIT: Duration = Duration::from_millis(100);

/// What people want to know of a worker.
fn worker_line(worker: &WorkerStatus) -> Value {
    json!({
        "pid": worker.pid,
        "alive": worker.alive,
        "resident_bytes": worker.rss,
        "open_files": worker.open_files,
        "unsaved_bytes": worker.unsaved,
        "requests": worker.requests,
        "requests_under_way": worker.under_way,
        "last_error": worker.last_error,
    })
}

impl Driver {
    /// `Status` of a volume: from memory, and from /proc when it is attached.
    pub(super) async fn volume_status(&self, record: &Record) -> Map<String, Value> {
        let mut status = Map::new();
        let mut put = |key: &str, value: Value| {
            status.insert(key.to_owned(), value);
        };
        let Ok(share) = self.catalog.share_of(&record.options) else {
            put(
                "error",
                json!("the volume names no share and this host has no home share"),
            );
            return status;
        };
        let held = self.attachments.get(&record.name);
        put("share", json!(share));
        put("data_dir", json!(record.data_dir));
        put(
            "held_by_other_hosts",
            json!(self.cluster.elsewhere().lines(&record.name)),
        );
        put("data_dir_made_by_driver", json!(record.made.is_some()));
        put("options", json!(record.options));
        put(
            "mount_options",
            json!(self.mount_options(&record.options).to_string()),
        );
        put("access", json!(record.options.access));
        put("on_remove", json!(record.on_remove));
        put("created_by", json!(record.created_by));
        put(
            "scope",
            json!(
                if self.config.share.is_some() && !self.catalog.is_only_here(&record.name) {
                    "global"
                } else {
                    "local"
                }
            ),
        );
        put(
            "health",
            json!(self.contact(share, &record.options).health()),
        );
        self.put_data_path(&mut put, record, held.as_ref());
        if let Some(held) = &held {
            put("attachments", json!(held.attachments));
            let holders = self.recent_holders(record);
            put("holders", json!(holders));
            self.put_stale(&mut put, &record.name, &holders);
            if held.how.data_path == DataPath::Fuse {
                let asked = tokio::time::timeout(WORKER_WAIT, self.paths.worker(&record.name));
                let worker = asked.await.ok().flatten();
                put(
                    "worker",
                    worker.map_or_else(|| json!("does not answer"), |w| worker_line(&w)),
                );
            }
        }
        let exclusive = record.options.access == Access::Exclusive;
        if exclusive && let Some(fenced) = self.paths.fenced(&record.name) {
            put("fenced", json!(fenced));
        }
        if exclusive && self.paths.is_own(&record.name) {
            let asked = tokio::time::timeout(WORKER_WAIT, self.paths.guard_state(&record.name));
            let guard = asked.await.ok().flatten();
            put(
                "guard",
                guard.map_or_else(|| json!("does not answer"), |state| json!(state)),
            );
        }
        let mut warnings = held.map(|h| h.how.warnings).unwrap_or_default();
        if record.squashed {
            warnings.push(
                "the server squashes root: Docker cannot copy image data into the empty volume; \
                 mount it with :nocopy"
                    .to_owned(),
            );
        }
        warnings.extend(self.catalog.unread().await.remove(&record.name));
        if !warnings.is_empty() {
            put("warnings", json!(warnings));
        }
        status
    }

    /// Names the holders of an earlier mount, such as one that the server no longer knows (ESTALE):
    /// the volume was mounted anew since, and only what starts from now on gets the new mount.
    fn put_stale(&self, put: &mut impl FnMut(&str, Value), name: &VolumeName, holders: &[Holder]) {
        if holders.is_empty() {
            return;
        }
        let mounted = self.paths.mounted().unwrap_or_default();
        let Some(now) = mounted.iter().find(|m| m.volume == *name).map(|m| m.dev) else {
            return;
        };
        let stale: Vec<&Holder> = holders.iter().filter(|h| h.device != now).collect();
        if !stale.is_empty() {
            put("stale_holders", json!(stale));
            put(
                "stale_next",
                json!("restart these containers: they hold an earlier mount of the volume"),
            );
        }
    }

    fn put_data_path(
        &self,
        put: &mut impl FnMut(&str, Value),
        record: &Record,
        held: Option<&Held>,
    ) {
        match held {
            Some(Held { how, .. }) => {
                put("data_path", json!(how.data_path));
                put("nfs_version", json!(how.nfs_version));
                put("address", json!(how.address));
            }
            None => match self.paths.choose_for(&record.options) {
                Ok(choice) => {
                    put("data_path", json!(choice.path));
                    put("data_path_reason", json!(choice.reason));
                }
                Err(error) => put("data_path_error", json!(error.to_string())),
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
    pub(super) fn volume_lines(&self, unread: &BTreeMap<VolumeName, String>) -> Vec<Value> {
        let records = self.catalog.list();
        let attached = self.attachments.names();
        let of_attached = records
            .iter()
            .filter(|record| attached.contains(&record.name));
        let of_attached: Vec<_> = of_attached.cloned().collect();
        let found = self.holders_of_all(&of_attached).unwrap_or_default();
        let names = of_attached.iter().map(|record| &record.name);
        let mut holders: HashMap<&VolumeName, Vec<Holder>> =
            names.clone().map(|n| (n, Vec::new())).collect();
        holders.extend(names.zip(found));
        let elsewhere = self.cluster.elsewhere();
        let line = |record: &Arc<Record>| {
            let here = holders.get(&record.name).map(Vec::as_slice);
            let mut line = self.volume_line(record, here, &elsewhere);
            line["warning"] = json!(unread.get(&record.name));
            line
        };
        let mut lines: Vec<Value> = records.iter().map(line).collect();
        let is_known = |name: &VolumeName| records.iter().any(|record| record.name == *name);
        let others = unread.iter().filter(|(name, _)| !is_known(name));
        lines.extend(others.map(|(name, why)| json!({ "name": name, "warning": why })));
        lines
    }

    fn volume_line(
        &self,
        record: &Record,
        here: Option<&[Holder]>,
        elsewhere: &Elsewhere,
    ) -> Value {
        let held = self.attachments.get(&record.name);
        json!({
            "held_by": self.held_by(record, here, elsewhere),
            "name": record.name,
            "share": self.catalog.share_of(&record.options).ok(),
            "data_dir": record.data_dir,
            "created": record.created,
            "created_by": record.created_by,
            "access": record.options.access,
            "mount_options": self.mount_options(&record.options).to_string(),
            "on_remove": record.on_remove,
            "attachments": held.as_ref().map_or(0, |h| h.attachments.len()),
            "mountpoint": held.map(|h| h.how.mountpoint),
        })
    }

    /// `nfsvol status`.
    pub(super) fn daemon_status(&self) -> Value {
        let shares: Vec<Value> = self
            .shares
            .all()
            .iter()
            .map(|contact| {
                json!({
                    "share": contact.share,
                    "home": self.config.share.as_ref() == Some(&contact.share),
                    "health": contact.health(),
                })
            })
            .collect();
        json!({
            "version": env!("CARGO_PKG_VERSION"),
            "host": self.config.host,
            "home_share": self.config.share,
            "state_dir": self.config.state_dir,
            "mount_root": self.config.mount_root,
            "data_path": match self.paths.choose(DataPath::Auto) {
                Ok(choice) => json!({ "path": choice.path, "reason": choice.reason }),
                Err(error) => json!({ "error": error.to_string() }),
            },
            "volumes": self.catalog.len(),
            "attachments": self.attachments.count(),
            "hosts": self.cluster.elsewhere().hosts().collect::<Vec<_>>(),
            "shares": shares,
        })
    }
}
