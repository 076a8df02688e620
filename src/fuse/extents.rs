//! The bytes of one file that the server does not hold durably yet.
//!
//! Pure: no I/O, no clock. A map of segments that never overlap; each holds the newest bytes of
//! its range and how far they have come: *unsent*, *sending*, *written* (in the server's memory,
//! under a write verifier) and *durable*. Whoever drives it takes [`Flight`]s out, sends them as
//! WRITE calls, and reports what came back.
//!
//! A mark names a moment. Bytes that overwrite unsent ones stand for these as well and take over
//! their mark; bytes that overwrite what was sent have a mark of their own, because what was sent
//! settles the old one when it arrives (in a flight, then as a [`Ghost`] until the COMMIT). So a
//! mark is settled after a few calls, however fast the file is overwritten.
//!
//! Invariants, which the property test below checks:
//! - the server's bytes overlaid with [`Held`] are the file as its writers see it, at any moment,
//!   also while READ calls are under way and also after the server lost what was not durable;
//! - no two flights overlap (NFS gives no order to WRITE calls that do), and none is taken back:
//!   it is over when the call was answered or failed;
//! - what was written before a [`Held::mark`] is durable once [`Held::pending`] says so, as it was
//!   then or newer;
//! - each segment owns the [`Share`] of its bytes, and keeps no more memory than twice as much.
//!
//! Costs: an answer costs what its own range holds, not what the file does; only an answer that
//! shows a restart of the server walks over everything.

mod answers;
mod buffer;
mod view;

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};

use crate::mutant::{self, Mutant};

use super::room::{Room, Share};

use buffer::Buffer;

/// The write verifier of RFC 1813: it changes when a server may have lost unstable writes.
pub(super) type Verifier = [u8; 8];
/// How many segments [`Held::take`] looks at to find one that no flight is in the way of. If all of
/// them have to wait, so may the others: the flights' ends ask again.
const LOOKS: usize = 64;

#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    Unsent,
    Sending(u64),
    Written { verifier: Verifier, order: u64 },
    Durable { after: u64 },
}

#[derive(Debug)]
struct Segment<C> {
    data: Buffer,
    share: Share,
    owner: C,
    /// The oldest write whose durability depends on this segment.
    mark: u64,
    state: State,
}

/// One WRITE call to make.
#[derive(Debug, Clone)]
pub(super) struct Flight<C> {
    pub(super) id: u64,
    pub(super) offset: u64,
    pub(super) data: Bytes,
    pub(super) owner: C,
}

/// A WRITE call under way.
#[derive(Debug)]
struct Out<C> {
    id: u64,
    owner: C,
    start: u64,
    end: u64,
    /// The oldest write that it carries.
    mark: u64,
    /// The oldest of those that were overwritten since.
    overwritten: Option<u64>,
}

impl<C> Out<C> {
    fn overlaps(&self, start: u64, end: u64) -> bool {
        self.start < end && start < self.end
    }
}

/// Bytes that the server has in its memory and this host has no more, because they were
/// overwritten. If the server loses them, what overwrote them stands for them.
#[derive(Debug)]
struct Ghost<C> {
    verifier: Verifier,
    order: u64,
    mark: u64,
    owner: C,
}

/// What became of a READ call's view; see [`Held::begin_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ReadToken(u64);

/// See the module's text. `C` says on whose behalf bytes are written.
#[derive(Debug)]
pub(super) struct Held<C> {
    segments: BTreeMap<u64, Segment<C>>,
    /// Unsent segments, oldest first: (mark, start).
    unsent: BTreeSet<(u64, u64)>,
    /// Those of them that are worth a call of their own.
    full: BTreeSet<(u64, u64)>,
    /// Written segments in the order in which they landed: (order, start).
    written: BTreeSet<(u64, u64)>,
    /// The same by age: (mark, start).
    written_marks: BTreeSet<(u64, u64)>,
    /// Durable segments that READ calls keep: (after, start).
    durable: BTreeSet<(u64, u64)>,
    flights: Vec<Out<C>>,
    /// Few: one for each verifier, before and after the last COMMIT began.
    ghosts: Vec<Ghost<C>>,
    reads: BTreeSet<u64>,
    bytes: usize,
    written_bytes: usize,
    /// The most that one call carries.
    chunk: usize,
    /// When the last COMMIT call began.
    begun: u64,
    clock: u64,
}

