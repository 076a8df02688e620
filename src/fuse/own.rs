//! Which changes of a file this host's own calls explain.
//!
//! The server says of each call that changes a file how the file was before and after it
//! (RFC 1813, section 2.6, `wcc_data`). While no call of ours is under way, what is seen must be
//! what was known; a call that finds something else was preceded by another host. Calls that
//! overlap each other are answered in any order: they explain each other as a chain, which leads
//! from the state before the first one through their befores and afters. What the chain does not
//! reach when every call has ended that could still explain it, is another host's.
//!
//! Only what the data in the kernel's pages depends on counts: time of modification and size.
//! (The ctime also changes by names and rights, and NFSv3 has no change attribute.)
//!
//! Known limits, those of the kernel's client: a WRITE or COMMIT answered without the state before
//! it is believed to have changed nothing but what it wrote, and explains whatever was seen beside
//! it; a change within the same tick of the server's clock that keeps the size is not seen, nor one
//! whose author set the time back.

use nfs::rpc::nfs3::{Attr, Time, WccAttr};

/// How much may be unexplained. Sixteen WRITEs of a file are under way at once.
const OPEN: usize = 64;
/// How many states are remembered that a call answered late may have found.
const TRAIL: usize = 4 * OPEN;

/// What the data of a file depends on.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Stamp {
    mtime: Time,
    size: u64,
}

impl From<&Attr> for Stamp {
    fn from(attr: &Attr) -> Self {
        Self {
            mtime: attr.mtime,
            size: attr.size,
        }
    }
}

impl From<WccAttr> for Stamp {
    fn from(attr: WccAttr) -> Self {
        Self {
            mtime: attr.mtime,
            size: attr.size,
        }
    }
}

/// Something told about the file that nothing explains yet.
#[derive(Debug)]
struct Told {
    /// When it was heard: only a call begun before can explain it.
    at: u64,
    from: Stamp,
    to: Stamp,
}

/// A time in which own calls that may change a file are under way without a break.
#[derive(Debug)]
pub(super) struct Overlap {
    /// When each call under way was begun.
    calls: Vec<u64>,
    /// The states that are explained.
    trail: Vec<Stamp>,
    open: Vec<Told>,
}

impl Overlap {
    pub(super) fn new(known: Stamp) -> Self {
        Self {
            calls: Vec::new(),
            trail: vec![known],
            open: Vec::new(),
        }
    }

    pub(super) fn begin(&mut self, asked: u64) {
        self.calls.push(asked);
    }

    pub(super) fn end(&mut self, asked: u64) {
        if let Some(at) = self.calls.iter().position(|call| *call == asked) {
            self.calls.swap_remove(at);
        }
    }

    pub(super) fn is_over(&self) -> bool {
        self.calls.is_empty()
    }

    /// Something is not explained yet.
    pub(super) fn is_in_doubt(&self) -> bool {
        !self.open.is_empty()
    }

    /// An own call led from one state to another; a look, from a state to itself.
    pub(super) fn told(&mut self, at: u64, from: Stamp, to: Stamp) {
        let known = |told: &Told| told.from == from && told.to == to;
        if !self.open.iter().any(known) {
            self.open.push(Told { at, from, to });
        }
        while let Some(at) = self.open.iter().position(|t| self.trail.contains(&t.from)) {
            let told = self.open.swap_remove(at);
            self.explain(told.to);
        }
    }

    /// An own call that told only what came of it.
    pub(super) fn told_blindly(&mut self, to: Stamp) {
        self.settle();
        self.explain(to);
    }

    /// Whether another host has changed the file. It is said once: everything told is settled.
    pub(super) fn is_foreign(&mut self) -> bool {
        let lost = |told: &Told| self.calls.iter().all(|asked| *asked > told.at);
        let foreign = self.open.len() > OPEN || self.open.iter().any(lost);
        if foreign {
            self.settle();
        }
        foreign
    }

    fn settle(&mut self) {
        for told in std::mem::take(&mut self.open) {
            self.explain(told.from);
            self.explain(told.to);
        }
    }

    fn explain(&mut self, stamp: Stamp) {
        if self.trail.contains(&stamp) {
            return;
        }
        if self.trail.len() >= TRAIL {
            self.trail.remove(0);
        }
        self.trail.push(stamp);
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn stamp(secs: u32) -> Stamp {
        Stamp {
            mtime: Time { secs, nanos: 0 },
            size: 1,
        }
    }

    fn over(calls: &[u64]) -> Overlap {
        let mut overlap = Overlap::new(stamp(0));
        for asked in calls {
            overlap.begin(*asked);
        }
        overlap
    }

    #[test]
    fn calls_answered_in_any_order_explain_each_other() {
        let mut own = over(&[1, 2, 3]);
        own.end(3);
        own.told(4, stamp(2), stamp(3));
        assert!(!own.is_foreign() && own.is_in_doubt());
        // A look between the first two.
        own.told(5, stamp(1), stamp(1));
        own.end(1);
        own.told(6, stamp(0), stamp(1));
        assert!(!own.is_foreign() && own.is_in_doubt());
        own.end(2);
        own.told(7, stamp(1), stamp(2));
        assert!(!own.is_foreign() && !own.is_in_doubt() && own.is_over());
    }

    //= test 1813-2.6-wcc
    #[test]
    fn a_gap_in_the_chain_is_another_hosts_once_nothing_can_fill_it() {
        let mut own = over(&[1, 2]);
        own.end(1);
        own.told(3, stamp(5), stamp(6));
        assert!(!own.is_foreign(), "the other call may have led there");
        // The stream goes on: what begins now explains nothing that was heard before.
        own.begin(4);
        own.end(2);
        own.told(5, stamp(6), stamp(7));
        assert!(own.is_foreign());
        assert!(!own.is_foreign(), "said once");
        own.end(4);
        own.told(6, stamp(7), stamp(8));
        assert!(!own.is_foreign());
    }

    #[test]
    fn a_look_is_explained_by_the_chain_only() {
        let mut own = over(&[1]);
        own.told(2, stamp(9), stamp(9));
        own.end(1);
        own.told(3, stamp(0), stamp(1));
        assert!(own.is_foreign());
    }

    #[test]
    fn a_server_that_tells_nothing_of_before_is_believed() {
        let mut own = over(&[1, 2]);
        own.end(1);
        own.told_blindly(stamp(1));
        own.told(3, stamp(2), stamp(2));
        own.end(2);
        own.told_blindly(stamp(3));
        assert!(!own.is_foreign() && !own.is_in_doubt());
    }

    #[test]
    fn what_is_remembered_is_bounded() {
        let mut own = over(&[1]);
        for at in 0..1000 {
            own.begin(2 * u64::from(at) + 2);
            own.end(2 * u64::from(at) + 2);
            own.told(2 * u64::from(at) + 3, stamp(at), stamp(at + 1));
            assert!(!own.is_foreign());
            own.told(2 * u64::from(at) + 3, stamp(5000 + at), stamp(5000 + at));
            own.is_foreign();
            assert!(own.trail.len() <= TRAIL && own.open.len() <= OPEN);
        }
    }
}
