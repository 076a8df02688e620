//! Bringing removed volumes back.
//!
//! Who restores an entry of the trash takes its record first, by one RENAME of which only one succeeds:
//!
//! 1. MKDIR `trash/<entry>/restoring.<nonce>`;
//! 2. RENAME `trash/<entry>/volume` to `restoring.<nonce>/from`: the entry is taken;
//! 3. write `restoring.<nonce>/record.json`, which says under which name and where it comes back;
//! 4. RENAME `trash/<entry>/data` to its place;
//! 5. of an exclusive volume: RENAME its claims out of `from` to `restoring.<nonce>/claims.<id>`;
//! 6. RENAME `restoring.<nonce>` to `volumes/<name>`: the volume is back;
//! 7. look whether record, data and claims are where they belong;
//! 8. delete `volumes/<name>/from`.
//!
//! Invariants: whoever restores writes only into a directory of its own, so nobody else's name gets
//! into the record that comes back; what was taken stays in the entry until 6, and is taken by the next
//! one that restores it in the same way, with what has moved by then. So a restore that was cut off is
//! done again under any name, and one that is still under way fails at 6, since what it has taken is gone.
//! A volume that comes back keeps its id, so it keeps its claims as well: where epochs began anew, a host
//! that is in the middle of claiming it would not meet the next one's claim. Intents and marks of
//! removals do not come back: nobody looks for them in `from`.
//!
//! Nothing is deleted before 7 has found the rest in place. Where a server that was restarted has forgotten
//! what it acknowledged, all goes back into the entry, and `from` tells what it is. Nor is anything
//! deleted once there is a new connection since the look: its server may have forgotten the restore, and
//! have `from` in the trash. A `from` that stays is not needed, and does no harm: it goes to the trash with the
//! volume, comes back beneath another one, and a sweep deletes it ([`super::sweep`]).
//!
//! Data that a restore which was cut off has moved elsewhere is moved back into the entry by the next one,
//! which looks afterwards whether it still has the entry, and otherwise puts the data back: whoever has it
//! then may have published a volume with it. Data that goes from the entry to a place (4) needs no such look:
//! who has the entry by then finds it by the record of that place.
//!
//! Known limits: a host that stops for ever between that move and the look, after it has lost the entry, leaves
//! the data of a volume in the trash; Mount refuses it. Without a home share the record comes back into the
//! state directory, which no RENAME guards; two such hosts that restore one entry within a moment may both
//! have it. Over a kernel mount no new connection is seen, so a server that restarts during 8 and has forgotten
//! the whole restore may leave data without a record.

use std::sync::Arc;

use super::error::CatalogError;
use super::layout::{self, RESTORED_FROM, TRASH_DATA, TrashName};
use super::trash::{self, TrashEntry};
use super::{Catalog, Copy, data, share};
use crate::cluster::layout as cluster;
use crate::mutant::{self, Mutant};
use crate::nfs::address::SharePath;
use crate::nfs::admin::{Admin, AdminError, AdminErrorKind};
use crate::volume::{Access, Record, VolumeName};

/// How often data is looked for that another restore of the entry may be moving.
const LOOKS: usize = 3;

/// A restore that has an entry.
pub(super) struct Restoring<'a> {
    home: &'a Admin,
    on: &'a Admin,
    entry: &'a TrashEntry,
    /// What comes back.
    record: Record,
    /// What was taken lies in here.
    dir: SharePath,
}

