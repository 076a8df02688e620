//! What operators see of this host: the view behind metrics and the status page.
//!
//! Invariants: nothing here asks a server or makes a system call on a mount. What is not in memory
//! is asked of /proc and of the workers' sockets, for a moment at most; the trash is listed by a
//! background task, and only while somebody watches.

use std::collections::hash_map::Entry;
use std::collections::{HashMap, HashSet};
use std::sync::atomic::{AtomicBool, Ordering};
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant, SystemTime, UNIX_EPOCH};

use serde::Serialize;

use super::elsewhere::Elsewhere;
use super::{Driver, DriverError};
use crate::cluster::Hold;
use crate::fuse::WorkerStatus;
use crate::home;
use crate::host;
use crate::monitor::view::{
    Attached, Cluster, MAX_ATTACHED, MAX_ROWS, MAX_TRASH, Mount, Page, Process, Row, Share, Trash,
    Trashed, View, Worker, Workers,
};
use crate::monitor::{Watched, metrics, view};
use crate::sys::mountinfo::DeviceId;
use crate::sys::proc;
use crate::volume::{Access, DataPath, Record, VolumeName};
use chance::host_time;

/// How old a view may be: however many ask, /proc and the workers are asked once in this time.
const FRESH: Duration = Duration::from_secs(1);
/// How long the workers may take to say how they are, all together; each takes microseconds.
const WORKERS_WAIT: Duration = Duration::from_secs(1);
/// How long /proc/self/mountstats may take.
const PROC_WAIT: Duration = Duration::from_millis(500);
/// How old the list of the trash may be while somebody watches: other hosts remove volumes too.
const TRASH_FRESH: Duration = Duration::from_secs(60);
/// A pause after listing the trash, in case that the share is away.
const TRASH_PAUSE: Duration = Duration::from_secs(5);

/// What is kept between two looks.
#[derive(Debug)]
pub(super) struct Watch {
    started: SystemTime,
    /// Held while a view is made, so that those who come together make one.
    view: tokio::sync::Mutex<Option<(Instant, View)>>,
    trash: Mutex<Option<(Instant, Trash)>>,
    trash_outdated: AtomicBool,
    /// This daemon has been through the trash.
    pub(super) looked_at_trash: AtomicBool,
    trash_wanted: tokio::sync::Notify,
}

impl Default for Watch {
    fn default() -> Self {
        Self {
            started: SystemTime::now(),
            view: tokio::sync::Mutex::default(),
            trash: Mutex::default(),
            trash_outdated: AtomicBool::new(false),
            looked_at_trash: AtomicBool::new(false),
            trash_wanted: tokio::sync::Notify::new(),
        }
    }
}

impl Watch {
    /// This host has put something into the trash, or taken something out of it.
    pub(super) fn trash_changed(&self) {
        self.trash_outdated.store(true, Ordering::Relaxed);
    }

    /// The trash as it was last listed; has it listed again if that is long ago.
    fn trash(&self) -> Option<Trash> {
        let known = self.trash.lock().unwrap_or_else(PoisonError::into_inner);
        let fresh = known
            .as_ref()
            .is_some_and(|(at, _)| at.elapsed() < TRASH_FRESH);
        if !fresh || self.trash_outdated.load(Ordering::Relaxed) {
            self.trash_wanted.notify_one();
        }
        known.as_ref().map(|(_, trash)| trash.clone())
    }
}

impl Watched for Driver {
    async fn metrics(&self) -> String {
        metrics::text(self.view().await, &self.calls)
    }

    async fn page(&self, find: &str) -> Page {
        let view = self.view().await;
        // Of ten thousand volumes that takes a while, and renewals must not wait for it.
        tokio::task::block_in_place(|| self.rows(view, find))
    }
}

impl Driver {
    /// The volumes that are asked for, those first that somebody holds.
    fn rows(&self, view: View, find: &str) -> Page {
        let holds = self.membership.holds();
        let find = find.trim().to_lowercase();
        let elsewhere = self.membership.elsewhere();
        let attached = self.host.attachments().names();
        let mut records = self.catalog.list();
        records.retain(|record| record.name.as_str().to_lowercase().contains(&find));
        let found = records.len();
        // Stable: each part stays in the order of names.
        records.sort_by_key(|record| {
            let name = &record.name;
            let here = holds.contains_key(name) || attached.contains(name);
            !here && elsewhere.of(name).next().is_none()
        });
        records.truncate(MAX_ROWS);
        let row = |record: &Arc<Record>| self.row(record, holds.get(&record.name), &elsewhere);
        let rows = records.iter().map(row).collect();
        Page { view, found, rows }
    }

