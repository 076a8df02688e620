//! Letting go of volumes, once no process of this host has them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use super::Membership;
use crate::driver::DriverError;
use crate::mutant::{self, Mutant};
use crate::volume::{Access, Record, VolumeName};

/// How long after the last Unmount it is looked for the end of the volume's last process: a
/// worker ends within milliseconds.
const FREE_WAIT: Duration = Duration::from_millis(500);
const FREE_LOOK: Duration = Duration::from_millis(20);
/// Volumes that are unmounted within this time are let go of by one document. In it a Remove on
/// another host waits ([`super::together`]) rather than being refused.
const LEAVE_TOGETHER: Duration = Duration::from_millis(50);
/// How long a daemon that ends waits for the home share to take what was unmounted last.
const LAST_WORD: Duration = Duration::from_secs(2);

impl Membership {
    /// Tells the others that this host does not hold a volume, if that is so. Of an exclusive one
    /// when this returns, so that the next host has it at once; of others in a moment.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn let_go(&self, name: &VolumeName) {
        if self.host.attachments().get(name).is_some() {
            return;
        }
        let exclusive = |record: Arc<Record>| record.options.access == Access::Exclusive;
        if !self.catalog.get(name).is_some_and(exclusive) {
            self.leave(name.clone(), Instant::now());
            return;
        }
        let Ok(Some(home)) = self.shares.home().await else {
            return; // `settle` does it when the share is back
        };
        if self.together().shared_home(Some(&home), name).is_some() && self.is_free_soon(name).await
        {
            let member = &self.member;
            member.release(&home, std::slice::from_ref(name)).await;
            self.turns.had(name);
        }
    }

    /// As [`let_go_together`](Self::let_go_together), before the daemon ends.
    pub(in crate::driver) async fn let_go_at_last(&self) {
        let told = tokio::time::timeout(LAST_WORD, self.let_go_together()).await;
        if !matches!(told, Ok(Ok(()))) {
            tracing::info!("the next start tells the other hosts what was unmounted last");
        }
    }

    pub(in crate::driver) fn leave(&self, name: VolumeName, since: Instant) {
        self.leaving().insert(name, since);
        self.left.notify_one();
    }

    /// Waits for an Unmount, and tells the others of those that came a moment later as well.
    pub(in crate::driver) async fn let_go_in_turn(&self) -> Result<(), DriverError> {
        self.left.notified().await;
        tokio::time::sleep(LEAVE_TOGETHER).await;
        self.let_go_together().await
    }

    /// Tells the others of the volumes that were unmounted a moment ago.
    pub(in crate::driver) async fn let_go_together(&self) -> Result<(), DriverError> {
        let mut leaving = std::mem::take(&mut *self.leaving());
        if leaving.is_empty() || self.aside {
            return Ok(());
        }
        let held = self.member.held();
        leaving.retain(|name, _| held.contains_key(name));
        if leaving.is_empty() {
            return Ok(());
        }
        let Some(home) = self.shares.home().await? else {
            return Ok(());
        };
        let mut gone = Vec::new();
        let mut records = Vec::new();
        let stops = leaving
            .keys()
            .filter(|_| mutant::is_on(Mutant::StoppedWorkerStopsOthers));
        let stopped: Vec<_> = stops.filter_map(|name| self.host.try_lock(name)).collect();
        // Without locks: a worker that is stopped keeps no other volume's calls waiting.
        for name in leaving.keys() {
            if self.host.attachments().get(name).is_some() || self.catalog.is_only_here(name) {
                continue;
            }
            if self.host.paths().is_left_to_containers(name).await
                || self.host.paths().is_served(name)
            {
                self.leave_later(name, &leaving);
                continue;
            }
            match self.catalog.get(name) {
                Some(record) => records.push(record),
                None => gone.push(name.clone()),
            }
        }
        let holders = match self.host.holders_of_all(&records) {
            Ok(holders) => holders,
            Err(error) => {
                tracing::warn!(%error, "the other hosts are told later what was unmounted");
                return Ok(()); // `settle` looks again
            }
        };
        for (record, holders) in records.iter().zip(holders) {
            if holders.is_empty() {
                gone.push(record.name.clone());
            } else {
                self.leave_later(&record.name, &leaving);
            }
        }
        drop(stopped);
        // Held until the others are told, so that none of them is mounted again meanwhile.
        let mut locks = Vec::new();
        gone.retain(|name| match self.host.try_lock(name) {
            // It was mounted meanwhile; if it was unmounted again as well, it is looked at anew.
            Some(_) if self.host.attachments().get(name).is_some() => false,
            Some(_) if self.leaving().contains_key(name) => false,
            Some(lock) => {
                locks.push(lock);
                true
            }
            // A call for the volume is under way, and may mount it again.
            None => {
                self.leave_later(name, &leaving);
                false
            }
        });
        if !gone.is_empty() {
            self.member.release(&home, &gone).await;
        }
        Ok(())
    }

    /// A process has the volume still; for a while it may be one that is ending.
    fn leave_later(&self, name: &VolumeName, leaving: &BTreeMap<VolumeName, Instant>) {
        if let Some(since) = leaving
            .get(name)
            .filter(|since| since.elapsed() < FREE_WAIT)
        {
            self.leave(name.clone(), *since);
        }
    }

    /// Whether no process of this host has a volume that it has unmounted.
    async fn is_free_soon(&self, name: &VolumeName) -> bool {
        let deadline = Instant::now() + FREE_WAIT;
        loop {
            if self.is_free(name).await {
                return true;
            }
            if Instant::now() > deadline {
                return false;
            }
            tokio::time::sleep(FREE_LOOK).await;
        }
    }

    pub(super) async fn is_free(&self, name: &VolumeName) -> bool {
        let record = self.catalog.get(name);
        self.host.is_free(name, record.as_deref()).await
    }
}
