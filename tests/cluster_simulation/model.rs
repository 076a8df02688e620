//! What must be true, looked at by somebody who sees everything at once.

use std::collections::BTreeMap;
use std::time::Duration;

use nfsvol::doors::cluster::HostDoc;
use tokio::time::Instant;

use crate::SESSION;
use crate::disk::Disk;

/// A use of a volume on a host: from the answer to Mount to the last byte.
pub(crate) type Grant = u64;

#[derive(Debug, Default)]
pub(crate) struct Model {
    next: Grant,
    /// Which use of an exclusive volume came last.
    latest: BTreeMap<String, Grant>,
    /// The volumes in use, by host.
    pub(crate) mounted: BTreeMap<(String, String), Grant>,
    pub(crate) wrong: Vec<String>,
    pub(crate) grants: u64,
    pub(crate) removals: u64,
    pub(crate) writes: u64,
    /// Records made, by their ids, and when.
    pub(crate) made: Vec<(String, Instant)>,
    /// Nothing happens that may end a right: one that ends is wrong.
    pub(crate) calm: bool,
    granted: BTreeMap<Grant, Instant>,
    /// When each host renewed its session last.
    renewed: BTreeMap<String, Instant>,
    /// Uses that began after this time may be unknown to the server until the other.
    forgotten: Option<(Instant, Instant)>,
    /// Exclusive volumes whose last use the server has forgotten, until it is settled whose they are.
    contested: BTreeMap<String, Instant>,
}

impl Model {
    pub(crate) fn mount(&mut self, host: &str, volume: &str, exclusive: bool) -> Grant {
        self.next += 1;
        self.grants += 1;
        self.granted.insert(self.next, Instant::now());
        if exclusive {
            self.latest.insert(volume.to_owned(), self.next);
        }
        self.mounted
            .insert((host.to_owned(), volume.to_owned()), self.next);
        self.next
    }

    /// The server goes back to what it was at a time. For what began since, nothing is promised
    /// until its host has had time to notice.
    pub(crate) fn forgets(&mut self, then: Instant, settled: Duration) {
        let until = Instant::now() + settled;
        self.forgotten = Some((then, until));
        self.made.retain(|(_, at)| *at < then);
        for (volume, grant) in &self.latest {
            if self.granted.get(grant).is_some_and(|at| *at >= then) {
                self.contested.insert(volume.clone(), until);
            }
        }
    }

    fn is_forgotten(&self, host: &str, grant: Grant) -> bool {
        let Some((then, until)) = self.forgotten else {
            return false;
        };
        let began = self.granted.get(&grant);
        // A host that is out of reach cannot put there again what was forgotten.
        let renewed = self.renewed.get(host);
        let away = renewed.is_none_or(|at| at.elapsed() > SESSION * 5 / 6);
        (away || Instant::now() < until) && began.is_some_and(|at| *at >= then)
    }

    /// A host does not send any more, or was told that it has lost a volume.
    pub(crate) fn fenced(&mut self, host: &str, volume: &str, grant: Grant) {
        if self.calm && !self.is_forgotten(host, grant) {
            let wrong = format!("{host} was fenced from {volume} without need");
            self.wrong.push(wrong);
        }
    }

    pub(crate) fn unmount(&mut self, host: &str, volume: &str) {
        self.mounted.remove(&(host.to_owned(), volume.to_owned()));
    }

    /// A byte of an exclusive volume has reached the server.
    pub(crate) fn written(&mut self, host: &str, volume: &str, by: Grant) {
        self.writes += 1;
        match self.contested.get(volume) {
            Some(until) if Instant::now() < *until => return,
            Some(_) => {
                self.contested.remove(volume);
                self.latest.insert(volume.to_owned(), by);
            }
            None => {}
        }
        if self.latest.get(volume) != Some(&by) {
            self.wrong.push(format!(
                "{host} wrote to {volume}, which another host has by now, or which is removed"
            ));
        }
    }

    /// Something has got a name. If that is the mark of a removal, nobody who lives may hold it.
    pub(crate) fn renamed(&mut self, disk: &Disk, to: &str) {
        let token = to.strip_prefix(".nfsvol/hosts/");
        if let Some((host, "alive")) = token.and_then(|t| t.split('.').next()?.split_once('/')) {
            self.renewed.insert(host.to_owned(), Instant::now());
        }
        let Some(volume) = to
            .strip_prefix(".nfsvol/volumes/")
            .and_then(|rest| rest.strip_suffix("/removing"))
        else {
            return;
        };
        self.removals += 1;
        // Of an exclusive volume no byte may come from now on; its user may have lost it already.
        if self.latest.insert(volume.to_owned(), 0).is_some() {
            return;
        }
        let holders: Vec<&String> = self
            .mounted
            .iter()
            .filter(|((host, held), grant)| held == volume && !self.is_forgotten(host, **grant))
            .map(|((host, _), _)| host)
            .filter(|host| lives(disk, host))
            .collect();
        if !holders.is_empty() {
            let wrong = format!("{volume} was removed while {holders:?} held it");
            self.wrong.push(wrong);
        }
    }
}

/// Whether a host's session, as its document has it, has not been ended.
fn lives(disk: &Disk, host: &str) -> bool {
    let names = disk.names(".nfsvol/hosts");
    let number = |name: &String| -> Option<u64> {
        let rest = name.strip_prefix(host)?.strip_prefix('.')?;
        rest.strip_suffix(".json")?.parse().ok()
    };
    let Some(number) = names.iter().filter_map(number).max() else {
        return false;
    };
    let json = disk.file(&format!(".nfsvol/hosts/{host}.{number}.json"));
    let Some(doc) = json.and_then(|json| serde_json::from_slice::<HostDoc>(json).ok()) else {
        return false;
    };
    let token = format!("alive.{}.", doc.session);
    let tokens = disk.names(&format!(".nfsvol/hosts/{host}"));
    tokens.iter().any(|name| name.starts_with(&token))
}
