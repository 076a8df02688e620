//! A file system in memory with the guarantees of NFSv3 and no others: what was written UNSTABLE
//! is lost in a crash unless it was committed, and a crash changes the write verifier.

use std::collections::BTreeMap;

use nfs3_types::nfs3::{
    createhow3, fattr3, ftype3, nfsstat3, nfstime3, sattr3, specdata3, stable_how, wcc_attr,
};

pub(crate) type Id = u64;
type Status<T> = Result<T, nfsstat3>;

pub(crate) const ROOT: Id = 1;

#[derive(Debug)]
pub(crate) enum Kind {
    File { stable: Vec<u8>, cached: Vec<u8> },
    Dir(BTreeMap<Vec<u8>, Id>),
    Symlink(Vec<u8>),
}

#[derive(Debug)]
struct Inode {
    kind: Kind,
    links: u32,
    mode: u32,
    /// When its data changed, and when anything did.
    modified: u32,
    changed: u32,
    verifier: Option<[u8; 8]>,
}

#[derive(Debug)]
pub(crate) struct Disk {
    inodes: BTreeMap<Id, Inode>,
    next: Id,
    ticks: u32,
    boot: u64,
    /// What one READ or WRITE carries at most, in bytes.
    pub(crate) sizes: u32,
    /// Answers come without the attributes that a server may leave out.
    pub(crate) mute: bool,
    /// Where a listing goes on behind a name. A name keeps its cookie, as long as the disk lives.
    cookies: BTreeMap<(Id, Vec<u8>), u64>,
}

fn overwrite(content: &mut Vec<u8>, offset: usize, data: &[u8]) {
    let end = offset + data.len();
    if content.len() < end {
        content.resize(end, 0);
    }
    content[offset..end].copy_from_slice(data);
}

impl Disk {
    pub(crate) fn new() -> Self {
        let mut disk = Self {
            inodes: BTreeMap::new(),
            next: ROOT,
            ticks: 0,
            boot: 1,
            sizes: 1 << 20,
            mute: false,
            cookies: BTreeMap::new(),
        };
        disk.make(Kind::Dir(BTreeMap::new()), 0o755);
        disk
    }

    fn make(&mut self, kind: Kind, mode: u32) -> Id {
        let id = self.next;
        self.next += 1;
        self.ticks += 1;
        let inode = Inode {
            kind,
            links: 1,
            mode,
            modified: self.ticks,
            changed: self.ticks,
            verifier: None,
        };
        self.inodes.insert(id, inode);
        id
    }

    fn inode(&mut self, id: Id) -> Status<&mut Inode> {
        self.inodes.get_mut(&id).ok_or(nfsstat3::NFS3ERR_STALE)
    }

    /// An inode that is about to change.
    fn change(&mut self, id: Id) -> Status<&mut Inode> {
        self.ticks += 1;
        let now = self.ticks;
        let inode = self.inode(id)?;
        inode.changed = now;
        Ok(inode)
    }

    /// An inode whose data is about to change.
    fn modify(&mut self, id: Id) -> Status<&mut Inode> {
        let inode = self.change(id)?;
        inode.modified = inode.changed;
        Ok(inode)
    }

    fn entries(&self, id: Id) -> Status<&BTreeMap<Vec<u8>, Id>> {
        match self.inodes.get(&id).map(|inode| &inode.kind) {
            Some(Kind::Dir(entries)) => Ok(entries),
            Some(_) => Err(nfsstat3::NFS3ERR_NOTDIR),
            None => Err(nfsstat3::NFS3ERR_STALE),
        }
    }

    /// A directory whose entries are about to change.
    fn dir(&mut self, id: Id) -> Status<&mut BTreeMap<Vec<u8>, Id>> {
        match &mut self.modify(id)?.kind {
            Kind::Dir(entries) => Ok(entries),
            _ => Err(nfsstat3::NFS3ERR_NOTDIR),
        }
    }

    pub(crate) fn attr(&self, id: Id) -> Option<fattr3> {
        let inode = self.inodes.get(&id)?;
        let (type_, size) = match &inode.kind {
            Kind::File { cached, .. } => (ftype3::NF3REG, cached.len()),
            Kind::Dir(entries) => (ftype3::NF3DIR, entries.len()),
            Kind::Symlink(target) => (ftype3::NF3LNK, target.len()),
        };
        let time = |seconds| nfstime3 {
            seconds,
            nseconds: 0,
        };
        Some(fattr3 {
            type_,
            mode: inode.mode,
            nlink: inode.links,
            uid: 0,
            gid: 0,
            size: size as u64,
            used: size as u64,
            rdev: specdata3::default(),
            fsid: 1,
            fileid: id,
            atime: time(inode.modified),
            mtime: time(inode.modified),
            ctime: time(inode.changed),
        })
    }

