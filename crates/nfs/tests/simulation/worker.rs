//! A task that works in a directory of its own and knows what has to be in it.

use std::collections::BTreeMap;
use std::sync::{Arc, Mutex};
use std::time::Duration;

use bytes::Bytes;
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{FileHandle, How, Nfs3, NfsError, SetAttr, Stable};
use nfs3_types::nfs3::nfsstat3::{NFS3ERR_EXIST, NFS3ERR_NOENT};
use tokio::task::JoinSet;

use crate::Dice;
use crate::disk::{Disk, Id, ROOT};

const STEPS: u64 = 40;
/// Names are few, so that they are taken, freed and taken again.
const NAMES: u64 = 6;
/// Rounds of the race between hosts for one name.
const ROUNDS: u64 = 6;
const MAX_SIZE: u64 = 3000;

/// Who got what both wanted.
#[derive(Debug, Default)]
pub(crate) struct Races {
    files: Mutex<BTreeMap<u64, Vec<u64>>>,
    /// Host, and whether its MKDIR was certain.
    dirs: Mutex<BTreeMap<u64, Vec<(u64, bool)>>>,
}

impl Races {
    pub(crate) fn check(&self) {
        for round in 0..ROUNDS {
            let files = self.files.lock().unwrap();
            let winners = files.get(&round).map_or(0, Vec::len);
            assert_eq!(
                winners, 1,
                "round {round}: an exclusive CREATE has one winner"
            );
            let dirs = self.dirs.lock().unwrap();
            let won: &[_] = dirs.get(&round).map_or(&[], Vec::as_slice);
            let certain = won.iter().filter(|(_, certain)| *certain).count();
            assert!(certain <= 1, "round {round}: two hosts made one directory");
            assert!(!won.is_empty(), "round {round}: nobody made the directory");
        }
    }
}

#[derive(Debug, Clone, PartialEq, Eq)]
enum Object {
    File(Id),
    Dir,
    Symlink(Vec<u8>),
}

#[derive(Debug)]
struct File {
    handle: FileHandle,
    content: Vec<u8>,
    links: u32,
}

#[derive(Debug)]
pub(crate) struct Worker {
    host: u64,
    number: u64,
    nfs: Nfs3,
    dice: Dice,
    cred: Cred,
    names: BTreeMap<Vec<u8>, Object>,
    files: BTreeMap<Id, File>,
    made: u64,
}

fn root() -> FileHandle {
    FileHandle::new(&ROOT.to_be_bytes()).unwrap()
}

fn key(handle: &FileHandle) -> Id {
    Id::from_be_bytes(handle.as_bytes().try_into().unwrap())
}

impl Worker {
    pub(crate) fn new(host: u64, number: u64, nfs: Nfs3, dice: Dice) -> Self {
        Self {
            host,
            number,
            nfs,
            dice,
            cred: Cred::new(1000, 1000),
            names: BTreeMap::new(),
            files: BTreeMap::new(),
            made: 0,
        }
    }

    fn home(&self) -> Vec<u8> {
        format!("host{}-{}", self.host, self.number).into_bytes()
    }

    pub(crate) async fn run(mut self, races: Arc<Races>) -> Self {
        let set = SetAttr::default();
        let made = self
            .nfs
            .mkdir(&self.cred, &root(), &self.home(), &set)
            .await;
        assert!(matches!(
            made,
            Ok(_) | Err(NfsError::Uncertain(NFS3ERR_EXIST))
        ));
        let home = self.nfs.lookup(&self.cred, &root(), &self.home()).await;
        let dir = home.unwrap().handle;
        for step in 0..STEPS {
            self.step(&dir).await;
            if self.number == 0 && step < ROUNDS {
                self.race(&races, step).await;
            }
            let pause = self.dice.below(3000);
            if pause < 2000 {
                tokio::time::sleep(Duration::from_millis(pause)).await;
            }
        }
        self.list(&dir).await;
        for id in self.files.keys().copied().collect::<Vec<_>>() {
            self.read(id).await;
        }
        self
    }

