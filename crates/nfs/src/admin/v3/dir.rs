//! Reading directories, and removing trees by the handles that reading gives.
//!
//! A server without READDIRPLUS is asked by READDIR from then on: entries then come without their
//! attributes, as they may from any server.

use std::ffi::{OsStr, OsString};
use std::os::unix::ffi::{OsStrExt, OsStringExt};
use std::sync::atomic::Ordering;

use nfs3_types::nfs3::{
    NFS_PROGRAM, Nfs3Option, READDIR3args, READDIR3resfail, READDIR3resok, READDIRPLUS3args,
    READDIRPLUS3resfail, READDIRPLUS3resok, cookieverf3, nfs_fh3, nfsstat3,
};

use super::session::{Effect, Fault, Session, attr_of};
use super::{AdminErrorKind, DirEntry, Kind, Outcome, SharePath, V3, present};
use crate::admin::Attr;
use crate::admin::tree::Tree;
use crate::mutant::{self, Mutant};

/// How much of a directory is asked for at a time, in bytes: some 1,500 entries for a listing,
/// some 300 where no more are used.
const LIST_BYTES: u32 = 256 * 1024;
const PAGE_BYTES: u32 = 48 * 1024;
/// How often a listing begins anew because the directory changed under its cookie.
const LIST_ROUNDS: u32 = 3;

/// Where in a directory to go on; the default is its start.
#[derive(Debug, Clone, Copy, Default)]
struct Place {
    cookie: u64,
    verifier: cookieverf3,
}

/// One answer: entries with their cookies, in the server's order.
struct Page {
    verifier: cookieverf3,
    entries: Vec<(u64, Vec<u8>, Option<Attr>)>,
    end: bool,
}

