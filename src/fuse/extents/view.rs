//! What is held, as a reader sees it.
//!
//! What was durable before a READ was begun is in that READ's answer, or what another host made of
//! it since; it is kept for earlier READs only, and `None` is a reader without a READ.

use crate::mutant::{self, Mutant};

use super::{Held, ReadToken, Segment, State};

impl<C> Segment<C> {
    fn is_for(&self, reader: Option<ReadToken>) -> bool {
        let earlier = |after| reader.is_some_and(|token| after >= token.0);
        match self.state {
            State::Durable { after } => earlier(after) || mutant::is_on(Mutant::DurableHidesOthers),
            _ => true,
        }
    }
}

impl<C> Held<C> {
    /// One past the last byte held.
    pub(in crate::fuse) fn end(&self, reader: Option<ReadToken>) -> Option<u64> {
        let last = self.segments.iter().rev().find(|(_, s)| s.is_for(reader))?;
        Some(last.0 + last.1.data.len() as u64)
    }

    /// Whether anything held lies in the range.
    pub(in crate::fuse) fn touches(&self, start: u64, end: u64) -> bool {
        self.segments
            .range(..end)
            .next_back()
            .is_some_and(|(at, s)| at + s.data.len() as u64 > start)
    }

    /// Whether every byte of the range is held, so that no READ is needed.
    pub(in crate::fuse) fn covers(&self, start: u64, end: u64) -> bool {
        let mut at = start;
        let first = self
            .segments
            .range(..=start)
            .next_back()
            .map_or(start, |(&k, _)| k);
        for (&from, segment) in self.segments.range(first..end) {
            if from > at || !segment.is_for(None) {
                return false;
            }
            at = at.max(from + segment.data.len() as u64);
        }
        at >= end
    }

    /// Puts what is held over the bytes at `offset`.
    pub(in crate::fuse) fn overlay(
        &self,
        offset: u64,
        bytes: &mut [u8],
        reader: Option<ReadToken>,
    ) {
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
            if low >= high || !segment.is_for(reader) {
                continue;
            }
            // All differences lie within `bytes` or within the segment, both in memory.
            let range = |base: u64| {
                usize::try_from(low - base).unwrap_or(0)..usize::try_from(high - base).unwrap_or(0)
            };
            bytes[range(offset)].copy_from_slice(&data[range(from)]);
        }
    }
}
