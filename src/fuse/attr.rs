//! What is remembered of a file's attributes, for how long, and whether a change was our own.
//!
//! Pure: the time is passed in. The rules are the kernel client's: attributes are trusted for
//! `acregmin` (`acdirmin`) seconds, twice as long each time they are found unchanged after that,
//! up to `acregmax` (`acdirmax`); a change sets the time back to the minimum. A change of another
//! host makes cached data invalid; a change that our own calls explain ([`super::own`]) does not.
//! An own call that may have changed the file, and whose outcome is not known, makes what is known
//! expire, until an answer comes that was asked for after that.

use std::time::{Duration, Instant};

use crate::mutant::{self, Mutant};
use nfs::rpc::nfs3::{Attr, Wcc};

use super::options::FuseOptions;
use super::own::{Overlap, Stamp};

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

/// Which of our calls it was that changed a file.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Own {
    /// WRITE and COMMIT: believed also where the server does not tell how the file was before.
    Written,
    /// Anything else.
    Set,
}

/// What an answer told.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Verdict {
    /// It was overtaken by a later one.
    Stale,
    /// Its data is what it was, or what this host has made of it.
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
    /// The number of the moment when the last own call was answered.
    answered: u64,
    trust: Duration,
    heard: Instant,
    valid: bool,
    /// The number of the moment when it expired last: what was asked for before does not end that.
    expired: u64,
    /// Present while own calls are under way that may change the file.
    own: Option<Box<Overlap>>,
}

impl Cached {
    pub(super) fn new(attr: Attr, asked: u64, limits: Limits, now: Instant) -> Self {
        Self {
            attr,
            asked,
            answered: 0,
            trust: limits.min,
            heard: now,
            valid: true,
            expired: 0,
            own: None,
        }
    }

    /// Takes the attributes that a look brought which was asked for as number `asked` and is heard
    /// at the moment `at`.
    pub(super) fn look(
        &mut self,
        attr: Attr,
        (asked, at): (u64, u64),
        limits: Limits,
        now: Instant,
    ) -> Verdict {
        let (known, new) = (Stamp::from(&self.attr), Stamp::from(&attr));
        // It may show what was before an own call that has ended since.
        if asked < self.answered {
            if attr.ctime < self.attr.ctime {
                return Verdict::Stale;
            }
            // Within one tick of the server's clock there is no telling.
            if attr.ctime == self.attr.ctime && new != known {
                self.expire(at);
                return Verdict::Stale;
            }
        }
        if !self.take(attr, asked, limits, now) {
            return Verdict::Stale;
        }
        if let Some(own) = &mut self.own {
            own.told(at, new, new);
            return verdict(own.is_foreign());
        }
        verdict(new != known)
    }

    /// An own call numbered `asked` begins that may change the file.
    pub(super) fn begin(&mut self, asked: u64) {
        let known = Stamp::from(&self.attr);
        let own = self
            .own
            .get_or_insert_with(|| Box::new(Overlap::new(known)));
        own.begin(asked);
    }

    /// The own call numbered `asked` has ended, with this answer at the moment `at`.
    pub(super) fn end(
        &mut self,
        (asked, at): (u64, u64),
        (call, answer): (Own, Wcc),
        limits: Limits,
        now: Instant,
    ) -> Verdict {
        let Some(attr) = answer.after else {
            return self.lost(asked, at);
        };
        let fresh = self.take(attr, asked, limits, now);
        self.answered = at;
        if let Some(own) = &mut self.own {
            own.end(asked);
            let new = Stamp::from(&attr);
            match (answer.before, call) {
                _ if hides_others(call) => own.told_blindly(new),
                //= 1813-2.6-wcc: Attributes from before a call that are not those last known tell
                //= of a change by somebody else.
                (Some(before), _) => own.told(at, before.into(), new),
                (None, Own::Written) => own.told_blindly(new),
                // To be explained like a look.
                (None, Own::Set) if fresh => own.told(at, new, new),
                (None, Own::Set) => {}
            }
        }
        self.judge()
    }