impl Catalog {
    /// Brings a removed volume back, under its own or another name.
    ///
    /// # Errors
    /// [`CatalogError::NameTaken`] or [`CatalogError::PathTaken`] when something is in the way;
    /// [`CatalogError::RestoredElsewhere`] when another host has the entry.
    pub async fn restore(
        &self,
        home: &Admin,
        on: &Admin,
        entry: &TrashEntry,
        name: Option<&VolumeName>,
    ) -> Result<Arc<Record>, CatalogError> {
        // A restore under another name that was cut off has written that one into the record.
        let record = renamed(&entry.record, name.unwrap_or(&entry.name))?;
        if self.is_only_here(&record.name) || share::read(home, &record.name).await?.is_some() {
            return Err(CatalogError::NameTaken(record.name));
        }
        if self.home.is_some() {
            self.catch_up(home).await?;
        }
        check_free(on, entry, &record).await?;
        let mut restoring = Restoring::take(home, on, entry, record).await?;
        fail::fail_point!("restore.taken", |_| crate::failpoint::die());
        restoring.note().await?;
        fail::fail_point!("restore.renamed", |_| crate::failpoint::die());
        restoring.bring_data(self).await?;
        fail::fail_point!("restore.data", |_| crate::failpoint::die());
        let record = Arc::new(restoring.record.clone());
        if self.home.is_some() {
            restoring.publish().await?;
            fail::fail_point!("restore.record", |_| crate::failpoint::die());
            self.keep(record.clone(), None).await?;
        } else {
            restoring.check_taken().await?;
            let copy = Copy {
                record: record.clone(),
                stamp: None,
            };
            tokio::task::block_in_place(|| self.only_here.put(copy))
                .map_err(CatalogError::state("writing the volume's record"))?;
            Self::purge(home, &entry.entry).await?;
        }
        trash::clear(home, entry).await;
        if on.share() != home.share() && record.moves_data() {
            trash::clear(on, entry).await;
        }
        Ok(record)
    }
}

/// A record under another name.
pub(super) fn renamed(record: &Record, name: &VolumeName) -> Result<Record, CatalogError> {
    let mut record = record.clone();
    if record.name != *name {
        record.name = name.clone();
        // A directory that was found, or is retained, never moved.
        let moved = match mutant::is_on(Mutant::RetainedMovesByName) {
            true => record.made.is_some(),
            false => record.moves_data(),
        };
        if moved {
            record.data_dir = record.options.data_dir(name)?;
        } else {
            record.options.subdir = Some(record.data_dir.as_str().to_owned());
        }
    }
    Ok(record)
}

fn data_of(entry: &TrashEntry) -> SharePath {
    layout::trash().join(&entry.entry).join(TRASH_DATA)
}

fn in_the_way(on: &Admin, path: &SharePath) -> CatalogError {
    CatalogError::PathTaken {
        share: on.share().to_string(),
        path: path.clone(),
    }
}

/// Refuses before anything has moved if something is where the data is to come.
async fn check_free(on: &Admin, entry: &TrashEntry, record: &Record) -> Result<(), CatalogError> {
    // In this order: another restore may move it there in between.
    let there = on.attr(&record.data_dir).await?;
    match there.is_some() && on.attr(&data_of(entry)).await?.is_some() {
        true => Err(in_the_way(on, &record.data_dir)),
        false => Ok(()),
    }
}

/// The record of an entry and the place of what a restore takes: its directory, or that of a restore
/// that has begun.
pub(super) async fn find(
    home: &Admin,
    entry: &TrashName,
) -> Result<Option<(SharePath, Record)>, CatalogError> {
    let volume = entry.path().join(layout::TRASH_VOLUME);
    if let Some(record) = trash::record_in(home, &volume, &entry.volume).await? {
        return Ok(Some((volume, record)));
    }
    for taken in begun(home, &entry.path()).await? {
        if let Some(record) = records(home, &taken, &entry.volume)
            .await?
            .into_iter()
            .next()
        {
            return Ok(Some((taken, record)));
        }
    }
    Ok(None)
}

/// The directories of restores that have begun, whether or not they have taken the entry.
async fn begun(home: &Admin, entry: &SharePath) -> Result<Vec<SharePath>, AdminError> {
    let entries = home.list(entry).await?.unwrap_or_default();
    let names = entries.iter().filter_map(|there| there.name.to_str());
    let begun = names.filter(|name| name.starts_with(layout::RESTORING));
    Ok(begun.map(|name| entry.join(name)).collect())
}

/// The records of a restore that has begun, and of those before it that were cut off.
async fn records(
    home: &Admin,
    taken: &SharePath,
    name: &VolumeName,
) -> Result<Vec<Record>, CatalogError> {
    let (mut found, mut torn) = (Vec::new(), None);
    for at in layers(home, taken).await? {
        match trash::record_in(home, &at, name).await {
            Ok(record) => found.extend(record),
            Err(error @ CatalogError::Record { .. }) => torn = torn.or(Some(error)),
            Err(error) => return Err(error),
        }
    }
    match torn {
        Some(error) if found.is_empty() => Err(error),
        _ => Ok(found),
    }
}

/// The directory of a restore, and in turn what it has taken.
async fn layers(home: &Admin, taken: &SharePath) -> Result<Vec<SharePath>, AdminError> {
    let (mut layers, mut at) = (Vec::new(), taken.clone());
    while home.attr(&at).await?.is_some() {
        let from = at.join(RESTORED_FROM);
        layers.push(std::mem::replace(&mut at, from));
    }
    Ok(layers)
}

