//! Deleting what crashes, and hosts that are no more, left in `.nfsvol/`.
//!
//! Invariant: nothing that somebody may still use is deleted. What a crash left is older than
//! [`LEFT_OVER`], a host is silent for [`DEAD`]; both by the server's clock, and only while that and
//! this host's agree.
//!
//! Costs a listing each of `tmp/`, `hosts/` and `volumes/`, of each volume whose directory changed
//! [`LATELY`], and of the export on a share that was set up as lately. Known limits: what a crash left in a
//! volume's directory, and nobody swept for so long, stays until the volume is removed, and is deleted
//! with it; what it left beside `.nfsvol/` then stays.

use std::collections::BTreeSet;
use std::time::Duration;

use super::error::CatalogError;
use super::expiry::Clocks;
use super::trash::{LEFT_OVER, delete};
use super::{restore, share};
use crate::layout;
use crate::mutant::{self, Mutant};
use nfs::address::SharePath;
use nfs::admin::{self, Admin, Attr, DirEntry, Kind};

const DAY: Duration = Duration::from_secs(86_400);
/// A host that was not heard of for so long is taken for scrapped: it holds nothing for hours already,
/// and if it comes back it begins anew.
const DEAD: Duration = DAY.saturating_mul(30);
/// Only so long is what a crash left looked for in a volume's directory, and beside `.nfsvol/`, where all of the
/// users' files may be: one sweep a day finds it.
const LATELY: Duration = DAY.saturating_mul(3);

/// What was deleted, and the first thing that could not be.
pub(super) type Swept = (usize, Result<(), CatalogError>);

struct Sweep<'a> {
    admin: &'a Admin,
    clocks: Clocks,
    swept: usize,
    result: Result<(), CatalogError>,
}

/// Sweeps. `unplaced` says whether `tmp/<id>.data` still waits to be put in place. Goes on after what
/// cannot be deleted.
pub(super) async fn sweep(admin: &Admin, clocks: Clocks, unplaced: impl Fn(&str) -> bool) -> Swept {
    let mut sweep = Sweep {
        admin,
        clocks,
        swept: 0,
        result: Ok(()),
    };
    let done = sweep.all(unplaced).await;
    let (swept, result) = (sweep.swept, sweep.result);
    (swept, result.and(done))
}

