//! The server in memory with calls that are carried out at once, for tests of what hosts do in time.

use std::sync::{Arc, Mutex, MutexGuard};

use nfs3_types::nfs3::{NFS_PROGRAM, Nfs3Result, READDIRPLUS3res};
use nfs3_types::xdr_codec::{Pack, Unpack};

use super::disk::Disk;
use super::server::{self, Call};
use super::{Start, world};
use crate::volume::{Record, VolumeName};
use nfs::admin::{Admin, simulated};

/// A home share.
#[derive(Debug, Clone)]
pub(in crate::driver) struct AtOnce(Arc<Mutex<State>>);

#[derive(Debug)]
struct State {
    disk: Disk,
    /// What listings leave out, and whether one has.
    left_out: Option<(String, bool)>,
    /// What another host moves right after the next listing: from where, and to where.
    moves: Vec<[&'static str; 2]>,
}

#[derive(Debug)]
struct Link {
    host: usize,
    share: AtOnce,
}

impl AtOnce {
    /// With a volume `db`. Not within a runtime.
    pub(in crate::driver) fn with_an_exclusive_volume() -> Self {
        let dir = tempfile::tempdir().unwrap();
        let disk = world::prepare(Start::Exclusive, dir.path());
        Self(Arc::new(Mutex::new(State {
            disk,
            left_out: None,
            moves: Vec::new(),
        })))
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.0.lock().unwrap()
    }

    /// Right after the next listing another host moves these.
    pub(in crate::driver) fn move_after_a_listing(&self, moves: &[[&'static str; 2]]) {
        self.state().moves = moves.to_vec();
    }

    pub(in crate::driver) fn is_there(&self, path: &str) -> bool {
        self.state().disk.at(path).is_some()
    }

    /// From now on no listing shows this name.
    pub(in crate::driver) fn leave_out(&self, name: &str) {
        self.state().left_out = Some((name.to_owned(), false));
    }

    pub(in crate::driver) fn has_left_out(&self) -> bool {
        matches!(self.state().left_out, Some((_, true)))
    }

    /// The way of a host to it.
    pub(in crate::driver) fn admin(&self, host: usize) -> Admin {
        let share = self.clone();
        let link = Arc::new(Link { host, share });
        simulated::admin("nas:/export".parse().unwrap(), link, server::root())
    }

    pub(in crate::driver) fn record(&self, name: &str) -> Record {
        let state = self.state();
        let json = state
            .disk
            .file(&format!(".nfsvol/volumes/{name}/record.json"));
        let name: VolumeName = name.parse().unwrap();
        Record::from_json(&name, json.unwrap()).unwrap()
    }
}

impl simulated::Server for Link {
    fn call(&self, procedure: u32, args: Vec<u8>, walks: bool) -> simulated::Reply<'_> {
        let call = Call {
            host: self.host,
            procedure,
            args,
            walks,
        };
        let mut state = self.share.state();
        let reply = call.carry_out(&mut state.disk);
        if procedure != NFS_PROGRAM::NFSPROC3_READDIRPLUS as u32 {
            return Box::pin(std::future::ready(Ok(reply)));
        }
        for [from, to] in std::mem::take(&mut state.moves) {
            state.disk.move_path(from, to);
        }
        let reply = match &mut state.left_out {
            Some((name, has)) => without(name, has, &reply),
            None => reply,
        };
        Box::pin(std::future::ready(Ok(reply)))
    }

    fn dials(&self) -> u64 {
        0
    }
}

/// A listing without an entry.
fn without(name: &str, has: &mut bool, reply: &[u8]) -> Vec<u8> {
    let (mut result, _) = READDIRPLUS3res::unpack(&mut &*reply).unwrap();
    if let Nfs3Result::Ok(listing) = &mut result {
        let before = listing.reply.entries.0.len();
        let entries = &mut listing.reply.entries.0;
        entries.retain(|entry| entry.name.as_ref() != name.as_bytes());
        *has |= entries.len() < before;
    }
    let mut out = Vec::new();
    result.pack(&mut out).unwrap();
    out
}
