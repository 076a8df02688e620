//! Files that were deleted while open, and live on under a hidden name until they are closed.
//!
//! Their names are also kept in a file of the host, beside the worker's lock and of its name: a
//! line for each name that is about to be, and one for each that is gone. A worker that is killed takes its open files with it; the next worker of the volume removes what
//! it left. Without that, and for other hosts' leftovers, the rule is the kernel client's: a
//! `.nfs…` file older than any program that may have it open can be removed.

use std::collections::HashMap;
use std::fs::File;
use std::io::{self, Write};
use std::path::{Path, PathBuf};
use std::sync::Mutex;

use serde::{Deserialize, Serialize};

use nfs::rpc::nfs3::{FileHandle, Nfs3};
use nfs::rpc::{Cred, NfsError};

use crate::attendant;

const SUFFIX: &str = ".hidden";

/// Lines of the file before it is written anew with what is left.
const LINES: usize = 4096;

/// A hidden file, and who deleted it.
#[derive(Debug, Clone, PartialEq, Eq, Hash, Serialize, Deserialize)]
struct Entry {
    dir: Vec<u8>,
    name: Vec<u8>,
    uid: u32,
    gid: u32,
    /// The name is gone again.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    gone: bool,
}

impl Entry {
    fn new(dir: &FileHandle, name: &[u8], cred: &Cred) -> Self {
        Self {
            dir: dir.as_bytes().to_vec(),
            name: name.to_vec(),
            uid: cred.uid,
            gid: cred.gid,
            gone: false,
        }
    }
}

#[derive(Debug)]
pub(super) struct Hidden {
    file: PathBuf,
    log: Mutex<Log>,
}

#[derive(Debug, Default)]
struct Log {
    entries: HashMap<(Vec<u8>, Vec<u8>), Entry>,
    lines: usize,
}

impl Hidden {
    /// `worker` is the name of this attendant.
    pub(super) fn new(run_dir: &Path, worker: &str) -> Self {
        Self {
            file: run_dir.join(format!("{worker}{SUFFIX}")),
            log: Mutex::default(),
        }
    }

    /// A file is about to get this name.
    pub(super) fn add(&self, dir: &FileHandle, name: &[u8], cred: &Cred) {
        let mut log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        let entry = Entry::new(dir, name, cred);
        let key = (entry.dir.clone(), entry.name.clone());
        let saved = self.append(&mut log, &entry);
        log.entries.insert(key, entry);
        self.noted(saved);
    }

    /// The name is gone.
    pub(super) fn remove(&self, dir: &FileHandle, name: &[u8]) {
        let mut log = self.log.lock().unwrap_or_else(|e| e.into_inner());
        let key = (dir.as_bytes().to_vec(), name.to_vec());
        let Some(mut entry) = log.entries.remove(&key) else {
            return;
        };
        entry.gone = true;
        let saved = if log.entries.is_empty() {
            log.lines = 0;
            std::fs::remove_file(&self.file)
        } else if log.lines >= LINES.max(2 * log.entries.len()) {
            log.lines = log.entries.len();
            let text: String = log.entries.values().map(line).collect();
            std::fs::write(&self.file, text)
        } else {
            self.append(&mut log, &entry)
        };
        self.noted(saved);
    }

    /// One line into the page cache, usually of a file system in memory.
    fn append(&self, log: &mut Log, entry: &Entry) -> io::Result<()> {
        log.lines += 1;
        File::options()
            .append(true)
            .create(true)
            .open(&self.file)?
            .write_all(line(entry).as_bytes())
    }

    fn noted(&self, saved: io::Result<()>) {
        if let Err(error) = saved {
            tracing::warn!("{}: {error}", self.file.display());
        }
    }
}

fn line(entry: &Entry) -> String {
    // Bytes and numbers, which JSON has.
    serde_json::to_string(entry).unwrap_or_default() + "\n"
}

/// What a file's lines leave; a worker of an earlier version has written one list.
fn parse(text: &str) -> Vec<Entry> {
    if let Ok(entries) = serde_json::from_str(text) {
        return entries;
    }
    let mut left: Vec<Entry> = Vec::new();
    for line in text.lines() {
        // The last line of a worker that was killed may be half a one: its name was never made.
        let Ok(entry) = serde_json::from_str::<Entry>(line) else {
            continue;
        };
        if entry.gone {
            left.retain(|known| (&known.dir, &known.name) != (&entry.dir, &entry.name));
        } else {
            left.push(entry);
        }
    }
    left
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
        let entries = parse(&std::fs::read_to_string(file.path()).unwrap_or_default());
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
        let text = std::fs::read_to_string(&hidden.file).unwrap();
        let left = [Entry::new(&handle, b".nfs1\xff", &Cred::new(5, 6))];
        assert_eq!(parse(&text), left);
        // Half a line, and the list of an earlier version.
        assert_eq!(parse(&format!("{text}{{\"dir\":[1")), left);
        assert_eq!(parse(&serde_json::to_string(&left).unwrap()), left);
        hidden.remove(&handle, b".nfs1\xff");
        assert!(!hidden.file.exists());
    }

    #[test]
    fn the_file_is_bounded_by_what_is_hidden() {
        let dir = tempfile::tempdir().unwrap();
        let hidden = Hidden::new(dir.path(), "worker");
        let handle = FileHandle::new(b"handle").unwrap();
        hidden.add(&handle, b".nfs1", &Cred::root());
        for _ in 0..2 * LINES {
            hidden.add(&handle, b".nfs2", &Cred::root());
            hidden.remove(&handle, b".nfs2");
        }
        let text = std::fs::read_to_string(&hidden.file).unwrap();
        assert!(text.lines().count() <= LINES + 1);
        assert_eq!(parse(&text), [Entry::new(&handle, b".nfs1", &Cred::root())]);
    }
}
