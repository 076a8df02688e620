//! The memory for what is held, of all files: who has some, and who waits for some.
//!
//! Invariants:
//! - a [`Share`] is the only way to have room; dropping it gives the room back and wakes whoever
//!   waits, and nothing else does either. Each segment of [`super::extents::Held`] owns the share
//!   of its bytes, so what is counted is the sum over all files at every moment;
//! - who waits is served in turn: nobody takes room past a writer that waits.

use std::sync::atomic::{AtomicU64, AtomicUsize, Ordering};
use std::sync::{Arc, Condvar, Mutex as Blocking};

use bytes::Bytes;
use tokio::sync::{Mutex, MutexGuard, Notify};

use crate::mutant::{self, Mutant};

use super::task;

/// What a segment costs beside its bytes: its entries in the maps and the allocator's head.
const SHARE_COST: usize = 256;

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Room {
    bytes: AtomicUsize,
    shares: AtomicUsize,
    freed: Notify,
    given_back: AtomicU64,
    turn: Mutex<()>,
}

impl Room {
    /// Bytes held.
    pub(super) fn bytes(&self) -> usize {
        self.bytes.load(Ordering::Relaxed)
    }

    pub(super) fn shares(&self) -> usize {
        self.shares.load(Ordering::Relaxed)
    }

    /// Memory that is taken.
    pub(super) fn cost(&self) -> usize {
        Self::cost_of(self.bytes(), self.shares())
    }

    /// Memory that so many bytes take in so many segments.
    pub(super) fn cost_of(bytes: usize, segments: usize) -> usize {
        match mutant::is_on(Mutant::PiecesCostNothing) {
            true => bytes,
            false => bytes + segments * SHARE_COST,
        }
    }

    /// Whether so many bytes more stay within `most`; they always do where there are none yet.
    pub(super) fn fits(cost: usize, more: usize, most: usize) -> bool {
        cost == 0 || cost + Self::cost_of(more, 1) <= most
    }

    /// Takes room, whether or not there is any: who calls has asked [`Self::fits`].
    pub(super) fn take(self: &Arc<Self>, bytes: usize) -> Share {
        self.bytes.fetch_add(bytes, Ordering::Relaxed);
        self.shares.fetch_add(1, Ordering::Relaxed);
        Share {
            room: Arc::clone(self),
            bytes,
        }
    }

    /// Counts who has given bytes back. That pieces were joined gets nobody further: where a server
    /// loses everything again and again they are split and joined for ever.
    pub(super) fn given_back(&self) -> u64 {
        self.given_back.load(Ordering::Relaxed)
    }

    /// Waits for one's turn to wait for room.
    pub(super) async fn turn(&self) -> MutexGuard<'_, ()> {
        self.turn.lock().await
    }

    pub(super) fn is_waited_for(&self) -> bool {
        self.turn.try_lock().is_err()
    }

    /// Waits until `ready` says so; it is asked now, and each time that room was given back.
    pub(super) async fn until(&self, ready: impl Fn() -> bool) {
        task::until(&self.freed, ready).await;
    }
}

/// Room that somebody has.
#[derive(Debug)]
pub(super) struct Share {
    room: Arc<Room>,
    bytes: usize,
}

impl Share {
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Keeps room for the first `bytes` bytes and returns a share of the others.
    pub(super) fn split_off(&mut self, bytes: usize) -> Self {
        let rest = self.bytes - bytes;
        self.bytes = bytes;
        self.room.shares.fetch_add(1, Ordering::Relaxed);
        Self {
            room: Arc::clone(&self.room),
            bytes: rest,
        }
    }

    /// Takes over what another one has.
    pub(super) fn join(&mut self, mut other: Self) {
        self.bytes += std::mem::take(&mut other.bytes);
    }
}

impl Drop for Share {
    fn drop(&mut self) {
        self.room.bytes.fetch_sub(self.bytes, Ordering::Relaxed);
        self.room.shares.fetch_sub(1, Ordering::Relaxed);
        if self.bytes > 0 || mutant::is_on(Mutant::JoinedRoomIsGivenBack) {
            self.room.given_back.fetch_add(1, Ordering::Relaxed);
        }
        self.room.freed.notify_waiters();
    }
}

/// Copies of what writers wait to have held: they have to be somewhere, and how many writers there
/// are is for programs to decide.
#[derive(Debug, Default)]
pub(super) struct Copies {
    bytes: Blocking<usize>,
    fewer: Condvar,
}

/// One of them.
#[derive(Debug)]
pub(super) struct Copy {
    copies: Arc<Copies>,
    data: Bytes,
}

impl Copies {
    /// Copies bytes, and waits first until no more than `most` of them are copied.
    pub(super) fn of(self: &Arc<Self>, data: &[u8], most: usize) -> Copy {
        let mut bytes = self.bytes.lock().unwrap_or_else(|e| e.into_inner());
        while *bytes > 0 && *bytes + data.len() > most && !mutant::is_on(Mutant::CopiesUnbounded) {
            bytes = self.fewer.wait(bytes).unwrap_or_else(|e| e.into_inner());
        }
        *bytes += data.len();
        drop(bytes);
        Copy {
            copies: Arc::clone(self),
            data: Bytes::copy_from_slice(data),
        }
    }
}

impl AsRef<[u8]> for Copy {
    fn as_ref(&self) -> &[u8] {
        &self.data
    }
}

impl Drop for Copy {
    fn drop(&mut self) {
        let mut bytes = self.copies.bytes.lock().unwrap_or_else(|e| e.into_inner());
        *bytes -= self.data.len();
        self.copies.fewer.notify_one();
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn copies_wait_until_there_are_fewer() {
        let copies = Arc::new(Copies::default());
        let first = copies.of(b"first", 10);
        let second = copies.of(b"other", 10);
        std::thread::scope(|scope| {
            let third = scope.spawn(|| copies.of(b"third, a longer one", 10));
            drop(first);
            assert_eq!(second.as_ref(), b"other");
            drop(second);
            // Alone, also one that is too long.
            assert_eq!(third.join().unwrap().as_ref(), b"third, a longer one");
        });
        assert_eq!(*copies.bytes.lock().unwrap(), 0);
    }

    #[test]
    fn what_is_split_and_joined_stays_counted_and_all_is_given_back() {
        let room = Arc::new(Room::default());
        let mut whole = room.take(10);
        let rest = whole.split_off(4);
        assert_eq!((whole.bytes(), rest.bytes()), (4, 6));
        assert_eq!((room.bytes(), room.shares()), (10, 2));
        drop(whole);
        assert_eq!((room.bytes(), room.shares()), (6, 1));
        let mut more = room.take(1);
        more.join(rest);
        assert_eq!((room.bytes(), room.shares()), (7, 1));
        drop(more);
        assert_eq!(room.cost(), 0);
    }

    #[tokio::test]
    async fn whoever_waits_is_woken_by_what_is_given_back() {
        let room = Arc::new(Room::default());
        let share = room.take(10);
        let waiting = room.until(|| room.bytes() == 0);
        tokio::pin!(waiting);
        assert!(
            poll_once(waiting.as_mut()).await.is_pending(),
            "nothing was given back"
        );
        drop(share);
        waiting.await;
    }

    async fn poll_once<F: Future>(mut future: std::pin::Pin<&mut F>) -> std::task::Poll<F::Output> {
        std::future::poll_fn(|context| std::task::Poll::Ready(future.as_mut().poll(context))).await
    }
}
