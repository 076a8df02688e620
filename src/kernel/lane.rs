//! Blocking calls with a deadline.
//!
//! A call into a mount of a silent server may never return, and nothing but the server's return
//! can end it. So such calls run on threads of their own, a few per lane and one set of lanes per
//! share: what one share can hold up is these threads, never an async thread, never another
//! share. (Not tokio's blocking pool: the runtime waits for that pool when it shuts down.)
//!
//! Invariants: at most [`WIDTH`] threads per lane; while a call is overdue, new calls on its lane
//! fail at once (but for unmounts, which must always be tried); a call whose caller has given up
//! commits nothing ([`Ticket::commit`]).

use std::sync::atomic::{AtomicU8, Ordering};
use std::sync::{Arc, Mutex, MutexGuard, PoisonError};
use std::time::{Duration, Instant};

use rustix::io::Errno;
use tokio::sync::{Semaphore, oneshot};

use super::error::{MountError, Step};

/// Threads per lane: enough that attachments of one share run side by side.
const WIDTH: usize = 4;
/// How long a call that has committed may take for its last, local step (a move_mount).
const COMMITTED_GRACE: Duration = Duration::from_secs(5);
/// Stack of a thread that makes a handful of system calls, in bytes.
const STACK: usize = 256 * 1024;

const RUNNING: u8 = 0;
const COMMITTED: u8 = 1;
const CANCELLED: u8 = 2;
const DONE: u8 = 3;

/// Threads for one kind of call on one share.
#[derive(Debug)]
pub(super) struct Lane {
    /// Whom the calls wait for, in errors: `nas:/export`.
    share: String,
    slots: Arc<Semaphore>,
    /// Calls that their callers no longer wait for.
    abandoned: Mutex<Vec<Abandoned>>,
    /// Whether an overdue call fails those that follow it.
    fails_fast: bool,
}

#[derive(Debug, Clone, Copy)]
struct Abandoned {
    ticket: usize,
    step: Step,
    began: Instant,
    /// Before this a call is not overdue, even if its caller went away early.
    deadline: Instant,
}

/// Held by a running call.
#[derive(Debug)]
pub(super) struct Ticket {
    state: AtomicU8,
    deadline: Instant,
}

impl Ticket {
    /// Asks, right before the one step that others can see, whether the caller still waits.
    ///
    /// # Errors
    /// [`Errno::CANCELED`] when it does not: undo and return.
    pub(super) fn commit(&self) -> Result<(), Errno> {
        self.state
            .compare_exchange(RUNNING, COMMITTED, Ordering::AcqRel, Ordering::Acquire)
            .map(drop)
            .map_err(|_| Errno::CANCELED)
    }

    pub(super) fn deadline(&self) -> Instant {
        self.deadline
    }
}

impl Lane {
    pub(super) fn new(share: &str) -> Arc<Self> {
        Arc::new(Self {
            share: share.to_owned(),
            slots: Arc::new(Semaphore::new(WIDTH)),
            abandoned: Mutex::default(),
            fails_fast: true,
        })
    }

    /// A lane whose calls are tried whatever became of those before them.
    pub(super) fn patient(share: &str) -> Arc<Self> {
        Arc::new(Self {
            share: share.to_owned(),
            slots: Arc::new(Semaphore::new(WIDTH)),
            abandoned: Mutex::default(),
            fails_fast: false,
        })
    }

    /// Since when a call that is overdue has run, and at which step it is.
    pub(super) fn stuck(&self) -> Option<(Instant, Step)> {
        let now = Instant::now();
        let calls = self.lock();
        let overdue = calls.iter().find(|call| call.deadline <= now)?;
        Some((overdue.began, overdue.step))
    }

    fn lock(&self) -> MutexGuard<'_, Vec<Abandoned>> {
        // A list of plain values is never half changed.
        self.abandoned
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
    }

    fn fail_if_stuck(&self) -> Result<(), MountError> {
        let stuck = self.stuck().filter(|_| self.fails_fast);
        stuck.map_or(Ok(()), |(since, step)| {
            Err(MountError::Busy {
                share: self.share.clone(),
                step,
                since: since.elapsed(),
            })
        })
    }

    fn timed_out(&self, step: Step, began: Instant) -> MountError {
        MountError::Timeout {
            share: self.share.clone(),
            step,
            after: began.elapsed(),
        }
    }

    /// Runs a blocking call on a thread of this lane, until the deadline.
    ///
    /// # Errors
    /// The call's own; [`MountError::Busy`] at once while an earlier call is overdue;
    /// [`MountError::Timeout`] when the deadline passes, and the call then commits nothing.
    pub(super) async fn run<T: Send + 'static>(
        self: &Arc<Self>,
        step: Step,
        deadline: Instant,
        call: impl FnOnce(&Ticket) -> Result<T, MountError> + Send + 'static,
    ) -> Result<T, MountError> {
        let began = Instant::now();
        self.fail_if_stuck()?;
        let slot = tokio::time::timeout_at(deadline.into(), self.slots.clone().acquire_owned())
            .await
            .map_err(|_| self.timed_out(step, began))?
            .map_err(|_| self.timed_out(step, began))?;
        // Those ahead may have become overdue while this call waited for its thread.
        self.fail_if_stuck()?;
        let ticket = Arc::new(Ticket {
            state: AtomicU8::new(RUNNING),
            deadline,
        });
        let (send, mut receive) = oneshot::channel();
        let (lane, held) = (self.clone(), ticket.clone());
        let key = Arc::as_ptr(&ticket) as usize;
        std::thread::Builder::new()
            .name(step.thread_name().to_owned())
            .stack_size(STACK)
            .spawn(move || {
                let result = call(&held);
                if held.state.swap(DONE, Ordering::AcqRel) == CANCELLED {
                    lane.lock().retain(|call| call.ticket != key);
                    tracing::info!(
                        share = %lane.share, %step, seconds = began.elapsed().as_secs(),
                        "a call that was given up has returned"
                    );
                }
                drop(slot);
                let _ = send.send(result);
            })
            .map_err(|source| MountError::Local {
                step,
                what: "starting a thread".to_owned(),
                source,
            })?;
        let mut guard = Abandon {
            lane: self,
            ticket: &ticket,
            step,
            began,
            key,
        };
        let lost = || MountError::Local {
            step,
            what: "a thread ended without an answer".to_owned(),
            source: std::io::Error::other("panicked"),
        };
        if let Ok(result) = tokio::time::timeout_at(deadline.into(), &mut receive).await {
            return result.map_err(|_| lost())?;
        }
        if guard.give_up() {
            return Err(self.timed_out(step, began));
        }
        // The call has committed: what remains of it is local and short.
        match tokio::time::timeout(COMMITTED_GRACE, receive).await {
            Ok(result) => result.map_err(|_| lost())?,
            Err(_) => Err(self.timed_out(step, began)),
        }
    }
}

