//! What programs may see: every change of a file's data, and which of them a read must show.
//!
//! A file's data consists of words of eight bytes; each holds the number of the change that wrote
//! it and its place in it, or zero where none did. So what a read returns tells which changes it saw. A word is wrong
//! if a change that must be visible to the reader is certainly newer than the one that it shows.
//!
//! - *Newer*: it began after the other had returned, on the same host; from another host, after
//!   the other's host had closed or synced it.
//! - *Must be visible*: on the same host, once it has returned; to another host's open, once it
//!   was closed or synced before; to a crashed disk, once it was synced through any descriptor.
//!
//! What the server refuses may be lost, and the error has to be told: an fsync or close that
//! returns without one answers for every change that was begun after its file was opened, or
//! after the last error that was told through it (`errseq_t`). Where calls time out, every change
//! is in doubt until then: its call may still be carried out, at any time.

use std::collections::BTreeMap;
use std::sync::Mutex;

/// The moments of a run, all different.
pub(super) type Moment = u64;

/// Bytes of a word.
pub(super) const WORD: u64 = 8;

/// The bytes of a change's words.
pub(super) fn bytes(number: u64, words: u64) -> Vec<u8> {
    (0..words)
        .flat_map(|index| (number << 8 | index).to_be_bytes())
        .collect()
}

/// The number of the change that wrote a word, and the word's place in it.
fn parts(word: u64) -> (u64, u64) {
    (word >> 8, word & 0xff)
}

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum What {
    /// Words from, to.
    Write(u64, u64),
    /// This many words at an end that is not known yet.
    Append(u64),
    /// To this many words.
    Cut(u64),
}

#[derive(Debug, Clone, Copy)]
struct Change {
    host: usize,
    what: What,
    /// It goes to the end, and covers nothing.
    appends: bool,
    begun: Moment,
    /// When it returned; none while it may still happen.
    over: Option<Moment>,
    /// It returned without an error …
    done: bool,
    /// … and none came later.
    certain: bool,
    /// A call that may have carried it was refused.
    refused: bool,
    /// Calls that carry it may still be carried out although they are over.
    floats: bool,
    /// When a close or fsync that covers it had returned.
    synced: Option<Moment>,
}

impl Change {
    fn covers(&self, word: u64) -> bool {
        match self.what {
            What::Write(from, to) => (from..to).contains(&word),
            What::Append(_) => false,
            What::Cut(size) => word >= size,
        }
    }

    fn place(&mut self, from: u64) {
        if let What::Append(words) = self.what {
            self.what = What::Write(from, from + words);
        }
    }

    /// Whether it certainly came after the other.
    fn newer(&self, other: &Self) -> bool {
        let over = if other.floats {
            None
        } else if self.host == other.host {
            other.over
        } else {
            other.synced
        };
        over.is_some_and(|over| self.begun > over)
    }
}

/// Who looks.
#[derive(Debug, Clone, Copy)]
pub(super) enum View {
    /// A program of a host, through a file that it opened, from a moment on.
    Program {
        host: usize,
        opened: Moment,
        from: Moment,
    },
    /// The server's disk, after a crash.
    Disk,
}

impl View {
    fn must_see(&self, change: &Change) -> bool {
        change.certain
            && match *self {
                Self::Program { host, opened, from } => {
                    (change.host == host && change.over.is_some_and(|over| over < from))
                        || change.synced.is_some_and(|synced| synced < opened)
                }
                Self::Disk => change.synced.is_some(),
            }
    }
}

#[derive(Debug, Default)]
struct State {
    now: Moment,
    files: BTreeMap<u64, BTreeMap<u64, Change>>,
    /// Calls time out.
    doubt: bool,
    /// How often WRITEs and COMMITs of a file and host were refused.
    refusals: BTreeMap<(u64, usize), u64>,
}

/// All changes of all files, by the server's number of the file and the number of the change.
#[derive(Debug, Default)]
pub(super) struct Model {
    state: Mutex<State>,
}

impl Model {
    pub(super) fn now(&self) -> Moment {
        let mut state = self.state.lock().unwrap();
        state.now += 1;
        state.now
    }

    fn begin(&self, file: u64, host: usize, what: What) -> u64 {
        let begun = self.now();
        let change = Change {
            host,
            what,
            appends: matches!(what, What::Append(_)),
            begun,
            over: None,
            done: false,
            certain: false,
            refused: false,
            floats: false,
            synced: None,
        };
        let mut state = self.state.lock().unwrap();
        state.files.entry(file).or_default().insert(begun, change);
        begun
    }