    pub(crate) fn wcc(&self, id: Id) -> Option<wcc_attr> {
        self.attr(id).map(|attr| wcc_attr {
            size: attr.size,
            mtime: attr.mtime,
            ctime: attr.ctime,
        })
    }

    pub(crate) fn verifier(&self) -> [u8; 8] {
        self.boot.to_be_bytes()
    }

    pub(crate) fn lookup(&self, dir: Id, name: &[u8]) -> Status<Id> {
        let entries = self.entries(dir)?;
        entries.get(name).copied().ok_or(nfsstat3::NFS3ERR_NOENT)
    }

    fn put(&mut self, dir: Id, name: &[u8], id: Id) -> Status<()> {
        self.dir(dir)?.insert(name.to_vec(), id);
        let next = self.cookies.len() as u64 + 1;
        self.cookies.entry((dir, name.to_vec())).or_insert(next);
        Ok(())
    }

    fn enter(&mut self, dir: Id, name: &[u8], kind: Kind, mode: u32) -> Status<Id> {
        if self.entries(dir)?.contains_key(name) {
            return Err(nfsstat3::NFS3ERR_EXIST);
        }
        let id = self.make(kind, mode);
        self.put(dir, name, id)?;
        Ok(id)
    }

    pub(crate) fn create(&mut self, dir: Id, name: &[u8], how: &createhow3) -> Status<Id> {
        let empty = Kind::File {
            stable: Vec::new(),
            cached: Vec::new(),
        };
        match (self.enter(dir, name, empty, 0o644), how) {
            (Ok(id), createhow3::EXCLUSIVE(verifier)) => {
                self.change(id)?.verifier = Some(verifier.0);
                Ok(id)
            }
            (Err(nfsstat3::NFS3ERR_EXIST), createhow3::EXCLUSIVE(verifier)) => {
                let id = self.lookup(dir, name)?;
                if self.inode(id)?.verifier == Some(verifier.0) {
                    Ok(id)
                } else {
                    Err(nfsstat3::NFS3ERR_EXIST)
                }
            }
            (Err(nfsstat3::NFS3ERR_EXIST), createhow3::UNCHECKED(set)) => {
                let id = self.lookup(dir, name)?;
                self.set(id, set)?;
                Ok(id)
            }
            (outcome, _) => outcome,
        }
    }

    pub(crate) fn mkdir(&mut self, dir: Id, name: &[u8]) -> Status<Id> {
        self.enter(dir, name, Kind::Dir(BTreeMap::new()), 0o755)
    }

    pub(crate) fn symlink(&mut self, dir: Id, name: &[u8], target: &[u8]) -> Status<Id> {
        self.enter(dir, name, Kind::Symlink(target.to_vec()), 0o777)
    }

    pub(crate) fn readlink(&mut self, id: Id) -> Status<Vec<u8>> {
        match &self.inode(id)?.kind {
            Kind::Symlink(target) => Ok(target.clone()),
            _ => Err(nfsstat3::NFS3ERR_INVAL),
        }
    }

    fn unlink(&mut self, id: Id) {
        if let Ok(inode) = self.change(id) {
            inode.links -= 1;
            if inode.links == 0 {
                self.inodes.remove(&id);
            }
        }
    }

    pub(crate) fn remove(&mut self, dir: Id, name: &[u8]) -> Status<()> {
        let id = self.lookup(dir, name)?;
        if matches!(self.inode(id)?.kind, Kind::Dir(_)) {
            return Err(nfsstat3::NFS3ERR_ISDIR);
        }
        self.dir(dir)?.remove(name);
        self.unlink(id);
        Ok(())
    }

    pub(crate) fn rmdir(&mut self, dir: Id, name: &[u8]) -> Status<()> {
        let id = self.lookup(dir, name)?;
        if !self.entries(id)?.is_empty() {
            return Err(nfsstat3::NFS3ERR_NOTEMPTY);
        }
        self.dir(dir)?.remove(name);
        self.unlink(id);
        Ok(())
    }

