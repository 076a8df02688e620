//! Taking turns with an exclusive volume.
//!
//! A host whose Mount waits looks every 200 ms ([`CLAIM_PAUSE`]) whether the volume is free, so one that
//! mounts again right after its Unmount would keep it for ever. Whoever waits leaves a mark beside the
//! claims; whoever had the volume a moment ago and wants it again waits for a while, once, if it finds
//! one. A mark that a crash left costs that while, once: it is taken away.

use std::collections::BTreeMap;
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use crate::cluster::{Claimed, Env, Member};
use crate::driver::DriverError;
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::{Record, VolumeName};
use nfs::admin::Admin;

/// How often a Mount that waits for an exclusive volume looks whether it is free.
const CLAIM_PAUSE: Duration = Duration::from_millis(200);
/// How long after its Unmount a host gives way; later than that whoever waited has the volume.
const JUST_NOW: Duration = Duration::from_secs(2);
/// How long it gives way: a few looks of whoever waits.
const GIVE_WAY: Duration = Duration::from_millis(600);
/// After so many looks the mark is made again, which was taken away for a host that was faster.
const REMIND: usize = 10;

/// Exclusive volumes that this host has had a moment ago.
#[derive(Debug, Default)]
pub(super) struct Turns(Mutex<BTreeMap<VolumeName, Instant>>);

impl Turns {
    fn all(&self) -> MutexGuard<'_, BTreeMap<VolumeName, Instant>> {
        self.0.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// Notes that an exclusive volume has been let go of.
    pub(super) fn had(&self, name: &VolumeName) {
        let mut all = self.all();
        all.retain(|_, at| at.elapsed() < JUST_NOW);
        all.insert(name.clone(), Instant::now());
    }

    /// Has a host take an exclusive volume as soon as nobody else has it; until when it has it then.
    pub(super) async fn take<E: Env>(
        &self,
        member: &Member<E>,
        home: &Admin,
        record: &Record,
        deadline: Instant,
    ) -> Result<Duration, DriverError> {
        let (name, host) = (&record.name, &member.host().name);
        self.give_way(home, record).await;
        let mut look = 0;
        loop {
            let holding = match member.claim(&home.scoped(), name, &record.id).await? {
                Claimed::Mine(until) => {
                    if look > 0 {
                        want(home, record, host, false).await;
                    }
                    return Ok(until);
                }
                Claimed::Held(holding) => holding,
            };
            if Instant::now() + CLAIM_PAUSE >= deadline {
                want(home, record, host, false).await;
                let (name, holding) = (name.clone(), holding.into());
                return Err(DriverError::Taken { name, holding });
            }
            if look % REMIND == 0 {
                want(home, record, host, true).await;
            }
            look += 1;
            tokio::time::sleep(CLAIM_PAUSE).await;
        }
    }

    /// Lets a host that waits for a volume go first, if this one has just had it.
    async fn give_way(&self, home: &Admin, record: &Record) {
        let had = self.all().remove(&record.name);
        let is_just_now = had.is_some_and(|at| at.elapsed() < JUST_NOW);
        if !is_just_now || mutant::is_on(Mutant::WhoeverIsFirst) {
            return;
        }
        let claims = layout::claims(&record.name, &record.id);
        let entries = home.list(&claims).await.ok().flatten().unwrap_or_default();
        let names = entries.iter().filter_map(|entry| entry.name.to_str());
        let mut waits = false;
        for mark in names.filter(|name| layout::is_wanted(name)) {
            waits = true;
            // What stays costs the same while again.
            let _ = home.remove_dir(&claims.join(mark)).await;
        }
        if waits {
            tracing::debug!(volume = %record.name, "another host waits for it: it goes first");
            tokio::time::sleep(GIVE_WAY).await;
        }
    }
}

/// Tells who has the volume that a host waits for it, or that it does no longer. It is a courtesy:
/// without it the volume is had all the same, if later.
async fn want(home: &Admin, record: &Record, host: &str, wanted: bool) {
    let mark = layout::wanted(&record.name, &record.id, host);
    let told = match wanted {
        true => home.mkdir(&mark, 0o755).await.map(drop),
        false => home.remove_dir(&mark).await.map(drop),
    };
    if let Err(error) = told {
        tracing::debug!(volume = %record.name, %error, "nobody is told who waits");
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::cluster::{Host, Times};
    use crate::driver::search::AtOnce;
    use crate::driver::tests::Clock;

    struct One {
        member: Member<Clock>,
        turns: Turns,
        home: Admin,
        record: Record,
    }

    impl One {
        async fn take(&self, wait: Duration) -> bool {
            let deadline = Instant::now() + wait;
            let taken = self
                .turns
                .take(&self.member, &self.home, &self.record, deadline);
            taken.await.is_ok()
        }
    }

    fn one(share: &AtOnce, number: usize, name: &str) -> One {
        let host = Host {
            name: name.to_owned(),
            id: name.to_owned(),
            boot: "boot".to_owned(),
        };
        let times = Times::new(Duration::from_secs(30));
        One {
            member: Member::new(host, times, Clock::default(), []),
            turns: Turns::default(),
            home: share.admin(number),
            record: share.record("db"),
        }
    }

    /// A host lets go of a volume and wants it again at once, while another one waits for it: whether
    /// the first has it again, and whether the other gets it.
    fn again_beside_one_that_waits() -> [bool; 2] {
        let share = AtOnce::with_an_exclusive_volume();
        let mut builder = tokio::runtime::Builder::new_current_thread();
        let runtime = builder.enable_time().start_paused(true).build().unwrap();
        runtime.block_on(async {
            let (a, b) = (one(&share, 0, "a"), one(&share, 1, "b"));
            for host in [&a, &b] {
                host.member.beat(&host.home).await.unwrap();
            }
            assert!(a.take(Duration::ZERO).await);
            let again = async {
                tokio::time::sleep(CLAIM_PAUSE / 2).await;
                let name = &a.record.name;
                a.member.release(&a.home, std::slice::from_ref(name)).await;
                a.turns.had(name);
                a.take(Duration::from_secs(1)).await
            };
            let (again, other) = tokio::join!(again, b.take(Duration::from_secs(3)));
            [again, other]
        })
    }

    #[test]
    fn whoever_waits_goes_first() {
        assert_eq!(again_beside_one_that_waits(), [false, true]);
        let _back = mutant::put_back(Mutant::WhoeverIsFirst);
        assert_eq!(again_beside_one_that_waits(), [true, false]);
    }
}
