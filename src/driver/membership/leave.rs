//! Letting go of volumes, once no process of this host has them.

use std::collections::BTreeMap;
use std::sync::Arc;
use std::time::{Duration, Instant};

use crate::driver::{Driver, DriverError};
use crate::mutant::{self, Mutant};
use crate::volume::{Access, Record, VolumeName};

/// How long after the last Unmount it is looked for the end of the volume's last process: a
/// worker ends within milliseconds.
const FREE_WAIT: Duration = Duration::from_millis(500);
const FREE_LOOK: Duration = Duration::from_millis(20);
/// How long a daemon that ends waits for the home share to take what was unmounted last.
const LAST_WORD: Duration = Duration::from_secs(2);

impl Driver {
    /// Tells the others that this host does not hold a volume, if that is so. Of an exclusive one
    /// when this returns, so that the next host has it at once; of others in a moment.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn let_go(&self, name: &VolumeName) {
        if self.attachments.get(name).is_some() {
            return;
        }
        let exclusive = |record: Arc<Record>| record.options.access == Access::Exclusive;
        if !self.catalog.get(name).is_some_and(exclusive) {
            self.leave(name.clone(), Instant::now());
            return;
        }
        let Ok(Some(home)) = self.home().await else {
            return; // `settle` does it when the share is back
        };
        if self.together().shared_home(Some(&home), name).is_some() && self.is_free_soon(name).await
        {
            let member = &self.cluster.member;
            member.release(&home, std::slice::from_ref(name)).await;
            self.cluster.turns.had(name);
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
        self.cluster.leaving().insert(name, since);
        self.cluster.left.notify_one();
    }

    /// Tells the others of the volumes that were unmounted a moment ago.
    pub(in crate::driver) async fn let_go_together(&self) -> Result<(), DriverError> {
        let mut leaving = std::mem::take(&mut *self.cluster.leaving());
        if leaving.is_empty() || self.cluster.aside {
            return Ok(());
        }
        let held = self.cluster.member.held();
        leaving.retain(|name, _| held.contains_key(name));
        if leaving.is_empty() {
            return Ok(());
        }
        let Some(home) = self.home().await? else {
            return Ok(());
        };
        let mut gone = Vec::new();
        let mut records = Vec::new();
        let stops = leaving
            .keys()
            .filter(|_| mutant::is_on(Mutant::StoppedWorkerStopsOthers));
        let stopped: Vec<_> = stops.filter_map(|name| self.locks.try_lock(name)).collect();
        // Without locks: a worker that is stopped keeps no other volume's calls waiting.
        for name in leaving.keys() {
            if self.attachments.get(name).is_some() || self.catalog.is_only_here(name) {
                continue;
            }
            if self.paths.is_left_to_containers(name).await || self.paths.is_served(name) {
                self.leave_later(name, &leaving);
                continue;
            }
            match self.catalog.get(name) {
                Some(record) => records.push(record),
                None => gone.push(name.clone()),
            }
        }
        let holders = match self.holders_of_all(&records) {
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
        gone.retain(|name| match self.locks.try_lock(name) {
            // It was mounted meanwhile; if it was unmounted again as well, it is looked at anew.
            Some(_) if self.attachments.get(name).is_some() => false,
            Some(_) if self.cluster.leaving().contains_key(name) => false,
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
            self.cluster.member.release(&home, &gone).await;
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

    pub(in crate::driver) async fn is_free(&self, name: &VolumeName) -> bool {
        if self.paths.is_left_to_containers(name).await || self.paths.is_served(name) {
            return false;
        }
        match self.catalog.get(name) {
            Some(record) => {
                matches!(self.holders(name, self.marks(&record)), Ok(found) if found.is_empty())
            }
            None => true,
        }
    }
}
