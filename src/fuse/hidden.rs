//! Files that were deleted while open, and live on under a hidden name until they are closed.
//!
//! Their names are also kept in a file of the host, beside the worker's lock and of its name.
//! A
//! worker that is killed takes its open files with it; the next worker of the volume removes what
//! it left. Without that, and for other hosts' leftovers, the rule is the kernel client's: a
//! `.nfs…` file older than any program that may have it open can be removed.

use std::io;
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use crate::nfs::rpc::nfs3::{FileHandle, Nfs3};
use crate::nfs::rpc::{Cred, NfsError};

use crate::attendant;

const SUFFIX: &str = ".hidden";

/// A hidden file, and who deleted it.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
struct Entry {
    dir: Vec<u8>,
    name: Vec<u8>,
    uid: u32,
    gid: u32,
}

impl Entry {
    fn new(dir: &FileHandle, name: &[u8], cred: &Cred) -> Self {
        Self {
            dir: dir.as_bytes().to_vec(),
            name: name.to_vec(),
            uid: cred.uid,
            gid: cred.gid,
        }
    }
}

#[derive(Debug)]
pub(super) struct Hidden {
    file: PathBuf,
    entries: Mutex<Vec<Entry>>,
}

impl Hidden {
    /// `worker` is the name of this attendant.
    pub(super) fn new(run_dir: &Path, worker: &str) -> Self {
        Self {
            file: run_dir.join(format!("{worker}{SUFFIX}")),
            entries: Mutex::default(),
        }
    }

    /// A file is about to get this name.
    pub(super) fn add(&self, dir: &FileHandle, name: &[u8], cred: &Cred) {
        let mut entries = self.entries.lock().unwrap_or_else(|e| e.into_inner());
        entries.push(Entry::new(dir, name, cred));
        self.save(&entries);
    }

    /// The name is gone.
    pub(super) fn remove(&self, dir: &FileHandle, name: &[u8]) {
        let mut entries = self.entries.lock().unwrap_or_else(|e| e.into_inner());
        entries.retain(|entry| entry.dir != dir.as_bytes() || entry.name != name);
        self.save(&entries);
    }

    /// There are few at a time, and they live in the page cache of a local directory.
    fn save(&self, entries: &[Entry]) {
        let saved = if entries.is_empty() {
            std::fs::remove_file(&self.file)
        } else {
            serde_json::to_vec(entries)
                .map_err(io::Error::from)
                .and_then(|text| std::fs::write(&self.file, text))
        };
        if let Err(error) = saved {
            tracing::warn!("{}: {error}", self.file.display());
        }
    }
}

/// Removes what workers that are dead have left behind.
pub(super) async fn clean(run_dir: &Path, nfs: &Nfs3) {
    let Ok(found) = std::fs::read_dir(run_dir) else {
        return;
    };
    for file in found.flatten() {
        let name = file.file_name();
        let worker = name.to_str().and_then(|name| name.strip_suffix(SUFFIX));
        let Some(worker) = worker.filter(|worker| !attendant::lives(run_dir, worker)) else {
            continue;
        };
        let entries: Vec<Entry> = std::fs::read(file.path())
            .ok()
            .and_then(|text| serde_json::from_slice(&text).ok())
            .unwrap_or_default();
        let mut left = false;
        for entry in &entries {
            let Some(dir) = FileHandle::new(&entry.dir) else {
                continue;
            };
            let cred = Cred::new(entry.uid, entry.gid);
            match nfs.remove(&cred, &dir, &entry.name).await {
                Ok(_) => {}
                Err(error) if is_gone(&error) => {}
                Err(error) => {
                    tracing::warn!("a file that worker {worker} left behind stays: {error}");
                    left = true;
                }
            }
        }
        if !left {
            let _ = std::fs::remove_file(file.path());
        }
    }
}

fn is_gone(error: &NfsError) -> bool {
    matches!(error.errno(), libc::ENOENT | libc::ESTALE)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn the_file_names_what_is_hidden_and_goes_with_the_last() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = Hidden::new(dir.path(), "worker");
        let handle = FileHandle::new(b"handle").unwrap();
        hidden.add(&handle, b".nfs1\xff", &Cred::new(5, 6));
        hidden.add(&handle, b".nfs2", &Cred::root());
        hidden.remove(&handle, b".nfs2");
        let saved: Vec<Entry> =
            serde_json::from_slice(&std::fs::read(&hidden.file).unwrap()).unwrap();
        assert_eq!(saved, [Entry::new(&handle, b".nfs1\xff", &Cred::new(5, 6))]);
        hidden.remove(&handle, b".nfs1\xff");
        assert!(!hidden.file.exists());
    }
}
