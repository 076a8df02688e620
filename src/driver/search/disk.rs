//! What is on the disk of the server in memory.
//!
//! What a host sees of it depends on what was done to the objects asked about and on nothing else: numbers of
//! objects are those of the host that makes them, and a time is the server's second with the count of
//! the object's changes. So calls that touch different objects can be swapped, and two ways to one
//! state are seen to be one.

use std::collections::BTreeMap;
use std::hash::{DefaultHasher, Hash, Hasher};
use std::sync::Arc;

use nfs3_types::nfs3::*;

pub(super) type Id = u64;
pub(super) type Status<T> = Result<T, nfsstat3>;

pub(super) const ROOT: Id = 1;
/// The server's clock at the start, in seconds since 1970.
const BEGAN: u64 = 1_795_000_000;
/// More changes of one object than a run makes.
const CHANGES: u32 = 1000;

#[derive(Debug, Clone, PartialEq, Eq, Hash)]
pub(super) enum Kind {
    Dir(BTreeMap<String, Id>),
    File(Vec<u8>),
}

#[derive(Debug, Clone, Hash)]
pub(super) struct Inode {
    pub(super) kind: Kind,
    mode: u32,
    owner: (u32, u32),
    secs: u64,
    changes: u32,
}

/// What is on the server's disk.
#[derive(Debug, Clone)]
pub(super) struct Disk {
    inodes: BTreeMap<Id, (u64, Arc<Inode>)>,
    /// The sum over the inodes.
    hash: u64,
    next: [u64; 4],
    tmp: Id,
    pub(super) hosts: Id,
    volumes: Id,
    /// Seconds since the start.
    pub(super) secs: u64,
}

pub(super) fn hash_of(value: impl Hash) -> u64 {
    let mut hasher = DefaultHasher::new();
    value.hash(&mut hasher);
    hasher.finish()
}

impl Disk {
    pub(super) fn new() -> Self {
        let mut disk = Self {
            inodes: BTreeMap::new(),
            hash: 0,
            next: [0; 4],
            tmp: 0,
            hosts: 0,
            volumes: 0,
            secs: 0,
        };
        let root = disk.inode(Kind::Dir(BTreeMap::new()), 0o755);
        disk.store(ROOT, root);
        disk
    }

    /// Equal for equal disks.
    pub(super) fn hash(&self) -> u64 {
        self.hash
    }

    /// The frame is made.
    pub(super) fn settle(&mut self) {
        self.tmp = self.at(".nfsvol/tmp").unwrap_or(0);
        self.hosts = self.at(".nfsvol/hosts").unwrap_or(0);
        self.volumes = self.at(".nfsvol/volumes").unwrap_or(0);
    }

    /// Goes back to an earlier state; numbers that were given since are not given again.
    pub(super) fn go_back_to(&mut self, earlier: &Self) {
        self.inodes = earlier.inodes.clone();
        self.hash = earlier.hash;
    }

    fn inode(&self, kind: Kind, mode: u32) -> Inode {
        Inode {
            kind,
            mode,
            owner: (0, 0),
            secs: self.secs,
            changes: 0,
        }
    }

    fn store(&mut self, id: Id, inode: Inode) {
        self.drop(id);
        let hash = hash_of((id, &inode));
        self.hash = self.hash.wrapping_add(hash);
        self.inodes.insert(id, (hash, Arc::new(inode)));
    }

    fn drop(&mut self, id: Id) {
        if let Some((hash, _)) = self.inodes.remove(&id) {
            self.hash = self.hash.wrapping_sub(hash);
        }
    }

    pub(super) fn get(&self, id: Id) -> Status<&Inode> {
        let found = self.inodes.get(&id).map(|(_, inode)| &**inode);
        found.ok_or(nfsstat3::NFS3ERR_STALE)
    }

    pub(super) fn entries(&self, id: Id) -> Status<&BTreeMap<String, Id>> {
        match &self.get(id)?.kind {
            Kind::Dir(entries) => Ok(entries),
            Kind::File(_) => Err(nfsstat3::NFS3ERR_NOTDIR),
        }
    }