impl Sweep<'_> {
    async fn all(&mut self, unplaced: impl Fn(&str) -> bool) -> Result<(), CatalogError> {
        let tmp = layout::tmp();
        for entry in self.list(&tmp).await? {
            let name = entry.name.to_str();
            let waits = name.and_then(|name| name.strip_suffix(".data"));
            if !waits.is_some_and(&unplaced) {
                self.old(&tmp, &entry, LEFT_OVER).await?;
            }
        }
        self.hosts().await?;
        self.volumes().await?;
        self.asides().await
    }

    /// Deletes what hosts that were killed while they set the share up have left beside `.nfsvol/`.
    async fn asides(&mut self) -> Result<(), CatalogError> {
        let made = self.admin.attr(&layout::format_file()).await?;
        if made.is_none_or(|made| self.age(&made) > LATELY) || mutant::is_on(Mutant::SetUpsStay) {
            return Ok(());
        }
        let root = SharePath::root();
        for entry in self.list(&root).await? {
            if entry.name.to_str().and_then(layout::as_own_aside).is_some() {
                self.old(&root, &entry, LEFT_OVER).await?;
            }
        }
        Ok(())
    }

    async fn hosts(&mut self) -> Result<(), CatalogError> {
        let dir = layout::hosts();
        let entries = self.list(&dir).await?;
        self.temporaries(&dir, &entries).await?;
        let (mut living, mut dead) = (BTreeSet::new(), Vec::new());
        for entry in &entries {
            let Some(name) = entry.name.to_str().filter(|name| !name.starts_with('.')) else {
                continue;
            };
            if layout::parse_document(name).is_some() {
                continue;
            }
            match self.attr(&dir, entry).await? {
                Some(attr) if attr.kind == Kind::Dir && self.age(&attr) > DEAD => dead.push(entry),
                _ => drop(living.insert(name)),
            }
        }
        // Its documents first: without one a host has never held anything.
        for entry in &entries {
            let document = entry.name.to_str().and_then(layout::parse_document);
            if document.is_some_and(|(host, _)| !living.contains(host)) {
                self.old(&dir, entry, DEAD).await?;
            }
        }
        for entry in dead {
            tracing::info!(host = ?entry.name, "not heard of for 30 days: forgotten");
            self.old(&dir, entry, DEAD).await?;
        }
        Ok(())
    }

    async fn volumes(&mut self) -> Result<(), CatalogError> {
        let dir = layout::volumes();
        for entry in self.list(&dir).await? {
            let Some(attr) = self.attr(&dir, &entry).await? else {
                continue;
            };
            let age = self.age(&attr);
            let (Some(name), true) = (entry.name.to_str(), age > LEFT_OVER && age < LATELY) else {
                continue;
            };
            let volume = dir.join(name);
            let entries = self.list(&volume).await?;
            self.temporaries(&volume, &entries).await?;
            self.restored(&volume, &entries).await?;
        }
        Ok(())
    }

    /// Deletes what a restore that was cut off has left beside the record. If that cannot be read, it is
    /// all that tells of the volume.
    async fn restored(
        &mut self,
        volume: &SharePath,
        entries: &[DirEntry],
    ) -> Result<(), CatalogError> {
        let left = entries.iter().find(|e| e.name == layout::RESTORED_FROM);
        let (Some(from), Ok(name)) = (left, volume.name().parse()) else {
            return Ok(());
        };
        let record = match share::read(self.admin, &name).await {
            Ok(Some(record)) => record,
            Ok(None) | Err(CatalogError::Record { .. }) => return Ok(()),
            Err(error) => return Err(error),
        };
        match self.is_older(volume, from, LEFT_OVER).await? {
            true => {
                let deleted = restore::delete_taken(self.admin, volume, &record, &|| true).await;
                self.note(deleted)
            }
            false => Ok(()),
        }
    }

    async fn temporaries(
        &mut self,
        dir: &SharePath,
        entries: &[DirEntry],
    ) -> Result<(), CatalogError> {
        for entry in entries.iter().filter(|e| admin::is_temporary(&e.name)) {
            self.old(dir, entry, LEFT_OVER).await?;
        }
        Ok(())
    }

    async fn list(&self, dir: &SharePath) -> Result<Vec<DirEntry>, CatalogError> {
        Ok(self.admin.list(dir).await?.unwrap_or_default())
    }

    async fn attr(&self, dir: &SharePath, entry: &DirEntry) -> Result<Option<Attr>, CatalogError> {
        match (entry.attr, entry.name.to_str()) {
            (Some(attr), _) => Ok(Some(attr)),
            (None, Some(name)) => Ok(self.admin.attr(&dir.join(name)).await?),
            (None, None) => Ok(None),
        }
    }

    fn age(&self, attr: &Attr) -> Duration {
        Duration::from_secs(self.clocks.server.saturating_sub(attr.mtime.secs))
    }

    async fn is_older(
        &self,
        dir: &SharePath,
        entry: &DirEntry,
        age: Duration,
    ) -> Result<bool, CatalogError> {
        let attr = self.attr(dir, entry).await?;
        Ok(attr.is_some_and(|attr| self.age(&attr) > age))
    }

    /// Deletes an entry that is older than `age`.
    async fn old(
        &mut self,
        dir: &SharePath,
        entry: &DirEntry,
        age: Duration,
    ) -> Result<(), CatalogError> {
        match (entry.name.to_str(), self.is_older(dir, entry, age).await?) {
            (Some(name), true) => {
                let deleted = delete(self.admin, &dir.join(name)).await;
                self.note(deleted)
            }
            _ => Ok(()),
        }
    }

    /// What cannot be deleted keeps nothing else.
    fn note(&mut self, deleted: Result<(), CatalogError>) -> Result<(), CatalogError> {
        match deleted {
            Ok(()) => self.swept += 1,
            Err(error) if mutant::is_on(Mutant::SweepEndsAtTheFirstError) => return Err(error),
            Err(error) => {
                tracing::warn!(%error, "left over");
                let first = std::mem::replace(&mut self.result, Ok(()));
                self.result = first.and(Err(error));
            }
        }
        Ok(())
    }
}
