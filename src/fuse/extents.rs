//! The bytes of one file that the server does not hold durably yet.
//!
//! Pure: no I/O, no clock. A map of segments that never overlap; each holds the newest bytes of
//! its range and how far they have come: *unsent*, *sending*, *written* (in the server's memory,
//! under a write verifier) and *durable*. Whoever drives it takes [`Flight`]s out, sends them as
//! WRITE calls, and reports what came back.
//!
//! Invariants, which the property test below checks:
//! - the server's bytes overlaid with [`Held`] are the file as its writers see it, at any moment,
//!   also while READ calls are under way and also after the server lost what was not durable;
//! - no two flights overlap (NFS gives no order to WRITE calls that do);
//! - what was written before a [`Held::mark`] is durable once [`Held::pending`] says so, also when
//!   it was overwritten in the meantime.

use std::collections::{BTreeMap, BTreeSet};

use bytes::{Bytes, BytesMut};

/// The write verifier of RFC 1813: it changes when a server may have lost unstable writes.
pub(super) type Verifier = [u8; 8];

/// Bytes that can still grow, or that a WRITE call shares.
#[derive(Debug)]
enum Buffer {
    Open(BytesMut),
    Shut(Bytes),
}

impl Buffer {
    fn as_slice(&self) -> &[u8] {
        match self {
            Self::Open(bytes) => bytes,
            Self::Shut(bytes) => bytes,
        }
    }

    fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Keeps the first `at` bytes and returns the others.
    fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Open(bytes) => Self::Open(bytes.split_off(at)),
            Self::Shut(bytes) => Self::Shut(bytes.split_off(at)),
        }
    }

    fn share(&mut self) -> Bytes {
        match self {
            Self::Open(bytes) => {
                let shut = std::mem::take(bytes).freeze();
                *self = Self::Shut(shut.clone());
                shut
            }
            Self::Shut(bytes) => bytes.clone(),
        }
    }
}

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

/// What became of a READ call's view; see [`Held::begin_read`].
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub(super) struct ReadToken(u64);

/// See the module's text. `C` says on whose behalf bytes are written.
#[derive(Debug)]
pub(super) struct Held<C> {
    segments: BTreeMap<u64, Segment<C>>,
    unsent: BTreeSet<u64>,
    /// Unsent segments that are worth a call of their own, in the order in which they filled.
    full: Vec<u64>,
    flights: Vec<(u64, u64, u64)>,
    reads: BTreeSet<u64>,
    bytes: usize,
    written: usize,
    durable: usize,
    clock: u64,
}

