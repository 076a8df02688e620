//! How long ago, at the least, a host renewed its session: a lower bound by this host's clock.
//!
//! Two ways, the better one counts:
//! - every own renewal leaves a pair (when its answer came, by this clock; the server's stamp). A
//!   stamp of another host that is not newer than one of these was made before that answer came;
//! - a stamp was made before this host first saw it.
//!
//! So only the order of the server's stamps matters. Its clock may jump forward at any time. A
//! jump back is seen at the next own renewal, because too little time has passed by the server's
//! clock, and drops what was noted before; that is why one is made before a session is ended.
//! What could hide in the time that an answer takes, and in 1 % of rate, counts as doubt.
//!
//! A server that forgets brings back stamps that are older than the last renewals, so after whatever
//! may hide that ([`Elapsed::forget`], a long pause) the past is void, and every host is as young as
//! can be.
//!
//! A server whose stamps are whole seconds (128-byte inodes of ext3, some NAS boxes) is known by them;
//! what hides in such a tick counts once, so a host is taken for dead up to three seconds later.
//!
//! Known limits: two jumps that cancel each other between two renewals are not seen; nor are several
//! of less than two seconds, of a server whose stamps are whole seconds.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::share::Stamp;
use crate::mutant::{self, Mutant};

/// How much the rates of the server's clock and of this host's may differ, in hundredths.
const RATE: u32 = 1;
/// The coarsest ticks of a server's clock, unless its stamps are whole seconds.
const TICK: Duration = Duration::from_millis(10);
const WHOLE_SECONDS: Duration = Duration::from_secs(1);
/// How many such pauses back the past is known.
const KEPT: u32 = 6;

/// An own renewal.
#[derive(Debug, Clone)]
struct Sample {
    /// When its answer came.
    at: Duration,
    stamp: Stamp,
    /// By how much the server's clock may have gone back unseen between the one before and this.
    doubt: Duration,
}

/// See the module.
#[derive(Debug, Clone)]
pub(crate) struct Elapsed {
    /// Longer pauses than this between own renewals say nothing of the server's clock.
    longest: Duration,
    /// Oldest first; the stamps grow with the times.
    samples: VecDeque<Sample>,
    /// The last stamp of each host, and when it was first seen.
    seen: BTreeMap<String, (Stamp, Duration)>,
    /// A stamp was seen that is no whole second.
    fine: bool,
}

fn since(earlier: Stamp, later: Stamp) -> Option<Duration> {
    let time = |stamp: Stamp| Duration::new(stamp.secs, stamp.nanos);
    time(later).checked_sub(time(earlier))
}

impl Elapsed {
    /// `longest`: the longest usual pause between two renewals.
    #[must_use]
    pub(crate) fn new(longest: Duration) -> Self {
        Self {
            longest,
            samples: VecDeque::new(),
            seen: BTreeMap::new(),
            fine: false,
        }
    }

    fn note_ticks(&mut self, stamp: Stamp) {
        let fine = stamp.nanos != 0 || mutant::is_on(Mutant::WholeSecondsAreExact);
        if fine && !self.fine {
            // What they leave in doubt was counted for whole seconds.
            self.samples.clear();
            self.fine = true;
        }
    }

    /// What may hide in a tick of the server's clock besides what each renewal counts: the order of
    /// two stamps, and a jump back in what one renewal measures.
    fn hidden(&self) -> Duration {
        if self.fine {
            Duration::ZERO
        } else {
            WHOLE_SECONDS * 3
        }
    }

    /// An own renewal that was sent at `sent`, and whose answer came at `now`, has this stamp.
    pub(crate) fn sample(&mut self, sent: Duration, now: Duration, stamp: Stamp) {
        self.note_ticks(stamp);
        let (tick, twice) = if self.fine {
            (TICK, TICK * 2)
        } else {
            (WHOLE_SECONDS, Duration::ZERO)
        };
        let mut doubt = Duration::ZERO;
        if let Some(last) = self.samples.back() {
            let least = sent.saturating_sub(last.at);
            let most = now.saturating_sub(last.at);
            let passed = since(last.stamp, stamp).map(|passed| passed + tick);
            match passed.filter(|passed| *passed >= least * (100 - RATE) / 100) {
                Some(passed) if most <= self.longest => {
                    doubt = (most * (100 + RATE) / 100 + twice).saturating_sub(passed);
                }
                // A stamp that was seen before may have been made anew since.
                _ => self.forget(),
            }
        }
        self.samples.push_back(Sample {
            at: now,
            stamp,
            doubt,
        });
        // One that is old enough is kept: it covers all stamps before it.
        let keep = self.longest * KEPT;
        while self
            .samples
            .get(1)
            .is_some_and(|sample| now.saturating_sub(sample.at) > keep)
        {
            self.samples.pop_front();
        }
    }

    /// The server may have forgotten what was seen, and bring back older stamps: all are as young
    /// as can be from now on.
    pub(crate) fn forget(&mut self) {
        self.samples.clear();
        self.seen.clear();
    }

