//! Random operations on a mounted volume and on a local directory: same results, same errnos.
//!
//! Left out is what NFS does not promise: that a directory with a deleted but open file in it can
//! be removed, and the link count of such a file.

use std::ffi::{CString, OsStr};
use std::fmt;
use std::fs::{self, File, OpenOptions};
use std::io;
use std::os::unix::ffi::OsStrExt;
use std::os::unix::fs::{FileExt, FileTypeExt, MetadataExt, OpenOptionsExt, PermissionsExt};
use std::path::{Path, PathBuf};

use lab::{Lab, Result};
use libtest_mimic::Trial;
use proptest::prelude::*;
use proptest::test_runner::{Config, TestRunner};
use rustix::fs::{CWD, RenameFlags};

use crate::{Host, fuse_trial, nas};

/// Sequences tried, each with up to [`STEPS`] operations.
const CASES: u32 = 60;
const STEPS: usize = 60;
/// Files that are kept open across operations.
const SLOTS: usize = 3;

pub(crate) fn trials() -> Vec<Trial> {
    vec![
        fuse_trial("model_with_caches", |lab| model(lab, "model", "")),
        fuse_trial("model_without_caches", |lab| {
            model(lab, "modelnoac", "noac")
        }),
        fuse_trial("model_with_small_calls", |lab| {
            model(lab, "modelsmall", "rsize=4096,wsize=4096")
        }),
    ]
}

fn model(lab: &'static Lab, name: &str, options: &str) -> Result {
    let host = Host::mount(nas(lab)?, name, options)?;
    let local = tempfile::tempdir()?;
    let mut runner = TestRunner::new(Config {
        cases: crate::guests::share_of(CASES),
        failure_persistence: None,
        max_shrink_iters: 200,
        ..Config::default()
    });
    let case = std::cell::Cell::new(0);
    runner
        .run(&prop::collection::vec(step(), 1..STEPS), |steps| {
            case.set(case.get() + 1);
            let name = format!("case{}", case.get());
            let mut theirs = Side::new(host.join(&name))?;
            let mut ours = Side::new(local.path().join(&name))?;
            for (index, step) in steps.iter().enumerate() {
                if ours.hides_files() && matters(step) {
                    continue;
                }
                let (expected, got) = (ours.apply(step), theirs.apply(step));
                prop_assert_eq!(got, expected, "step {} {:?}", index, step);
            }
            ours.close();
            theirs.close();
            prop_assert_eq!(theirs.tree(), ours.tree());
            Ok(())
        })
        .map_err(|error| anyhow::anyhow!("{error}"))
}

/// Whether an operation's result may depend on deleted files that are still open.
fn matters(step: &Step) -> bool {
    matches!(step, Step::Rmdir(_) | Step::Rename(..) | Step::Stat(_))
}

#[derive(Debug, Clone)]
enum Step {
    Create {
        at: Place,
        exclusive: bool,
        fill: u8,
    },
    Open {
        at: Place,
        slot: usize,
        append: bool,
        truncate: bool,
    },
    Close(usize),
    Write {
        slot: usize,
        offset: u64,
        length: usize,
        fill: u8,
    },
    Read {
        slot: usize,
        offset: u64,
        length: usize,
    },
    SlotStat(usize),
    SlotTruncate {
        slot: usize,
        size: u64,
    },
    Sync(usize),
    Overwrite {
        at: Place,
        length: usize,
        fill: u8,
    },
    Contents(Place),
    Truncate {
        at: Place,
        size: u64,
    },
    Mkdir(Place),
    Rmdir(Place),
    Unlink(Place),
    Rename(Place, Place, bool),
    Link(Place, Place),
    Symlink(Place, Place),
    Readlink(Place),
    Mkfifo(Place),
    Chmod(Place, u32),
    Chown(Place, u32),
    Utime(Place, u32, u32),
    Stat(Place),
    List(Place),
}

/// A path of one or two components out of few names, so that operations meet.
#[derive(Debug, Clone)]
struct Place(Vec<u8>, Option<Vec<u8>>);

impl Place {
    fn below(&self, root: &Path) -> PathBuf {
        let mut path = root.join(OsStr::from_bytes(&self.0));
        if let Some(name) = &self.1 {
            path.push(OsStr::from_bytes(name));
        }
        path
    }
}

fn place() -> impl Strategy<Value = Place> {
    let name = || {
        prop_oneof![
            Just(b"a".to_vec()),
            Just(b"b".to_vec()),
            Just(b"\xff\xfe \n'".to_vec()),
            Just(vec![b'n'; 255]),
        ]
    };
    prop_oneof![
        3 => name().prop_map(|first| Place(first, None)),
        2 => (name(), name()).prop_map(|(first, second)| Place(first, Some(second))),
        1 => Just(Place(vec![b'm'; 256], None)),
    ]
}

