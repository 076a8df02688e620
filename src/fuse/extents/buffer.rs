//! The bytes of one segment.
//!
//! Invariant: they are at least half of the memory that they keep, so that what is counted of them
//! bounds it, however they were cut up.

use bytes::{Bytes, BytesMut};

use crate::mutant::{self, Mutant};

/// Bytes that can still grow, or that a WRITE call shares.
#[derive(Debug)]
enum Content {
    Open(BytesMut),
    Shut(Bytes),
}

#[derive(Debug)]
pub(super) struct Buffer {
    content: Content,
    /// How long the longest buffer was that shares this one's memory.
    whole: usize,
}

impl From<BytesMut> for Buffer {
    fn from(bytes: BytesMut) -> Self {
        Self {
            whole: bytes.len(),
            content: Content::Open(bytes),
        }
    }
}

impl Buffer {
    pub(super) fn as_slice(&self) -> &[u8] {
        match &self.content {
            Content::Open(bytes) => bytes,
            Content::Shut(bytes) => bytes,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// How much memory it may keep.
    #[cfg(test)]
    pub(super) fn whole(&self) -> usize {
        self.whole
    }

    /// Whether it can still grow.
    pub(super) fn is_open(&self) -> bool {
        matches!(self.content, Content::Open(_))
    }

    /// Puts bytes behind its own, if it can still grow.
    pub(super) fn extend(&mut self, data: &[u8]) {
        if let Content::Open(bytes) = &mut self.content {
            bytes.extend_from_slice(data);
            self.whole = self.whole.max(bytes.len());
        }
    }

    /// Keeps the first `at` bytes and returns the others.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        let content = match &mut self.content {
            Content::Open(bytes) => Content::Open(bytes.split_off(at)),
            Content::Shut(bytes) => Content::Shut(bytes.split_off(at)),
        };
        let whole = self.whole;
        let mut rest = Self { content, whole };
        self.detach();
        rest.detach();
        rest
    }

    /// A small part of a large buffer gets memory of its own: it may stay when the others have gone.
    fn detach(&mut self) {
        let (len, small) = (self.len(), self.len() < self.whole.div_ceil(2));
        if !small || mutant::is_on(Mutant::PartsKeepTheWhole) {
            return;
        }
        self.content = match &self.content {
            Content::Open(bytes) => Content::Open(BytesMut::from(&bytes[..])),
            Content::Shut(bytes) => Content::Shut(Bytes::copy_from_slice(bytes)),
        };
        self.whole = len;
    }

    pub(super) fn share(&mut self) -> Bytes {
        match &mut self.content {
            Content::Open(bytes) => {
                let shut = std::mem::take(bytes).freeze();
                self.content = Content::Shut(shut.clone());
                shut
            }
            Content::Shut(bytes) => bytes.clone(),
        }
    }
}

#[cfg(test)]
mod tests {
    use std::ops::Range;

    use super::*;
    use crate::mutant::put_back;

    fn memory(bytes: &[u8]) -> Range<*const u8> {
        bytes.as_ptr_range()
    }

    /// What is left of a long buffer when all but its end, or its start, has gone; and whether it
    /// lies in the memory of the long one.
    fn part(at: usize, shut: bool) -> (Vec<u8>, bool) {
        let long: Vec<u8> = (0..=255).cycle().take(1 << 20).collect();
        let mut buffer = Buffer::from(BytesMut::from(&long[..]));
        if shut {
            buffer.share();
        }
        let whole = memory(buffer.as_slice());
        let rest = buffer.split_off(at);
        let kept = if at < long.len() / 2 { buffer } else { rest };
        let keeps = whole.contains(&kept.as_slice().as_ptr());
        (kept.as_slice().to_vec(), keeps)
    }

    #[test]
    fn a_small_part_does_not_keep_the_whole_in_memory() {
        for shut in [false, true] {
            assert_eq!(part(1, shut), (vec![0], false));
            assert_eq!(part((1 << 20) - 1, shut), (vec![255], false));
        }
        let _back = put_back(Mutant::PartsKeepTheWhole);
        assert_eq!(part(1, false), (vec![0], true));
    }

    #[test]
    fn parts_of_parts_are_at_least_half_of_what_they_keep() {
        let mut all = vec![Buffer::from(BytesMut::zeroed(1000))];
        for at in [700, 600, 550, 300, 299, 1] {
            let mut buffer = all.pop().unwrap();
            let rest = buffer.split_off(at);
            all.extend([rest, buffer]);
            assert!(all.iter().all(|part| part.len() * 2 >= part.whole));
        }
        assert_eq!(all.iter().map(Buffer::len).sum::<usize>(), 1000);
    }
}