    /// A host's stamp has been read; the answer came at `now`.
    pub(crate) fn see(&mut self, host: &str, stamp: Stamp, now: Duration) {
        self.note_ticks(stamp);
        match self.seen.get(host) {
            Some((known, _)) if *known == stamp => {}
            _ => {
                self.seen.insert(host.to_owned(), (stamp, now));
            }
        }
    }

    /// A lower bound of the time since the host's stamp was made.
    #[must_use]
    pub(crate) fn since(&self, host: &str, stamp: Stamp, now: Duration) -> Duration {
        let covering = self.samples.iter().position(|own| own.stamp >= stamp);
        let by_samples = covering.map(|first| {
            let doubt: Duration = self.samples.iter().skip(first + 1).map(|s| s.doubt).sum();
            self.samples[first].at + doubt + self.hidden()
        });
        let by_sight = self
            .seen
            .get(host)
            .filter(|(known, _)| *known == stamp)
            .map(|(_, at)| *at);
        [by_samples, by_sight]
            .into_iter()
            .flatten()
            .min()
            .map_or(Duration::ZERO, |at| now.saturating_sub(at))
    }

    /// Forgets hosts that are no more.
    pub(crate) fn keep_hosts(&mut self, is_there: impl Fn(&str) -> bool) {
        self.seen.retain(|host, _| is_there(host));
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn stamp(millis: i64) -> Stamp {
        let millis = u64::try_from(millis + 1_000_000_000).unwrap();
        Stamp {
            secs: millis / 1000,
            nanos: u32::try_from(millis % 1000).unwrap() * 1_000_000,
        }
    }

    fn ms(n: u64) -> Duration {
        Duration::from_millis(n)
    }

    #[test]
    fn a_stamp_is_as_old_as_the_first_own_one_after_it() {
        let mut elapsed = Elapsed::new(ms(10_000));
        for (at, own) in [(1000, 10), (2000, 1010), (3000, 2010)] {
            elapsed.sample(ms(at), ms(at), stamp(own));
        }
        let about = |time: Duration, expected: u64| {
            let doubt = ms(20 * 3);
            assert!(
                time <= ms(expected) && time + doubt >= ms(expected),
                "{time:?}"
            );
        };
        about(elapsed.since("b", stamp(1010), ms(3500)), 1500);
        about(elapsed.since("b", stamp(1500), ms(3500)), 500);
        about(elapsed.since("b", stamp(2500), ms(3500)), 0);
        elapsed.see("b", stamp(2500), ms(3200));
        elapsed.see("b", stamp(2500), ms(3400));
        assert_eq!(elapsed.since("b", stamp(2500), ms(3500)), ms(300));
    }

    /// A server whose stamps are whole seconds: the longest by which the bound exceeds the truth.
    fn most_with_whole_seconds() -> Duration {
        let whole = |millis: u64| stamp(i64::try_from(millis / 1000 * 1000).unwrap());
        let mut most = Duration::ZERO;
        for phase in (0..1000).step_by(50) {
            let mut elapsed = Elapsed::new(ms(10_000));
            for own in 0..6 {
                let at = phase + own * 5000;
                elapsed.sample(ms(at), ms(at), whole(at));
            }
            let now = phase + 25_000;
            for made in (phase..now).step_by(50) {
                let bound = elapsed.since("b", whole(made), ms(now));
                most = most.max(bound.saturating_sub(ms(now - made)));
            }
        }
        most
    }

    #[test]
    fn whole_seconds_are_taken_for_no_more_than_that() {
        assert_eq!(most_with_whole_seconds(), Duration::ZERO);
        let _back = mutant::put_back(Mutant::WholeSecondsAreExact);
        assert!(most_with_whole_seconds() > ms(500));
    }

    proptest! {
        /// Whatever the server's clock does, jumping once between two renewals, the bound never
        /// exceeds the truth once an own renewal has followed the reading.
        #[test]
        fn the_bound_is_one(
            steps in prop::collection::vec(
                (1u64..9000, -20_000i64..20_000, 0u64..3, 0u64..1000),
                1..40,
            ),
        ) {
            let (mut now, mut ahead) = (0u64, 0i64);
            let mut elapsed = Elapsed::new(ms(10_000));
            let mut other: Option<(u64, Stamp)> = None;
            let mut jumped = false;
            for (pause, jump, what, answer) in steps {
                now += pause;
                if !jumped && jump % 3 == 0 {
                    ahead += jump;
                    jumped = true;
                }
                let server = stamp(i64::try_from(now).unwrap() + ahead);
                if what == 0 {
                    other = Some((now, server));
                    continue;
                }
                if what == 1 {
                    let sent = now;
                    now += answer;
                    elapsed.sample(ms(sent), ms(now), server);
                    jumped = false;
                    continue;
                }
                if let Some((at, made)) = other {
                    elapsed.see("b", made, ms(now));
                    elapsed.sample(ms(now), ms(now), server);
                    jumped = false;
                    prop_assert!(elapsed.since("b", made, ms(now)) <= ms(now - at));
                }
            }
        }
    }
}
