//! The names that a listing has handed out, so that it can begin anew without repeating them.

use std::collections::hash_map::RandomState;
use std::hash::BuildHasher;

/// Names remembered of one listing, at 8 bytes each: 8 MiB for a directory of a million entries,
/// while it is being listed.
const MOST: usize = 1 << 20;

#[derive(Debug)]
pub(super) struct Given {
    /// Their hashes, with keys of this listing's own. That one of a million other names has the
    /// hash of a given one is as likely as one in 10¹³.
    hashes: Vec<u64>,
    keys: RandomState,
    sorted: bool,
    /// None is missing.
    whole: bool,
    most: usize,
}

impl Default for Given {
    /// At the start of a directory.
    fn default() -> Self {
        Self {
            hashes: Vec::new(),
            keys: RandomState::new(),
            sorted: false,
            whole: true,
            most: MOST,
        }
    }
}

impl Given {
    pub(super) fn add(&mut self, name: &[u8]) {
        if !self.whole {
            return;
        }
        if self.hashes.len() == self.most {
            return self.lose();
        }
        self.hashes.push(self.keys.hash_one(name));
        self.sorted = false;
    }

    /// What is handed out from here on cannot be remembered any more.
    pub(super) fn lose(&mut self) {
        self.hashes = Vec::new();
        self.whole = false;
    }

    pub(super) fn is_whole(&self) -> bool {
        self.whole
    }

    pub(super) fn has(&mut self, name: &[u8]) -> bool {
        if !self.sorted {
            self.hashes.sort_unstable();
            self.sorted = true;
        }
        let hash = self.keys.hash_one(name);
        self.hashes.binary_search(&hash).is_ok()
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_was_given_is_known_up_to_a_bound() {
        let mut given = Given {
            most: 1000,
            ..Given::default()
        };
        for n in 0..1000u32 {
            given.add(&n.to_be_bytes());
            assert!(given.has(&n.to_be_bytes()) && !given.has(&(n + 1).to_be_bytes()));
        }
        assert!((0..1000u32).all(|n| given.has(&n.to_be_bytes())) && given.is_whole());
        given.add(b"one more");
        assert!(!given.is_whole());
        assert_eq!(given.hashes.capacity(), 0);
    }
}
