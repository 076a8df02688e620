//! Replies to calls that must not be carried out twice.
//!
//! A client whose connection broke sends its calls again, with the same transaction id, on a new
//! one. A second REMOVE would say NOENT, a second MKDIR EXIST, though the first one succeeded;
//! so the first one's reply is given again. A call that is still under way is waited for.
//!
//! Limits: the memory ends with the process, with [`MAX_REPLIES`] and after [`KEPT`].

use std::collections::{HashMap, VecDeque};
use std::hash::{BuildHasher, RandomState};
use std::net::IpAddr;
use std::sync::{Arc, Mutex, PoisonError};
use std::time::{Duration, Instant};

use nfs3_types::nfs3::{self, NFS_PROGRAM};
use tokio::sync::OnceCell;

/// How many replies are kept, of at most about 300 bytes each.
const MAX_REPLIES: usize = 1024;
/// How long a reply is kept: longer than any client waits before it sends again.
const KEPT: Duration = Duration::from_secs(300);

/// The client's address, and a hash of the whole call (which begins with the transaction id).
type Key = (IpAddr, u64);
type Reply = Arc<OnceCell<Option<Vec<u8>>>>;

#[derive(Debug, Default)]
pub(super) struct Replies {
    hasher: RandomState,
    known: Mutex<Known>,
}

#[derive(Debug, Default)]
struct Known {
    replies: HashMap<Key, Reply>,
    /// Oldest first.
    order: VecDeque<(Key, Instant)>,
}

impl Replies {
    /// The reply to a call that must not be carried out twice: to be made now, or made already.
    /// `None` for a call that does no harm when repeated.
    pub(super) fn of(&self, client: IpAddr, record: &[u8]) -> Option<Reply> {
        if !once_only(record) {
            return None;
        }
        let key = (client, self.hasher.hash_one(record));
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(PoisonError::into_inner);
        while let Some(&(old, since)) = known.order.front()
            && (known.order.len() >= MAX_REPLIES || now - since > KEPT)
        {
            known.order.pop_front();
            known.replies.remove(&old);
        }
        if let Some(reply) = known.replies.get(&key) {
            return Some(Arc::clone(reply));
        }
        let reply = Reply::default();
        known.replies.insert(key, Arc::clone(&reply));
        known.order.push_back((key, now));
        Some(reply)
    }
}

/// Whether repeating the call could change its answer.
fn once_only(record: &[u8]) -> bool {
    use NFS_PROGRAM as P;
    // xid, type, RPC version, program, version, procedure
    let word = |index: usize| {
        let bytes = record.get(index * 4..)?.first_chunk()?;
        Some(u32::from_be_bytes(*bytes))
    };
    if word(3) != Some(nfs3::PROGRAM) {
        return false;
    }
    let procedure = word(5).and_then(|procedure| P::try_from(procedure).ok());
    matches!(
        procedure,
        Some(
            P::NFSPROC3_SETATTR
                | P::NFSPROC3_CREATE
                | P::NFSPROC3_MKDIR
                | P::NFSPROC3_SYMLINK
                | P::NFSPROC3_MKNOD
                | P::NFSPROC3_REMOVE
                | P::NFSPROC3_RMDIR
                | P::NFSPROC3_RENAME
                | P::NFSPROC3_LINK
        )
    )
}

#[cfg(test)]
mod tests {
    use super::*;

    fn record(xid: u32, procedure: u32) -> Vec<u8> {
        [xid, 0, 2, nfs3::PROGRAM, 3, procedure]
            .iter()
            .flat_map(|w| w.to_be_bytes())
            .collect()
    }

    #[test]
    fn only_the_same_call_of_the_same_client_is_a_repetition() {
        let replies = Replies::default();
        let (a, b) = (IpAddr::from([127, 0, 0, 1]), IpAddr::from([10, 0, 0, 1]));
        let mkdir = replies.of(a, &record(1, 9)).unwrap();
        mkdir.set(Some(vec![7])).unwrap();
        assert_eq!(
            replies.of(a, &record(1, 9)).unwrap().get(),
            Some(&Some(vec![7]))
        );
        assert_eq!(replies.of(b, &record(1, 9)).unwrap().get(), None);
        assert_eq!(replies.of(a, &record(2, 9)).unwrap().get(), None);
        assert!(
            replies.of(a, &record(1, 1)).is_none(),
            "GETATTR may be repeated"
        );
        assert!(replies.of(a, &[]).is_none());
    }

    #[test]
    fn the_memory_is_bounded() {
        let replies = Replies::default();
        let client = IpAddr::from([127, 0, 0, 1]);
        for xid in 0..3_000 {
            replies.of(client, &record(xid, 12)).unwrap();
        }
        let known = replies.known.lock().unwrap();
        assert_eq!(
            (known.replies.len(), known.order.len()),
            (MAX_REPLIES, MAX_REPLIES)
        );
    }
}
