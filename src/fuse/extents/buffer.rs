//! The bytes of one segment.

use bytes::{Bytes, BytesMut};

/// Bytes that can still grow, or that a WRITE call shares.
#[derive(Debug)]
pub(super) enum Buffer {
    Open(BytesMut),
    Shut(Bytes),
}

impl Buffer {
    pub(super) fn as_slice(&self) -> &[u8] {
        match self {
            Self::Open(bytes) => bytes,
            Self::Shut(bytes) => bytes,
        }
    }

    pub(super) fn len(&self) -> usize {
        self.as_slice().len()
    }

    /// Keeps the first `at` bytes and returns the others.
    pub(super) fn split_off(&mut self, at: usize) -> Self {
        match self {
            Self::Open(bytes) => Self::Open(bytes.split_off(at)),
            Self::Shut(bytes) => Self::Shut(bytes.split_off(at)),
        }
    }

    pub(super) fn share(&mut self) -> Bytes {
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
