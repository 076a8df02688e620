//! The durable local copy: one file a record in a directory of the state directory, and all of
//! them in memory.
//!
//! Invariants: memory never shows a record that the disk does not hold, a file is replaced whole
//! (temporary file, fsync, rename), and a file that cannot be read keeps its volume from being
//! called absent. A stamp on disk may be an older one; then the record is read once more.

use std::collections::HashMap;
use std::fs;
use std::io;
use std::path::{Path, PathBuf};
use std::sync::{Arc, Mutex, PoisonError, RwLock};

use serde::{Deserialize, Serialize};

use crate::mutant::{self, Mutant};
use crate::sys::files::write_durably;
use crate::volume::{Record, VolumeName};
use nfs::admin::{Attr, ServerTime};

/// How a volume's directory in the catalog looked when its record was read.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Stamp {
    fileid: u64,
    mtime: ServerTime,
}

impl Stamp {
    pub(super) fn fileid(self) -> u64 {
        self.fileid
    }
}

impl From<&Attr> for Stamp {
    fn from(attr: &Attr) -> Self {
        Self {
            fileid: attr.fileid,
            mtime: attr.mtime,
        }
    }
}

/// A record and, when it is a copy from the home share, the stamp of what it was read from.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(super) struct Copy {
    pub(super) record: Arc<Record>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub(super) stamp: Option<Stamp>,
}

/// The records in one directory.
#[derive(Debug)]
pub(super) struct LocalCopy {
    dir: PathBuf,
    known: RwLock<Known>,
    /// Held while a file and what is known of it change together: a call and a poll may have the
    /// same record to write.
    writing: Mutex<()>,
}

#[derive(Debug, Clone, Default)]
struct Known {
    copies: HashMap<VolumeName, Copy>,
    /// Names whose file could not be read: neither here nor absent.
    unreadable: HashMap<VolumeName, String>,
}

impl LocalCopy {
    /// Reads every record in `dir`, which is made if it is absent.
    ///
    /// # Errors
    /// When the directory cannot be made or listed. A single unreadable file is logged and its
    /// volume is then known as unreadable.
    pub(super) fn open(dir: &Path) -> io::Result<Self> {
        fs::create_dir_all(dir)?;
        let mut known = Known::default();
        for entry in fs::read_dir(dir)? {
            let entry = entry?;
            let file = entry.file_name();
            let Some(stem) = file.to_str().and_then(|f| f.strip_suffix(".json")) else {
                continue;
            };
            let Ok(name) = stem.parse::<VolumeName>() else {
                continue;
            };
            let read = fs::read(entry.path())
                .and_then(|json| Ok(serde_json::from_slice::<Copy>(&json)?))
                .map_err(|e| e.to_string());
            let error = match read {
                Ok(copy) if copy.record.name == name => {
                    known.copies.insert(name, copy);
                    continue;
                }
                Ok(copy) => format!("it names volume {}", copy.record.name),
                Err(error) => error,
            };
            tracing::error!(volume = %name, file = %entry.path().display(), error, "record unreadable");
            known.unreadable.insert(name, error);
        }
        Ok(Self {
            dir: dir.to_owned(),
            known: known.into(),
            writing: Mutex::default(),
        })
    }

    /// The same records once more, for a test.
    #[cfg(test)]
    pub(super) fn copy(&self) -> Self {
        Self {
            dir: self.dir.clone(),
            known: self.known.read().unwrap().clone().into(),
            writing: Mutex::default(),
        }
    }

    pub(super) fn get(&self, name: &VolumeName) -> Option<Copy> {
        self.known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .copies
            .get(name)
            .cloned()
    }

    pub(super) fn is_unreadable(&self, name: &VolumeName) -> bool {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.unreadable.contains_key(name)
    }

    pub(super) fn all(&self) -> Vec<Copy> {
        let known = self.known.read().unwrap_or_else(PoisonError::into_inner);
        known.copies.values().cloned().collect()
    }

    pub(super) fn len(&self) -> usize {
        self.known
            .read()
            .unwrap_or_else(PoisonError::into_inner)
            .copies
            .len()
    }

