//! Making true what the other hosts are told.

use std::collections::BTreeSet;
use std::sync::Arc;
use std::time::Duration;

use super::{Membership, STARTED};
use crate::docker::engine;
use crate::driver::DriverError;
use crate::host::{HostError, RECONCILE_EVERY, describe};
use crate::volume::{Access, Record, VolumeName};

/// How long a volume may take, at each later try, whose data did not reach the server in time.
const LATE_FLUSH: Duration = Duration::from_secs(5);

impl Membership {
    /// Goes on with volumes that were fenced, now that this host has a right again: what Docker
    /// did not let go of is let go of, and containers are started as their restart policy says.
    pub(in crate::driver) async fn recover(self: &Arc<Self>) {
        let mut stopped = BTreeSet::new();
        for (name, fenced) in self.host.paths().guards().unsettled() {
            let Some(_lock) = self.host.try_lock(&name) else {
                continue;
            };
            if self.host.paths().is_served(&name) {
                continue;
            }
            tracing::warn!(volume = %name, containers = ?fenced.containers, "was fenced; going on");
            self.host.attachments().retain(&name, |_| false);
            self.let_go(&name).await;
            if let Err(error) = self.host.paths().guards().settle(&name, &fenced) {
                tracing::warn!(volume = %name, %error, "asked again at the next renewal");
                continue;
            }
            stopped.extend(fenced.containers);
        }
        // Each once, however many of its volumes were fenced: a start that waits for another host is
        // in the way of whoever stops the container.
        for container in stopped {
            let docker = self.docker_socket.clone();
            tokio::spawn(async move {
                if let Err(error) = engine::start_again(&docker, &container).await {
                    tracing::warn!(container, %error, "not started again; start it by hand");
                }
            });
        }
    }

    /// Ends the use of an exclusive volume that another host may have by now.
    pub(in crate::driver) async fn give_up(&self, name: &VolumeName) {
        tracing::error!(volume = %name, "lost: its containers get errors; start them again");
        if let Err(error) = self.host.paths().abort(name).await {
            tracing::error!(volume = %name, %error, "its worker is fenced, but not ended");
        }
    }

    /// Waits for a change, or for a while without one, and settles.
    pub(in crate::driver) async fn settle_in_turn(&self) -> Result<(), DriverError> {
        let changed = self.changed.notified();
        if tokio::time::timeout(RECONCILE_EVERY, changed).await.is_ok() {
            tokio::time::sleep(STARTED).await;
        }
        self.settle().await
    }

    /// Makes what the others are told true: volumes that are attached are held, others are not.
    pub(in crate::driver) async fn settle(&self) -> Result<(), DriverError> {
        let Some(home) = self.shares.home().await? else {
            return Ok(());
        };
        let member = &self.member;
        let attached = self.host.attachments().all();
        let records: Vec<Arc<Record>> = attached
            .iter()
            .filter(|(name, _)| !self.catalog.is_only_here(name))
            .filter_map(|(name, _)| self.catalog.get(name))
            .collect();
        for record in &records {
            let name = &record.name;
            // An exclusive volume is held by its claim alone.
            if record.options.access != Access::Exclusive {
                member.hold(&home, name, record.options.access).await?;
            } else if let Some(_lock) = self.host.try_lock(name)
                && self.host.paths().is_served(name)
                && member.has_right()
                && !member.held().contains_key(name)
            {
                self.give_up(name).await;
            }
        }
        let found = self.host.holders_of_all(&records);
        let found = found.map_err(HostError::state("reading /proc"))?;
        let holders = records.iter().zip(found).map(|(record, found)| {
            let mut found: Vec<String> = found.iter().map(describe).collect();
            found.sort();
            found.dedup();
            (record.name.clone(), found)
        });
        member.describe(&home, &holders.collect()).await?;
        for name in member.held().keys() {
            // A call for the volume is under way: it knows better.
            let Some(_lock) = self.host.try_lock(name) else {
                continue;
            };
            if self.host.attachments().get(name).is_some() {
                continue;
            }
            // What an Unmount could not finish.
            if self.host.paths().is_own(name)
                && let Err(error) = self.host.paths().detach(name, LATE_FLUSH).await
            {
                tracing::warn!(volume = %name, %error, "not let go of yet");
            }
            if self.is_free(name).await {
                member.release(&home, std::slice::from_ref(name)).await;
            }
        }
        Ok(())
    }
}
