//! One lock a volume, so that calls for one volume follow each other and no call waits for
//! another volume's I/O.

use std::collections::HashMap;
use std::sync::{Arc, Mutex, PoisonError, Weak};

use tokio::sync::OwnedMutexGuard;

use crate::volume::VolumeName;

/// Dead entries are dropped when there are more entries than this.
const TIDY_ABOVE: usize = 256;

#[derive(Debug, Default)]
pub(super) struct Locks(Mutex<HashMap<VolumeName, Weak<tokio::sync::Mutex<()>>>>);

impl Locks {
    /// Waits for the calls before this one on the same volume.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn lock(&self, name: &VolumeName) -> OwnedMutexGuard<()> {
        self.entry(name).lock_owned().await
    }

    /// The same of two volumes; calls that lock the same ones never wait for each other for ever.
    pub(super) async fn lock_both(
        &self,
        one: &VolumeName,
        other: &VolumeName,
    ) -> (OwnedMutexGuard<()>, Option<OwnedMutexGuard<()>>) {
        let first = self.lock(one.min(other)).await;
        if one == other {
            return (first, None);
        }
        (first, Some(self.lock(one.max(other)).await))
    }

    /// The lock, unless a call holds it.
    pub(super) fn try_lock(&self, name: &VolumeName) -> Option<OwnedMutexGuard<()>> {
        self.entry(name).try_lock_owned().ok()
    }

    fn entry(&self, name: &VolumeName) -> Arc<tokio::sync::Mutex<()>> {
        let mut locks = self.0.lock().unwrap_or_else(PoisonError::into_inner);
        if let Some(lock) = locks.get(name).and_then(Weak::upgrade) {
            return lock;
        }
        if locks.len() > TIDY_ABOVE {
            locks.retain(|_, lock| lock.strong_count() > 0);
        }
        let lock = Arc::new(tokio::sync::Mutex::new(()));
        locks.insert(name.clone(), Arc::downgrade(&lock));
        lock
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[tokio::test]
    async fn a_lock_holds_its_own_volume_only() {
        let locks = Locks::default();
        let (a, b) = ("a".parse().unwrap(), "b".parse().unwrap());
        let held = locks.lock(&a).await;
        assert!(locks.try_lock(&a).is_none() && locks.try_lock(&b).is_some());
        drop(held);
        assert!(locks.try_lock(&a).is_some());
    }

    #[tokio::test]
    async fn two_locks_are_taken_in_one_order() {
        let locks = Locks::default();
        let (a, b): (VolumeName, VolumeName) = ("a".parse().unwrap(), "b".parse().unwrap());
        drop(locks.lock_both(&a, &a).await);
        let held = locks.lock(&a).await;
        let mut there = Box::pin(locks.lock_both(&a, &b));
        let mut back = Box::pin(locks.lock_both(&b, &a));
        tokio::select! {
            biased;
            _ = &mut there => panic!("the first is held"),
            _ = &mut back => panic!("the first is held"),
            () = std::future::ready(()) => {}
        }
        assert!(locks.try_lock(&b).is_some(), "neither has the second first");
        drop(held);
        drop(there.await);
        drop(back.await);
    }
}
