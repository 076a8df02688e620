//! Who on this host uses which volume, as Docker told it: a multiset of (volume, mount ID).
//!
//! Invariants: an attachment is on disk before Mount answers, so that kill -9 loses none; after a
//! reboot (another boot id) there are none. Docker repeats an ID for `docker cp` and after its own
//! crash, and may never send an Unmount, so counts are only hints: what the kernel's mount
//! namespaces show decides (see [`super::reconcile`]).

use std::collections::{HashMap, HashSet};
use std::fs;
use std::io;
use std::net::IpAddr;
use std::path::{Path, PathBuf};
use std::sync::{Mutex, MutexGuard, PoisonError};
use std::time::Duration;

use crate::mutant::{self, Mutant};
use crate::sys::files::{write_durably, write_whole};
use crate::sys::holders::Mark;
use crate::volume::{DataPath, VolumeName};
use nfs::address::Share;
use serde::{Deserialize, Serialize};

/// Counts the starts of the engine that were seen; in the state directory.
const EPOCH_FILE: &str = "engine-epoch";
/// The kernel's name for this boot (random(4)).
const BOOT_ID: &str = "/proc/sys/kernel/random/boot_id";

/// How a volume is mounted on this host.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct How {
    pub(crate) share: Share,
    pub(crate) data_path: DataPath,
    pub(crate) mountpoint: PathBuf,
    pub(crate) nfs_version: String,
    pub(crate) address: Option<IpAddr>,
    /// By what the volume is known in the mount namespaces that hold it.
    pub(crate) held: Mark,
    #[serde(default)]
    pub(crate) warnings: Vec<String>,
}

/// One Mount call that no Unmount has answered yet.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attachment {
    pub(crate) id: String,
    /// Seconds since 1970 by this host's clock, for people.
    pub(crate) since: u64,
    /// Seconds since the boot, by which its age is told: nobody sets that clock.
    #[serde(default)]
    pub(crate) at: u64,
    /// Which start of the engine it belongs to.
    pub(crate) epoch: u64,
}

/// A volume with attachments.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Attached {
    pub(crate) how: How,
    pub(crate) attachments: Vec<Attachment>,
}

#[derive(Debug, Serialize, Deserialize)]
struct File {
    boot_id: String,
    volume: VolumeName,
    #[serde(flatten)]
    held: Attached,
}

/// All attachments of this host.
#[derive(Debug)]
pub(crate) struct Attachments {
    dir: PathBuf,
    epoch_file: PathBuf,
    boot_id: String,
    state: Mutex<State>,
    /// Held while the epoch is written.
    starting: Mutex<()>,
}

#[derive(Debug, Default)]
struct State {
    epoch: u64,
    held: HashMap<VolumeName, Attached>,
}

impl Attachments {
    /// Reads the attachments of this boot; those of an earlier one are deleted.
    ///
    /// # Errors
    /// When the state directory cannot be made, read or written.
    pub(crate) fn open(state_dir: &Path) -> io::Result<Self> {
        let boot_id = fs::read_to_string(BOOT_ID)?.trim().to_owned();
        Self::open_at_boot(state_dir, boot_id)
    }

    fn open_at_boot(state_dir: &Path, boot_id: String) -> io::Result<Self> {
        let dir = state_dir.join("attachments");
        fs::create_dir_all(&dir)?;
        let epoch_file = state_dir.join(EPOCH_FILE);
        let epoch = fs::read_to_string(&epoch_file).ok();
        let epoch = epoch.and_then(|text| text.trim().parse().ok()).unwrap_or(0);
        let mut held = HashMap::new();
        for entry in fs::read_dir(&dir)? {
            let path = entry?.path();
            if path.extension().is_none_or(|e| e != "json") {
                continue;
            }
            // A file of an earlier boot may be damaged: it was not made durable.
            match serde_json::from_slice::<File>(&fs::read(&path)?) {
                Ok(file) if file.boot_id == boot_id => {
                    held.insert(file.volume, file.held);
                }
                read => {
                    tracing::info!(file = %path.display(), damaged = read.is_err(),
                        "attachments of an earlier boot forgotten");
                    fs::remove_file(&path)?;
                }
            }
        }
        Ok(Self {
            dir,
            epoch_file,
            boot_id,
            state: State { epoch, held }.into(),
            starting: Mutex::default(),
        })
    }

    /// The kernel's id of this boot.
    pub(crate) fn boot_id(&self) -> &str {
        &self.boot_id
    }