    /// Writes a record, if it is a new one or from another directory; it is durable when this
    /// returns. Blocks: call it off the async threads.
    ///
    /// # Errors
    /// Any error of the file system (a full disk: ENOSPC); the old record then still stands.
    pub(super) fn put(&self, copy: Copy) -> io::Result<()> {
        let name = copy.record.name.clone();
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        let fileid = |copy: &Copy| copy.stamp.map(Stamp::fileid);
        // Its times change with each hold, which is not worth a write.
        let same = |old: Copy| {
            let same_directory = copy.stamp.is_none() || fileid(&old) == fileid(&copy);
            old.record == copy.record
                && (same_directory || mutant::is_on(Mutant::DirectoriesAreForgotten))
        };
        if !self.get(&name).is_some_and(same) {
            write_durably(&self.file(&name), &serde_json::to_vec_pretty(&copy)?)?;
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.unreadable.remove(&name);
        known.copies.insert(name, copy);
        Ok(())
    }

    /// Forgets a record. Blocks.
    ///
    /// # Errors
    /// Any error of the file system but ENOENT; the record is then still known.
    pub(super) fn remove(&self, name: &VolumeName) -> io::Result<()> {
        self.remove_if(name, |_| true).map(drop)
    }

    /// Forgets a record if what is known of it now is what is asked for; whether it did.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub(super) fn remove_if(
        &self,
        name: &VolumeName,
        is_it: impl FnOnce(Option<&Copy>) -> bool,
    ) -> io::Result<bool> {
        let _alone = self.writing.lock().unwrap_or_else(PoisonError::into_inner);
        if !is_it(self.get(name).as_ref()) {
            return Ok(false);
        }
        match fs::remove_file(self.file(name)) {
            Err(e) if e.kind() != io::ErrorKind::NotFound => return Err(e),
            _ => {}
        }
        let mut known = self.known.write().unwrap_or_else(PoisonError::into_inner);
        known.copies.remove(name);
        known.unreadable.remove(name);
        Ok(true)
    }

    fn file(&self, name: &VolumeName) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::record::tests::record;

    fn copy(name: &str) -> Copy {
        Copy {
            record: record(name).into(),
            stamp: None,
        }
    }

    #[test]
    fn records_survive_a_restart() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalCopy::open(dir.path()).unwrap();
        local.put(copy("db")).unwrap();
        local.put(copy("web")).unwrap();
        local.remove(&"web".parse().unwrap()).unwrap();
        let again = LocalCopy::open(dir.path()).unwrap();
        assert_eq!(again.all(), [copy("db")]);
    }

    #[test]
    fn a_damaged_file_is_not_an_absent_volume() {
        let dir = tempfile::tempdir().unwrap();
        fs::write(dir.path().join("db.json"), "{").unwrap();
        let local = LocalCopy::open(dir.path()).unwrap();
        let name: VolumeName = "db".parse().unwrap();
        assert!(local.get(&name).is_none() && local.is_unreadable(&name));
        local.put(copy("db")).unwrap();
        assert!(local.get(&name).is_some() && !local.is_unreadable(&name));
    }

    #[test]
    fn one_record_may_be_written_by_many_at_once() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalCopy::open(dir.path()).unwrap();
        std::thread::scope(|scope| {
            for writer in 0..4 {
                let local = &local;
                scope.spawn(move || {
                    for n in 0..50 {
                        let mut changed = record("db");
                        changed.created_by = format!("{writer}-{n}");
                        let record = changed.into();
                        local
                            .put(Copy {
                                record,
                                stamp: None,
                            })
                            .unwrap();
                    }
                });
            }
        });
        assert_eq!(LocalCopy::open(dir.path()).unwrap().all(), local.all());
    }

    #[test]
    fn a_write_that_fails_leaves_the_old_record() {
        let dir = tempfile::tempdir().unwrap();
        let local = LocalCopy::open(dir.path()).unwrap();
        local.put(copy("db")).unwrap();
        // A directory in the way of the temporary file stands for any failure to write.
        fs::create_dir(dir.path().join("db.json.tmp")).unwrap();
        let mut changed = record("db");
        changed.created_by = "other".to_owned();
        assert!(
            local
                .put(Copy {
                    record: changed.into(),
                    stamp: None
                })
                .is_err()
        );
        assert_eq!(local.all(), [copy("db")]);
        assert_eq!(LocalCopy::open(dir.path()).unwrap().all(), [copy("db")]);
    }
}