impl<C> Default for Held<C> {
    fn default() -> Self {
        Self {
            segments: BTreeMap::new(),
            unsent: BTreeSet::new(),
            full: Vec::new(),
            flights: Vec::new(),
            reads: BTreeSet::new(),
            bytes: 0,
            written: 0,
            durable: 0,
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
    pub(super) fn bytes(&self) -> usize {
        self.bytes
    }

    /// Bytes that wait for a COMMIT.
    pub(super) fn written(&self) -> usize {
        self.written
    }

    pub(super) fn is_empty(&self) -> bool {
        self.segments.is_empty() && self.flights.is_empty()
    }

    /// Whether nothing is on its way or waiting: all that is held is durable.
    pub(super) fn is_clean(&self) -> bool {
        self.unsent.is_empty() && self.flights.is_empty() && self.written == 0
    }

    /// One past the last byte held.
    pub(super) fn end(&self) -> Option<u64> {
        self.segments
            .last_key_value()
            .map(|(start, segment)| start + segment.data.len() as u64)
    }

    /// Takes new bytes at `offset`. A run of small writes becomes one segment of up to `chunk`
    /// bytes.
    pub(super) fn write(&mut self, offset: u64, data: &[u8], owner: &C, chunk: usize) {
        if data.is_empty() {
            return;
        }
        let end = offset + data.len() as u64;
        let mark = self.tick();
        let mark = self
            .punch(offset, end)
            .map_or(mark, |older| older.min(mark));
        self.bytes += data.len();
        if let Some((&start, last)) = self.segments.range_mut(..offset).next_back()
            && start + last.data.len() as u64 == offset
            && last.state == State::Unsent
            && last.owner == *owner
            && last.data.len() + data.len() <= chunk
            && let Buffer::Open(bytes) = &mut last.data
        {
            bytes.extend_from_slice(data);
            last.mark = last.mark.min(mark);
            if bytes.len() == chunk {
                self.full.push(start);
            }
            return;
        }
        self.segments.insert(
            offset,
            Segment {
                data: Buffer::Open(BytesMut::from(data)),
                owner: owner.clone(),
                mark,
                state: State::Unsent,
            },
        );
        self.unsent.insert(offset);
        if data.len() >= chunk {
            self.full.push(offset);
        }
    }

    /// Forgets what is held of a range; returns the oldest mark among what was not durable.
    fn punch(&mut self, start: u64, end: u64) -> Option<u64> {
        let mut oldest: Option<u64> = None;
        self.split(start);
        self.split(end);
        let inside: Vec<u64> = self.segments.range(start..end).map(|(&at, _)| at).collect();
        for at in inside {
            if let Some(segment) = self.remove(at)
                && !matches!(segment.state, State::Durable { .. })
            {
                oldest = Some(oldest.map_or(segment.mark, |o| o.min(segment.mark)));
            }
        }
        oldest
    }

    fn remove(&mut self, at: u64) -> Option<Segment<C>> {
        let segment = self.segments.remove(&at)?;
        self.bytes -= segment.data.len();
        match segment.state {
            State::Unsent => {
                self.unsent.remove(&at);
            }
            State::Sending(_) => {}
            State::Written { .. } => self.written -= segment.data.len(),
            State::Durable { .. } => self.durable -= 1,
        }
        Some(segment)
    }

    fn set_state(&mut self, at: u64, state: State) {
        let Some(segment) = self.segments.get_mut(&at) else {
            return;
        };
        let len = segment.data.len();
        match std::mem::replace(&mut segment.state, state) {
            State::Unsent => {
                self.unsent.remove(&at);
            }
            State::Sending(_) => {}
            State::Written { .. } => self.written -= len,
            State::Durable { .. } => self.durable -= 1,
        }
        match state {
            State::Unsent => {
                self.unsent.insert(at);
            }
            State::Sending(_) => {}
            State::Written { .. } => self.written += len,
            State::Durable { .. } => self.durable += 1,
        }
    }

    /// Makes `at` a boundary between segments.
    fn split(&mut self, at: u64) {
        let Some((&start, segment)) = self.segments.range_mut(..at).next_back() else {
            return;
        };
        let len = segment.data.len() as u64;
        if start + len <= at {
            return;
        }
        // The difference is below the segment's length, which is a usize.
        let Ok(keep) = usize::try_from(at - start) else {
            return;
        };
        let rest = Segment {
            data: segment.data.split_off(keep),
            owner: segment.owner.clone(),
            mark: segment.mark,
            state: segment.state,
        };
        match rest.state {
            State::Unsent => {
                self.unsent.insert(at);
            }
            State::Durable { .. } => self.durable += 1,
            State::Sending(_) | State::Written { .. } => {}
        }
        self.segments.insert(at, rest);
    }

    /// The next WRITE call: a full chunk, or whatever was written up to the mark `force`.
    /// At most `chunk` bytes.
    pub(super) fn take(&mut self, chunk: usize, force: u64) -> Option<Flight<C>> {
        let mut candidate = None;
        let mut index = 0;
        while index < self.full.len() {
            let at = self.full[index];
            if !self.unsent.contains(&at) {
                self.full.remove(index);
            } else if self.is_free(at, chunk) {
                self.full.remove(index);
                candidate = Some(at);
                break;
            } else {
                index += 1;
            }
        }
        let start = candidate.or_else(|| {
            self.unsent.iter().copied().find(|&at| {
                self.segments.get(&at).is_some_and(|s| s.mark <= force) && self.is_free(at, chunk)
            })
        })?;
        Some(self.launch(start, chunk))
    }

    /// Whether the call that would start at `at` overlaps none that is under way.
    fn is_free(&self, at: u64, chunk: usize) -> bool {
        let Some(segment) = self.segments.get(&at) else {
            return false;
        };
        let end = at + segment.data.len().min(chunk) as u64;
        !self.flights.iter().any(|&(_, s, e)| s < end && at < e)
    }

    fn launch(&mut self, start: u64, chunk: usize) -> Flight<C> {
        self.split(start + chunk as u64);
        let id = self.tick();
        // What follows without a gap goes along, up to one chunk.
        let mut run: Vec<u64> = Vec::new();
        let mut end = start;
        let mut owner: Option<C> = None;
        for (&at, segment) in self.segments.range(start..) {
            let next = at + segment.data.len() as u64;
            let fits = next - start <= chunk as u64;
            let same = owner.as_ref().is_none_or(|o| *o == segment.owner);
            let busy = self.flights.iter().any(|&(_, s, e)| s < next && at < e);
            if at != end || segment.state != State::Unsent || !fits || !same || busy {
                break;
            }
            owner.get_or_insert_with(|| segment.owner.clone());
            run.push(at);
            end = next;
        }
        if run.len() > 1 {
            let len = run
                .iter()
                .filter_map(|at| self.segments.get(at))
                .map(|s| s.data.len())
                .sum();
            let mut joined = BytesMut::with_capacity(len);
            let mut mark = u64::MAX;
            for &at in &run {
                if let Some(segment) = self.remove(at) {
                    joined.extend_from_slice(segment.data.as_slice());
                    mark = mark.min(segment.mark);
                }
            }
            self.bytes += joined.len();
            if let Some(owner) = owner {
                let data = Buffer::Open(joined);
                let state = State::Unsent;
                self.segments.insert(
                    start,
                    Segment {
                        data,
                        owner,
                        mark,
                        state,
                    },
                );
            }
        }
        self.set_state(start, State::Sending(id));
        let segment = self
            .segments
            .get_mut(&start)
            .expect("the run starts with this segment");
        let data = segment.data.share();
        self.flights.push((id, start, start + data.len() as u64));
        Flight {
            id,
            offset: start,
            data,
            owner: segment.owner.clone(),
        }
    }

    /// A WRITE call came back: `count` bytes from the flight's start are in the server's memory,
    /// or on its disk when `durable`. The rest is unsent again.
    pub(super) fn sent(&mut self, id: u64, count: usize, verifier: Verifier, durable: bool) {
        let Some((start, end)) = self.land(id) else {
            return;
        };
        let upto = end.min(start + count as u64);
        self.split(upto);
        let order = self.tick();
        let mut rest = false;
        for at in self.of_flight(id, start, end) {
            if at >= upto {
                self.set_state(at, State::Unsent);
                rest = true;
            } else if durable {
                self.make_durable(at);
            } else {
                self.set_state(at, State::Written { verifier, order });
            }
        }
        if rest {
            self.full.push(upto);
        }
    }

    /// A WRITE call failed for good: its bytes are dropped.
    pub(super) fn failed(&mut self, id: u64) {
        let Some((start, end)) = self.land(id) else {
            return;
        };
        for at in self.of_flight(id, start, end) {
            self.remove(at);
        }
    }

    /// A WRITE call was given up before an answer: its bytes are unsent again.
    pub(super) fn returned(&mut self, id: u64) {
        let Some((start, end)) = self.land(id) else {
            return;
        };
        for at in self.of_flight(id, start, end) {
            self.set_state(at, State::Unsent);
        }
    }

    fn land(&mut self, id: u64) -> Option<(u64, u64)> {
        let index = self.flights.iter().position(|f| f.0 == id)?;
        let (_, start, end) = self.flights.swap_remove(index);
        Some((start, end))
    }

    fn of_flight(&self, id: u64, start: u64, end: u64) -> Vec<u64> {
        self.segments
            .range(start..end)
            .filter(|(_, s)| s.state == State::Sending(id))
            .map(|(&at, _)| at)
            .collect()
    }

    /// Names the moment before a COMMIT call is sent.
    pub(super) fn begin_commit(&mut self) -> u64 {
        self.tick()
    }

    /// A COMMIT call that was sent at `begun` answered with this verifier. What was written under
    /// another one is unsent again.
    pub(super) fn committed(&mut self, begun: u64, now: Verifier) {
        let written: Vec<(u64, Verifier)> = self
            .segments
            .iter()
            .filter_map(|(&at, s)| match s.state {
                State::Written { verifier, order } if order < begun => Some((at, verifier)),
                _ => None,
            })
            .collect();
        for (at, verifier) in written {
            if verifier == now {
                self.make_durable(at);
            } else {
                self.set_state(at, State::Unsent);
            }
        }
    }

    /// COMMIT failed for good: what waited for it is dropped.
    pub(super) fn commit_failed(&mut self, begun: u64) {
        let written: Vec<u64> = self
            .segments
            .iter()
            .filter(|(_, s)| matches!(s.state, State::Written { order, .. } if order < begun))
            .map(|(&at, _)| at)
            .collect();
        for at in written {
            self.remove(at);
        }
    }

    fn make_durable(&mut self, at: u64) {
        if self.reads.is_empty() {
            self.remove(at);
        } else {
            let after = self.clock;
            self.set_state(at, State::Durable { after });
        }
    }

    /// Names the moment: everything written so far has a mark at or below it.
    pub(super) fn mark(&self) -> u64 {
        self.clock
    }

    /// Whether something written up to `mark` is not in the server's memory yet.
    pub(super) fn unsent_upto(&self, mark: u64) -> bool {
        self.segments
            .values()
            .any(|s| s.mark <= mark && matches!(s.state, State::Unsent | State::Sending(_)))
    }

    /// Whether something written up to `mark` is not durable yet.
    pub(super) fn pending(&self, mark: u64) -> bool {
        self.segments
            .values()
            .any(|s| s.mark <= mark && !matches!(s.state, State::Durable { .. }))
    }

    /// Whether one WRITE call would carry all there is, so that it may as well be a stable one.
    pub(super) fn is_one_call(&self, chunk: usize) -> bool {
        self.flights.is_empty()
            && self.written == 0
            && self.unsent.len() == 1
            && self
                .unsent
                .first()
                .and_then(|at| self.segments.get(at))
                .is_some_and(|s| s.data.len() <= chunk)
    }

    /// Begins a READ call: nothing that is held now is forgotten before [`Held::end_read`].
    pub(super) fn begin_read(&mut self) -> ReadToken {
        let token = self.tick();
        self.reads.insert(token);
        ReadToken(token)
    }

    pub(super) fn end_read(&mut self, token: ReadToken) {
        self.reads.remove(&token.0);
        if self.durable == 0 {
            return;
        }
        let oldest = self.reads.first().copied().unwrap_or(u64::MAX);
        let gone: Vec<u64> = self
            .segments
            .iter()
            .filter(|(_, s)| matches!(s.state, State::Durable { after } if after < oldest))
            .map(|(&at, _)| at)
            .collect();
        for at in gone {
            self.remove(at);
        }
    }

    /// On whose behalf some of what waits for a COMMIT was written.
    pub(super) fn writer(&self) -> Option<C> {
        self.segments
            .values()
            .find(|s| matches!(s.state, State::Written { .. }))
            .map(|s| s.owner.clone())
    }

    /// Whether anything held lies in the range.
    pub(super) fn touches(&self, start: u64, end: u64) -> bool {
        self.segments
            .range(..end)
            .next_back()
            .is_some_and(|(at, s)| at + s.data.len() as u64 > start)
    }

    /// Whether every byte of the range is held.
    pub(super) fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        let first = self
            .segments
            .range(..=start)
            .next_back()
            .map_or(start, |(&k, _)| k);
        for (&from, segment) in self.segments.range(first..end) {
            if from > at {
                return false;
            }
            at = at.max(from + segment.data.len() as u64);
        }
        at >= end
    }

    /// Puts what is held over the bytes at `offset`.
    pub(super) fn overlay(&self, offset: u64, bytes: &mut [u8]) {
        let end = offset + bytes.len() as u64;
        let first = self
            .segments
            .range(..=offset)
            .next_back()
            .map_or(offset, |(&k, _)| k);
        for (&from, segment) in self.segments.range(first..end) {
            let data = segment.data.as_slice();
            let to = from + data.len() as u64;
            let (low, high) = (from.max(offset), to.min(end));
            if low >= high {
                continue;
            }
            // All differences lie within `bytes` or within the segment, both in memory.
            let range = |base: u64| {
                usize::try_from(low - base).unwrap_or(0)..usize::try_from(high - base).unwrap_or(0)
            };
            bytes[range(offset)].copy_from_slice(&data[range(from)]);
        }
    }

    /// The file was cut to `size`: nothing held beyond it counts any more. The caller has made
    /// sure that nothing is under way.
    pub(super) fn cut(&mut self, size: u64) {
        self.punch(size, u64::MAX);
    }
}

#[cfg(test)]
mod tests;