/// The highest epoch of claims, 0 where there is none in their directory.
async fn highest_epoch(home: &Admin, claims: &SharePath) -> Result<Option<u64>, AdminError> {
    let entries = home.list(claims).await?;
    Ok(entries.map(|entries| {
        let epochs = entries.iter().filter_map(|e| e.name.to_str()?.parse().ok());
        epochs.max().unwrap_or(0)
    }))
}

/// Removes what restores that took nothing have left in an entry.
pub(super) async fn clear(home: &Admin, entry: &SharePath) -> Result<(), AdminError> {
    for left in begun(home, entry).await? {
        match home.remove_dir(&left).await {
            Err(error) if !matches!(error.kind, AdminErrorKind::NotEmpty) => return Err(error),
            _ => {}
        }
    }
    Ok(())
}

impl<'a> Restoring<'a> {
    /// Takes the entry, to bring it back as `record`.
    pub(super) async fn take(
        home: &'a Admin,
        on: &'a Admin,
        entry: &'a TrashEntry,
        record: Record,
    ) -> Result<Self, CatalogError> {
        let nonce = match mutant::is_on(Mutant::RestoresShareADirectory) {
            true => String::new(),
            false => layout::random_id().map_err(CatalogError::state("random bytes"))?,
        };
        let dir = layout::trash().join(&entry.entry);
        let dir = dir.join(&format!("{}{nonce}", layout::RESTORING));
        let restoring = Self {
            home,
            on,
            entry,
            record,
            dir,
        };
        let made = home.mkdir(&restoring.dir, 0o755).await;
        made.map_err(|error| restoring.lost(error))?;
        let from = restoring.dir.join(RESTORED_FROM);
        let Err(error) = home.rename(&entry.at, &from).await else {
            return Ok(restoring);
        };
        // The reply may have been lost.
        if home.attr(&from).await?.is_some() {
            return Ok(restoring);
        }
        if matches!(error.kind, AdminErrorKind::NotFound) {
            let _ = home.remove_dir(&restoring.dir).await;
        }
        Err(restoring.lost(error))
    }

    /// The error of a call in an entry that another host has taken.
    fn lost(&self, error: AdminError) -> CatalogError {
        match error.kind {
            AdminErrorKind::NotFound => CatalogError::RestoredElsewhere(self.entry.entry.clone()),
            _ => error.into(),
        }
    }

    /// Writes what comes back, before anything of it moves: what is cut off then is found again.
    pub(super) async fn note(&self) -> Result<(), CatalogError> {
        let file = self.dir.join(layout::RECORD);
        let written = self.home.write(&file, &self.record.to_json()).await;
        written.map(drop).map_err(|error| self.lost(error))
    }

    /// Makes sure that the entry is still this restore's.
    async fn check_taken(&self) -> Result<(), CatalogError> {
        match self.home.attr(&self.dir).await? {
            Some(_) => Ok(()),
            None => Err(CatalogError::RestoredElsewhere(self.entry.entry.clone())),
        }
    }

    /// Brings the data back, from the entry or from where a restore that was cut off has moved it.
    pub(super) async fn bring_data(&mut self, catalog: &Catalog) -> Result<(), CatalogError> {
        let mut looks = 0..LOOKS;
        let there = loop {
            let moved = async {
                self.gather(catalog).await?;
                self.move_data().await
            };
            match moved.await {
                // Moved in between, by a restore that has lost the entry and was at that step.
                Err(error) if is_missing(&error) && looks.next().is_some() => {}
                moved => break moved?,
            }
        };
        // Where its number follows from the path, the directory has another one there.
        if there != self.record.made {
            self.record.made = there;
            self.note().await?;
        }
        Ok(())
    }

    /// Moves data that another restore of the entry has moved to another place back into the entry.
    async fn gather(&self, catalog: &Catalog) -> Result<(), CatalogError> {
        match self.elsewhere(catalog).await? {
            Some(place) => self.fetch(&place).await,
            None => Ok(()),
        }
    }