    async fn race(&mut self, races: &Races, round: u64) {
        let mut verifier = [0; 8];
        verifier.copy_from_slice(&(self.dice.roll() | 1).to_be_bytes());
        let name = format!("race-file-{round}");
        let how = How::Exclusive(verifier);
        let made = self
            .nfs
            .create(&self.cred, &root(), name.as_bytes(), how)
            .await;
        match made {
            Ok(_) => {
                let mut files = races.files.lock().unwrap();
                files.entry(round).or_default().push(self.host);
            }
            Err(e) => assert_eq!(e, NfsError::Status(NFS3ERR_EXIST)),
        }
        let name = format!("race-dir-{round}");
        let set = SetAttr::default();
        let made = self
            .nfs
            .mkdir(&self.cred, &root(), name.as_bytes(), &set)
            .await;
        let mut dirs = races.dirs.lock().unwrap();
        match made {
            Ok(_) => dirs.entry(round).or_default().push((self.host, true)),
            Err(NfsError::Uncertain(NFS3ERR_EXIST)) => {
                dirs.entry(round).or_default().push((self.host, false));
            }
            Err(e) => assert_eq!(e, NfsError::Status(NFS3ERR_EXIST)),
        }
    }

    fn any_name(&mut self) -> Vec<u8> {
        format!("n{}", self.dice.below(NAMES)).into_bytes()
    }

    fn any_file(&mut self) -> Option<Id> {
        let at = self.dice.below(self.files.len() as u64);
        self.files.keys().nth(usize::try_from(at).unwrap()).copied()
    }

    /// One random operation, its answer, and what follows for what is known.
    async fn step(&mut self, dir: &FileHandle) {
        let name = self.any_name();
        let there = self.names.get(&name).cloned();
        match (self.dice.below(14), there) {
            (0..=2, there) => self.create(dir, &name, there).await,
            (3..=5, _) => {
                if let Some(id) = self.any_file() {
                    self.write(id).await;
                }
            }
            (6, _) => {
                if let Some(id) = self.any_file() {
                    self.read(id).await;
                }
            }
            (7, _) => {
                if let Some(id) = self.any_file() {
                    self.resize(id).await;
                }
            }
            (8, Some(Object::Dir)) => {
                let gone = self.nfs.rmdir(&self.cred, dir, &name).await;
                gone.unwrap();
                self.names.remove(&name);
            }
            (8, Some(_)) => {
                let gone = self.nfs.remove(&self.cred, dir, &name).await;
                gone.unwrap();
                self.unlink(&name);
            }
            (9, Some(object)) if object != Object::Dir => self.rename(dir, &name, object).await,
            (10, there) => self.link(dir, &name, there).await,
            (11, there) => self.symlink(dir, &name, there).await,
            (12, there) => self.mkdir(dir, &name, there).await,
            (13, _) => self.list(dir).await,
            (_, there) => {
                let found = self.nfs.lookup(&self.cred, dir, &name).await;
                match there {
                    None => assert_eq!(found, Err(NfsError::Status(NFS3ERR_NOENT))),
                    Some(Object::File(id)) => assert_eq!(key(&found.unwrap().handle), id),
                    Some(_) => assert!(found.is_ok()),
                }
            }
        }
    }

    /// A new file is known from now on.
    fn enter(&mut self, name: &[u8], handle: FileHandle) {
        let id = key(&handle);
        let file = File {
            handle,
            content: Vec::new(),
            links: 1,
        };
        assert!(self.files.insert(id, file).is_none(), "a handle came twice");
        self.names.insert(name.to_vec(), Object::File(id));
    }

    fn unlink(&mut self, name: &[u8]) {
        if let Some(Object::File(id)) = self.names.remove(name) {
            let file = self.files.get_mut(&id).unwrap();
            file.links -= 1;
            if file.links == 0 {
                self.files.remove(&id);
            }
        }
    }