    /// A write of words begins.
    pub(super) fn write(&self, file: u64, host: usize, from: u64, to: u64) -> u64 {
        self.begin(file, host, What::Write(from, to))
    }

    pub(super) fn cut(&self, file: u64, host: usize, size: u64) -> u64 {
        self.begin(file, host, What::Cut(size))
    }

    /// The file is cut, perhaps as a part of an open that makes files; nobody knows here when it began.
    pub(super) fn cut_by_open(&self, file: u64, host: usize) {
        let cut = self.cut(file, host, 0);
        self.over(file, cut, true, true);
        self.change(file, cut, |change, _| change.begun = 0);
    }

    fn change(&self, file: u64, number: u64, with: impl FnOnce(&mut Change, Moment)) {
        let now = self.now();
        let mut state = self.state.lock().unwrap();
        let files = &mut state.files;
        with(files.get_mut(&file).unwrap().get_mut(&number).unwrap(), now);
    }

    pub(super) fn append(&self, file: u64, host: usize, words: u64) -> u64 {
        self.begin(file, host, What::Append(words))
    }

    /// Words were seen, and with them where appends went.
    pub(super) fn seen(&self, file: u64, first: u64, words: &[u64]) {
        let mut state = self.state.lock().unwrap();
        let Some(changes) = state.files.get_mut(&file) else {
            return;
        };
        for (word, value) in (first..).zip(words) {
            let (number, index) = parts(*value);
            if let Some(change) = changes.get_mut(&number) {
                change.place(word.saturating_sub(index));
            }
        }
    }

    /// A change has returned. Until it has, a cut of a killed program's keeps later writes of its host
    /// away; where calls time out it may happen at any time.
    pub(super) fn over(&self, file: u64, number: u64, done: bool, durable: bool) {
        let doubt = self.state.lock().unwrap().doubt;
        self.change(file, number, |change, now| {
            let cut = matches!(change.what, What::Cut(_));
            let durable = done && (durable || cut);
            change.done = done;
            change.floats = doubt && !durable;
            change.certain = durable || (done && !change.floats && !change.refused);
            change.over = Some(now);
            change.synced = durable.then_some(now);
        });
    }

    /// Calls time out in this run.
    pub(super) fn doubt(&self) {
        self.state.lock().unwrap().doubt = true;
    }

    pub(super) fn is_in_doubt(&self) -> bool {
        self.state.lock().unwrap().doubt
    }

    /// An fsync or close that began at a moment has returned without an error, through a file that
    /// has heard of all errors up to another moment.
    pub(super) fn synced(&self, file: u64, host: usize, begun: Moment, heard: Moment) {
        let now = self.now();
        let mut state = self.state.lock().unwrap();
        let changes = state.files.entry(file).or_default().values_mut();
        for change in changes.filter(|c| c.host == host && c.synced.is_none()) {
            if change.over.is_some_and(|over| over < begun) {
                if change.begun > heard && change.done {
                    change.certain = true;
                    change.floats = false;
                }
                if !change.floats {
                    change.synced = Some(now);
                }
            }
        }
    }

    /// The server refused a write of this host: what is not durable yet may be lost.
    pub(super) fn refused(&self, file: u64, host: usize) {
        let mut state = self.state.lock().unwrap();
        *state.refusals.entry((file, host)).or_default() += 1;
        drop(state);
        self.unsettle(file, host);
    }

    /// What is not durable yet of what this host wrote may be lost: its file is gone, say.
    pub(super) fn unsettle(&self, file: u64, host: usize) {
        let mut state = self.state.lock().unwrap();
        let changes = state.files.entry(file).or_default().values_mut();
        for change in changes.filter(|c| c.host == host && c.synced.is_none()) {
            change.certain = false;
            change.refused = true;
        }
    }

    /// An error was told through a file for the `times`th time: each is told there once.
    pub(super) fn check_told(&self, file: u64, host: usize, times: u64) -> Result<(), String> {
        let state = self.state.lock().unwrap();
        let refused = state.refusals.get(&(file, host)).copied().unwrap_or(0);
        if state.doubt || times <= refused {
            Ok(())
        } else {
            Err(format!("{times} errors were told, {refused} calls refused"))
        }
    }

