//! What is remembered of a file's attributes, for how long, and whether a change was our own.
//!
//! Pure: the time is passed in. The rules are the kernel client's: attributes are trusted for
//! `acregmin` (`acdirmin`) seconds, twice as long each time they are found unchanged after that,
//! up to `acregmax` (`acdirmax`); a change sets the time back to the minimum. A change of another
//! host makes cached data invalid; a change that an answer to our own call explains does not
//! (RFC 1813, section 2.6, wcc_data).

use std::time::{Duration, Instant};

use crate::nfs::rpc::nfs3::{Attr, WccAttr};

use super::options::FuseOptions;

/// The clock of the runtime, which a simulation sets.
pub(super) fn now() -> Instant {
    tokio::time::Instant::now().into_std()
}

/// Between which limits attributes are trusted.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Limits {
    pub(super) min: Duration,
    pub(super) max: Duration,
}

impl Limits {
    pub(super) fn of(options: &FuseOptions, directory: bool) -> Self {
        let seconds = |n: u32| Duration::from_secs(n.into());
        if directory {
            Self {
                min: seconds(options.acdirmin),
                max: seconds(options.acdirmax),
            }
        } else {
            Self {
                min: seconds(options.acregmin),
                max: seconds(options.acregmax),
            }
        }
    }
}

/// Who made the change that an answer may show.
#[derive(Debug, Clone, Copy)]
pub(super) enum Origin {
    /// Nobody we know of: a change is another host's.
    Observed,
    /// Our own call, whose answer carries these attributes.
    Own,
    /// Our own call, if nothing changed before it (`wcc_data`).
    After(Option<WccAttr>),
}

/// What an answer told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was overtaken by a later one.
    Stale,
    Same,
    /// Changed by this host.
    Ours,
    /// Changed by someone else: cached data is not valid any more.
    Theirs,
}

/// What this host's own calls made of a file's size, for as long as no answer is newer.
///
/// Calls overtake each other: an answer to a look that was asked for before a WRITE or a SETATTR was
/// acknowledged may show the file as it was before, also when it comes later, and its times may be
/// the same. The end of an append must not come from it.
#[derive(Debug, Default)]
pub(super) struct OwnSize {
    /// The size that a SETATTR gave, and the number of the moment when it was acknowledged.
    cut: (u64, u64),
    /// The furthest end of what was written since, and likewise.
    end: (u64, u64),
}

impl OwnSize {
    /// A SETATTR that was acknowledged at the moment `at` made the file this long.
    pub(super) fn cut(&mut self, size: u64, at: u64) {
        self.cut = (size, at);
        self.end = (size, at);
    }

    /// A WRITE up to `end` was acknowledged at the moment `at`.
    pub(super) fn wrote(&mut self, end: u64, at: u64, cached: &Cached) {
        // What was known after the last one may be of another host's making.
        let before = if cached.asked < self.end.1 {
            self.end.0
        } else {
            0
        };
        self.end = (before.max(end), at);
    }

    /// The size of the file.
    pub(super) fn size(&self, cached: &Cached) -> u64 {
        let mut size = cached.attr.size;
        if cached.asked < self.cut.1 {
            size = self.cut.0;
        }
        if cached.asked < self.end.1 {
            size = size.max(self.end.0);
        }
        size
    }
}

/// The attributes of one file as last heard.
#[derive(Debug)]
pub(super) struct Cached {
    pub(super) attr: Attr,
    /// The number of the call that told them; later calls have higher numbers.
    asked: u64,
    trust: Duration,
    heard: Instant,
    valid: bool,
}

impl Cached {
    pub(super) fn new(attr: Attr, asked: u64, limits: Limits, now: Instant) -> Self {
        Self {
            attr,
            asked,
            trust: limits.min,
            heard: now,
            valid: true,
        }
    }

    /// Takes the attributes that the call numbered `asked` brought.
    pub(super) fn update(
        &mut self,
        attr: Attr,
        asked: u64,
        origin: Origin,
        limits: Limits,
        now: Instant,
    ) -> Verdict {
        // Calls overtake each other: what was asked earlier and shows an earlier state is old.
        if asked < self.asked && attr.ctime <= self.attr.ctime {
            return Verdict::Stale;
        }
        let same = attr.mtime == self.attr.mtime
            && attr.ctime == self.attr.ctime
            && attr.size == self.attr.size;
        let verdict = if same {
            Verdict::Same
        } else {
            match origin {
                Origin::Own => Verdict::Ours,
                Origin::After(Some(before))
                    if before.size == self.attr.size
                        && before.mtime == self.attr.mtime
                        && before.ctime == self.attr.ctime =>
                {
                    Verdict::Ours
                }
                Origin::Observed | Origin::After(_) => Verdict::Theirs,
            }
        };
        if !same {
            self.trust = limits.min;
        } else if now.duration_since(self.heard) >= self.trust {
            self.trust = (self.trust * 2).min(limits.max).max(limits.min);
        }
        self.attr = attr;
        self.asked = self.asked.max(asked);
        self.heard = now;
        self.valid = true;
        verdict
    }

    /// How much longer the attributes may be trusted.
    pub(super) fn remaining(&self, now: Instant) -> Duration {
        if self.valid {
            (self.heard + self.trust).saturating_duration_since(now)
        } else {
            Duration::ZERO
        }
    }

    /// For how long they are trusted when freshly heard.
    pub(super) fn trust(&self) -> Duration {
        self.trust
    }

    /// Something happened to the file whose outcome is not known.
    pub(super) fn expire(&mut self) {
        self.valid = false;
    }
}

