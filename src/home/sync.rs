//! Following the home share.
//!
//! At rest a poll is one GETATTR of `volumes/`, whose mtime changes whenever a volume comes or
//! goes. Only when it changed is the directory listed (one READDIRPLUS for about 300 volumes), and
//! only records whose directory changed are read.
//!
//! Known limit: servers stamp times in ticks of some milliseconds, so a change may hide behind a
//! listing of the same tick; a list is therefore trusted only when a second one, at least [`TICK`]
//! later, finds the same stamp, and the whole is listed again every [`RELIST`].

use std::collections::{BTreeMap, HashMap, HashSet};
use std::path::Path;
use std::time::Duration;

use serde::{Deserialize, Serialize};
use tokio::time::Instant;

use super::error::CatalogError;
use super::local::{Copy, Stamp};
use super::{Catalog, Known, share};
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::{Record, VolumeName, json};
use nfs::admin::Admin;

/// Where [`State`] is kept in the state directory.
pub(super) const FILE: &str = "home.json";
/// How often the catalog is listed although nothing seems to have changed.
const RELIST: Duration = Duration::from_secs(600);
/// Two listings of the same stamp at least so far apart are not of one tick: the longest ticks are
/// those of servers that keep whole seconds.
const TICK: Duration = Duration::from_millis(1100);
/// For how long a volume that the share was seen to hold is there without another look: as many calls
/// as one command makes.
const CONFIRMED: Duration = Duration::from_secs(1);
/// Records read at once while catching up: enough to hide the round trip, little for the server.
const READS_AT_ONCE: usize = 8;

/// Which share the local copy is of, and how far it follows it.
#[derive(Debug, Default)]
pub(super) struct State {
    known: Identity,
    /// `volumes/` as two listings in a row saw it.
    settled: Option<Stamp>,
    last: Option<(Stamp, Instant)>,
    /// When the stamp of `last` was first listed.
    first: Option<Instant>,
    /// Volumes whose record could not be read when it was looked at last, and why.
    unread: BTreeMap<VolumeName, String>,
    /// When the share was last seen to hold a volume, of those for which that is not long ago.
    confirmed: HashMap<VolumeName, Instant>,
}

#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
struct Identity {
    share_id: Option<String>,
    /// The copy has held every volume at least once.
    complete: bool,
}

impl State {
    pub(super) fn load(state_dir: &Path) -> Result<Self, CatalogError> {
        let known = match std::fs::read(state_dir.join(FILE)) {
            // Damaged: as if never seen, which only makes answers more careful.
            Ok(json) => serde_json::from_slice(&json).unwrap_or_default(),
            Err(e) if e.kind() == std::io::ErrorKind::NotFound => Identity::default(),
            Err(e) => return Err(CatalogError::state(FILE)(e)),
        };
        Ok(Self {
            known,
            ..Self::default()
        })
    }

    /// The same share, not listed yet.
    #[cfg(test)]
    pub(super) fn again(&self) -> Self {
        Self {
            known: self.known.clone(),
            ..Self::default()
        }
    }

    pub(super) fn to_json(&self) -> Vec<u8> {
        json(&self.known)
    }

    #[cfg(test)]
    pub(super) fn listed(unread: BTreeMap<VolumeName, String>) -> Self {
        let mut state = Self {
            unread,
            ..Self::default()
        };
        state.known.complete = true;
        state
    }

    /// The id of the share that the copy is of.
    pub(super) fn known_share(&self) -> Option<String> {
        self.known.share_id.clone()
    }

    /// Notes whether a record could be read.
    pub(super) fn note(&mut self, name: &VolumeName, read: &Result<Option<Record>, CatalogError>) {
        match read {
            Ok(_) => drop(self.unread.remove(name)),
            Err(error @ CatalogError::Record { .. }) => {
                self.unread.insert(name.clone(), error.to_string());
            }
            Err(_) => {}
        }
    }

    fn is_confirmed(&self, name: &VolumeName) -> bool {
        let at = self.confirmed.get(name);
        at.is_some_and(|at| at.elapsed() < CONFIRMED)
    }

    fn confirm(&mut self, name: &VolumeName) {
        self.confirmed.retain(|_, at| at.elapsed() < CONFIRMED);
        self.confirmed.insert(name.clone(), Instant::now());
    }

    /// The volumes whose record could not be read when it was looked at last, and why.
    pub(super) fn unread(&self) -> &BTreeMap<VolumeName, String> {
        &self.unread
    }