    /// The outcome of the own call numbered `asked` will never be known.
    pub(super) fn lost(&mut self, asked: u64, at: u64) -> Verdict {
        //= 1813-3.3.2-partly: “A failed SETATTR may partially change a file's attributes.”
        if !mutant::is_on(Mutant::LostCallsChangeNothing) {
            self.expire(at);
        }
        self.answered = at;
        if let Some(own) = &mut self.own {
            own.end(asked);
        }
        self.judge()
    }

    fn judge(&mut self) -> Verdict {
        let Some(own) = &mut self.own else {
            return Verdict::Ours;
        };
        let foreign = own.is_foreign();
        if own.is_over() {
            self.own = None;
        }
        verdict(foreign)
    }

    /// Whether something was told that is another host's unless an own call under way explains it.
    pub(super) fn is_in_doubt(&self) -> bool {
        self.own.as_ref().is_some_and(|own| own.is_in_doubt())
    }

    /// Takes attributes, unless they are older than those that are known.
    fn take(&mut self, attr: Attr, asked: u64, limits: Limits, now: Instant) -> bool {
        // Calls overtake each other: what was asked earlier and shows an earlier state is old.
        if asked < self.asked && attr.ctime <= self.attr.ctime {
            return false;
        }
        let same = attr.mtime == self.attr.mtime
            && attr.ctime == self.attr.ctime
            && attr.size == self.attr.size;
        if !same {
            self.trust = limits.min;
        } else if now.duration_since(self.heard) >= self.trust {
            self.trust = (self.trust * 2).min(limits.max).max(limits.min);
        }
        self.attr = attr;
        self.asked = self.asked.max(asked);
        self.heard = now;
        self.valid |= asked > self.expired || mutant::is_on(Mutant::OldAnswersEndDoubts);
        true
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

    /// Whether something happened to the file whose outcome is not known.
    pub(super) fn is_expired(&self) -> bool {
        !self.valid
    }

    /// Something has happened to the file whose outcome is not known, up to the moment `at`.
    pub(super) fn expire(&mut self, at: u64) {
        self.valid = false;
        self.expired = at;
    }
}

/// Whether a fault is put back.
fn hides_others(call: Own) -> bool {
    match call {
        Own::Written => mutant::is_on(Mutant::WriteHidesOthers),
        Own::Set => mutant::is_on(Mutant::SetattrHidesOthers),
    }
}

fn verdict(foreign: bool) -> Verdict {
    if foreign {
        Verdict::Theirs
    } else {
        Verdict::Ours
    }
}

#[cfg(test)]
pub(super) mod tests {
    use nfs::rpc::nfs3::{FileKind, Time, WccAttr};

    use super::*;

    const LIMITS: Limits = Limits {
        min: Duration::from_secs(3),
        max: Duration::from_secs(10),
    };