fn step() -> impl Strategy<Value = Step> {
    let slot = || 0..SLOTS;
    let offset = || prop_oneof![0u64..10_000, Just(5 << 30), 1_000_000u64..1_100_000];
    let length = || prop_oneof![0usize..200, 4000usize..9000, Just(300_000)];
    prop_oneof![
        4 => (place(), any::<bool>(), any::<u8>())
            .prop_map(|(at, exclusive, fill)| Step::Create { at, exclusive, fill }),
        4 => (place(), slot(), prop::bool::weighted(0.3), prop::bool::weighted(0.2))
            .prop_map(|(at, slot, append, truncate)| Step::Open { at, slot, append, truncate }),
        1 => slot().prop_map(Step::Close),
        6 => (slot(), offset(), length(), any::<u8>())
            .prop_map(|(slot, offset, length, fill)| Step::Write { slot, offset, length, fill }),
        4 => (slot(), offset(), length())
            .prop_map(|(slot, offset, length)| Step::Read { slot, offset, length }),
        2 => slot().prop_map(Step::SlotStat),
        1 => (slot(), offset()).prop_map(|(slot, size)| Step::SlotTruncate { slot, size }),
        1 => slot().prop_map(Step::Sync),
        2 => (place(), length(), any::<u8>())
            .prop_map(|(at, length, fill)| Step::Overwrite { at, length, fill }),
        2 => place().prop_map(Step::Contents),
        1 => (place(), offset()).prop_map(|(at, size)| Step::Truncate { at, size }),
        3 => place().prop_map(Step::Mkdir),
        1 => place().prop_map(Step::Rmdir),
        3 => place().prop_map(Step::Unlink),
        3 => (place(), place(), prop::bool::weighted(0.3))
            .prop_map(|(from, to, keep)| Step::Rename(from, to, keep)),
        2 => (place(), place()).prop_map(|(from, to)| Step::Link(from, to)),
        1 => (place(), place()).prop_map(|(target, at)| Step::Symlink(target, at)),
        1 => place().prop_map(Step::Readlink),
        1 => place().prop_map(Step::Mkfifo),
        1 => (place(), 0u32..0o1000).prop_map(|(at, mode)| Step::Chmod(at, mode | 0o600)),
        1 => (place(), 0u32..3).prop_map(|(at, id)| Step::Chown(at, id)),
        1 => (place(), any::<u32>(), 0u32..1_000_000_000)
            .prop_map(|(at, secs, nanos)| Step::Utime(at, secs >> 1, nanos)),
        2 => place().prop_map(Step::Stat),
        1 => place().prop_map(Step::List),
    ]
}

/// What an operation showed to the program.
#[derive(PartialEq, Eq)]
enum Seen {
    Nothing,
    Errno(i32),
    Bytes(Vec<u8>),
    Names(Vec<Vec<u8>>),
    Stat(Vec<u64>),
}

impl fmt::Debug for Seen {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Nothing => f.write_str("nothing"),
            Self::Errno(errno) => write!(f, "{}", io::Error::from_raw_os_error(*errno)),
            Self::Bytes(bytes) => {
                let head = &bytes[..bytes.len().min(16)];
                let sum = bytes
                    .iter()
                    .fold(0u64, |s, b| s.rotate_left(5) ^ u64::from(*b));
                write!(f, "{} bytes {head:?} sum {sum:x}", bytes.len())
            }
            Self::Names(names) => write!(f, "{names:?}"),
            Self::Stat(fields) => write!(f, "{fields:?}"),
        }
    }
}

fn seen(result: io::Result<Seen>) -> Seen {
    result.unwrap_or_else(|error| match error.raw_os_error() {
        // Both say that a directory is not empty; servers differ.
        Some(libc::EEXIST) => Seen::Errno(libc::ENOTEMPTY),
        other => Seen::Errno(other.unwrap_or(0)),
    })
}

struct Side {
    root: PathBuf,
    slots: [Option<File>; SLOTS],
    /// A file of a slot may have been deleted.
    deleted: bool,
}

impl Side {
    fn new(root: PathBuf) -> std::result::Result<Self, TestCaseError> {
        fs::create_dir(&root)
            .map_err(|e| TestCaseError::fail(format!("{}: {e}", root.display())))?;
        Ok(Self {
            root,
            slots: [const { None }; SLOTS],
            deleted: false,
        })
    }