impl Session<'_> {
    /// Reads a directory: all of it up to `limit` entries, or with `whole` unset just so many.
    pub(super) async fn entries(
        &mut self,
        dir: &nfs_fh3,
        limit: usize,
        whole: bool,
    ) -> Outcome<Vec<DirEntry>> {
        let mut entries = Vec::new();
        let mut place = Place::default();
        let mut rounds = 0;
        let bytes = if whole { LIST_BYTES } else { PAGE_BYTES };
        loop {
            let page = match self.read_page(dir, place, bytes).await {
                Err(Fault::Status(nfsstat3::NFS3ERR_BAD_COOKIE)) if rounds < LIST_ROUNDS => {
                    rounds += 1;
                    entries.clear();
                    place = Place::default();
                    continue;
                }
                page => page?,
            };
            let before = place.cookie;
            //= 1813-3.3.16-cookie: “For subsequent READDIRs, the client must present both the
            //= cookie and the corresponding cookie verifier.”
            place.verifier = page.verifier;
            for (cookie, name, attr) in page.entries {
                place.cookie = cookie;
                if name == b"." || name == b".." {
                    continue;
                }
                if name.is_empty() || name.contains(&b'/') || name.contains(&0) {
                    let text = format!("READDIR: the name {:?}", OsStr::from_bytes(&name));
                    return Err(AdminErrorKind::Protocol(text));
                }
                if entries.len() == limit {
                    return match whole {
                        true => Err(AdminErrorKind::TooLarge(limit)),
                        false => Ok(entries),
                    };
                }
                let name = OsString::from_vec(name);
                entries.push(DirEntry { name, attr });
            }
            if page.end {
                return Ok(entries);
            }
            //= 1813-3.3.16-end: Only eof says that a directory has no more entries.
            if place.cookie == before {
                let text = "READDIR: no way forward".to_owned();
                return Err(AdminErrorKind::Protocol(text));
            }
        }
    }

    /// One answer, by READDIRPLUS where the server has it.
    async fn read_page(&mut self, dir: &nfs_fh3, place: Place, bytes: u32) -> Result<Page, Fault> {
        let plain = &self.v3.shared.plain_listing;
        if plain.load(Ordering::Relaxed) {
            return self.read_names(dir, place, bytes).await;
        }
        match self.read_plus(dir, place, bytes).await {
            Err(Fault::Status(nfsstat3::NFS3ERR_NOTSUPP))
                if !mutant::is_on(Mutant::ReaddirplusOnly) =>
            {
                plain.store(true, Ordering::Relaxed);
                self.read_names(dir, place, bytes).await
            }
            page => page,
        }
    }

    async fn read_plus(&mut self, dir: &nfs_fh3, place: Place, bytes: u32) -> Result<Page, Fault> {
        let args = READDIRPLUS3args {
            dir: dir.clone(),
            cookie: place.cookie,
            cookieverf: place.verifier,
            dircount: bytes,
            maxcount: bytes,
        };
        let readdir = NFS_PROGRAM::NFSPROC3_READDIRPLUS;
        let page: READDIRPLUS3resok<'_> = self
            .call::<_, _, READDIRPLUS3resfail>(readdir, &args, Effect::Repeatable)
            .await?;
        let entries = page.reply.entries.into_inner().into_iter().map(|entry| {
            let attr = match &entry.name_attributes {
                Nfs3Option::Some(attr) => Some(attr_of(attr)),
                Nfs3Option::None => None,
            };
            (entry.cookie, entry.name.0.into_owned(), attr)
        });
        Ok(Page {
            verifier: page.cookieverf,
            entries: entries.collect(),
            end: page.reply.eof,
        })
    }

    async fn read_names(&mut self, dir: &nfs_fh3, place: Place, bytes: u32) -> Result<Page, Fault> {
        let args = READDIR3args {
            dir: dir.clone(),
            cookie: place.cookie,
            cookieverf: place.verifier,
            count: bytes,
        };
        let readdir = NFS_PROGRAM::NFSPROC3_READDIR;
        let page: READDIR3resok<'_> = self
            .call::<_, _, READDIR3resfail>(readdir, &args, Effect::Repeatable)
            .await?;
        let entries = page.reply.entries.into_inner().into_iter();
        let entries = entries.map(|entry| (entry.cookie, entry.name.0.into_owned(), None));
        Ok(Page {
            verifier: page.cookieverf,
            entries: entries.collect(),
            end: page.reply.eof,
        })
    }

    /// Up to `limit` entries with their kinds, also where the server leaves attributes out.
    async fn page(&mut self, dir: &nfs_fh3, limit: usize) -> Outcome<Vec<(OsString, Kind)>> {
        let entries = present(self.entries(dir, limit, false).await)?.unwrap_or_default();
        let mut page = Vec::with_capacity(entries.len());
        for DirEntry { name, attr } in entries {
            let attr = match attr {
                Some(attr) => Some(attr),
                None => present(self.lookup(dir, name.as_bytes()).await)?.map(|(_, attr)| attr),
            };
            if let Some(attr) = attr {
                page.push((name, attr.kind));
            }
        }
        Ok(page)
    }

    async fn enter(&mut self, dir: &nfs_fh3, name: &[u8]) -> Outcome<Option<nfs_fh3>> {
        let found = present(self.lookup(dir, name).await)?;
        Ok(found.and_then(|(handle, attr)| (attr.kind == Kind::Dir).then_some(handle)))
    }
}

/// A tree is removed by handles, so names that no path can hold, and directories that are
/// renamed meanwhile, are no obstacle. A stale handle is a directory that is gone.
impl Tree for V3 {
    type Dir = nfs_fh3;

    async fn parent(&self, path: &SharePath) -> Outcome<Option<nfs_fh3>> {
        self.forget(path);
        self.parent_handle(&path.parent()).await
    }

    async fn enter(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<Option<nfs_fh3>> {
        self.within(async { Session::open(self).await?.enter(dir, name.as_bytes()).await })
            .await
    }

    async fn page(&self, dir: &nfs_fh3, limit: usize) -> Outcome<Vec<(OsString, Kind)>> {
        let page = self
            .within(async { Session::open(self).await?.page(dir, limit).await })
            .await;
        match page {
            Err(AdminErrorKind::Stale) => Ok(Vec::new()),
            page => page,
        }
    }

    async fn unlink(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<bool> {
        let name = name.as_bytes();
        self.within(async { Session::open(self).await?.unlink(dir, name).await })
            .await
    }

    async fn rmdir(&self, dir: &nfs_fh3, name: &OsStr) -> Outcome<bool> {
        let name = name.as_bytes();
        self.within(async { Session::open(self).await?.rmdir(dir, name).await })
            .await
    }
}
