//! The times of a session, all derived from one setting.

use std::time::Duration;

/// A session is renewed six times in its length: more often would only load the server; and
/// nobody waits longer than the other for a dead host.
pub(crate) const SHORTEST_SESSION: Duration = Duration::from_secs(3);
pub(crate) const LONGEST_SESSION: Duration = Duration::from_secs(3600);

/// The times of a session of length T. The margins, at T = 30 s:
///
/// | after the last renewal was sent | by the clock of |
/// |---|---|
/// | T/6 (5 s): the next renewal; one that is not answered within T/12 (2.5 s) is sent again T/60 (0.5 s) later | the host |
/// | T/2 (15 s): the host's right ends; no more is sent | the host |
/// | + T/6 (20 s): nothing sent before is still under way (TCP_USER_TIMEOUT) | the host |
/// | 5T/6 (25 s): others may end the session | the others |
/// | T (30 s): they have, at the latest, if they looked | the others |
///
/// 20 s of a clock that is 5 % slow are 21 s, and 25 s of one that is 5 % fast are 23.8 s: there
/// are 2.7 s left for the server to carry out what has reached it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct Times {
    /// The session time, T.
    pub session: Duration,
}

impl Times {
    #[must_use]
    pub fn new(session: Duration) -> Self {
        Self { session }
    }

    /// Between two renewals.
    #[must_use]
    pub fn renew(self) -> Duration {
        self.session / 6
    }

    /// How long a renewal waits for its answer.
    #[must_use]
    pub fn answer(self) -> Duration {
        self.session / 12
    }

    /// Before a renewal is sent again that was not answered.
    #[must_use]
    pub fn again(self) -> Duration {
        self.session / 60
    }

    /// How long the right lasts that a renewal gives, from when it was sent.
    #[must_use]
    pub fn right(self) -> Duration {
        self.session / 2
    }

    /// How long what was handed to TCP may still be under way.
    #[must_use]
    pub fn under_way(self) -> Duration {
        self.session / 6
    }

    /// How long a session must have been silent before another host ends it.
    #[must_use]
    pub fn expire(self) -> Duration {
        self.session * 5 / 6
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_margins_hold_for_clocks_that_differ_by_5_percent() {
        for secs in [3, 30, 300] {
            let times = Times::new(Duration::from_secs(secs));
            let fenced = (times.right() + times.under_way()).mul_f64(1.05);
            let expired = times.expire().div_f64(1.05);
            assert!(fenced + times.session / 12 < expired, "{times:?}");
            let one_more = times.answer() + times.again();
            assert!(
                times.renew() + one_more * 2 + times.answer() < times.right(),
                "two lost renewals are nothing"
            );
            // The last stamp that another host knows of is at most one renewal old.
            assert!(times.expire() + times.renew() <= times.session);
        }
    }
}
