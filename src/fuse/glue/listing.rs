//! Answers to READDIR and READDIRPLUS.
//!
//! An entry of which the server tells no more than the name and the file id is passed on as such:
//! of unknown type and, in an answer to READDIRPLUS, without a node, which means that the kernel
//! looks it up by itself if a program asks for more. fuser has no words for that, so a run of such
//! entries is an answer of its own, put together and written here (`struct fuse_dirent` and
//! `fuse_direntplus` of linux/fuse.h).
//!
//! A made-up node would not do: the kernel puts it in the place of one that somebody else has
//! looked up, and takes away what is mounted there.

use std::ffi::OsStr;
use std::fs::File;
use std::io::Write;
use std::os::unix::ffi::OsStrExt;
use std::sync::Arc;
use std::time::Duration;

use fuser::{Generation, INodeNo, ReplyDirectory, ReplyDirectoryPlus};

use crate::fuse::dir::{Item, OpenDir};
use crate::fuse::error::{Errno, Result};
use crate::fuse::fs::Fs;
use nfs::rpc::nfs3::FileKind;

use super::reply::{file_attr, file_type};

/// Bytes of entries in an answer put together here: what the kernel asks for is not to be learnt
/// from fuser, and it never asks for less than a page.
const MOST: usize = 4096;
/// `struct fuse_out_header`, `fuse_entry_out` and `fuse_dirent`, in bytes.
const OUT_HEADER: usize = 16;
const ENTRY_OUT: usize = 128;
const DIRENT: usize = 24;

pub(super) enum Reply {
    Names(ReplyDirectory),
    Plus(ReplyDirectoryPlus),
}

impl Reply {
    pub(super) fn failed(self, errno: Errno) {
        let errno = fuser::Errno::from_i32(errno.0);
        match self {
            Self::Names(reply) => reply.error(errno),
            Self::Plus(reply) => reply.error(errno),
        }
    }
}

/// An answer that is being filled: by fuser, or here.
pub(super) struct Page {
    reply: Reply,
    /// Entries that fuser has.
    any: bool,
    bare: Bare,
    unique: u64,
    device: Arc<File>,
}

impl Page {
    pub(super) fn new(reply: Reply, unique: u64, device: Arc<File>) -> Self {
        let plus = matches!(reply, Reply::Plus(_));
        Self {
            reply,
            any: false,
            bare: Bare::new(plus),
            unique,
            device,
        }
    }

    /// Takes an entry, if there is room for it in this answer.
    pub(super) fn take(&mut self, fs: &Fs, dir: &OpenDir, item: &Item, asked: u64) -> bool {
        let bare = match self.reply {
            Reply::Names(_) => item.kind().is_none(),
            Reply::Plus(_) => dir.is_bare(item, asked),
        };
        if bare {
            return !self.any && self.bare.add(item);
        }
        if !self.bare.is_empty() {
            return false;
        }
        let taken = match &mut self.reply {
            Reply::Names(reply) => name(reply, item),
            Reply::Plus(reply) => plus(reply, fs, dir, item, asked),
        };
        self.any |= taken;
        taken
    }

    pub(super) fn answer(self, listed: Result<()>) {
        match (listed, self.reply) {
            (Err(errno), reply) => reply.failed(errno),
            (Ok(()), reply) if !self.bare.is_empty() => {
                match (&*self.device).write_all(&self.bare.answer(self.unique)) {
                    // It is answered, which fuser cannot know; there is nothing in it. What is lost
                    // of it is a reference to the descriptor, which is closed with the process.
                    Ok(()) => std::mem::forget(reply),
                    Err(_) => reply.failed(Errno(libc::EIO)),
                }
            }
            (Ok(()), Reply::Names(reply)) => reply.ok(),
            (Ok(()), Reply::Plus(reply)) => reply.ok(),
        }
    }
}

fn name(reply: &mut ReplyDirectory, item: &Item) -> bool {
    let Some(kind) = item.kind() else {
        return false;
    };
    let name = OsStr::from_bytes(&item.name);
    !reply.add(INodeNo(item.ino), item.cookie, file_type(kind), name)
}

fn plus(reply: &mut ReplyDirectoryPlus, fs: &Fs, dir: &OpenDir, item: &Item, asked: u64) -> bool {
    let name = OsStr::from_bytes(&item.name);
    if item.is_dots() {
        // The kernel counts no lookup for these.
        let attr = file_attr(item.ino, &dir.inode.state().attr());
        let zero = Duration::ZERO;
        return !reply.add(attr.ino, item.cookie, name, &zero, &attr, Generation(0));
    }
    let Some(found) = item.handle.zip(item.attr) else {
        return false;
    };
    let entry = fs.grant(dir, &item.name, found, asked);
    let attr = file_attr(entry.ino, &entry.attr);
    let trusted = entry.attr_trusted.min(entry.name_trusted);
    let full = reply.add(attr.ino, item.cookie, name, &trusted, &attr, Generation(0));
    if full {
        fs.forget(entry.ino, 1);
    }
    !full
}

/// Entries that are names and file ids, in the form of linux/fuse.h.
struct Bare {
    plus: bool,
    /// Behind room for the header.
    bytes: Vec<u8>,
}

impl Bare {
    fn new(plus: bool) -> Self {
        let bytes = Vec::new();
        Self { plus, bytes }
    }

    fn is_empty(&self) -> bool {
        self.bytes.is_empty()
    }

    fn add(&mut self, item: &Item) -> bool {
        let start = self.bytes.len().max(OUT_HEADER);
        let entry_out = if self.plus { ENTRY_OUT } else { 0 };
        let length = (entry_out + DIRENT + item.name.len()).next_multiple_of(8);
        // No name that is listed is longer than NAME_MAX.
        let Ok(name_length) = u32::try_from(item.name.len()) else {
            return false;
        };
        if start + length > OUT_HEADER + MOST {
            return false;
        }
        // All zeros: no node, nothing known.
        self.bytes.resize(start + entry_out, 0);
        self.bytes.extend(item.ino.to_ne_bytes());
        self.bytes.extend(item.cookie.to_ne_bytes());
        self.bytes.extend(name_length.to_ne_bytes());
        self.bytes.extend(directory_type(item.kind()).to_ne_bytes());
        self.bytes.extend(&item.name);
        self.bytes.resize(start + length, 0);
        true
    }

    /// The whole answer to a request.
    fn answer(mut self, unique: u64) -> Vec<u8> {
        let length = u32::try_from(self.bytes.len()).unwrap_or(0);
        let error = 0u32;
        self.bytes[..4].copy_from_slice(&length.to_ne_bytes());
        self.bytes[4..8].copy_from_slice(&error.to_ne_bytes());
        self.bytes[8..OUT_HEADER].copy_from_slice(&unique.to_ne_bytes());
        self.bytes
    }
}

/// The type of an entry as `struct dirent` has it (readdir(3)).
fn directory_type(kind: Option<FileKind>) -> u32 {
    let kind = match kind {
        None => libc::DT_UNKNOWN,
        Some(FileKind::Regular) => libc::DT_REG,
        Some(FileKind::Directory) => libc::DT_DIR,
        Some(FileKind::BlockDevice) => libc::DT_BLK,
        Some(FileKind::CharDevice) => libc::DT_CHR,
        Some(FileKind::Symlink) => libc::DT_LNK,
        Some(FileKind::Socket) => libc::DT_SOCK,
        Some(FileKind::Fifo) => libc::DT_FIFO,
    };
    kind.into()
}
