//! How long ago, at the least, a host renewed its session: a lower bound by this host's clock.
//!
//! Two ways, the better one counts:
//! - every own renewal leaves a pair (when its answer came, by this clock; the server's stamp). A
//!   stamp of another host that is not newer than one of these was made before that answer came;
//! - a stamp was made before this host first saw it.
//!
//! So only the order of the server's stamps matters, not its clock's rate or its jumps forward. A
//! jump back is seen at the next own renewal, which drops what was noted before; that is why one
//! is made before a session is ended.

use std::collections::{BTreeMap, VecDeque};
use std::time::Duration;

use super::share::Stamp;

/// See the module.
#[derive(Debug, Default)]
pub struct Elapsed {
    /// Oldest first; the stamps grow with the times.
    samples: VecDeque<(Duration, Stamp)>,
    /// The last stamp of each host, and when it was first seen.
    seen: BTreeMap<String, (Stamp, Duration)>,
}

impl Elapsed {
    /// An own renewal, whose answer came at `now`, has this stamp. Those older than `keep` are
    /// of no use.
    pub fn sample(&mut self, now: Duration, stamp: Stamp, keep: Duration) {
        if self.samples.back().is_some_and(|(_, last)| stamp < *last) {
            self.samples.clear();
        }
        self.samples.push_back((now, stamp));
        // One that is old enough is kept: it covers all stamps before it.
        while self
            .samples
            .get(1)
            .is_some_and(|(at, _)| now.saturating_sub(*at) > keep)
        {
            self.samples.pop_front();
        }
    }

    /// A host's stamp has been read; the answer came at `now`.
    pub fn see(&mut self, host: &str, stamp: Stamp, now: Duration) {
        match self.seen.get(host) {
            Some((known, _)) if *known == stamp => {}
            _ => {
                self.seen.insert(host.to_owned(), (stamp, now));
            }
        }
    }

    /// A lower bound of the time since the host's stamp was made.
    #[must_use]
    pub fn since(&self, host: &str, stamp: Stamp, now: Duration) -> Duration {
        let by_samples = self
            .samples
            .iter()
            .find(|(_, own)| *own >= stamp)
            .map(|(at, _)| *at);
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
    pub fn keep_hosts(&mut self, is_there: impl Fn(&str) -> bool) {
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
        let mut elapsed = Elapsed::default();
        for (at, own) in [(1000, 10), (2000, 1010), (3000, 2010)] {
            elapsed.sample(ms(at), stamp(own), ms(60_000));
        }
        assert_eq!(elapsed.since("b", stamp(1010), ms(3500)), ms(1500));
        assert_eq!(elapsed.since("b", stamp(1500), ms(3500)), ms(500));
        assert_eq!(elapsed.since("b", stamp(2500), ms(3500)), ms(0));
        elapsed.see("b", stamp(2500), ms(3200));
        elapsed.see("b", stamp(2500), ms(3400));
        assert_eq!(elapsed.since("b", stamp(2500), ms(3500)), ms(300));
    }

    proptest! {
        /// Whatever the server's clock does, the bound never exceeds the truth once an own renewal
        /// has followed the reading.
        #[test]
        fn the_bound_is_one(
            steps in prop::collection::vec((1u64..5000, -20_000i64..20_000, any::<bool>()), 1..40),
        ) {
            let (mut now, mut shift) = (0u64, 0i64);
            let mut elapsed = Elapsed::default();
            let mut other: Option<(u64, Stamp)> = None;
            for (pause, jump, renews) in steps {
                now += pause;
                // The server's clock jumps now and then.
                if jump % 3 == 0 {
                    shift += jump;
                }
                let server = stamp(i64::try_from(now).unwrap() + shift);
                if renews {
                    other = Some((now, server));
                }
                if let Some((at, made)) = other {
                    elapsed.see("b", made, ms(now));
                    elapsed.sample(ms(now), server, ms(30_000));
                    prop_assert!(elapsed.since("b", made, ms(now)) <= ms(now - at));
                }
            }
        }
    }
}