    pub(crate) fn rename(
        &mut self,
        (from, old): (Id, &[u8]),
        (to, new): (Id, &[u8]),
    ) -> Status<()> {
        let id = self.lookup(from, old)?;
        match self.lookup(to, new) {
            // Two names of one file: POSIX has both stay.
            Ok(there) if there == id => return Ok(()),
            Ok(there) if self.entries(there).is_ok() && self.entries(id).is_ok() => {
                self.rmdir(to, new)?;
            }
            Ok(_) => self.remove(to, new)?,
            Err(_) => {}
        }
        self.dir(from)?.remove(old);
        self.put(to, new, id)
    }

    pub(crate) fn link(&mut self, id: Id, dir: Id, name: &[u8]) -> Status<()> {
        self.inode(id)?;
        if self.entries(dir)?.contains_key(name) {
            return Err(nfsstat3::NFS3ERR_EXIST);
        }
        self.put(dir, name, id)?;
        self.change(id)?.links += 1;
        Ok(())
    }

    /// The names in a directory, what they lead to, and their cookies, in the order of these.
    pub(crate) fn names(&self, dir: Id) -> Status<Vec<(Vec<u8>, Id, u64)>> {
        let entries = self.entries(dir)?;
        let cookie = |name: &Vec<u8>| self.cookies[&(dir, name.clone())];
        let mut names: Vec<_> = entries
            .iter()
            .map(|(name, id)| (name.clone(), *id, cookie(name)))
            .collect();
        names.sort_unstable_by_key(|(_, _, cookie)| *cookie);
        Ok(names)
    }

    pub(crate) fn read(&mut self, id: Id, offset: u64, count: u32) -> Status<(Vec<u8>, bool)> {
        match &self.inode(id)?.kind {
            Kind::File { cached, .. } => {
                let offset = usize::try_from(offset).unwrap_or(usize::MAX);
                let rest = cached.get(offset..).unwrap_or(&[]);
                let data = &rest[..rest.len().min(count as usize)];
                Ok((data.to_vec(), data.len() == rest.len()))
            }
            _ => Err(nfsstat3::NFS3ERR_INVAL),
        }
    }

    pub(crate) fn write(
        &mut self,
        id: Id,
        offset: u64,
        data: &[u8],
        how: stable_how,
    ) -> Status<()> {
        let offset = usize::try_from(offset).map_err(|_| nfsstat3::NFS3ERR_FBIG)?;
        match &mut self.modify(id)?.kind {
            Kind::File { stable, cached } => {
                overwrite(cached, offset, data);
                if how != stable_how::UNSTABLE {
                    overwrite(stable, offset, data);
                }
                Ok(())
            }
            _ => Err(nfsstat3::NFS3ERR_INVAL),
        }
    }

    pub(crate) fn set(&mut self, id: Id, set: &sattr3) -> Status<()> {
        use nfs3_types::nfs3::Nfs3Option;
        let inode = match set.size {
            Nfs3Option::Some(_) => self.modify(id)?,
            Nfs3Option::None => self.change(id)?,
        };
        if let Nfs3Option::Some(mode) = set.mode {
            inode.mode = mode;
        }
        if let (Nfs3Option::Some(size), Kind::File { stable, cached }) = (set.size, &mut inode.kind)
        {
            let size = usize::try_from(size).map_err(|_| nfsstat3::NFS3ERR_FBIG)?;
            cached.resize(size, 0);
            stable.resize(size, 0);
        }
        Ok(())
    }

    pub(crate) fn commit(&mut self, id: Id) -> Status<()> {
        match &mut self.inode(id)?.kind {
            Kind::File { stable, cached } => {
                stable.clone_from(cached);
                Ok(())
            }
            _ => Err(nfsstat3::NFS3ERR_INVAL),
        }
    }

    /// What of a file is on the disk, and what is in memory.
    pub(crate) fn content(&self, id: Id) -> Option<(&[u8], &[u8])> {
        match &self.inodes.get(&id)?.kind {
            Kind::File { stable, cached } => Some((stable, cached)),
            _ => None,
        }
    }

    /// The power fails: what was not committed is gone.
    pub(crate) fn crash(&mut self) {
        self.boot += 1;
        for inode in self.inodes.values_mut() {
            if let Kind::File { stable, cached } = &mut inode.kind {
                cached.clone_from(stable);
            }
        }
    }
}