    /// Whether the change `old` of a file is newer than `new`, both of one host.
    pub(super) fn is_newer(&self, file: u64, old: u64, new: u64) -> bool {
        let state = self.state.lock().unwrap();
        let Some(changes) = state.files.get(&file) else {
            return false;
        };
        match (changes.get(&parts(old).0), changes.get(&parts(new).0)) {
            (Some(old), Some(new)) => old.host == new.host && old.newer(new),
            _ => false,
        }
    }

    /// Checks the words from `first` on that somebody saw; `end` says whether the file ended
    /// behind them.
    pub(super) fn check(
        &self,
        file: u64,
        view: View,
        first: u64,
        words: &[u64],
        end: bool,
    ) -> Result<(), String> {
        let state = self.state.lock().unwrap();
        let empty = BTreeMap::new();
        let changes = state.files.get(&file).unwrap_or(&empty);
        let visible: Vec<(&u64, &Change)> =
            changes.iter().filter(|(_, c)| view.must_see(c)).collect();
        let hidden_by = |word: u64, of: Option<&Change>| {
            visible
                .iter()
                .find(|(_, y)| y.covers(word) && of.is_none_or(|x| y.newer(x)))
        };
        // Unless something that is not older covered an append before it was sent.
        let unsent = |y: &&Change| {
            matches!(y.what, What::Append(_))
                && !changes.values().any(|z| !z.appends && !y.newer(z))
        };
        if let (View::Disk, Some(lost)) = (view, visible.iter().map(|(_, y)| *y).find(unsent)) {
            return Err(format!("{lost:?} was never sent"));
        }
        for (word, value) in (first..).zip(words) {
            let (number, index) = parts(*value);
            if number == 0 {
                let cut_away = changes.values().any(|x| {
                    matches!(x.what, What::Cut(_))
                        && x.covers(word)
                        && hidden_by(word, Some(x)).is_none()
                });
                if let Some((newer, y)) = hidden_by(word, None)
                    && !cut_away
                {
                    return Err(format!("word {word} is zero, not {newer} of {y:?}"));
                }
                continue;
            }
            let there = |x: &&Change| matches!(x.what, What::Write(from, to) if (from..to).contains(&word) && word - from == index);
            let Some(x) = changes.get(&number).filter(there) else {
                return Err(format!(
                    "word {word} is {number}, which was not written there"
                ));
            };
            if let Some((newer, y)) = hidden_by(word, Some(x)) {
                return Err(format!(
                    "word {word} is {number} of {x:?}, not {newer} of {y:?}"
                ));
            }
        }
        let seen = first + words.len() as u64;
        let (least, most) = sizes(changes, &visible);
        if end && seen < least {
            return Err(format!("the file ends at word {seen}, not {least}"));
        }
        if !words.is_empty() && seen > most {
            return Err(format!("the file ends behind word {seen}, not at {most}"));
        }
        Ok(())
    }

    /// Checks a size in words that a program was told.
    pub(super) fn check_size(&self, file: u64, view: View, size: u64) -> Result<(), String> {
        let state = self.state.lock().unwrap();
        let empty = BTreeMap::new();
        let changes = state.files.get(&file).unwrap_or(&empty);
        let visible: Vec<_> = changes.iter().filter(|(_, c)| view.must_see(c)).collect();
        let (least, most) = sizes(changes, &visible);
        if (least..=most).contains(&size) {
            Ok(())
        } else {
            Err(format!("the size is {size} words, not {least} to {most}"))
        }
    }

    /// The files that were changed.
    pub(super) fn files(&self) -> Vec<u64> {
        self.state.lock().unwrap().files.keys().copied().collect()
    }
}

/// Between which sizes a file is, in words.
fn sizes(changes: &BTreeMap<u64, Change>, visible: &[(&u64, &Change)]) -> (u64, u64) {
    let reach = |change: &Change, unknown| match change.what {
        What::Write(_, to) => to,
        What::Append(_) => unknown,
        What::Cut(size) => size,
    };
    let cut_to = |change: &Change| match change.what {
        What::Write(..) | What::Append(_) => u64::MAX,
        What::Cut(size) => size,
    };
    let least = visible.iter().map(|(_, y)| {
        let cuts = changes.values().filter(|z| !y.newer(z));
        cuts.map(cut_to).min().unwrap_or(u64::MAX).min(reach(y, 0))
    });
    let most = changes.values().map(|x| {
        let cuts = visible.iter().filter(|(_, z)| z.newer(x));
        cuts.map(|(_, z)| cut_to(z))
            .min()
            .unwrap_or(u64::MAX)
            .min(reach(x, u64::MAX))
    });
    (least.max().unwrap_or(0), most.max().unwrap_or(0))
}