impl<C> Default for Held<C> {
    fn default() -> Self {
        Self {
            segments: BTreeMap::new(),
            unsent: BTreeSet::new(),
            full: BTreeSet::new(),
            written: BTreeSet::new(),
            written_marks: BTreeSet::new(),
            durable: BTreeSet::new(),
            flights: Vec::new(),
            ghosts: Vec::new(),
            reads: BTreeSet::new(),
            bytes: 0,
            written_bytes: 0,
            chunk: usize::MAX,
            begun: 0,
            clock: 0,
        }
    }
}

impl<C: Clone + PartialEq> Held<C> {
    fn tick(&mut self) -> u64 {
        self.clock += 1;
        self.clock
    }

    /// Bytes in memory.
    #[cfg(test)]
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Segments in memory: so many shares.
    #[cfg(test)]
    pub(super) fn segments(&self) -> usize {
        self.segments.len()
    }

    /// Memory that is taken.
    pub(super) fn cost(&self) -> usize {
        Room::cost_of(self.bytes, self.segments.len())
    }

    /// Bytes that wait for a COMMIT.
    pub(super) fn written(&self) -> usize {
        self.written_bytes
    }

    /// Whether anything waits for a COMMIT.
    pub(super) fn needs_commit(&self) -> bool {
        !self.written.is_empty() || !self.ghosts.is_empty()
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.flights.is_empty()
    }

    /// Whether nothing is on its way or waiting: all that is held is durable.
    pub(super) fn is_clean(&self) -> bool {
        self.unsent.is_empty() && self.flights.is_empty() && !self.needs_commit()
    }

    /// Takes new bytes at `offset`, whose room is `share`. A run of small writes becomes one
    /// segment of up to `chunk` bytes.
    pub(super) fn write(
        &mut self,
        offset: u64,
        data: &[u8],
        owner: &C,
        chunk: usize,
        share: Share,
    ) {
        if data.is_empty() {
            return;
        }
        debug_assert_eq!(share.bytes(), data.len());
        self.chunk = chunk;
        let mark = self.tick();
        let end = offset + data.len() as u64;
        let mark = self
            .punch(offset, end)
            .map_or(mark, |older| older.min(mark));
        let grows = |(&start, last): (&u64, &Segment<C>)| {
            let fits = start + last.data.len() as u64 == offset
                && last.state == State::Unsent
                && last.owner == *owner
                && last.data.len() + data.len() <= chunk
                && last.data.is_open();
            fits.then_some(start)
        };
        if let Some(start) = self.segments.range(..offset).next_back().and_then(grows)
            && let Some(mut last) = self.take_out(start)
        {
            last.data.extend(data);
            last.share.join(share);
            last.mark = last.mark.min(mark);
            self.put_in(start, last);
            return;
        }
        let segment = Segment {
            data: Buffer::from(BytesMut::from(data)),
            share,
            owner: owner.clone(),
            mark,
            state: State::Unsent,
        };
        self.put_in(offset, segment);
    }

    /// Forgets what is held of a range. Returns the oldest mark that nothing sent will settle.
    fn punch(&mut self, start: u64, end: u64) -> Option<u64> {
        let inherit = mutant::is_on(Mutant::HeirsTakeOverMarks);
        let mut oldest: Option<u64> = None;
        self.split(start);
        self.split(end);
        while let Some((&at, _)) = self.segments.range(start..end).next() {
            let Some(segment) = self.take_out(at) else {
                break;
            };
            let mark = segment.mark;
            let heir = match segment.state {
                State::Unsent => true,
                State::Sending(id) => {
                    if let Some(out) = self.flights.iter_mut().find(|out| out.id == id) {
                        out.overwritten = Some(out.overwritten.map_or(mark, |o| o.min(mark)));
                    }
                    inherit
                }
                State::Written { verifier, order } => {
                    self.add_ghost(verifier, order, mark, segment.owner);
                    inherit
                }
                State::Durable { .. } => false,
            };
            if heir {
                oldest = Some(oldest.map_or(mark, |o| o.min(mark)));
            }
        }
        oldest
    }

    fn add_ghost(&mut self, verifier: Verifier, order: u64, mark: u64, owner: C) {
        let begun = self.begun;
        let same =
            |g: &&mut Ghost<C>| g.verifier == verifier && (g.order < begun) == (order < begun);
        match self.ghosts.iter_mut().find(same) {
            Some(ghost) => {
                ghost.order = ghost.order.max(order);
                ghost.mark = ghost.mark.min(mark);
            }
            None => self.ghosts.push(Ghost {
                verifier,
                order,
                mark,
                owner,
            }),
        }
    }

