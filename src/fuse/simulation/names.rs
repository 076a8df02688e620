//! Names: whole listings beside changes of them, and who makes a file.

use std::collections::{BTreeMap, BTreeSet};

use crate::fuse::dir::OpenDir;
use crate::fuse::error::{Errno, Result};

use super::process::Process;
use super::{Seen, World};

/// A directory is read whole in this many requests at most.
const MOST_REQUESTS: usize = 10_000;

/// What happened to the names of the directory, and who made which file with O_EXCL.
#[derive(Debug, Default)]
pub(super) struct Names {
    /// Those that were made or taken away, in turn.
    pub(super) changed: Vec<Vec<u8>>,
    /// How many tried to make a file, and how many did.
    made: BTreeMap<String, (u64, u64)>,
    tries: u64,
}

/// How many tries there are to make one file, at most: from both hosts, nearly at once.
const TRIES: u64 = 4;

impl World {
    fn names_now(&self) -> (BTreeSet<Vec<u8>>, usize) {
        let server = self.server();
        let disk = server.disk.lock().unwrap();
        let names = disk.names(super::disk::ROOT).unwrap();
        let names = names.into_iter().map(|(name, _, _)| name).collect();
        (names, self.names.lock().unwrap().changed.len())
    }

    /// A listing that began when there were these names has shown those.
    fn check_listing(
        &self,
        (before, from): (BTreeSet<Vec<u8>>, usize),
        listed: &[Vec<u8>],
    ) -> std::result::Result<(), String> {
        let text = |name: &[u8]| String::from_utf8_lossy(name).into_owned();
        let names = self.names.lock().unwrap();
        let changed: BTreeSet<_> = names.changed[from..].iter().collect();
        let mut seen = BTreeSet::new();
        for name in listed.iter().filter(|name| !changed.contains(name)) {
            if !before.contains(name) {
                return Err(format!("it shows {}, which is not there", text(name)));
            }
            if !seen.insert(name) {
                return Err(format!("it shows {} twice", text(name)));
            }
        }
        let stayed = before.iter().filter(|name| !changed.contains(name));
        for name in stayed {
            if !seen.contains(name) {
                return Err(format!("it does not show {}", text(name)));
            }
        }
        Ok(())
    }
}

impl Process {
    /// Lists the directory, with entries to be known from then on if `plus`.
    pub(super) async fn list(&self, plus: bool, room: usize) -> Result<()> {
        let (host, fs) = (&self.host, &self.host.fs);
        let before = host.world.names_now();
        let dir = OpenDir::new(fs.inode(1)?);
        let (mut listed, mut offset) = (Vec::new(), 0);
        for _ in 0..MOST_REQUESTS {
            let (mut taken, mut next) = (Vec::new(), offset);
            let version = host.version();
            let sink = |item: &crate::fuse::dir::Item, asked: u64| {
                if taken.len() == room {
                    return false;
                }
                let known = item
                    .handle
                    .zip(item.attr)
                    .filter(|_| plus && !item.is_dots());
                let entry = known.map(|known| fs.grant(&dir, &item.name, known, asked));
                taken.push((item.name.to_vec(), entry));
                next = item.cookie;
                true
            };
            self.request(fs.list(&self.cred, &dir, offset, sink))
                .await?;
            if taken.is_empty() {
                host.world.saw(Seen::Listed);
                let checked = host.world.check_listing(before, &listed);
                host.world
                    .demand(checked, || format!("a listing of host {}", host.number));
                return Ok(());
            }
            for (name, entry) in taken {
                if let Some(entry) = entry {
                    self.entry(&name, &entry, version);
                }
                listed.push(name);
            }
            offset = next;
        }
        host.world.fail("a listing never ends".to_owned());
        Ok(())
    }

    /// Makes a file that nobody else makes: one of those that try.
    pub(super) async fn make_alone(&self) -> Result<()> {
        let world = &self.host.world;
        let name = {
            let mut names = world.names.lock().unwrap();
            let name = format!("alone{}", names.tries / TRIES);
            names.tries += 1;
            names.made.entry(name.clone()).or_default().0 += 1;
            name
        };
        let flags = libc::O_WRONLY | libc::O_CREAT | libc::O_EXCL;
        let outcome = self.open(name.as_bytes(), flags).await;
        let (tried, made) = {
            let mut names = world.names.lock().unwrap();
            let counts = names.made.entry(name.clone()).or_default();
            counts.1 += u64::from(outcome.is_ok());
            *counts
        };
        if made > 1 {
            world.fail(format!("{name} was made {made} times"));
        }
        match outcome {
            Ok(file) => self.close(file).await,
            Err(Errno(libc::EEXIST)) if tried > 1 => {
                world.saw(Seen::Exclusive);
                Ok(())
            }
            Err(Errno(libc::EEXIST)) => {
                world.fail(format!("{name} was there before anybody made it"));
                Ok(())
            }
            Err(errno) => Err(errno),
        }
    }
}