    async fn view(&self) -> View {
        let mut kept = self.watch.view.lock().await;
        if let Some((at, view)) = &*kept
            && at.elapsed() < FRESH
        {
            return view.clone();
        }
        let view = self.look_around().await;
        *kept = Some((Instant::now(), view.clone()));
        view
    }

    async fn look_around(&self) -> View {
        let mut all = self.host.attachments().all();
        all.sort_by(|(a, _), (b, _)| a.cmp(b));
        let left_out = all.len().saturating_sub(MAX_ATTACHED);
        all.truncate(MAX_ATTACHED);
        let (mut workers, mut serving, silent) = self.workers_of(&all).await;
        let mounted = self.host.paths().mounted().unwrap_or_default();
        let devices: HashMap<VolumeName, DeviceId> =
            mounted.into_iter().map(|m| (m.volume, m.dev)).collect();
        let attached: Vec<Attached> = all
            .iter()
            .map(|(name, held)| {
                let worker = serving.remove(name);
                let state = (held.how.data_path == DataPath::Fuse).then_some(
                    match (&worker, silent.contains(name)) {
                        (Some(_), _) => "serving",
                        (None, true) => "silent",
                        (None, false) => "died",
                    },
                );
                workers.died += usize::from(state == Some("died"));
                attached(name, held, devices.get(name), worker, state)
            })
            .collect();
        let mounts = self.mounts(&devices).await;
        View {
            version: env!("CARGO_PKG_VERSION"),
            host: self.config.host.clone(),
            now: host_time(),
            process: process(self.watch.started),
            home: self.config.share.as_ref().map(ToString::to_string),
            volumes: self.catalog.len(),
            attachments: self.host.attachments().count(),
            shares: self.shares_seen(),
            attached,
            left_out,
            workers,
            mounts,
            cluster: self.cluster_seen().await,
            trash: self
                .config
                .share
                .is_some()
                .then(|| self.watch.trash())
                .flatten(),
        }
    }

    /// The FUSE workers by their state, what those said that serve volumes, and the volumes of those
    /// that said nothing.
    async fn workers_of(
        &self,
        all: &[(VolumeName, host::Attached)],
    ) -> (Workers, HashMap<VolumeName, Worker>, HashSet<VolumeName>) {
        let by_fuse = all
            .iter()
            .filter(|(_, held)| held.how.data_path == DataPath::Fuse);
        let by_fuse: Vec<VolumeName> = by_fuse.map(|(name, _)| name.clone()).collect();
        let mut workers = Workers::default();
        let (mut serving, mut silent) = (HashMap::new(), HashSet::new());
        for said in self.host.paths().survey(&by_fuse, WORKERS_WAIT).await {
            match said.status {
                Some(status) if status.leaving => workers.leaving += 1,
                Some(status) => {
                    workers.serving += 1;
                    serving.insert(said.volume, worker(&status));
                }
                None => {
                    workers.silent += 1;
                    silent.insert(said.volume);
                }
            }
        }
        (workers, serving, silent)
    }

    /// The shares of this host, one entry for each, whatever ports its volumes name.
    fn shares_seen(&self) -> Vec<Share> {
        let mut seen: HashMap<String, Share> = HashMap::new();
        for contact in self.shares.all() {
            let health = contact.health();
            let home = self.config.share.as_ref() == Some(&contact.share);
            let share = Share {
                share: contact.share.to_string(),
                home,
                in_use: home || self.host.attachments().uses(&contact.share),
                up: health.healthy,
                error: health.error,
                last_answer: health.last_answer,
                rtt: health.rtt_ms.map(|ms| ms / 1e3),
                address: health.address,
                size: health.bytes_total,
                available: health.bytes_available,
                rpcs: contact.rpcs(),
            };
            match seen.entry(share.share.clone()) {
                Entry::Vacant(vacant) => drop(vacant.insert(share)),
                Entry::Occupied(mut known) => merge(known.get_mut(), share),
            }
        }
        let mut seen: Vec<Share> = seen.into_values().collect();
        seen.sort_by(|a, b| (b.home, &a.share).cmp(&(a.home, &b.share)));
        seen
    }