#[cfg(test)]
mod tests {
    use crate::nfs::rpc::nfs3::{FileKind, Time};

    use super::*;

    const LIMITS: Limits = Limits {
        min: Duration::from_secs(3),
        max: Duration::from_secs(10),
    };

    fn attr(size: u64, at: u32) -> Attr {
        let time = Time { secs: at, nanos: 0 };
        Attr {
            kind: FileKind::Regular,
            mode: 0o644,
            nlink: 1,
            uid: 0,
            gid: 0,
            size,
            used: 0,
            rdev: (0, 0),
            fsid: 1,
            fileid: 2,
            atime: time,
            mtime: time,
            ctime: time,
        }
    }

    fn before(attr: &Attr) -> Option<WccAttr> {
        Some(WccAttr {
            size: attr.size,
            mtime: attr.mtime,
            ctime: attr.ctime,
        })
    }

    #[test]
    fn an_answer_from_before_an_own_write_does_not_shorten_the_file() {
        let now = Instant::now();
        let mut cached = Cached::new(attr(10, 1), 1, LIMITS, now);
        let mut own = OwnSize::default();
        assert_eq!(own.size(&cached), 10);
        // Asked as 3 while WRITE 2 was under way: as it was before, within one tick of the server's
        // clock, and heard first.
        cached.update(attr(10, 1), 3, Origin::Observed, LIMITS, now);
        own.wrote(20, 4, &cached);
        let late = cached.update(attr(20, 1), 2, Origin::Own, LIMITS, now);
        assert_eq!((late, own.size(&cached)), (Verdict::Stale, 20));
        // The next one, heard before an answer that is as old.
        own.wrote(30, 6, &cached);
        cached.update(attr(20, 1), 5, Origin::Observed, LIMITS, now);
        assert_eq!(own.size(&cached), 30);
        // Asked after it: another host has cut the file, or made it longer.
        cached.update(attr(5, 2), 7, Origin::Observed, LIMITS, now);
        assert_eq!(own.size(&cached), 5);
        own.wrote(8, 8, &cached);
        assert_eq!(own.size(&cached), 8);
    }

    #[test]
    fn an_answer_from_before_an_own_cut_does_not_lengthen_the_file() {
        let now = Instant::now();
        let mut cached = Cached::new(attr(100, 1), 1, LIMITS, now);
        let mut own = OwnSize::default();
        own.cut(0, 4);
        cached.update(attr(100, 1), 3, Origin::Observed, LIMITS, now);
        assert_eq!(own.size(&cached), 0);
        own.wrote(10, 6, &cached);
        assert_eq!(own.size(&cached), 10);
        // From between the two.
        cached.update(attr(0, 2), 5, Origin::Observed, LIMITS, now);
        assert_eq!(own.size(&cached), 10);
        cached.update(attr(10, 3), 7, Origin::Observed, LIMITS, now);
        assert_eq!(own.size(&cached), 10);
    }

    #[test]
    fn trust_doubles_while_nothing_changes_and_starts_anew_with_a_change() {
        let start = Instant::now();
        let mut cached = Cached::new(attr(1, 1), 1, LIMITS, start);
        let mut now = start;
        for (call, expected) in (2..).zip([6, 10, 10]) {
            now += cached.trust();
            assert!(cached.remaining(now).is_zero());
            cached.update(attr(1, 1), call, Origin::Observed, LIMITS, now);
            assert_eq!(cached.remaining(now), Duration::from_secs(expected));
        }
        // Asked again early: no reason to trust longer.
        cached.update(attr(1, 2), 9, Origin::Observed, LIMITS, now);
        cached.update(attr(1, 2), 10, Origin::Observed, LIMITS, now);
        assert_eq!(cached.remaining(now), LIMITS.min);
        cached.expire();
        assert!(cached.remaining(now).is_zero());
    }

    #[test]
    fn only_changes_of_others_are_theirs() {
        let now = Instant::now();
        let mut cached = Cached::new(attr(1, 1), 1, LIMITS, now);
        let mut update = |new, asked, origin| cached.update(new, asked, origin, LIMITS, now);
        assert_eq!(update(attr(1, 1), 2, Origin::Observed), Verdict::Same);
        assert_eq!(update(attr(2, 2), 3, Origin::Own), Verdict::Ours);
        let ours = Origin::After(before(&attr(2, 2)));
        assert_eq!(update(attr(3, 3), 4, ours), Verdict::Ours);
        // Something happened between what we knew and what our call found.
        let overlapped = Origin::After(before(&attr(4, 4)));
        assert_eq!(update(attr(5, 5), 5, overlapped), Verdict::Theirs);
        assert_eq!(update(attr(6, 6), 6, Origin::After(None)), Verdict::Theirs);
        assert_eq!(update(attr(6, 7), 7, Origin::Observed), Verdict::Theirs);
    }

    #[test]
    fn an_answer_that_was_overtaken_changes_nothing() {
        let now = Instant::now();
        let mut cached = Cached::new(attr(1, 1), 1, LIMITS, now);
        cached.update(attr(9, 9), 5, Origin::Own, LIMITS, now);
        let late = cached.update(attr(1, 1), 4, Origin::Observed, LIMITS, now);
        assert_eq!(late, Verdict::Stale);
        assert_eq!(cached.attr.size, 9);
        // A server whose clock was set back is believed all the same.
        let back = cached.update(attr(2, 2), 6, Origin::Observed, LIMITS, now);
        assert_eq!(back, Verdict::Theirs);
    }
}