    async fn create(&mut self, dir: &FileHandle, name: &[u8], there: Option<Object>) {
        self.made += 1;
        let guarded = self.dice.below(2) == 0;
        let mut verifier = [0; 8];
        verifier[..4].copy_from_slice(&u32::try_from(self.made).unwrap().to_be_bytes());
        verifier[4] = u8::try_from(self.number).unwrap();
        verifier[5] = u8::try_from(self.host).unwrap();
        let how = if guarded {
            How::Guarded(SetAttr::default())
        } else {
            How::Exclusive(verifier)
        };
        match (self.nfs.create(&self.cred, dir, name, how).await, there) {
            (Ok(made), None) => self.enter(name, made.handle.unwrap()),
            (Err(NfsError::Uncertain(NFS3ERR_EXIST)), None) if guarded => {
                let found = self.nfs.lookup(&self.cred, dir, name).await;
                self.enter(name, found.unwrap().handle);
            }
            (Err(NfsError::Status(NFS3ERR_EXIST)), Some(_)) => {}
            (Err(NfsError::Uncertain(NFS3ERR_EXIST)), Some(_)) if guarded => {}
            (outcome, there) => panic!("CREATE with {there:?} there: {outcome:?}"),
        }
    }

    /// Writes in several places at once and makes it durable, as a file system does: whatever
    /// was written under another verifier than the COMMIT's is written again.
    async fn write(&mut self, id: Id) {
        let mut parts = Vec::new();
        let mut at = self.dice.below(MAX_SIZE);
        for _ in 0..=self.dice.below(4) {
            let length = self.dice.below(700) + 1;
            let byte = self.dice.roll().to_be_bytes()[0];
            let data = vec![byte; usize::try_from(length).unwrap()];
            parts.push((at, Bytes::from(data)));
            at += length;
        }
        let handle = self.files[&id].handle;
        let sync = self.dice.below(4) == 0;
        loop {
            let mut writes = JoinSet::new();
            for (offset, data) in parts.clone() {
                let (nfs, cred) = (self.nfs.clone(), self.cred.clone());
                let stable = if sync {
                    Stable::FileSync
                } else {
                    Stable::Unstable
                };
                writes.spawn(async move {
                    let written = nfs
                        .write(&cred, &handle, offset, data.clone(), stable)
                        .await;
                    let written = written.unwrap();
                    assert_eq!(written.count as usize, data.len());
                    assert!(written.committed >= stable);
                    written.verf
                });
            }
            let verifiers = writes.join_all().await;
            if sync {
                break;
            }
            let committed = self.nfs.commit(&self.cred, &handle, 0, 0).await.unwrap();
            if verifiers.iter().all(|verf| *verf == committed.verf) {
                break;
            }
        }
        let content = &mut self.files.get_mut(&id).unwrap().content;
        for (offset, data) in parts {
            let start = usize::try_from(offset).unwrap();
            let end = start + data.len();
            content.resize(content.len().max(end), 0);
            content[start..end].copy_from_slice(&data);
        }
    }

    async fn read(&mut self, id: Id) {
        let file = &self.files[&id];
        let offset = self.dice.below(file.content.len() as u64 + 1);
        let count = u32::try_from(self.dice.below(MAX_SIZE) + 1).unwrap();
        if self.dice.below(4) == 0 {
            // One that nobody waits for any more.
            let patience = Duration::from_millis(self.dice.below(100));
            let read = self.nfs.read(&self.cred, &file.handle, offset, count);
            let _ = tokio::time::timeout(patience, read).await;
        }
        let read = self.nfs.read(&self.cred, &file.handle, offset, count);
        let read = read.await.unwrap();
        let rest = &file.content[usize::try_from(offset).unwrap()..];
        let expected = &rest[..rest.len().min(count as usize)];
        assert_eq!(read.data, expected);
        assert_eq!(read.eof, expected.len() == rest.len());
        let attr = self.nfs.getattr(&self.cred, &file.handle).await.unwrap();
        assert_eq!(attr.size, file.content.len() as u64);
        assert_eq!(attr.nlink, file.links);
    }

    async fn resize(&mut self, id: Id) {
        let size = self.dice.below(MAX_SIZE);
        let set = SetAttr {
            size: Some(size),
            ..SetAttr::default()
        };
        let file = self.files.get_mut(&id).unwrap();
        let done = self.nfs.setattr(&self.cred, &file.handle, &set, None).await;
        done.unwrap();
        file.content.resize(usize::try_from(size).unwrap(), 0);
    }