    /// Everything that is not durable stands for `mark` too: bytes that were overwritten have been
    /// lost, and nobody knows any more by what.
    fn inherit(&mut self, mark: u64) {
        let all: Vec<u64> = self.segments.keys().copied().collect();
        for at in all {
            let Some(mut segment) = self.take_out(at) else {
                continue;
            };
            segment.mark = segment.mark.min(mark);
            self.put_in(at, segment);
        }
        for out in &mut self.flights {
            out.mark = out.mark.min(mark);
        }
    }

    /// The only way in; its opposite is [`Self::take_out`].
    fn put_in(&mut self, at: u64, segment: Segment<C>) {
        let len = segment.data.len();
        self.bytes += len;
        match segment.state {
            State::Unsent => {
                self.unsent.insert((segment.mark, at));
                if len >= self.chunk {
                    self.full.insert((segment.mark, at));
                }
            }
            State::Sending(_) => {}
            State::Written { order, .. } => {
                self.written.insert((order, at));
                self.written_marks.insert((segment.mark, at));
                self.written_bytes += len;
            }
            State::Durable { after } => {
                self.durable.insert((after, at));
            }
        }
        self.segments.insert(at, segment);
    }

    /// The only way out.
    fn take_out(&mut self, at: u64) -> Option<Segment<C>> {
        let segment = self.segments.remove(&at)?;
        self.bytes -= segment.data.len();
        match segment.state {
            State::Unsent => {
                self.unsent.remove(&(segment.mark, at));
                self.full.remove(&(segment.mark, at));
            }
            State::Sending(_) => {}
            State::Written { order, .. } => {
                self.written.remove(&(order, at));
                self.written_marks.remove(&(segment.mark, at));
                self.written_bytes -= segment.data.len();
            }
            State::Durable { after } => {
                self.durable.remove(&(after, at));
            }
        }
        Some(segment)
    }

    fn set_state(&mut self, at: u64, state: State) {
        if let Some(mut segment) = self.take_out(at) {
            segment.state = state;
            self.put_in(at, segment);
        }
    }

    /// Makes `at` a boundary between segments.
    fn split(&mut self, at: u64) {
        let Some((&start, segment)) = self.segments.range(..at).next_back() else {
            return;
        };
        if start + segment.data.len() as u64 <= at {
            return;
        }
        // The difference is below the segment's length, which is a usize.
        let Ok(keep) = usize::try_from(at - start) else {
            return;
        };
        let Some(mut first) = self.take_out(start) else {
            return;
        };
        let rest = Segment {
            data: first.data.split_off(keep),
            share: first.share.split_off(keep),
            owner: first.owner.clone(),
            mark: first.mark,
            state: first.state,
        };
        self.put_in(start, first);
        self.put_in(at, rest);
    }

    /// The next WRITE call: whatever was written up to the mark `force`, oldest first, or a full
    /// chunk. At most a chunk of bytes.
    pub(super) fn take(&mut self, force: u64) -> Option<Flight<C>> {
        let forced = self.unsent.range(..=(force, u64::MAX)).take(LOOKS);
        let mut either = forced
            .chain(self.full.iter().take(LOOKS))
            .map(|&(_, at)| at);
        let at = either.find(|&at| self.is_free(at))?;
        Some(self.launch(at))
    }

    /// Whether the call that would start at `at` overlaps none that is under way.
    fn is_free(&self, at: u64) -> bool {
        let Some(segment) = self.segments.get(&at) else {
            return false;
        };
        let end = at + segment.data.len().min(self.chunk) as u64;
        !self.flights.iter().any(|out| out.overlaps(at, end))
    }

    /// Whether the segment at `at` may go along in a call on behalf of `owner`.
    fn goes_along(&self, (&at, segment): (&u64, &Segment<C>), owner: &C) -> bool {
        let end = at + segment.data.len() as u64;
        segment.state == State::Unsent
            && segment.owner == *owner
            && !self.flights.iter().any(|out| out.overlaps(at, end))
    }

    /// The segments of the call that carries the one at `at`: what lies around it without a gap
    /// goes along, up to one chunk.
    fn run(&self, at: u64) -> Vec<u64> {
        let Some(middle) = self.segments.get(&at) else {
            return Vec::new();
        };
        let owner = &middle.owner;
        let (mut start, mut end) = (at, at + middle.data.len() as u64);
        let mut run = vec![at];
        for (&from, segment) in self.segments.range(..at).rev() {
            let touches = from + segment.data.len() as u64 == start;
            let fits = end - from <= self.chunk as u64;
            if !touches || !fits || !self.goes_along((&from, segment), owner) {
                break;
            }
            run.push(from);
            start = from;
        }
        run.reverse();
        for (&from, segment) in self.segments.range(at..).skip(1) {
            let next = from + segment.data.len() as u64;
            let fits = next - start <= self.chunk as u64;
            if from != end || !fits || !self.goes_along((&from, segment), owner) {
                break;
            }
            run.push(from);
            end = next;
        }
        run
    }