    pub(super) fn lookup(&self, dir: Id, name: &str) -> Status<Id> {
        let found = self.entries(dir)?.get(name).copied();
        found.ok_or(nfsstat3::NFS3ERR_NOENT)
    }

    /// Changes an object, and the time of its last change if `what` says so.
    fn change<T>(&mut self, id: Id, what: impl FnOnce(&mut Inode) -> (bool, T)) -> Status<T> {
        let mut inode = self.get(id)?.clone();
        let is_quiet = self.is_quiet(id);
        let (stamps, result) = what(&mut inode);
        if stamps {
            inode.secs = self.secs;
            inode.changes += u32::from(!is_quiet);
        }
        self.store(id, inode);
        Ok(result)
    }

    fn link(&mut self, dir: Id, name: &str, id: Option<Id>) -> Status<()> {
        self.entries(dir)?;
        self.change(dir, |inode| {
            if let Kind::Dir(entries) = &mut inode.kind {
                match id {
                    Some(id) => entries.insert(name.to_owned(), id),
                    None => entries.remove(name),
                };
            }
            (true, ())
        })
    }

    /// The directories of which nobody asks when they changed.
    pub(super) fn is_quiet(&self, id: Id) -> bool {
        [self.tmp, self.hosts].contains(&id)
    }

    /// Whether anybody looks at the attributes of what is listed in a directory.
    pub(super) fn are_stamps_seen(&self, dir: Id) -> bool {
        [self.volumes, self.hosts].contains(&dir)
    }

    pub(super) fn make(
        &mut self,
        host: usize,
        dir: Id,
        name: &str,
        kind: Kind,
        mode: u32,
    ) -> Status<Id> {
        if self.entries(dir)?.contains_key(name) {
            return Err(nfsstat3::NFS3ERR_EXIST);
        }
        self.next[host] += 1;
        let id = ((host as u64 + 1) << 32) + self.next[host];
        let inode = self.inode(kind, mode);
        self.store(id, inode);
        self.link(dir, name, Some(id))?;
        Ok(id)
    }

    pub(super) fn remove(&mut self, dir: Id, name: &str, is_dir: bool) -> Status<()> {
        let id = self.lookup(dir, name)?;
        match &self.get(id)?.kind {
            Kind::Dir(_) if !is_dir => return Err(nfsstat3::NFS3ERR_ISDIR),
            Kind::File(_) if is_dir => return Err(nfsstat3::NFS3ERR_NOTDIR),
            Kind::Dir(entries) if !entries.is_empty() => return Err(nfsstat3::NFS3ERR_NOTEMPTY),
            _ => {}
        }
        self.drop(id);
        self.link(dir, name, None)
    }

    pub(super) fn rename(&mut self, (from, old): (Id, &str), (to, new): (Id, &str)) -> Status<()> {
        let id = self.lookup(from, old)?;
        let moves_dir = matches!(self.get(id)?.kind, Kind::Dir(_));
        if let Ok(there) = self.lookup(to, new) {
            if there == id {
                return Ok(());
            }
            match &self.get(there)?.kind {
                Kind::Dir(entries) if moves_dir && entries.is_empty() => {}
                Kind::File(_) if !moves_dir => {}
                Kind::Dir(_) if moves_dir => return Err(nfsstat3::NFS3ERR_NOTEMPTY),
                _ => return Err(nfsstat3::NFS3ERR_EXIST),
            }
            self.entries(to)?;
            self.drop(there);
        }
        self.entries(to)?;
        self.link(from, old, None)?;
        self.link(to, new, Some(id))?;
        Ok(())
    }