    fn close(&mut self) {
        self.slots = [const { None }; SLOTS];
        // A deleted file is removed behind the close.
        for _ in 0..200 {
            let left = walk(&self.root).iter().any(|path| is_hidden(path));
            if !left {
                break;
            }
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
    }

    fn hides_files(&self) -> bool {
        self.deleted && self.slots.iter().any(Option::is_some)
    }

    fn apply(&mut self, step: &Step) -> Seen {
        seen(self.attempt(step))
    }

    fn attempt(&mut self, step: &Step) -> io::Result<Seen> {
        let nothing = |()| Seen::Nothing;
        let root = self.root.clone();
        let path = |place: &Place| place.below(&root);
        let slots = &mut self.slots;
        let slot = |index: usize| {
            slots[index]
                .as_ref()
                .ok_or_else(|| io::Error::from_raw_os_error(libc::EBADF))
        };
        match step {
            Step::Create {
                at,
                exclusive,
                fill,
            } => {
                let mut options = OpenOptions::new();
                options.write(true).mode(0o640);
                if *exclusive {
                    options.create_new(true)
                } else {
                    options.create(true)
                };
                let file = options.custom_flags(libc::O_NONBLOCK).open(path(at))?;
                refuse_pipe(&file)?;
                file.write_all_at(&[*fill; 100], 0).map(nothing)
            }
            Step::Open {
                at,
                slot,
                append,
                truncate,
            } => {
                let mut options = OpenOptions::new();
                options.read(true).write(!append).append(*append);
                options
                    .truncate(*truncate && !append)
                    .custom_flags(libc::O_NONBLOCK);
                let file = options.open(path(at))?;
                refuse_pipe(&file)?;
                self.slots[*slot] = Some(file);
                Ok(Seen::Nothing)
            }
            Step::Close(index) => {
                self.slots[*index] = None;
                Ok(Seen::Nothing)
            }
            Step::Write {
                slot: index,
                offset,
                length,
                fill,
            } => {
                let count = (0..=u8::MAX).cycle().take(*length);
                let bytes: Vec<u8> = count.map(|i| i.wrapping_add(*fill)).collect();
                slot(*index)?.write_all_at(&bytes, *offset).map(nothing)
            }
            Step::Read {
                slot: index,
                offset,
                length,
            } => {
                let mut bytes = vec![0; *length];
                let mut done = 0;
                while done < *length {
                    match slot(*index)?.read_at(&mut bytes[done..], offset + done as u64)? {
                        0 => break,
                        n => done += n,
                    }
                }
                bytes.truncate(done);
                Ok(Seen::Bytes(bytes))
            }
            Step::SlotStat(index) => {
                let found = slot(*index)?.metadata()?;
                Ok(Seen::Stat(vec![found.size(), found.mode().into()]))
            }
            Step::SlotTruncate { slot: index, size } => slot(*index)?.set_len(*size).map(nothing),
            Step::Sync(index) => slot(*index)?.sync_all().map(nothing),
            Step::Overwrite { at, length, fill } => {
                let mut options = OpenOptions::new();
                let options = options
                    .write(true)
                    .truncate(true)
                    .custom_flags(libc::O_NONBLOCK);
                let file = options.open(path(at))?;
                refuse_pipe(&file)?;
                file.write_all_at(&vec![*fill; *length], 0).map(nothing)
            }
            Step::Contents(at) => {
                let mut options = OpenOptions::new();
                let file = options
                    .read(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(path(at))?;
                refuse_pipe(&file)?;
                let found = file.metadata()?;
                if found.size() > 10 << 20 {
                    return Ok(Seen::Stat(vec![found.size()]));
                }
                let mut bytes = Vec::new();
                io::Read::read_to_end(&mut &file, &mut bytes)?;
                Ok(Seen::Bytes(bytes))
            }
            Step::Truncate { at, size } => {
                let path = CString::new(path(at).as_os_str().as_bytes())?;
                let file = OpenOptions::new()
                    .write(true)
                    .custom_flags(libc::O_NONBLOCK)
                    .open(OsStr::from_bytes(path.as_bytes()))?;
                refuse_pipe(&file)?;
                file.set_len(*size).map(nothing)
            }
            Step::Mkdir(at) => fs::create_dir(path(at)).map(nothing),
            Step::Rmdir(at) => fs::remove_dir(path(at)).map(nothing),
            Step::Unlink(at) => {
                self.deleted = true;
                fs::remove_file(path(at)).map(nothing)
            }
            Step::Rename(from, to, keep) => {
                self.deleted = true;
                let flags = if *keep {
                    RenameFlags::NOREPLACE
                } else {
                    RenameFlags::empty()
                };
                rustix::fs::renameat_with(CWD, path(from), CWD, path(to), flags)?;
                Ok(Seen::Nothing)
            }
            Step::Link(from, to) => {
                rustix::fs::linkat(CWD, path(from), CWD, path(to), rustix::fs::AtFlags::empty())?;
                Ok(Seen::Nothing)
            }
            Step::Symlink(target, at) => {
                let target = OsStr::from_bytes(&target.0);
                std::os::unix::fs::symlink(target, path(at)).map(nothing)
            }
            Step::Readlink(at) => {
                let target = fs::read_link(path(at))?;
                Ok(Seen::Bytes(target.into_os_string().as_bytes().to_vec()))
            }
            Step::Mkfifo(at) => {
                let mode = rustix::fs::Mode::from_raw_mode(0o600);
                rustix::fs::mknodat(CWD, path(at), rustix::fs::FileType::Fifo, mode, 0)?;
                Ok(Seen::Nothing)
            }
            Step::Chmod(at, mode) => {
                // A directory without x for its owner only stops those who are not root.
                fs::set_permissions(path(at), fs::Permissions::from_mode(*mode)).map(nothing)
            }
            Step::Chown(at, id) => {
                std::os::unix::fs::lchown(path(at), Some(*id), Some(*id)).map(nothing)
            }
            Step::Utime(at, secs, nanos) => {
                let time = rustix::fs::Timespec {
                    tv_sec: (*secs).into(),
                    tv_nsec: (*nanos).into(),
                };
                let times = rustix::fs::Timestamps {
                    last_access: time,
                    last_modification: time,
                };
                rustix::fs::utimensat(CWD, path(at), &times, rustix::fs::AtFlags::empty())?;
                let found = fs::metadata(path(at))?;
                Ok(Seen::Stat(vec![
                    found.mtime().cast_unsigned(),
                    found.mtime_nsec().cast_unsigned(),
                ]))
            }
            Step::Stat(at) => stat(&path(at)),
            Step::List(at) => list(&path(at)),
        }
    }

    /// Everything that is there, with contents.
    fn tree(&self) -> Vec<(PathBuf, Seen, Seen)> {
        walk(&self.root)
            .into_iter()
            .map(|path| {
                let stat = seen(stat(&path));
                let kind = fs::symlink_metadata(&path).map(|m| m.file_type());
                let content = match kind {
                    Ok(kind) if kind.is_file() => seen(big_or_bytes(&path)),
                    Ok(kind) if kind.is_symlink() => seen(
                        fs::read_link(&path)
                            .map(|t| Seen::Bytes(t.as_os_str().as_bytes().to_vec())),
                    ),
                    _ => Seen::Nothing,
                };
                let name = path
                    .strip_prefix(&self.root)
                    .map(Path::to_owned)
                    .unwrap_or_default();
                (name, stat, content)
            })
            .collect()
    }
}

/// Opening a pipe works on both sides, and nothing after that is worth comparing.
fn refuse_pipe(file: &File) -> io::Result<()> {
    if file.metadata()?.file_type().is_fifo() {
        return Err(io::Error::from_raw_os_error(libc::ESPIPE));
    }
    Ok(())
}

fn is_hidden(path: &Path) -> bool {
    path.file_name()
        .is_some_and(|name| name.as_bytes().starts_with(b".nfs"))
}

fn walk(root: &Path) -> Vec<PathBuf> {
    let mut found = Vec::new();
    let mut open = vec![root.to_owned()];
    while let Some(dir) = open.pop() {
        for entry in fs::read_dir(&dir).into_iter().flatten().flatten() {
            let path = entry.path();
            if entry.file_type().is_ok_and(|kind| kind.is_dir()) {
                open.push(path.clone());
            }
            found.push(path);
        }
    }
    found.sort();
    found
}

fn big_or_bytes(path: &Path) -> io::Result<Seen> {
    let size = fs::metadata(path)?.size();
    if size > 10 << 20 {
        // A sparse file: its ends.
        let file = File::open(path)?;
        let mut bytes = vec![0; 20_000];
        let head = file.read_at(&mut bytes[..10_000], 0)?;
        let tail = file.read_at(&mut bytes[head..], size - 5000)?;
        bytes.truncate(head + tail);
        return Ok(Seen::Bytes(bytes));
    }
    fs::read(path).map(Seen::Bytes)
}

fn stat(path: &Path) -> io::Result<Seen> {
    let found = fs::symlink_metadata(path)?;
    let directory = found.is_dir();
    Ok(Seen::Stat(vec![
        found.mode().into(),
        found.uid().into(),
        found.gid().into(),
        if directory { 0 } else { found.size() },
        if directory { 0 } else { found.nlink() },
    ]))
}

fn list(path: &Path) -> io::Result<Seen> {
    let mut names = Vec::new();
    for entry in fs::read_dir(path)? {
        let name = entry?.file_name().as_bytes().to_vec();
        if !name.starts_with(b".nfs") {
            names.push(name);
        }
    }
    names.sort();
    Ok(Seen::Names(names))
}
