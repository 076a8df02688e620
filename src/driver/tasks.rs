//! What runs in the background: following the home share, emptying the trash, watching shares,
//! reconciling attachments, unmounting idle shares.
//!
//! The RPCs that this costs are in docs/DESIGN.md ("What a host costs the server").

use std::collections::HashSet;
use std::sync::Arc;
use std::time::Duration;

use tokio_util::sync::CancellationToken;

use super::membership::STARTED;
use super::{Driver, DriverError};
use crate::home::Changes;
use crate::volume::VolumeName;
use nfs::address::Share;

/// How often the health of shares in use is looked at.
const HEALTH_EVERY: Duration = Duration::from_secs(30);
/// How often the trash is looked through.
const TRASH_EVERY: Duration = Duration::from_secs(3600);
/// A daemon that starts has calls to answer before it looks through the trash.
const SERVE_FIRST: Duration = Duration::from_secs(2);
/// How long the tasks may take to end at the stop: each does at its next await.
const TASKS_END: Duration = Duration::from_secs(2);

impl Driver {
    /// Starts the background tasks; they end when `stop` is cancelled.
    pub(crate) fn start(self: &Arc<Self>, stop: &CancellationToken) {
        let poll = self.config.poll;
        self.every(
            stop,
            "following the home share",
            poll,
            |driver| async move { driver.follow().await },
        );
        self.every(stop, "checking shares", HEALTH_EVERY, |driver| async move {
            driver.check_shares().await;
            Ok(())
        });
        self.every(
            stop,
            "emptying the trash",
            TRASH_EVERY,
            |driver| async move {
                tokio::time::sleep(SERVE_FIRST).await;
                driver.empty_trash().await
            },
        );
        let driver = self.clone();
        let looking = async move { driver.look_at_trash_when_asked().await };
        self.tasks
            .spawn(stop.clone().run_until_cancelled_owned(looking));
        if self.config.session.is_some() {
            // Each waits by itself for its next turn.
            self.every(
                stop,
                "renewing this host's session",
                Duration::ZERO,
                |driver| async move { driver.membership.beat().await },
            );
            self.every(
                stop,
                "keeping what this host has on the home share",
                Duration::ZERO,
                |driver| async move { driver.membership.tend().await },
            );
            self.every(
                stop,
                "telling the other hosts what this one holds",
                STARTED,
                |driver| async move { driver.membership.settle_in_turn().await },
            );
            self.every(
                stop,
                "telling the other hosts what this one has unmounted",
                Duration::ZERO,
                |driver| async move { driver.membership.let_go_in_turn().await },
            );
        }
        let driver = self.clone();
        let reconciling = async move {
            let exists = |name: &VolumeName| driver.catalog.get(name).is_some();
            driver.host.keep_reconciled(exists).await;
        };
        self.tasks
            .spawn(stop.clone().run_until_cancelled_owned(reconciling));
    }

    /// Ends the background tasks, whose token is cancelled, tells the other hosts what was
    /// unmounted, and unmounts the shares that no volume uses; mounted volumes stay for their
    /// containers.
    pub(crate) async fn stop(&self) {
        self.tasks.close();
        if tokio::time::timeout(TASKS_END, self.tasks.wait())
            .await
            .is_err()
        {
            tracing::warn!("some background work goes on while this daemon ends");
        }
        self.membership.let_go_at_last().await;
        self.host.paths().shutdown().await;
    }

    fn every<F>(
        self: &Arc<Self>,
        stop: &CancellationToken,
        what: &'static str,
        pause: Duration,
        work: impl Fn(Arc<Self>) -> F + Send + 'static,
    ) where
        F: Future<Output = Result<(), DriverError>> + Send,
    {
        let driver = self.clone();
        let turns = async move {
            let mut failed = false;
            loop {
                match work(driver.clone()).await {
                    // Said once, not at every turn while a server is away.
                    Err(error) if !failed => {
                        tracing::warn!(%error, "{what} failed; going on trying");
                        failed = true;
                    }
                    Err(_) => {}
                    Ok(()) if failed => {
                        tracing::info!("{what} works again");
                        failed = false;
                    }
                    Ok(()) => {}
                }
                tokio::time::sleep(pause).await;
            }
        };
        // In the middle of a turn too: what it leaves is what a crash would leave.
        self.tasks
            .spawn(stop.clone().run_until_cancelled_owned(turns));
    }

    /// Reads the catalog of the home share, which must be there.
    ///
    /// # Errors
    /// When the share cannot be reached, or holds no catalog.
    pub(crate) async fn read_catalog(&self) -> Result<(), DriverError> {
        if let Some(home) = self.shares.home().await? {
            self.catalog.expect(&home).await?;
            self.catalog.poll(&home).await?;
            self.membership.look(&home).await?;
        }
        Ok(())
    }

    async fn follow(&self) -> Result<(), DriverError> {
        let Some(contact) = self.shares.home_contact() else {
            return Ok(());
        };
        let polled = async {
            Ok(self
                .catalog
                .poll(&self.shares.admin(&contact).await?)
                .await?)
        };
        let polled: Result<Changes, DriverError> = polled.await;
        contact.heard(polled.is_ok());
        let changes = polled?;
        if changes.read > 0 || !changes.gone.is_empty() {
            tracing::debug!(
                read = changes.read,
                gone = changes.gone.len(),
                "catalog followed"
            );
        }
        self.membership
            .look_in_turn(&self.shares.admin(&contact).await?)
            .await
    }

    /// Forgets the shares that no volume names any more: containers may name any number of them.
    pub(super) fn forget_shares(&self) {
        let home = self.config.share.as_ref();
        let records = self.catalog.list();
        let named: HashSet<&Share> = records.iter().filter_map(|r| r.share(home)).collect();
        self.shares.keep(|share| {
            home == Some(share) || named.contains(share) || self.host.attachments().uses(share)
        });
    }

    async fn check_shares(self: &Arc<Self>) {
        let home = self.config.share.as_ref();
        self.forget_shares();
        let mut checks = tokio::task::JoinSet::new();
        for contact in self.shares.all() {
            if home == Some(&contact.share) || self.host.attachments().uses(&contact.share) {
                // Each in its own task: a silent share delays no other.
                let driver = self.clone();
                checks.spawn(async move {
                    let admin = driver.shares.admin(&contact).await;
                    contact.check(admin).await;
                });
            }
        }
        while checks.join_next().await.is_some() {}
    }
}