    /// Of a file with this size, whose times are all this many seconds.
    pub(in crate::fuse) fn attr(size: u64, at: u32) -> Attr {
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

    fn wcc(before: Option<Attr>, after: Attr) -> Wcc {
        Wcc {
            before: before.map(|attr| WccAttr {
                size: attr.size,
                mtime: attr.mtime,
                ctime: attr.ctime,
            }),
            after: Some(after),
        }
    }

    /// What is known of a file, and the moments of its calls.
    struct Known {
        cached: Cached,
        now: Instant,
    }

    impl Known {
        fn new(attr: Attr) -> Self {
            let now = Instant::now();
            let cached = Cached::new(attr, 1, LIMITS, now);
            Self { cached, now }
        }

        fn look(&mut self, attr: Attr, asked: u64, at: u64) -> Verdict {
            self.cached.look(attr, (asked, at), LIMITS, self.now)
        }

        fn end(&mut self, asked: u64, at: u64, call: Own, wcc: Wcc) -> Verdict {
            let answer = (call, wcc);
            self.cached.end((asked, at), answer, LIMITS, self.now)
        }

        /// A call that overlaps no other.
        fn own(&mut self, asked: u64, call: Own, wcc: Wcc) -> Verdict {
            self.cached.begin(asked);
            self.end(asked, asked + 1, call, wcc)
        }
    }

    #[test]
    fn an_answer_from_before_an_own_write_does_not_shorten_the_file() {
        let mut known = Known::new(attr(10, 1));
        let mut own = OwnSize::default();
        assert_eq!(own.size(&known.cached), 10);
        // Asked as 3 while WRITE 2 was under way: as it was before, within one tick of the server's
        // clock, and heard first.
        known.cached.begin(2);
        known.look(attr(10, 1), 3, 4);
        own.wrote(20, 5, &known.cached);
        known.end(2, 5, Own::Written, wcc(None, attr(20, 1)));
        assert_eq!(own.size(&known.cached), 20);
        // The next one, heard before an answer that is as old.
        own.wrote(30, 8, &known.cached);
        known.look(attr(20, 1), 6, 9);
        assert_eq!(own.size(&known.cached), 30);
        // Asked after it: another host has cut the file, or made it longer.
        known.look(attr(5, 2), 10, 11);
        assert_eq!(own.size(&known.cached), 5);
        own.wrote(8, 12, &known.cached);
        assert_eq!(own.size(&known.cached), 8);
    }

    //= test 1813-3.3.2-size
    #[test]
    fn an_answer_from_before_an_own_cut_does_not_lengthen_the_file() {
        let mut known = Known::new(attr(100, 1));
        let mut own = OwnSize::default();
        own.cut(0, 4);
        known.look(attr(100, 1), 3, 5);
        assert_eq!(own.size(&known.cached), 0);
        own.wrote(10, 7, &known.cached);
        assert_eq!(own.size(&known.cached), 10);
        // From between the two.
        known.look(attr(0, 2), 6, 8);
        assert_eq!(own.size(&known.cached), 10);
        known.look(attr(10, 3), 9, 10);
        assert_eq!(own.size(&known.cached), 10);
    }

    #[test]
    fn trust_doubles_while_nothing_changes_and_starts_anew_with_a_change() {
        let mut known = Known::new(attr(1, 1));
        for (call, expected) in (2..).zip([6, 10, 10]) {
            known.now += known.cached.trust();
            assert!(known.cached.remaining(known.now).is_zero());
            known.look(attr(1, 1), call, call);
            let remaining = known.cached.remaining(known.now);
            assert_eq!(remaining, Duration::from_secs(expected));
        }
        // Asked again early: no reason to trust longer.
        known.look(attr(1, 2), 9, 9);
        known.look(attr(1, 2), 10, 10);
        assert_eq!(known.cached.remaining(known.now), LIMITS.min);
        known.cached.expire(11);
        assert!(known.cached.remaining(known.now).is_zero());
    }

    /// Whether a file's end is still taken for unknown when a cut has been given up and an answer
    /// comes that was asked for before.
    fn is_in_doubt_after_an_old_answer() -> bool {
        let mut known = Known::new(attr(100, 1));
        known.cached.begin(3);
        known.cached.lost(3, 4);
        known.look(attr(100, 1), 2, 5);
        known.cached.is_expired()
    }

    //= test 1813-3.3.2-partly
    #[test]
    fn only_what_is_asked_after_a_call_was_given_up_tells_what_became_of_it() {
        assert!(is_in_doubt_after_an_old_answer());
        let back = mutant::put_back(Mutant::OldAnswersEndDoubts);
        assert!(!is_in_doubt_after_an_old_answer());
        drop(back);
        let mut known = Known::new(attr(100, 1));
        // Another call, begun before and answered after.
        known.cached.begin(2);
        known.cached.begin(3);
        known.cached.lost(3, 4);
        known.end(2, 5, Own::Written, wcc(Some(attr(100, 1)), attr(100, 2)));
        assert!(known.cached.is_expired());
        known.look(attr(0, 3), 6, 7);
        assert!(!known.cached.is_expired());
        assert_eq!(known.cached.attr.size, 0);
        // Whatever comes late after that.
        known.look(attr(100, 4), 5, 8);
        assert!(!known.cached.is_expired());
    }

    #[test]
    fn only_changes_of_others_are_theirs() {
        let mut known = Known::new(attr(1, 1));
        assert_eq!(known.look(attr(1, 1), 2, 2), Verdict::Ours);
        for call in [Own::Written, Own::Set] {
            let (before, after) = (known.cached.attr, attr(2, known.cached.attr.mtime.secs + 1));
            let asked = 10 * u64::from(after.mtime.secs);
            assert_eq!(
                known.own(asked, call, wcc(Some(before), after)),
                Verdict::Ours
            );
            // Something happened between what we knew and what our call found.
            let (found, after) = (attr(2, after.mtime.secs + 1), attr(2, after.mtime.secs + 2));
            let overtaken = known.own(asked + 2, call, wcc(Some(found), after));
            assert_eq!(overtaken, Verdict::Theirs);
        }
        assert_eq!(known.look(attr(9, 90), 100, 100), Verdict::Theirs);
    }

    #[test]
    fn a_call_that_tells_nothing_of_before_is_believed_if_it_wrote() {
        let mut known = Known::new(attr(1, 1));
        assert_eq!(
            known.own(2, Own::Written, wcc(None, attr(2, 2))),
            Verdict::Ours
        );
        assert_eq!(known.own(4, Own::Set, wcc(None, attr(2, 2))), Verdict::Ours);
        assert_eq!(
            known.own(6, Own::Set, wcc(None, attr(2, 3))),
            Verdict::Theirs
        );
    }

    #[test]
    fn names_and_rights_leave_the_data_alone() {
        let mut known = Known::new(attr(1, 1));
        let renamed = Attr {
            ctime: attr(1, 5).ctime,
            ..attr(1, 1)
        };
        assert_eq!(known.look(renamed, 2, 2), Verdict::Ours);
    }

    #[test]
    fn a_call_of_unknown_outcome_explains_nothing() {
        let mut known = Known::new(attr(1, 1));
        known.cached.begin(2);
        assert_eq!(known.cached.lost(2, 3), Verdict::Ours);
        assert!(known.cached.remaining(known.now).is_zero());
        assert_eq!(known.look(attr(0, 2), 4, 5), Verdict::Theirs);
    }

    #[test]
    fn an_open_beside_own_calls_knows_of_the_doubt() {
        let mut known = Known::new(attr(1, 1));
        known.cached.begin(2);
        assert_eq!(known.look(attr(1, 7), 3, 4), Verdict::Ours);
        assert!(known.cached.is_in_doubt());
        let ended = known.end(2, 5, Own::Written, wcc(Some(attr(1, 1)), attr(1, 6)));
        assert_eq!(ended, Verdict::Theirs);
        assert!(!known.cached.is_in_doubt());
    }

    #[test]
    fn hidden_changes_come_back_with_their_faults() {
        for (fault, call) in [
            (Mutant::WriteHidesOthers, Own::Written),
            (Mutant::SetattrHidesOthers, Own::Set),
        ] {
            let _back = mutant::put_back(fault);
            let mut known = Known::new(attr(1, 1));
            let found = known.own(2, call, wcc(Some(attr(1, 2)), attr(1, 3)));
            assert_eq!(found, Verdict::Ours, "{fault:?}");
        }
    }

    #[test]
    fn an_answer_that_was_overtaken_changes_nothing() {
        let mut known = Known::new(attr(1, 1));
        known.look(attr(9, 9), 5, 6);
        assert_eq!(known.look(attr(1, 1), 4, 7), Verdict::Stale);
        assert_eq!(known.cached.attr.size, 9);
        // A server whose clock was set back is believed all the same.
        assert_eq!(known.look(attr(2, 2), 8, 9), Verdict::Theirs);
        // Asked while an own call was under way, and heard after it.
        known.cached.begin(10);
        known.end(10, 12, Own::Written, wcc(Some(attr(2, 2)), attr(3, 3)));
        assert_eq!(known.look(attr(2, 2), 11, 13), Verdict::Stale);
        assert!(!known.cached.remaining(known.now).is_zero());
        assert_eq!(known.look(attr(2, 3), 11, 13), Verdict::Stale);
        assert!(
            known.cached.remaining(known.now).is_zero(),
            "as old or as new: to be asked anew"
        );
    }
}