    /// Whether a volume that the copy does not hold is none.
    pub(super) fn tells_of(&self, name: &VolumeName) -> bool {
        let unread = self.unread.contains_key(name) && !mutant::is_on(Mutant::UnreadIsAbsent);
        self.known.complete && !unread
    }
}

/// What a poll found.
#[derive(Debug, Default, Clone, PartialEq, Eq)]
pub(crate) struct Changes {
    /// Volumes whose record was read.
    pub read: usize,
    /// Volumes that have gone from the share.
    pub gone: Vec<VolumeName>,
}

impl Catalog {
    /// Makes `.nfsvol/` on a share that has none, and remembers which share this is.
    ///
    /// # Errors
    /// [`CatalogError::OtherShare`] when it is not the share that the local copy is of.
    pub(crate) async fn init(&self, home: &Admin) -> Result<(), CatalogError> {
        let known = self.sync.lock().await.known.share_id.clone();
        let found = match (share::share_id(home).await?, &known) {
            (Some(id), _) => id,
            // Nothing is made on what should be a known share: its file system is not mounted.
            (None, Some(expected)) => return Err(self.other_share(home, "none", expected)),
            (None, None) => {
                let _alone = self.making.lock().await;
                share::init(home).await?
            }
        };
        self.recognise(home, &found).await
    }

    /// Checks that the share holds a catalog.
    ///
    /// # Errors
    /// [`CatalogError::NoCatalog`] when it does not; none is made.
    pub(crate) async fn expect(&self, home: &Admin) -> Result<(), CatalogError> {
        match share::share_id(home).await? {
            Some(_) => Ok(()),
            None => Err(CatalogError::NoCatalog(home.share().to_string())),
        }
    }

    /// Checks that the share is the one that the local copy is of.
    pub(super) async fn verify(&self, home: &Admin) -> Result<(), CatalogError> {
        match share::share_id(home).await? {
            Some(id) => self.recognise(home, &id).await,
            None => {
                let known = self.sync.lock().await.known.share_id.clone();
                known.map_or(Ok(()), |expected| {
                    Err(self.other_share(home, "none", &expected))
                })
            }
        }
    }

    async fn recognise(&self, home: &Admin, id: &str) -> Result<(), CatalogError> {
        let mut state = self.sync.lock().await;
        match &state.known.share_id {
            Some(known) if known == id => Ok(()),
            Some(known) => Err(self.other_share(home, id, known)),
            None => {
                state.known.share_id = Some(id.to_owned());
                tokio::task::block_in_place(|| self.write_sync_state(&state))
            }
        }
    }

    fn other_share(&self, home: &Admin, found: &str, expected: &str) -> CatalogError {
        CatalogError::OtherShare {
            share: home.share().to_string(),
            found: found.to_owned(),
            expected: expected.to_owned(),
            state: self.state_dir.display().to_string(),
        }
    }

    /// Follows the home share: what changes in the tick of a change that was seen is seen once that
    /// tick is over.
    ///
    /// # Errors
    /// What the share answered; the local copy is then as it was, or further along.
    pub(crate) async fn poll(&self, home: &Admin) -> Result<Changes, CatalogError> {
        let changes = self.follow(home, TICK).await?;
        let unread: Vec<_> = {
            let state = self.sync.lock().await;
            state.unread.keys().take(READS_AT_ONCE).cloned().collect()
        };
        // They may have been put right, which does not show in `volumes/`.
        for name in unread {
            let _ = self.fetch(home, &name).await;
        }
        Ok(changes)
    }

    /// Whether a volume needs no look at the share to be told of: it was seen there a moment ago, or no
    /// other host has to do with it.
    pub(crate) async fn is_confirmed(&self, name: &VolumeName) -> bool {
        let known = self.get(name).is_some();
        known && (self.is_only_here(name) || self.sync.lock().await.is_confirmed(name))
    }

    /// What is known of a name, after a look at the share also for a volume that the local copy holds:
    /// another host may have removed it. A share that is silent until `deadline` leaves the copy.
    pub(crate) async fn confirm(
        &self,
        home: Option<&Admin>,
        name: &VolumeName,
        deadline: Instant,
    ) -> Known {
        let (Some(known), Some(home)) = (self.get(name), home) else {
            return self.look_up(home, name, deadline).await;
        };
        if mutant::is_on(Mutant::KnownIsThere) {
            return Known::Here(known);
        }
        match tokio::time::timeout_at(deadline, self.revalidate(home, name)).await {
            Ok(Ok(Some(record))) => {
                self.sync.lock().await.confirm(name);
                Known::Here(record)
            }
            Ok(Ok(None)) => Known::Absent,
            Ok(Err(error)) => {
                tracing::debug!(volume = %name, %error, "the share does not tell; the copy does");
                Known::Here(known)
            }
            Err(_) => {
                tracing::debug!(volume = %name, "the share is silent; the copy tells");
                Known::Here(known)
            }
        }
    }