    async fn mounts(&self, devices: &HashMap<VolumeName, DeviceId>) -> Vec<Mount> {
        let traffic = self.host.paths().traffic(PROC_WAIT).await;
        traffic
            .into_iter()
            .map(|share| Mount {
                volumes: devices.values().filter(|dev| **dev == share.dev).count(),
                device: share.dev.to_string(),
                share: share.stats.source,
                read_bytes: share.stats.read_bytes,
                written_bytes: share.stats.written_bytes,
                reads: share.stats.reads,
                writes: share.stats.writes,
                others: share.stats.others,
                retransmits: share.stats.repeated,
                timeouts: share.stats.timeouts,
                rtt: share.stats.rtt.as_secs_f64(),
            })
            .collect()
    }

    async fn cluster_seen(&self) -> Option<Cluster> {
        self.config
            .session
            .filter(|_| self.config.share.is_some())?;
        let holds = self.membership.holds();
        let claims = holds.values().filter(|h| h.access == Access::Exclusive);
        let mut hosts = vec![self.membership.name().to_owned()];
        hosts.extend(self.membership.elsewhere().hosts().map(str::to_owned));
        Some(Cluster {
            session: self.membership.has_right(),
            right: self.membership.right_left().as_secs_f64(),
            claims: claims.count(),
            holds: holds.len(),
            hosts,
        })
    }

    fn row(&self, record: &Record, hold: Option<&Hold>, elsewhere: &Elsewhere) -> Row {
        let mut held = Vec::new();
        if hold.is_some() || self.host.attachments().get(&record.name).is_some() {
            held.push(view::Held {
                host: self.membership.name().to_owned(),
                holders: hold.map(|hold| hold.holders.clone()).unwrap_or_default(),
            });
        }
        held.extend(elsewhere.of(&record.name).map(|(host, hold)| view::Held {
            host: host.to_owned(),
            holders: hold.holders.clone(),
        }));
        let facts = self.facts(record);
        let share = facts.share.map(|share| share.to_string());
        Row {
            volume: record.name.clone(),
            share: share.unwrap_or_default(),
            dir: facts.data_dir.to_string(),
            access: facts.access,
            on_remove: facts.on_remove,
            created: record.created.clone(),
            created_by: facts.created_by,
            held,
        }
    }

    /// Lists the trash whenever somebody who watches wants to know.
    pub(super) async fn look_at_trash_when_asked(self: Arc<Self>) {
        loop {
            self.watch.trash_wanted.notified().await;
            if let Err(error) = self.look_at_trash().await {
                tracing::debug!(%error, "the trash was not listed");
            }
            tokio::time::sleep(TRASH_PAUSE).await;
        }
    }

    async fn look_at_trash(&self) -> Result<(), DriverError> {
        let Some(home) = self.shares.home().await? else {
            return Ok(());
        };
        self.watch.trash_outdated.store(false, Ordering::Relaxed);
        let names = self.catalog.trash_names(&home).await?;
        let trash = trash(&names);
        *self
            .watch
            .trash
            .lock()
            .unwrap_or_else(PoisonError::into_inner) = Some((Instant::now(), trash));
        Ok(())
    }
}

fn trash(names: &[home::Trashed]) -> Trash {
    let newest = names.iter().rev().take(MAX_TRASH);
    Trash {
        entries: names.len(),
        oldest: names.first().map(|oldest| oldest.removed_secs),
        newest: newest
            .map(|trashed| Trashed {
                entry: trashed.entry.clone(),
                volume: trashed.name.to_string(),
                removed: trashed.removed_secs,
            })
            .collect(),
    }
}

/// Two ways to one share: it is up if both are, and the later answer counts.
fn merge(known: &mut Share, other: Share) {
    let rpcs = known.rpcs + other.rpcs;
    let up = match (known.up, other.up) {
        (Some(a), Some(b)) => Some(a && b),
        (a, b) => a.or(b),
    };
    let error = known.error.take().or_else(|| other.error.clone());
    if other.last_answer > known.last_answer {
        *known = other;
    }
    known.rpcs = rpcs;
    known.up = up;
    known.error = error;
}

