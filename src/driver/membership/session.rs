//! The session of this host and the rights that it gives: renewing and prolonging.

use std::sync::Arc;
use std::sync::atomic::Ordering;

use super::{Membership, nanos};
use crate::cluster::{Beat, Renewal};
use crate::driver::DriverError;
use crate::volume::{Access, Right, VolumeName};

impl Membership {
    /// Tells the workers of exclusive volumes until when they may send.
    fn prolong(self: &Arc<Self>) {
        // Read before the holds: a right of a session that begins now is not for those of the last.
        let until = nanos(self.member.right_until());
        for (name, hold) in self.member.held().iter() {
            if hold.access == Access::Exclusive {
                let (membership, name) = (Arc::clone(self), name.clone());
                // One that does not answer delays no other.
                tokio::spawn(async move {
                    if !membership.host.paths().prolong(&name, until).await {
                        membership.guard_again(&name, until).await;
                    }
                });
            }
        }
    }

    /// Tells the worker of a volume that has just been mounted: it may have missed a renewal since
    /// the claim.
    pub(in crate::driver) async fn prolong_one(&self, name: &VolumeName) {
        // Read before the holds, as above.
        let until = nanos(self.member.right_until());
        if self.member.held().contains_key(name) {
            self.host.paths().prolong(name, until).await;
        }
    }

    /// The fence of an exclusive volume whose guard has gone.
    async fn guard_again(&self, name: &VolumeName, until: u64) {
        // A call for the volume is under way: it knows better, and this comes again.
        let Some(_lock) = self.host.try_lock(name) else {
            return;
        };
        tracing::warn!(volume = %name, "without a guard; a new one is started");
        if self.host.paths().is_own(name)
            && let Err(error) = self.host.paths().guard(name, self.fence(until)).await
        {
            tracing::error!(volume = %name, %error, "nobody would fence it");
        }
    }

    /// Has an exclusive volume watched that has just been mounted by the kernel's client.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn guard(
        &self,
        name: &VolumeName,
        fence: Right,
    ) -> Result<(), DriverError> {
        // Mounting may have taken longer than the right lasted that the claim was made in. Read
        // before the holds: a right of a session that begins now is not for those of the last.
        let until = nanos(self.member.right_until());
        let held = self.member.held().contains_key(name);
        let until = if held { until } else { fence.until };
        let guarded = self.host.paths().guard(name, Right { until, ..fence });
        Ok(guarded.await?)
    }

    /// Renews this host's session, tells the workers of exclusive volumes, and waits until that is
    /// due again: at once as long as there is a right and no answer.
    pub(in crate::driver) async fn beat(self: &Arc<Self>) -> Result<(), DriverError> {
        let member = &self.member;
        let renewed = self.renew().await;
        if !matches!(renewed, Ok(Renewal::Renewed)) || member.is_unsure() {
            self.tend.notify_one();
        }
        self.prolong();
        let pause = member.pause(renewed.is_ok());
        let begun = self.begun.notified();
        // A session that began meanwhile gives a right with its first renewal.
        let _ = tokio::time::timeout(pause, begun).await;
        renewed.map(drop)
    }

    async fn renew(&self) -> Result<Renewal, DriverError> {
        let Some(home) = self.shares.home().await? else {
            return Ok(Renewal::Renewed);
        };
        let tries = self.unanswered.load(Ordering::Relaxed);
        // A server may take longer to be reached anew than to answer: every other time there is
        // more time for it.
        let way = match tries % 2 {
            0 => home.for_renewals(self.member.times().answer()),
            _ => home,
        };
        let renewed = self.member.renew(&way).await;
        let tries = if renewed.is_ok() { 0 } else { tries + 1 };
        self.unanswered.store(tries, Ordering::Relaxed);
        Ok(renewed?)
    }

    /// What is to be done beside the renewals, from time to time and when one of them says so.
    pub(in crate::driver) async fn tend(self: &Arc<Self>) -> Result<(), DriverError> {
        let pause = self.member.times().renew();
        let _ = tokio::time::timeout(pause, self.tend.notified()).await;
        let Some(home) = self.shares.home().await? else {
            return Ok(());
        };
        if !self.member.has_right() {
            // Made where it is absent, and known to be the share that it was.
            self.catalog.init(&home).await?;
        }
        let forgotten = self.member.is_forgotten();
        match self.member.tend(&home).await? {
            Beat::Renewed if forgotten => self.begun.notify_one(),
            Beat::Renewed => {}
            // Only a renewal gives a right.
            Beat::Began => {
                self.begun.notify_one();
                self.changed.notify_one();
            }
            Beat::Lost(lost) => {
                self.begun.notify_one();
                tracing::error!(
                    ?lost,
                    "this host was out of reach of its home share for longer \
                    than the session time, or its server has forgotten that they were here"
                );
                let held = self.member.held();
                // One that was taken anew meanwhile has a new worker.
                for name in lost.into_iter().filter(|name| !held.contains_key(name)) {
                    let membership = Arc::clone(self);
                    tokio::spawn(async move { membership.give_up(&name).await });
                }
                self.changed.notify_one();
            }
        }
        if self.member.has_right() {
            self.recover().await;
        }
        Ok(())
    }
}