    /// Brings the local copy up to date with the home share, for what is decided on it.
    ///
    /// # Errors
    /// As [`poll`](Self::poll).
    pub(crate) async fn catch_up(&self, home: &Admin) -> Result<Changes, CatalogError> {
        self.follow(home, Duration::ZERO).await
    }

    /// Lists the share, unless it is as it was, or was listed as it is less than `patience` ago.
    async fn follow(&self, home: &Admin, patience: Duration) -> Result<Changes, CatalogError> {
        let Some(attr) = share::volumes_attr(home).await? else {
            self.init(home).await?;
            return Ok(Changes::default());
        };
        let stamp = Stamp::from(&attr);
        let (settled, last, first) = {
            let state = self.sync.lock().await;
            (state.settled, state.last, state.first)
        };
        let fresh = last.is_some_and(|(_, at)| at.elapsed() < RELIST);
        let is_as_listed = last.is_some_and(|(seen, _)| seen == stamp);
        let waits = is_as_listed && first.is_some_and(|first| first.elapsed() < patience);
        if (settled == Some(stamp) && fresh) || waits {
            return Ok(Changes::default());
        }
        let began = Instant::now();
        let changes = self.list_and_read(home).await?;
        let mut state = self.sync.lock().await;
        if !is_as_listed {
            state.first = Some(began);
        }
        let since = state.first.map_or(Duration::ZERO, |first| {
            began.saturating_duration_since(first)
        });
        state.settled = (since >= TICK).then_some(stamp);
        state.last = Some((stamp, Instant::now()));
        if !state.known.complete {
            state.known.complete = true;
            tokio::task::block_in_place(|| self.write_sync_state(&state))?;
        }
        Ok(changes)
    }

    async fn list_and_read(&self, home: &Admin) -> Result<Changes, CatalogError> {
        self.verify(home).await?;
        let before = self.copies.all();
        let listed = share::list(home).await?;
        let mut changes = Changes::default();
        let torn = self.sync.lock().await.unread.clone();
        let mut unread = BTreeMap::new();
        let changed: Vec<_> = listed
            .iter()
            .filter(|(name, stamp)| {
                let copy = self.copies.get(name);
                torn.contains_key(name) || copy.is_none_or(|copy| copy.stamp != Some(*stamp))
            })
            .cloned()
            .collect();
        for some in changed.chunks(READS_AT_ONCE) {
            let mut reads = tokio::task::JoinSet::new();
            for (name, stamp) in some.iter().cloned() {
                let home = home.clone();
                reads.spawn(async move { (share::read_known(&home, &name).await, name, stamp) });
            }
            while let Some(read) = reads.join_next().await {
                let Ok((read, name, stamp)) = read else {
                    continue;
                };
                match read {
                    Ok(Some(record)) => {
                        let copy = Copy {
                            record: record.into(),
                            stamp: Some(stamp),
                        };
                        tokio::task::block_in_place(|| self.copies.put(copy))
                            .map_err(CatalogError::state("writing a record"))?;
                        changes.read += 1;
                    }
                    // Removed since it was listed; the next poll sees that.
                    Ok(None) => {}
                    // One damaged record must not hide the others, nor may it look removed.
                    Err(error @ CatalogError::Record { .. }) => {
                        tracing::error!(volume = %name, %error, "record on the share unreadable");
                        unread.insert(name, error.to_string());
                    }
                    Err(error) => return Err(error),
                }
            }
        }
        let names: HashSet<&VolumeName> = listed.iter().map(|(name, _)| name).collect();
        // Only what was known before the listing can have gone from it.
        for copy in before
            .iter()
            .filter(|copy| !names.contains(&copy.record.name))
        {
            let name = &copy.record.name;
            // A listing may leave out an entry while others change (RFC 1813, READDIR).
            let is_gone = home.attr(&layout::volume(name)).await?.is_none();
            if is_gone && self.forget(Some(copy), name).await? {
                tracing::info!(volume = %name, entry = %layout::volume(name), "removed by another host");
                changes.gone.push(name.clone());
            }
        }
        self.sync.lock().await.unread = unread;
        Ok(changes)
    }
}
