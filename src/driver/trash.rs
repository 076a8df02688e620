//! Emptying the trash, and sweeping what crashes left, on every share that this host knows of.
//!
//! Invariants: one share that is away, or one entry that cannot be deleted, stops no other's; data on
//! another share goes before its entry on the home share, by which it is known. Of the hosts of a
//! home share one looks at a time, another one each day.

use std::collections::{BTreeSet, HashSet};
use std::sync::atomic::Ordering;
use std::time::Duration;

use super::{Driver, DriverError};
use crate::api::{Purged, TrashPurge};
use crate::home::{Catalog, TrashEntry};
use crate::mutant::{self, Mutant};
use chance::host_time;
use nfs::address::Share;
use nfs::admin::Admin;

/// How long one host of several looks after the trash: each needs to read what it has not seen.
const TURN: Duration = Duration::from_secs(86_400);
/// Of so few hosts each looks once when its daemon starts as well.
const FEW: usize = 10;

impl Driver {
    /// Deletes what has been in the trash for long enough, and what crashes left.
    pub(super) async fn empty_trash(&self) -> Result<(), DriverError> {
        if self.config.share.is_some() && !self.is_its_turn().await? {
            return Ok(());
        }
        let mut trashes: Vec<Share> = self.config.share.iter().cloned().collect();
        if trashes.is_empty() {
            trashes = self.catalog.trash_shares().await;
        }
        let mut sweeping: BTreeSet<String> = trashes.iter().map(ToString::to_string).collect();
        let records = self.catalog.list();
        let moved = records.iter().filter(|record| record.moves_data());
        let named = moved.filter_map(|record| record.share(self.config.share.as_ref()));
        sweeping.extend(named.map(ToString::to_string));
        let mut result = Ok(());
        for share in trashes {
            let emptied = self.empty_trash_of(&share, &mut sweeping).await;
            result = result.and(emptied);
        }
        for share in sweeping.iter().filter_map(|share| share.parse().ok()) {
            let swept = async { Ok(self.catalog.sweep(&self.admin_of(&share).await?).await?) };
            let swept: Result<usize, DriverError> = swept.await;
            let swept = swept.map(drop);
            result = result.and(swept);
        }
        result
    }

    async fn empty_trash_of(
        &self,
        share: &Share,
        sweeping: &mut BTreeSet<String>,
    ) -> Result<(), DriverError> {
        let home = self.admin_of(share).await?;
        let expired = self.catalog.expired(&home, self.config.trash_time).await?;
        let mut result = Ok(());
        let mut away: HashSet<Share> = HashSet::new();
        for entry in expired {
            let its = entry.record.share(Some(share)).unwrap_or(share).clone();
            sweeping.insert(its.to_string());
            if away.contains(&its) {
                continue;
            }
            match self.purge_entry(&home, &entry).await {
                Ok(()) => tracing::info!(entry = entry.entry, "purged from the trash"),
                Err(error) => {
                    tracing::warn!(entry = entry.entry, %error, "stays in the trash for now");
                    if error.is_transient() && its != *share {
                        away.insert(its);
                    }
                    if mutant::is_on(Mutant::SweepEndsAtTheFirstError) {
                        return Err(error);
                    }
                    result = result.and(Err(error));
                }
            }
        }
        result
    }

    /// Whether it is this host that looks after the trash of the home share now.
    async fn is_its_turn(&self) -> Result<bool, DriverError> {
        if self.config.session.is_none() {
            return Ok(true);
        }
        if let Some(home) = self.shares.home().await? {
            self.membership.look(&home).await?;
        }
        let me = self.membership.name().to_owned();
        let others = self.membership.elsewhere();
        let mut hosts: BTreeSet<&str> = others.hosts().collect();
        hosts.insert(&me);
        // What the daemon itself left when it ended is looked at when it starts.
        if hosts.len() < FEW && !self.watch.looked_at_trash.swap(true, Ordering::Relaxed) {
            return Ok(true);
        }
        let turn = usize::try_from(host_time() / TURN.as_secs()).unwrap_or(0) % hosts.len();
        Ok(hosts.iter().nth(turn) == Some(&me.as_str()))
    }

    /// The way to a share that no volume names any more, or that is the home share.
    async fn admin_of(&self, share: &Share) -> Result<Admin, DriverError> {
        let contact = self.shares.contact_without_volume(share);
        self.shares.admin(&contact).await
    }

    async fn purge_entry(&self, home: &Admin, entry: &TrashEntry) -> Result<(), DriverError> {
        // Of a share that holds none of its data nothing is needed.
        let on = match entry.holds_data() {
            true => Some(self.shares.data(&entry.record.options).await?),
            false => None,
        };
        Ok(Catalog::purge(Some(home), on.as_ref(), &entry.entry).await?)
    }

    /// `nfsvol trash purge`.
    pub(super) async fn purge(&self, purge: TrashPurge) -> Result<Purged, DriverError> {
        let home = self.trash_share().await?;
        let mut entries = self.catalog.trash(&home).await?;
        if let TrashPurge::Name(name) = purge {
            let newest = self.catalog.find_in_trash(&home, &name).await?;
            entries.retain(|e| e.entry == name || (newest.entry != name && e.name == newest.name));
        }
        let mut purged = Vec::new();
        let mut result = Ok(());
        for entry in &entries {
            match self.purge_entry(&home, entry).await {
                Ok(()) => purged.push(entry.entry.clone()),
                Err(error) => result = result.and(Err(error)),
            }
        }
        self.watch.trash_changed();
        result?;
        Ok(Purged { purged })
    }
}