    fn launch(&mut self, at: u64) -> Flight<C> {
        let rest = at.saturating_add(self.chunk as u64);
        self.split(rest);
        if mutant::is_on(Mutant::RestsWaitToBeForced) {
            self.full.retain(|(_, from)| *from != rest);
        }
        let id = self.tick();
        let run = self.run(at);
        let start = run.first().copied().unwrap_or(at);
        let mut parts = run.iter();
        let mut whole = parts
            .next()
            .and_then(|at| self.take_out(*at))
            .expect("a run begins with a segment");
        if run.len() > 1 {
            let len = run.iter().filter_map(|at| self.segments.get(at));
            let len: usize = len.map(|s| s.data.len()).sum();
            let mut joined = BytesMut::with_capacity(whole.data.len() + len);
            joined.extend_from_slice(whole.data.as_slice());
            for part in parts {
                if let Some(part) = self.take_out(*part) {
                    joined.extend_from_slice(part.data.as_slice());
                    whole.share.join(part.share);
                    whole.mark = whole.mark.min(part.mark);
                }
            }
            whole.data = Buffer::from(joined);
        }
        whole.state = State::Sending(id);
        let data = whole.data.share();
        let owner = whole.owner.clone();
        self.flights.push(Out {
            id,
            owner: owner.clone(),
            start,
            end: start + data.len() as u64,
            mark: whole.mark,
            overwritten: None,
        });
        self.put_in(start, whole);
        Flight {
            id,
            offset: start,
            data,
            owner,
        }
    }

    /// Names the moment: everything written so far has a mark at or below it.
    pub(super) fn mark(&self) -> u64 {
        self.clock
    }

    /// Whether something written up to `mark` is not in the server's memory yet.
    pub(super) fn unsent_upto(&self, mark: u64) -> bool {
        self.unsent.first().is_some_and(|first| first.0 <= mark)
            || self.flights.iter().any(|out| out.mark <= mark)
    }

    /// Whether something written up to `mark` is not durable yet.
    pub(super) fn pending(&self, mark: u64) -> bool {
        self.unsent_upto(mark)
            || self
                .written_marks
                .first()
                .is_some_and(|first| first.0 <= mark)
            || self.ghosts.iter().any(|ghost| ghost.mark <= mark)
    }

    /// Whether one WRITE call would carry all there is, so that it may as well be a stable one.
    pub(super) fn is_one_call(&self) -> bool {
        self.flights.is_empty()
            && !self.needs_commit()
            && self.unsent.len() == 1
            && self
                .unsent
                .first()
                .and_then(|(_, at)| self.segments.get(at))
                .is_some_and(|s| s.data.len() <= self.chunk)
    }

    /// Begins a READ call: nothing that is held now is forgotten before [`Held::end_read`].
    pub(super) fn begin_read(&mut self) -> ReadToken {
        let token = self.tick();
        self.reads.insert(token);
        ReadToken(token)
    }

    pub(super) fn end_read(&mut self, token: ReadToken) {
        self.reads.remove(&token.0);
        let oldest = self.reads.first().copied().unwrap_or(u64::MAX);
        while let Some(&(after, at)) = self.durable.first()
            && after < oldest
        {
            let segment = self.take_out(at);
            if mutant::is_on(Mutant::HeldLeaksBesideReads) {
                std::mem::forget(segment);
            }
        }
    }

    /// On whose behalf some of what waits for a COMMIT was written.
    pub(super) fn writer(&self) -> Option<C> {
        let of_segment = |(_, at): &(u64, u64)| Some(self.segments.get(at)?.owner.clone());
        let of_ghost = || Some(self.ghosts.first()?.owner.clone());
        self.written.first().and_then(of_segment).or_else(of_ghost)
    }

    /// The file was cut to `size`: nothing held beyond it counts any more. The caller has made
    /// sure that nothing is under way.
    pub(super) fn cut(&mut self, size: u64) {
        self.punch(size, u64::MAX);
    }
}

#[cfg(test)]
mod tests;