    pub(super) fn attr(&self, id: Id) -> Option<fattr3> {
        let inode = self.get(id).ok()?;
        let (type_, size, nlink) = match &inode.kind {
            Kind::File(bytes) => (ftype3::NF3REG, bytes.len(), 1),
            Kind::Dir(entries) => {
                let dirs = entries.values().filter(|id| self.entries(**id).is_ok());
                (ftype3::NF3DIR, 4096, 2 + dirs.count())
            }
        };
        let number = u32::try_from(id % 100_000).unwrap();
        let time = nfstime3 {
            seconds: u32::try_from(BEGAN + inode.secs).unwrap(),
            // Of no two objects the same, as if none were made in the same tick.
            nseconds: number * CHANGES + inode.changes.min(CHANGES - 1),
        };
        Some(fattr3 {
            type_,
            mode: inode.mode,
            nlink: u32::try_from(nlink).unwrap(),
            uid: inode.owner.0,
            gid: inode.owner.1,
            size: size as u64,
            used: size as u64,
            rdev: specdata3::default(),
            fsid: 1,
            fileid: id,
            atime: time,
            mtime: time,
            ctime: time,
        })
    }

    pub(super) fn post(&self, id: Id) -> post_op_attr {
        self.attr(id).map_or(Nfs3Option::None, Nfs3Option::Some)
    }

    pub(super) fn set(&mut self, id: Id, new: &sattr3) -> Status<()> {
        self.change(id, |inode| {
            if let Nfs3Option::Some(mode) = new.mode {
                inode.mode = mode;
            }
            if let Nfs3Option::Some(uid) = new.uid {
                inode.owner.0 = uid;
            }
            if let Nfs3Option::Some(gid) = new.gid {
                inode.owner.1 = gid;
            }
            (matches!(new.mtime, set_mtime::SET_TO_SERVER_TIME), ())
        })
    }

    pub(super) fn write(&mut self, id: Id, offset: usize, data: &[u8]) -> Status<()> {
        self.change(id, |inode| {
            if let Kind::File(bytes) = &mut inode.kind {
                bytes.resize(bytes.len().max(offset + data.len()), 0);
                bytes[offset..offset + data.len()].copy_from_slice(data);
            }
            (true, ())
        })
    }

    /// What lies at a path.
    pub(super) fn at(&self, path: &str) -> Option<Id> {
        let parts = path.split('/').filter(|part| !part.is_empty());
        parts
            .into_iter()
            .try_fold(ROOT, |dir, name| self.lookup(dir, name).ok())
    }

    /// The names in a directory.
    pub(super) fn names(&self, path: &str) -> Vec<String> {
        let entries = self.at(path).and_then(|id| self.entries(id).ok());
        entries.map_or_else(Vec::new, |entries| entries.keys().cloned().collect())
    }

    pub(super) fn file(&self, path: &str) -> Option<&[u8]> {
        match &self.get(self.at(path)?).ok()?.kind {
            Kind::File(bytes) => Some(bytes),
            Kind::Dir(_) => None,
        }
    }

    /// Puts a file there, as a container would.
    pub(super) fn put_file(&mut self, dir: &str, name: &str) {
        let dir = self.at(dir).unwrap();
        self.make(3, dir, name, Kind::File(b"of a user".to_vec()), 0o644)
            .unwrap();
    }

    /// Moves what lies at a path.
    pub(super) fn move_path(&mut self, from: &str, to: &str) {
        let [from, to] = [from, to].map(|path| path.rsplit_once('/').unwrap_or(("", path)));
        let [from_dir, to_dir] = [from, to].map(|(dir, _)| self.at(dir).unwrap());
        self.rename((from_dir, from.1), (to_dir, to.1)).unwrap();
    }

    /// The paths of all objects.
    pub(super) fn paths(&self) -> Vec<String> {
        let mut paths = Vec::new();
        let mut todo = vec![(String::new(), ROOT)];
        while let Some((path, id)) = todo.pop() {
            for (name, id) in self.entries(id).into_iter().flatten() {
                let path = format!("{path}/{name}");
                todo.push((path.clone(), *id));
                paths.push(path);
            }
        }
        paths.sort();
        paths
    }

    pub(super) fn path_of(&self, id: Id) -> String {
        for (dir, (_, inode)) in &self.inodes {
            if let Kind::Dir(entries) = &inode.kind
                && let Some((name, _)) = entries.iter().find(|(_, there)| **there == id)
            {
                return format!("{}/{name}", self.path_of(*dir));
            }
        }
        String::new()
    }
}
