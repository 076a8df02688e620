//! One breaker per server: while it does not answer, callers fail at once.
//!
//! After a failed attempt the next ones get its error for a while (1 s, doubling to 15 s), then
//! one caller may try again while the others still get the old error. A server that answers,
//! even with a refusal, closes its breaker. Servers have nothing to do with each other.

use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use tokio::time::Instant;

use super::ReachError;

/// The rest after the first failure: a caller who retries at once learns nothing new.
const FIRST_REST: Duration = Duration::from_secs(1);
/// The longest rest: after an outage all is well again within this time, without a restart.
const LONGEST_REST: Duration = Duration::from_secs(15);

/// The breaker of one server. Clones are the same breaker.
#[derive(Debug, Clone)]
pub struct Breaker {
    broken: Arc<Mutex<Option<Broken>>>,
    longest: Duration,
}

impl Default for Breaker {
    fn default() -> Self {
        Self::resting(LONGEST_REST)
    }
}

#[derive(Debug)]
struct Broken {
    error: ReachError,
    rest: Duration,
    until: Instant,
    /// A caller is trying whether the server is back.
    trying: bool,
}

impl Breaker {
    /// One whose rests are no longer than this.
    #[must_use]
    pub fn resting(longest: Duration) -> Self {
        Self {
            broken: Arc::default(),
            longest,
        }
    }

    /// Makes an attempt to reach the server, unless it is known to be away.
    ///
    /// Only errors that are [transient](ReachError::is_transient) break the circuit.
    ///
    /// # Errors
    /// That of the attempt, or the last one's with [`ReachError::resting`] set.
    pub async fn run<T>(
        &self,
        attempt: impl Future<Output = Result<T, ReachError>>,
    ) -> Result<T, ReachError> {
        let trial = self.admit()?;
        let result = attempt.await;
        match &result {
            Err(error) if error.is_transient() => self.broke(error, trial.alone),
            _ => *self.state() = None,
        }
        drop(trial);
        result
    }

    /// The error that callers get at the moment, if the server is known to be away.
    #[must_use]
    pub fn last_error(&self) -> Option<ReachError> {
        self.state().as_ref().map(|broken| broken.error.clone())
    }

    fn admit(&self) -> Result<Trial<'_>, ReachError> {
        let mut state = self.state();
        let alone = state.is_some();
        if let Some(broken) = state.as_mut() {
            let rest = broken.until.saturating_duration_since(Instant::now());
            if broken.trying || !rest.is_zero() {
                let mut error = broken.error.clone();
                error.resting = Some(rest);
                return Err(error);
            }
            broken.trying = true;
        }
        drop(state);
        Ok(Trial {
            breaker: self,
            alone,
        })
    }

    fn broke(&self, error: &ReachError, alone: bool) {
        let mut state = self.state();
        let rest = match state.as_ref() {
            Some(before) if alone => (before.rest * 2).min(self.longest),
            // It began before the server was known to be away: nothing new.
            Some(_) => return,
            None => FIRST_REST.min(self.longest),
        };
        *state = Some(Broken {
            error: error.clone(),
            rest,
            until: Instant::now() + rest,
            trying: false,
        });
    }

    fn state(&self) -> MutexGuard<'_, Option<Broken>> {
        self.broken.lock().unwrap_or_else(PoisonError::into_inner)
    }
}

/// An admitted attempt. One that is given up without a result makes room for another.
struct Trial<'a> {
    breaker: &'a Breaker,
    /// It is the one attempt that was let through to a broken circuit.
    alone: bool,
}

impl Drop for Trial<'_> {
    fn drop(&mut self) {
        if let (true, Some(broken)) = (self.alone, self.breaker.state().as_mut()) {
            broken.trying = false;
        }
    }
}

#[cfg(test)]
mod tests {
    use std::future::pending;

    use tokio::time::{advance, timeout};

    use super::*;
    use crate::probe::{Cause, Step};

    fn error(cause: Cause) -> ReachError {
        ReachError {
            share: "nas:/export".to_owned(),
            step: Step::Connect,
            addr: None,
            cause,
            resting: None,
        }
    }

    async fn fails(breaker: &Breaker) -> bool {
        let refused = breaker
            .run(async { Err::<(), _>(error(Cause::Refused)) })
            .await;
        refused.unwrap_err().resting.is_none()
    }

    #[tokio::test(start_paused = true)]
    async fn a_failing_server_rests_longer_each_time_up_to_fifteen_seconds() {
        let breaker = Breaker::default();
        assert!(fails(&breaker).await);
        for rest in [1, 2, 4, 8, 15, 15] {
            advance(Duration::from_millis(rest * 1000 - 1)).await;
            assert!(!fails(&breaker).await, "nothing is sent before {rest} s");
            advance(Duration::from_millis(1)).await;
            assert!(fails(&breaker).await, "one attempt after {rest} s");
        }
        advance(LONGEST_REST).await;
        breaker.run(async { Ok(()) }).await.unwrap();
        assert!(breaker.last_error().is_none());
        assert!(fails(&breaker).await);
        advance(FIRST_REST).await;
        assert!(fails(&breaker).await, "a success forgets the long rest");
    }

    #[tokio::test(start_paused = true)]
    async fn one_caller_at_a_time_tries_a_server_that_was_away() {
        let breaker = Breaker::default();
        assert!(fails(&breaker).await);
        advance(FIRST_REST).await;
        {
            let trial = breaker.run(pending::<Result<(), _>>());
            let others = async {
                tokio::task::yield_now().await;
                assert!(!fails(&breaker).await);
            };
            let trial = timeout(Duration::from_millis(10), trial);
            let (trial, ()) = tokio::join!(trial, others);
            assert!(trial.is_err());
        }
        assert!(
            fails(&breaker).await,
            "a trial that was given up does not block the next"
        );
    }

    #[tokio::test(start_paused = true)]
    async fn failures_beside_each_other_count_once_and_refusals_not_at_all() {
        let breaker = Breaker::default();
        let slow = breaker.run(async {
            tokio::time::sleep(Duration::from_millis(5)).await;
            Err::<(), _>(error(Cause::Refused))
        });
        let (first, second) = tokio::join!(slow, fails(&breaker));
        assert!(second && first.unwrap_err().resting.is_none());
        advance(FIRST_REST).await;
        let denied = breaker
            .run(async { Err::<(), _>(error(Cause::Denied)) })
            .await;
        assert_eq!(denied.unwrap_err().resting, None);
        assert!(fails(&breaker).await, "a server that refuses is there");
    }
}
