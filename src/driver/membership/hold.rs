//! Taking a volume: what the other hosts are told before it is mounted.

use std::time::Instant;

use super::{Membership, nanos};
use crate::cluster::MemberError;
use crate::driver::DriverError;
use crate::home::CatalogError;
use crate::volume::{Access, Record, Right};
use nfs::admin::Admin;

impl Membership {
    /// Tells the others that this host is about to mount a volume, and makes sure that none of
    /// them is removing it.
    ///
    /// Waits for an exclusive volume until the deadline; returns its fence.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(in crate::driver) async fn hold(
        &self,
        home: Option<&Admin>,
        record: &Record,
        deadline: Instant,
    ) -> Result<Option<Right>, DriverError> {
        let name = &record.name;
        let exclusive = record.options.access == Access::Exclusive;
        let Some(home) = self.together().shared_home(home, name) else {
            return match exclusive {
                true => Err(CatalogError::NoHome("access=exclusive").into()),
                false => Ok(None),
            };
        };
        let mut fence = None;
        let there = if exclusive {
            fence = Some(match self.claim(home, record, deadline).await {
                // Removed since it was looked up: there is no place for a claim.
                Err(DriverError::Cluster(_)) if self.together().is_gone(record).await => {
                    return Err(CatalogError::Absent(name.clone()).into());
                }
                claimed => claimed?,
            });
            // The claim may have been waited for: the volume is looked up anew.
            self.together().is_still_there(&home.scoped(), record).await
        } else {
            let there = self.together().announce_hold(home, record).await;
            there.map_err(DriverError::from)
        };
        match there {
            Ok(true) => Ok(fence),
            Ok(false) => {
                self.let_go(name).await;
                Err(CatalogError::Absent(name.clone()).into())
            }
            // A full share must not keep the container from starting that would tidy it up.
            Err(DriverError::Cluster(MemberError::Share(error)))
                if !exclusive && error.takes_no_change() =>
            {
                tracing::warn!(volume = %name, %error, "mounted without telling the other hosts");
                Ok(None)
            }
            Err(error) => {
                self.let_go(name).await;
                Err(error)
            }
        }
    }

    /// Takes an exclusive volume as soon as nobody else has it.
    #[tracing::instrument(level = "debug", skip_all)]
    async fn claim(
        &self,
        home: &Admin,
        record: &Record,
        deadline: Instant,
    ) -> Result<Right, DriverError> {
        let (name, member) = (&record.name, &self.member);
        // What serves it since a time when this host had it before holds what others do not know.
        // Of a daemon that has just started only its session tells what goes on.
        if self.host.paths().is_served(name)
            && !member.held_in_session(home).await?.contains_key(name)
        {
            self.host.paths().abort(name).await?;
        }
        let taken = self.turns.take(member, home, record, deadline.into());
        // Not the right of now: the claim may be lost by now, and a new session begun.
        Ok(self.fence(nanos(taken.await?)))
    }

    pub(in crate::driver) fn fence(&self, until: u64) -> Right {
        let under_way = self.member.times().under_way().as_millis();
        Right {
            until,
            under_way: u32::try_from(under_way).unwrap_or(u32::MAX),
        }
    }
}