/// Gives a call up when its caller goes away, whether by deadline or by being dropped.
struct Abandon<'a> {
    lane: &'a Arc<Lane>,
    ticket: &'a Ticket,
    step: Step,
    began: Instant,
    key: usize,
}

impl Abandon<'_> {
    /// Whether the call was still uncommitted, and now never will be.
    fn give_up(&mut self) -> bool {
        let mut abandoned = self.lane.lock();
        let cancelled = self
            .ticket
            .state
            .compare_exchange(RUNNING, CANCELLED, Ordering::AcqRel, Ordering::Acquire)
            .is_ok();
        if cancelled {
            abandoned.push(Abandoned {
                ticket: self.key,
                step: self.step,
                began: self.began,
                deadline: self.ticket.deadline,
            });
        }
        cancelled
    }
}

impl Drop for Abandon<'_> {
    fn drop(&mut self) {
        self.give_up();
    }
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;

    use super::*;

    fn soon() -> Instant {
        Instant::now() + Duration::from_millis(30)
    }

    fn later() -> Instant {
        Instant::now() + Duration::from_secs(20)
    }

    #[tokio::test]
    async fn a_stuck_call_fails_its_successors_at_once_until_it_returns() {
        let lane = Lane::new("nas:/export");
        let other = Lane::new("other:/export");
        let (release, blocked) = mpsc::channel::<()>();
        let stuck = lane
            .run(Step::OpenDirectory, soon(), move |ticket| {
                let _ = blocked.recv();
                Ok(ticket.commit())
            })
            .await;
        assert!(
            matches!(stuck, Err(MountError::Timeout { .. })),
            "{stuck:?}"
        );

        let began = Instant::now();
        let next = lane
            .run(Step::OpenDirectory, later(), |_| Ok(()))
            .await
            .unwrap_err();
        assert!(matches!(next, MountError::Busy { .. }), "{next}");
        assert!(began.elapsed() < Duration::from_secs(5));
        assert!(
            other
                .run(Step::OpenDirectory, later(), |_| Ok(()))
                .await
                .is_ok()
        );

        release.send(()).unwrap();
        while lane.stuck().is_some() {
            tokio::time::sleep(Duration::from_millis(1)).await;
        }
        assert!(
            lane.run(Step::OpenDirectory, later(), |_| Ok(()))
                .await
                .is_ok()
        );
    }

    #[tokio::test]
    async fn a_call_that_was_given_up_commits_nothing() {
        let lane = Lane::new("nas:/export");
        let (release, blocked) = mpsc::channel::<()>();
        let (tell, told) = mpsc::channel();
        let _ = lane
            .run(Step::Bind, soon(), move |ticket| {
                let _ = blocked.recv();
                let _ = tell.send(ticket.commit());
                Ok(())
            })
            .await;
        release.send(()).unwrap();
        assert_eq!(told.recv().unwrap(), Err(Errno::CANCELED));
    }

    #[tokio::test]
    async fn a_call_that_has_committed_is_waited_for() {
        let lane = Lane::new("nas:/export");
        let result = lane
            .run(Step::Bind, soon(), |ticket| {
                ticket.commit().unwrap();
                std::thread::sleep(Duration::from_millis(80));
                Ok(7)
            })
            .await;
        assert_eq!(result.unwrap(), 7);
        assert!(lane.stuck().is_none());
    }

    #[tokio::test]
    async fn more_calls_than_threads_wait_their_turn() {
        let lane = Lane::new("nas:/export");
        let calls = (0..3 * WIDTH).map(|_| {
            let lane = lane.clone();
            tokio::spawn(async move {
                lane.run(Step::Bind, later(), |_| {
                    std::thread::sleep(Duration::from_millis(2));
                    Ok(())
                })
                .await
            })
        });
        for call in calls.collect::<Vec<_>>() {
            call.await.unwrap().unwrap();
        }
        assert_eq!(lane.slots.available_permits(), WIDTH);
    }
}