    /// Where another restore of the entry has moved the data.
    pub(super) async fn elsewhere(
        &self,
        catalog: &Catalog,
    ) -> Result<Option<SharePath>, CatalogError> {
        if !self.record.moves_data() || self.on.attr(&data_of(self.entry)).await?.is_some() {
            return Ok(None);
        }
        for before in records(self.home, &self.dir, &self.entry.name).await? {
            let moved = &before.data_dir;
            if *moved == self.record.data_dir {
                continue;
            }
            let there = self.on.attr(moved).await?;
            if there.is_none_or(|attr| before.made != Some(attr.fileid)) {
                continue;
            }
            let used = Record {
                name: self.record.name.clone(),
                ..before.clone()
            };
            if !catalog.overlapping(&used).await.is_empty() {
                return Err(in_the_way(self.on, moved));
            }
            self.check_taken().await?;
            return Ok(Some(before.data_dir));
        }
        Ok(None)
    }

    /// Moves data back into the entry, if that is still this restore's.
    pub(super) async fn fetch(&self, place: &SharePath) -> Result<(), CatalogError> {
        let trashed = data_of(self.entry);
        let moved = self.on.rename(place, &trashed).await;
        if mutant::is_on(Mutant::DataIsFetchedFromVolumes) {
            return Ok(moved?);
        }
        // Who has taken the entry since may have made a volume of the data where it was.
        let Err(lost) = self.check_taken().await else {
            return Ok(moved?);
        };
        match self.on.rename(&trashed, place).await {
            Err(error) if !matches!(error.kind, AdminErrorKind::NotFound) => Err(error.into()),
            // Not there: that one has moved it.
            _ => Err(lost),
        }
    }

    /// Returns the number of the directory, if the driver made it.
    async fn move_data(&self) -> Result<Option<u64>, CatalogError> {
        let (on, record, from) = (self.on, &self.record, data_of(self.entry));
        let there = on.attr(&record.data_dir).await?;
        if on.attr(&from).await?.is_none() {
            // Retained or found directories never moved; another restore may have moved it already.
            return match there {
                Some(attr) if record.made.is_none_or(|made| made == attr.fileid) => Ok(record.made),
                _ => Err(data::gone(on, record)),
            };
        }
        if there.is_some() {
            return Err(in_the_way(on, &record.data_dir));
        }
        data::make_parents(on, &record.data_dir).await?;
        on.rename(&from, &record.data_dir).await?;
        match on.attr(&record.data_dir).await? {
            Some(attr) => Ok(record.made.map(|_| attr.fileid)),
            None => Err(data::gone(on, record)),
        }
    }

    /// Brings the claims to an exclusive volume out of what was taken; whether there were any. A host that
    /// was slow may have made others in what an earlier restore had taken: the highest epoch tells.
    pub(super) async fn bring_claims(&self) -> Result<bool, CatalogError> {
        if self.record.options.access != Access::Exclusive
            || mutant::is_on(Mutant::RestoredClaimsBeginAnew)
        {
            return Ok(false);
        }
        let claims = cluster::claims(&self.record.name, &self.record.id);
        let (home, to) = (self.home, self.dir.join(claims.name()));
        for _ in 0..LOOKS {
            let mut last: Option<(u64, SharePath)> = None;
            // The innermost first: a restore that has lost the entry may be at this, and moves them outwards.
            for layer in layers(home, &self.dir).await?.iter().skip(1).rev() {
                let from = layer.join(claims.name());
                let epoch = highest_epoch(home, &from).await?;
                if epoch.is_some() && epoch >= last.as_ref().map(|(epoch, _)| *epoch) {
                    last = epoch.map(|epoch| (epoch, from));
                }
            }
            let Some((_, from)) = last else {
                return Ok(false);
            };
            match home.rename(&from, &to).await {
                Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => {}
                moved => return Ok(moved.map(|()| true)?),
            }
        }
        Err(CatalogError::RestoredElsewhere(self.entry.entry.clone()))
    }

    /// Takes the entry where the server has forgotten that it was taken: it would stay in the trash beside the
    /// volume.
    async fn take_again(&self) -> Result<(), CatalogError> {
        let from = self.dir.join(RESTORED_FROM);
        if self.home.attr(&from).await?.is_some() || mutant::is_on(Mutant::RestoredUnseen) {
            return Ok(());
        }
        let taken = self.home.rename(&self.entry.at, &from).await;
        taken.map_err(|error| self.lost(error))
    }

