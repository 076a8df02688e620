//! Comparing a copy with its source: every byte, and what both say of themselves.
//!
//! Limits: of times only the seconds are compared, since servers keep them in steps of their own,
//! and those of files and directories only; access times, and attributes that the share did not take, are not compared.

use std::collections::HashMap;
use std::ffi::{CStr, CString};
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::atomic::Ordering;

use rustix::fs::{self, Advice, FileType, Mode, OFlags, Stat};

use super::copy::{BLOCK, Copier, MARKER};
use super::tree::{CopyError, Place, kind, mode, names, open_dir, open_root, size, stat};

struct Comparison<'a> {
    copier: &'a Copier<'a>,
    /// Whether hard links were made.
    links: bool,
    /// For a file with several names, the one file that is its copy.
    copies: HashMap<u64, u64>,
    blocks: (Vec<u8>, Vec<u8>),
}

impl Copier<'_> {
    /// Compares the tree `to` with `from`, of which it is a copy.
    ///
    /// # Errors
    /// [`CopyError::Differs`] for the first difference.
    pub(crate) fn verify(&self, from: &Path, to: &Path, links: bool) -> Result<(), CopyError> {
        let mut comparison = Comparison {
            copier: self,
            links,
            copies: HashMap::new(),
            blocks: (vec![0; BLOCK], vec![0; BLOCK]),
        };
        comparison.directory(&open_root(from)?, &open_root(to)?, &Place::default())
    }
}

impl Comparison<'_> {
    fn directory(&mut self, from: &OwnedFd, to: &OwnedFd, at: &Place) -> Result<(), CopyError> {
        let mut wanted = Vec::new();
        for name in names(from).map_err(at.failed("cannot list"))? {
            let place = at.join(&name);
            let source = stat(from, &name).map_err(place.failed("cannot look at"))?;
            if kind(&source) != FileType::Socket {
                wanted.push((name, source));
            }
        }
        let there: Vec<CString> = names(to)
            .map_err(at.failed("cannot list the copy of"))?
            .into_iter()
            .filter(|name| **name != *MARKER)
            .collect();
        if let Some(other) = there
            .iter()
            .find(|n| wanted.iter().all(|(name, _)| name != *n))
        {
            return Err(at.join(other).differs("the source does not have it"));
        }
        for (name, source) in &wanted {
            let place = at.join(name);
            if !there.contains(name) {
                return Err(place.differs("it is missing"));
            }
            self.entry(from, to, name, source, &place)?;
        }
        Ok(())
    }

    fn entry(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        source: &Stat,
        place: &Place,
    ) -> Result<(), CopyError> {
        let copy = stat(to, name).map_err(place.failed("cannot look at the copy of"))?;
        let device = matches!(
            kind(source),
            FileType::CharacterDevice | FileType::BlockDevice
        );
        if kind(&copy) != kind(source) || device && copy.st_rdev != source.st_rdev {
            return Err(place.differs("another kind"));
        }
        if (copy.st_uid, copy.st_gid) != (source.st_uid, source.st_gid) {
            return Err(place.differs("another owner"));
        }
        if kind(source) != FileType::Symlink && mode(&copy) != mode(source) {
            return Err(place.differs("another mode"));
        }
        // Servers keep no time that is set of a link (nfs-ganesha), or of a pipe or device.
        let timed = matches!(kind(source), FileType::RegularFile | FileType::Directory);
        let same_time = match timed && copy.st_mtime != source.st_mtime {
            true => Err(place.differs("another time")),
            false => Ok(()),
        };
        if self.links && kind(source) == FileType::RegularFile && source.st_nlink > 1 {
            let first = *self.copies.entry(source.st_ino).or_insert(copy.st_ino);
            if first != copy.st_ino {
                return Err(place.differs("not linked"));
            }
        }
        match kind(source) {
            FileType::Directory => {
                let from = open_dir(from, name).map_err(place.failed("cannot open"))?;
                let to = open_dir(to, name).map_err(place.failed("cannot open the copy of"))?;
                // What changed in it says more than that it changed.
                self.directory(&from, &to, place).and(same_time)
            }
            _ if same_time.is_err() => same_time,
            FileType::RegularFile if size(&copy) != size(source) => {
                Err(place.differs("another length"))
            }
            FileType::RegularFile => self.contents(from, to, name, place),
            FileType::Symlink => {
                let read = |at| fs::readlinkat(at, name, Vec::new());
                let target = read(from).map_err(place.failed("cannot read the link"))?;
                match read(to).is_ok_and(|there| there == target) {
                    true => Ok(()),
                    false => Err(place.differs("another target")),
                }
            }
            _ => Ok(()),
        }
    }

    fn contents(
        &mut self,
        from: &OwnedFd,
        to: &OwnedFd,
        name: &CStr,
        place: &Place,
    ) -> Result<(), CopyError> {
        let flags = OFlags::RDONLY | OFlags::NOFOLLOW | OFlags::CLOEXEC;
        let open = |at| fs::openat(at, name, flags, Mode::empty());
        let source = open(from).map_err(place.failed("cannot open"))?;
        let copy = open(to).map_err(place.failed("cannot open the copy of"))?;
        // What the client still has in memory would prove nothing.
        let _ = fs::fadvise(&copy, 0, None, Advice::DontNeed);
        let mut offset = 0;
        loop {
            if self.copier.stop.load(Ordering::Relaxed) {
                return Err(CopyError::Interrupted);
            }
            let (ours, theirs) = &mut self.blocks;
            let read = fill(&source, ours, offset).map_err(place.failed("cannot read"))?;
            let other =
                fill(&copy, theirs, offset).map_err(place.failed("cannot read the copy of"))?;
            if ours[..read] != theirs[..other] {
                return Err(place.differs("other bytes"));
            }
            if read == 0 {
                return Ok(());
            }
            offset += read as u64;
            (self.copier.progress)(read as u64);
        }
    }
}

/// Reads until the block is full or the file ends.
fn fill(file: &OwnedFd, block: &mut [u8], offset: u64) -> Result<usize, rustix::io::Errno> {
    let mut filled = 0;
    while filled < block.len() {
        match rustix::io::pread(file, &mut block[filled..], offset + filled as u64)? {
            0 => break,
            read => filled += read,
        }
    }
    Ok(filled)
}