    fn state(&self) -> MutexGuard<'_, State> {
        self.state.lock().unwrap_or_else(PoisonError::into_inner)
    }

    /// The engine has (re)started: what comes from now on belongs to a new epoch.
    pub(crate) fn engine_started(&self) {
        let epoch = {
            let mut state = self.state();
            state.epoch += 1;
            state.epoch
        };
        let _all = mutant::is_on(Mutant::SlowDiskStopsAll).then(|| self.state());
        // Not under the lock, for which every Get and List would wait.
        let _alone = self.starting.lock().unwrap_or_else(PoisonError::into_inner);
        if let Err(error) = write_durably(&self.epoch_file, epoch.to_string().as_bytes()) {
            tracing::warn!(%error, "engine epoch not written; stale attachments may stay longer");
        }
    }

    pub(crate) fn get(&self, name: &VolumeName) -> Option<Attached> {
        self.state().held.get(name).cloned()
    }

    /// The volumes that are attached.
    pub(crate) fn names(&self) -> HashSet<VolumeName> {
        self.state().held.keys().cloned().collect()
    }

    pub(crate) fn all(&self) -> Vec<(VolumeName, Attached)> {
        self.state()
            .held
            .iter()
            .map(|(name, held)| (name.clone(), held.clone()))
            .collect()
    }

    /// The number of attachments of all volumes.
    pub(crate) fn count(&self) -> usize {
        self.state()
            .held
            .values()
            .map(|held| held.attachments.len())
            .sum()
    }

    /// Whether any volume of `share` is attached.
    pub(crate) fn uses(&self, share: &Share) -> bool {
        self.state()
            .held
            .values()
            .any(|held| held.how.share == *share)
    }

    pub(crate) fn epoch(&self) -> u64 {
        self.state().epoch
    }

    /// Adds one attachment; it is on disk when this returns. As all that changes a volume's, under
    /// the lock of the volume.
    ///
    /// # Errors
    /// Any error of the file system (a full disk: ENOSPC); then nothing was added.
    pub(crate) fn add(&self, name: &VolumeName, how: How, id: &str) -> io::Result<()> {
        let attachment = Attachment {
            id: id.to_owned(),
            since: chance::host_time(),
            at: since_boot(),
            epoch: self.epoch(),
        };
        let before = self.get(name).map(|held| held.attachments);
        let mut attachments = before.unwrap_or_default();
        attachments.push(attachment);
        let held = Attached { how, attachments };
        self.write(name, &held)?;
        self.state().held.insert(name.clone(), held);
        Ok(())
    }

    /// Takes the newest attachment of `id` away; how many the volume has left, or `None` when
    /// there was none of this ID.
    ///
    /// The newest, because an older one of the same ID may be of an engine that was killed: that
    /// one counts for nothing as soon as no process stands behind it.
    pub(crate) fn remove(&self, name: &VolumeName, id: &str) -> Option<usize> {
        let newest = {
            let state = self.state();
            let attachments = &state.held.get(name)?.attachments;
            attachments.iter().rposition(|a| a.id == id)?
        };
        let mut at = 0..;
        Some(self.retain(name, |_| at.next() != Some(newest)))
    }

    /// Keeps the attachments for which `keep` says so; how many are left.
    pub(crate) fn retain(&self, name: &VolumeName, keep: impl FnMut(&Attachment) -> bool) -> usize {
        let Some(mut held) = self.get(name) else {
            return 0;
        };
        let before = held.attachments.len();
        held.attachments.retain(keep);
        let left = held.attachments.len();
        // What cannot be written drifts upwards on disk only, which reconciling repairs.
        let written = match left {
            0 => fs::remove_file(self.file(name)),
            _ if left == before => Ok(()),
            _ => self.write(name, &held),
        };
        if let Err(error) = written {
            tracing::warn!(volume = %name, %error, "attachments not written");
        }
        let mut state = self.state();
        match left {
            0 => state.held.remove(name),
            _ => state.held.insert(name.clone(), held),
        };
        left
    }

    /// Writes a volume's file. Not under the lock of all, for which every Get and List would wait.
    fn write(&self, name: &VolumeName, held: &Attached) -> io::Result<()> {
        let _all = mutant::is_on(Mutant::SlowDiskStopsAll).then(|| self.state());
        let file = File {
            boot_id: self.boot_id.clone(),
            volume: name.clone(),
            held: held.clone(),
        };
        let json = serde_json::to_vec_pretty(&file)?;
        // They mean nothing after a crash of the host, so they need no fsync.
        tokio::task::block_in_place(|| write_whole(&self.file(name), &json))
    }

    fn file(&self, name: &VolumeName) -> PathBuf {
        self.dir.join(format!("{name}.json"))
    }
}

impl Attachment {
    /// How long ago it was made.
    pub(crate) fn age(&self) -> Duration {
        Duration::from_secs(since_boot().saturating_sub(self.at))
    }
}

/// Seconds since the boot, also while the host slept.
fn since_boot() -> u64 {
    chance::since_boot().as_secs()
}

#[cfg(test)]
mod tests {
    use std::sync::mpsc;
    use std::thread;

    use super::*;

    fn how() -> How {
        How {
            share: "nas:/export".parse().unwrap(),
            data_path: DataPath::Kernel,
            mountpoint: "/mnt/db".into(),
            nfs_version: "4.2".to_owned(),
            address: None,
            held: Mark::Source("nas:/export/db".to_owned()),
            warnings: Vec::new(),
        }
    }