    async fn rename(&mut self, dir: &FileHandle, from: &[u8], object: Object) {
        let to = self.any_name();
        if self.names.get(&to) == Some(&Object::Dir) {
            return;
        }
        let source = match &object {
            Object::File(id) => self.files[id].handle,
            _ => {
                let found = self.nfs.lookup(&self.cred, dir, from).await;
                found.unwrap().handle
            }
        };
        let done = self
            .nfs
            .rename(&self.cred, (dir, from), (dir, &to), Some(&source))
            .await;
        done.unwrap();
        let one_file = self.names.get(&to) == Some(&object) && matches!(object, Object::File(_));
        if to != from && !one_file {
            self.unlink(&to);
            self.names.remove(from);
            self.names.insert(to, object);
        }
    }

    async fn link(&mut self, dir: &FileHandle, name: &[u8], there: Option<Object>) {
        let Some(id) = self.any_file() else { return };
        let handle = self.files[&id].handle;
        match (self.nfs.link(&self.cred, &handle, dir, name).await, there) {
            (Ok(_), None) => {
                self.names.insert(name.to_vec(), Object::File(id));
                self.files.get_mut(&id).unwrap().links += 1;
            }
            (Err(NfsError::Status(NFS3ERR_EXIST)), Some(_)) => {}
            // It was there, and it may have been made by this call: both are so.
            (Ok(_), Some(Object::File(other))) if other == id => {}
            (outcome, there) => panic!("LINK with {there:?} there: {outcome:?}"),
        }
    }

    async fn symlink(&mut self, dir: &FileHandle, name: &[u8], there: Option<Object>) {
        self.made += 1;
        let target = format!("target-{}", self.made).into_bytes();
        let set = SetAttr::default();
        let made = self.nfs.symlink(&self.cred, dir, name, &target, &set).await;
        match (made, there) {
            (Ok(made), None) => {
                let link = self.nfs.readlink(&self.cred, &made.handle.unwrap()).await;
                assert_eq!(link.unwrap().target, target);
                self.names.insert(name.to_vec(), Object::Symlink(target));
            }
            (Err(NfsError::Status(NFS3ERR_EXIST)), Some(_)) => {}
            (outcome, there) => panic!("SYMLINK with {there:?} there: {outcome:?}"),
        }
    }

    async fn mkdir(&mut self, dir: &FileHandle, name: &[u8], there: Option<Object>) {
        let set = SetAttr::default();
        match (self.nfs.mkdir(&self.cred, dir, name, &set).await, there) {
            (Ok(_) | Err(NfsError::Uncertain(NFS3ERR_EXIST)), None) => {
                let found = self.nfs.lookup(&self.cred, dir, name).await;
                assert!(found.is_ok());
                self.names.insert(name.to_vec(), Object::Dir);
            }
            (
                Err(NfsError::Status(NFS3ERR_EXIST) | NfsError::Uncertain(NFS3ERR_EXIST)),
                Some(_),
            ) => {}
            (outcome, there) => panic!("MKDIR with {there:?} there: {outcome:?}"),
        }
    }

    async fn list(&mut self, dir: &FileHandle) {
        let mut cookie = 0;
        let mut verifier = [0; 8];
        let mut listed = Vec::new();
        loop {
            let page = self
                .nfs
                .readdirplus(&self.cred, dir, cookie, verifier, 4096, 8192)
                .await
                .unwrap();
            verifier = page.verf;
            for entry in page.entries {
                cookie = entry.cookie;
                listed.push(entry.name.to_vec());
            }
            if page.eof {
                break;
            }
        }
        let known: Vec<_> = self.names.keys().cloned().collect();
        listed.sort_unstable();
        assert_eq!(listed, known);
    }

    /// What is known against the disk after everything.
    pub(crate) fn check(&self, disk: &mut Disk) {
        let dir = disk.lookup(ROOT, &self.home()).unwrap();
        let names = disk.names(dir).unwrap();
        assert_eq!(names.len(), self.names.len());
        for (name, id, _) in names {
            match &self.names[&name] {
                Object::File(known) => assert_eq!(*known, id),
                Object::Dir => assert_eq!(disk.names(id), Ok(Vec::new())),
                Object::Symlink(target) => assert_eq!(disk.readlink(id).as_ref(), Ok(target)),
            }
        }
        for (id, file) in &self.files {
            let (content, _) = disk.content(*id).unwrap();
            assert!(content == file.content, "acknowledged data is gone");
        }
    }
}
