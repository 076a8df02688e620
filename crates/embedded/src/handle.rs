//! Handles on the wire: `[version 1][kind 4][length 1][kernel handle][seal 8]`, at most 64 bytes.
//!
//! Invariant: only a handle that was sealed with this directory's key reaches the kernel, so a
//! made-up handle opens nothing. (The kernel would open any file of the file system by its
//! handle, also outside of the served directory.) The key is kept in the state directory: handles
//! stay good over restarts.

use std::hash::Hasher;
#[expect(
    deprecated,
    reason = "the one keyed hash of the standard library; `DefaultHasher` takes no key"
)]
use std::hash::SipHasher;

use super::sys::{KernelHandle, MAX_HANDLE};

const VERSION: u8 = 1;
/// Bytes before the kernel's handle.
const HEAD: usize = 6;
/// Bytes of the seal.
const SEAL: usize = 8;

/// The secret that seals handles.
#[derive(Clone, Copy)]
pub(super) struct Key([u64; 2]);

impl std::fmt::Debug for Key {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        f.write_str("Key(..)")
    }
}

impl Key {
    pub(super) fn from_bytes(bytes: [u8; 16]) -> Self {
        let all = u128::from_le_bytes(bytes);
        #[expect(
            clippy::cast_possible_truncation,
            reason = "the two halves of the number"
        )]
        Self([all as u64, (all >> 64) as u64])
    }

    /// SipHash-2-4 of `bytes` under this key.
    #[expect(deprecated, reason = "see the import")]
    fn seal(self, bytes: &[u8]) -> [u8; SEAL] {
        let mut hasher = SipHasher::new_with_keys(self.0[0], self.0[1]);
        hasher.write(bytes);
        hasher.finish().to_le_bytes()
    }

    /// The handle as clients see it.
    pub(super) fn encode(self, handle: &KernelHandle) -> Vec<u8> {
        let mut wire = Vec::with_capacity(HEAD + MAX_HANDLE + SEAL);
        wire.push(VERSION);
        wire.extend_from_slice(&handle.kind.to_le_bytes());
        wire.push(handle.len);
        wire.extend_from_slice(handle.bytes());
        let seal = self.seal(&wire);
        wire.extend_from_slice(&seal);
        wire
    }

    /// The kernel's handle, or `None` for bytes that this key did not seal.
    pub(super) fn decode(self, wire: &[u8]) -> Option<KernelHandle> {
        let (body, seal) = wire.split_at_checked(wire.len().checked_sub(SEAL)?)?;
        if seal != self.seal(body) {
            return None;
        }
        let (head, rest) = body.split_at_checked(HEAD)?;
        if head[0] != VERSION || usize::from(head[5]) != rest.len() {
            return None;
        }
        let mut bytes = [0; MAX_HANDLE];
        bytes.get_mut(..rest.len())?.copy_from_slice(rest);
        Some(KernelHandle {
            kind: i32::from_le_bytes([head[1], head[2], head[3], head[4]]),
            len: head[5],
            bytes,
        })
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    fn handle(kind: i32, content: &[u8]) -> KernelHandle {
        let mut bytes = [0; MAX_HANDLE];
        bytes[..content.len()].copy_from_slice(content);
        KernelHandle {
            kind,
            len: u8::try_from(content.len()).unwrap(),
            bytes,
        }
    }

    proptest! {
        #[test]
        fn a_sealed_handle_decodes_to_itself_and_fits(
            kind in any::<i32>(),
            content in prop::collection::vec(any::<u8>(), 0..=MAX_HANDLE),
            key in any::<[u8; 16]>(),
        ) {
            let key = Key::from_bytes(key);
            let original = handle(kind, &content);
            let wire = key.encode(&original);
            prop_assert!(wire.len() <= 64);
            prop_assert_eq!(key.decode(&wire), Some(original));
        }

        #[test]
        fn a_changed_or_foreign_handle_is_refused(
            content in prop::collection::vec(any::<u8>(), 1..=MAX_HANDLE),
            at in any::<prop::sample::Index>(),
            flip in 1..=255_u8,
        ) {
            let key = Key::from_bytes([7; 16]);
            let mut wire = key.encode(&handle(1, &content));
            prop_assert_eq!(Key::from_bytes([8; 16]).decode(&wire), None);
            let at = at.index(wire.len());
            wire[at] ^= flip;
            prop_assert_eq!(key.decode(&wire), None);
        }

        #[test]
        fn any_bytes_are_refused(wire in prop::collection::vec(any::<u8>(), 0..80)) {
            prop_assert_eq!(Key::from_bytes([7; 16]).decode(&wire), None);
        }
    }
}