fn attached(
    name: &VolumeName,
    held: &host::Attached,
    device: Option<&DeviceId>,
    worker: Option<Worker>,
    worker_state: Option<&'static str>,
) -> Attached {
    Attached {
        volume: name.to_string(),
        share: held.how.share.to_string(),
        data_path: word(&held.how.data_path),
        nfs_version: held.how.nfs_version.clone(),
        attachments: held.attachments.len(),
        device: device.map(ToString::to_string),
        worker,
        worker_state,
    }
}

fn worker(status: &WorkerStatus) -> Worker {
    let traffic = status.traffic;
    Worker {
        read_bytes: traffic.read_bytes,
        written_bytes: traffic.written_bytes,
        reads: traffic.reads,
        writes: traffic.writes,
        others: status
            .requests
            .saturating_sub(traffic.reads + traffic.writes),
        rpcs: traffic.rpcs,
        retransmits: traffic.repeated_rpcs,
        running: status.under_way,
        interrupted: status.interrupted,
        open_files: status.open_files,
        unsaved: status.unsaved,
        resident: status.rss,
        last_error: status.last_error.clone(),
    }
}

/// How a value is written in records: `exclusive`, `fuse`.
fn word(value: &impl Serialize) -> String {
    let value = serde_json::to_value(value).unwrap_or_default();
    value.as_str().unwrap_or_default().to_owned()
}

/// This process, by /proc/self; what it does not say is 0.
fn process(started: SystemTime) -> Process {
    let read = |file: &str| std::fs::read_to_string(format!("/proc/self/{file}"));
    let stat = read("stat").unwrap_or_default();
    let statm = read("statm").unwrap_or_default();
    let pages: u64 = statm
        .split(' ')
        .nth(1)
        .and_then(|pages| pages.parse().ok())
        .unwrap_or(0);
    let open = std::fs::read_dir("/proc/self/fd").map_or(0, Iterator::count);
    Process {
        started: started
            .duration_since(UNIX_EPOCH)
            .map_or(0.0, |since| since.as_secs_f64()),
        cpu: cpu(&stat, rustix::param::clock_ticks_per_second()),
        resident: pages * rustix::param::page_size() as u64,
        // Without the one through which they were listed.
        open_files: (open as u64).saturating_sub(1),
    }
}

/// Seconds of processor time: fields 14 and 15 of /proc/PID/stat, in ticks.
fn cpu(stat: &str, ticks: u64) -> f64 {
    let spent = proc::stat_fields(stat).skip(11).take(2);
    let spent: u64 = spent.filter_map(|n| n.parse::<u64>().ok()).sum();
    Duration::from_millis(spent.saturating_mul(1000) / ticks.max(1)).as_secs_f64()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn processor_time_is_read_behind_any_name() {
        let stat = "7 (a) b)) S 1 7 7 0 -1 4194304 900 0 3 0 250 50 0 0 20 0 9 0 100 1 2";
        assert!((cpu(stat, 100) - 3.0).abs() < 1e-9);
        assert!(cpu("", 100).abs() < 1e-9);
        let own = process(SystemTime::now());
        assert!(own.resident > 0 && own.open_files > 2 && own.started > 1e9);
    }

    #[test]
    fn two_ways_to_one_share_are_one_share() {
        let way = |up, last_answer, rtt, rpcs| Share {
            share: "nas:/export".to_owned(),
            up,
            last_answer,
            rtt: Some(rtt),
            rpcs,
            error: (up == Some(false)).then(|| "away".to_owned()),
            ..Share::default()
        };
        let mut known = way(Some(false), Some(5), 0.1, 3);
        merge(&mut known, way(Some(true), Some(9), 0.2, 4));
        assert_eq!((known.up, known.rpcs), (Some(false), 7));
        assert_eq!((known.rtt, known.last_answer), (Some(0.2), Some(9)));
        assert_eq!(known.error.as_deref(), Some("away"));
    }

    #[test]
    fn the_trash_is_shown_newest_first() {
        let name: VolumeName = "db".parse().unwrap();
        let names: Vec<_> = (0..150)
            .map(|n| home::Trashed {
                entry: format!("db.{n}"),
                name: name.clone(),
                removed_secs: n,
            })
            .collect();
        let trash = trash(&names);
        assert_eq!((trash.entries, trash.oldest), (150, Some(0)));
        assert_eq!(trash.newest.len(), MAX_TRASH);
        assert_eq!(trash.newest[0].removed, 149);
    }
}
