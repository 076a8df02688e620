//! How many files the kernel knows, each of which costs memory here.
//!
//! The kernel remembers a file as long as it has memory for that, and this process has to, too.
//! Beyond [`super::write::Bounds::known`] the kernel is made to forget the files that nobody uses:
//! that are not open, mapped, or somebody's working directory. So it loses their cached pages.
//!
//! Known limit: what is used cannot be forgotten. While that is more than the bound, it is tried
//! again each time that half as many came to it.

use std::sync::Arc;
use std::sync::atomic::{AtomicBool, AtomicUsize, Ordering};

use crate::mutant::{self, Mutant};

/// See the module's text.
#[derive(Debug, Default)]
pub(super) struct Known {
    under_way: AtomicBool,
    /// The fewest known since the kernel was last made to forget, or 0 if it never was.
    fewest: AtomicUsize,
}

/// The kernel is being made to forget, until this is dropped.
#[derive(Debug)]
pub(super) struct Forgetting(Arc<Known>);

impl Drop for Forgetting {
    fn drop(&mut self) {
        self.0.under_way.store(false, Ordering::Relaxed);
    }
}

impl Known {
    /// A file was added, so that `now` are known, where `most` may be. Whether some have to be
    /// forgotten.
    pub(super) fn added(self: &Arc<Self>, now: usize, most: usize) -> Option<Forgetting> {
        if mutant::is_on(Mutant::NothingIsForgotten) {
            return None;
        }
        let used = self.fewest.load(Ordering::Relaxed);
        if now <= most.max(used + most / 2) || self.under_way.swap(true, Ordering::Relaxed) {
            return None;
        }
        self.fewest.store(now, Ordering::Relaxed);
        Some(Forgetting(Arc::clone(self)))
    }

    /// The kernel has forgotten one.
    pub(super) fn fewer(&self, now: usize) {
        self.fewest.fetch_min(now, Ordering::Relaxed);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn files_are_forgotten_beyond_the_bound_and_not_in_vain() {
        let known = Arc::new(Known::default());
        assert!(known.added(100, 100).is_none());
        let under_way = known.added(101, 100);
        assert!(under_way.is_some());
        assert!(known.added(300, 100).is_none(), "one at a time");
        known.fewer(90);
        drop(under_way);
        // 90 are in use.
        assert!(known.added(140, 100).is_none());
        let under_way = known.added(141, 100);
        assert!(under_way.is_some());
        drop(under_way);
        // Nothing was forgotten.
        assert!(known.added(191, 100).is_none());
        assert!(known.added(192, 100).is_some());
        known.fewer(10);
        assert!(known.added(101, 100).is_some());
    }
}