    /// Brings the record back; its data is in place.
    pub(super) async fn publish(&self) -> Result<(), CatalogError> {
        self.take_again().await?;
        let claimed = self.bring_claims().await?;
        fail::fail_point!("restore.claims", |_| crate::failpoint::die());
        self.put_in_place(claimed).await
    }

    /// Puts the volume in its place. `claimed`: with claims.
    pub(super) async fn put_in_place(&self, claimed: bool) -> Result<(), CatalogError> {
        let (home, volume) = (self.home, layout::volume(&self.record.name));
        if mutant::is_on(Mutant::RestoreDeletesFirst) {
            share::delete_tree(home, &self.dir.join(RESTORED_FROM)).await?;
        }
        let failed = home.rename(&self.dir, &volume).await.err();
        fail::fail_point!("restore.published", |_| crate::failpoint::die());
        let dials = home.dials();
        match (self.look_at(&volume, claimed).await?, failed) {
            (Published::Whole, None) => {
                self.delete_taken(&volume, dials).await;
                Ok(())
            }
            // The reply was lost, or it is another restore's: what was taken is for a sweep, or for that one.
            (Published::Whole, Some(_)) => Ok(()),
            (Published::InPart, _) => self.put_back(&volume).await,
            (Published::Another, Some(_)) => Err(CatalogError::NameTaken(self.record.name.clone())),
            (Published::Nothing, Some(error)) => Err(self.lost(error)),
            // It was there, and has been removed since.
            (Published::Another, None) => Ok(()),
            // The same, or the server has forgotten all of it.
            (Published::Nothing, None) => {
                let was_empty = home.remove_dir(&volume).await.unwrap_or(false);
                match was_empty || home.attr(&self.dir).await?.is_some() {
                    false => Ok(()),
                    true => Err(CatalogError::RestoredElsewhere(self.entry.entry.clone())),
                }
            }
        }
    }

    /// Looks at what was published: a server may have forgotten a part of it on the way.
    async fn look_at(&self, volume: &SharePath, claimed: bool) -> Result<Published, CatalogError> {
        let (home, record) = (self.home, &self.record);
        if mutant::is_on(Mutant::RestoredUnseen) {
            return Ok(Published::Whole);
        }
        match share::read(home, &record.name).await {
            Ok(Some(there)) if there.id == record.id => {}
            Ok(Some(_)) => return Ok(Published::Another),
            Ok(None) | Err(CatalogError::Record { .. }) => {
                let there = records(home, volume, &self.entry.name).await;
                let is_ours = there.is_ok_and(|there| there.iter().any(|it| it.id == record.id));
                return Ok(match is_ours {
                    true => Published::InPart,
                    false => Published::Nothing,
                });
            }
            Err(error) => return Err(error),
        }
        let claims = volume.join(cluster::claims(&record.name, &record.id).name());
        let in_part = (claimed && home.attr(&claims).await?.is_none())
            || (record.moves_data() && self.on.attr(&data_of(self.entry)).await?.is_some());
        Ok(match in_part {
            true => Published::InPart,
            false => Published::Whole,
        })
    }

    /// Puts what was published in part back into the entry, where it is found again.
    async fn put_back(&self, volume: &SharePath) -> Result<(), CatalogError> {
        tracing::warn!(volume = %self.record.name, "the server forgot a part of its restore: put back");
        self.home.mkdir(&self.dir.parent(), 0o755).await?;
        let moved = self.home.rename(volume, &self.dir).await;
        moved.map_err(|error| self.lost(error))?;
        Err(CatalogError::RestoredElsewhere(self.entry.entry.clone()))
    }

    /// Deletes what was taken, as long as it is reached by the connections that it was looked at by.
    async fn delete_taken(&self, volume: &SharePath, dials: u64) {
        let (home, from) = (self.home, volume.join(RESTORED_FROM));
        if let Err(error) = home.remove_tree(&from, &|| home.dials() == dials).await {
            tracing::warn!(volume = %self.record.name, %error,
                "restored; what it was restored from stays beside its record until it is swept");
        }
    }
}

/// What a restore finds where it has published.
enum Published {
    Whole,
    /// Something of it is missing.
    InPart,
    /// Another volume.
    Another,
    Nothing,
}

/// Whether something was not where it was a moment ago.
fn is_missing(error: &CatalogError) -> bool {
    match error {
        CatalogError::Share(error) => matches!(error.kind, AdminErrorKind::NotFound),
        CatalogError::DataGone { .. } => true,
        _ => false,
    }
}