    fn open(dir: &Path, boot: &str) -> Attachments {
        Attachments::open_at_boot(dir, boot.to_owned()).unwrap()
    }

    #[test]
    fn the_same_id_twice_counts_twice() {
        let dir = tempfile::tempdir().unwrap();
        let db: VolumeName = "db".parse().unwrap();
        let attachments = open(dir.path(), "a");
        for id in ["x", "x", "y"] {
            attachments.add(&db, how(), id).unwrap();
        }
        assert_eq!(attachments.remove(&db, "x"), Some(2));
        assert_eq!(attachments.remove(&db, "unknown"), None);
        assert_eq!(attachments.remove(&db, "y"), Some(1));
        assert_eq!(attachments.remove(&db, "x"), Some(0));
        assert_eq!(attachments.get(&db), None);
    }

    #[test]
    fn of_one_id_the_newest_is_taken_away() {
        let dir = tempfile::tempdir().unwrap();
        let db: VolumeName = "db".parse().unwrap();
        let attachments = open(dir.path(), "a");
        attachments.add(&db, how(), "x").unwrap();
        attachments.engine_started();
        attachments.add(&db, how(), "x").unwrap();
        assert_eq!(attachments.remove(&db, "x"), Some(1));
        assert_eq!(attachments.get(&db).unwrap().attachments[0].epoch, 0);
    }

    #[test]
    fn attachments_survive_a_restart_but_not_a_reboot() {
        let dir = tempfile::tempdir().unwrap();
        let db: VolumeName = "db".parse().unwrap();
        let first = open(dir.path(), "a");
        first.engine_started();
        first.add(&db, how(), "x").unwrap();
        let again = open(dir.path(), "a");
        assert_eq!(again.get(&db), first.get(&db));
        assert_eq!(again.epoch(), 1);
        assert_eq!(open(dir.path(), "b").count(), 0);
        assert_eq!(open(dir.path(), "a").count(), 0, "forgotten for good");
    }

    /// Whether calls for other volumes go on while the disk keeps one waiting that writes this file.
    fn goes_on_beside(file: &str, fault: bool, write: impl Fn(&Attachments) + Send) -> bool {
        let dir = tempfile::tempdir().unwrap();
        let attachments = &open(dir.path(), "a");
        // Whoever opens it to write waits until somebody reads.
        let slow = dir.path().join(file);
        let mode = rustix::fs::Mode::from_raw_mode(0o600);
        let fifo = rustix::fs::FileType::Fifo;
        rustix::fs::mknodat(rustix::fs::CWD, &slow, fifo, mode, 0).unwrap();
        let (started, starts) = mpsc::channel();
        let (answer, answered) = mpsc::channel();
        thread::scope(|scope| {
            scope.spawn(move || {
                let _back = fault.then(|| mutant::put_back(Mutant::SlowDiskStopsAll));
                started.send(rustix::thread::gettid()).unwrap();
                write(attachments);
            });
            let thread = starts.recv().unwrap().as_raw_nonzero();
            let stat = format!("/proc/self/task/{thread}/stat");
            // Sleeping: it has come to the file.
            let waits = || {
                crate::sys::proc::stat_fields(&fs::read_to_string(&stat).unwrap()).next()
                    == Some("S")
            };
            while !waits() {
                thread::yield_now();
            }
            scope.spawn(move || {
                attachments.get(&"web".parse().unwrap());
                answer.send(()).unwrap();
            });
            let goes_on = answered.recv_timeout(Duration::from_secs(2)).is_ok();
            fs::read(&slow).unwrap();
            goes_on
        })
    }

    #[test]
    fn a_slow_disk_keeps_no_other_call_waiting() {
        let db: VolumeName = "db".parse().unwrap();
        for fault in [false, true] {
            let added = goes_on_beside("attachments/db.json.tmp", fault, |attachments| {
                attachments.add(&db, how(), "x").unwrap();
            });
            let started = goes_on_beside("engine-epoch.tmp", fault, Attachments::engine_started);
            assert_eq!([added, started], [!fault; 2]);
        }
    }

    #[test]
    fn an_age_is_not_told_by_the_clock_that_people_set() {
        let attachment = |since, at| Attachment {
            id: "x".to_owned(),
            since,
            at,
            epoch: 0,
        };
        let at = since_boot();
        for since in [0, chance::host_time(), chance::host_time() + 86_400] {
            assert!(attachment(since, at).age() < Duration::from_secs(5));
            assert!(attachment(since, 0).age() >= Duration::from_secs(at));
        }
    }

    #[test]
    fn what_cannot_be_written_is_not_added() {
        let dir = tempfile::tempdir().unwrap();
        let db: VolumeName = "db".parse().unwrap();
        let attachments = open(dir.path(), "a");
        fs::create_dir(dir.path().join("attachments/db.json.tmp")).unwrap();
        assert!(attachments.add(&db, how(), "x").is_err());
        assert_eq!(attachments.count(), 0);
    }
}
