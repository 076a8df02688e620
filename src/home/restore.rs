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
//! have `from` in the trash. It is moved to `tmp/` and looked at there first, since the volume may have been
//! removed meanwhile, and another one restored. A `from` that stays is not needed, and does no harm: it goes
//! to the trash with the volume, comes back beneath another one, and a sweep deletes it ([`super::sweep`]).
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
//! the whole restore may leave data without a record; over NFSv3 so may one that restarts in the microseconds
//! between a look at the connection and the call that deletes.

mod publish;

use std::sync::Arc;

pub(super) use self::publish::delete_taken;
use super::error::CatalogError;
use super::trash::{self, TrashEntry};
use super::{Catalog, Copy, data, share};
use crate::layout::{self, RESTORED_FROM, TRASH_DATA, TrashName};
use crate::mutant::{self, Mutant};
use crate::volume::{Record, VolumeName};
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, AdminErrorKind};

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
    pub(crate) async fn restore(
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
        self.bring_back(home, on, entry, record, layout::RESTORING)
            .await
    }

    /// Brings an entry back as `record`, whose name is free, by a directory that is called so.
    pub(super) async fn bring_back(
        &self,
        home: &Admin,
        on: &Admin,
        entry: &TrashEntry,
        record: Record,
        called: &str,
    ) -> Result<Arc<Record>, CatalogError> {
        if self.home.is_some() {
            self.catch_up(home).await?;
        }
        check_free(on, entry, &record).await?;
        let mut restoring = Restoring::take(home, on, entry, record, called).await?;
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
            // Not the entry: a server that was restarted may have put the data there again.
            share::delete_tree(home, &restoring.dir).await?;
        }
        trash::clear(home, entry).await;
        if on.share() != home.share() && entry.holds_data() {
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
    /// Takes the entry, to bring it back as `record`, into a directory that is called so.
    pub(super) async fn take(
        home: &'a Admin,
        on: &'a Admin,
        entry: &'a TrashEntry,
        record: Record,
        called: &str,
    ) -> Result<Self, CatalogError> {
        let nonce = match mutant::is_on(Mutant::RestoresShareADirectory) {
            true => String::new(),
            false => layout::random_id().map_err(CatalogError::state("random bytes"))?,
        };
        let dir = layout::trash().join(&entry.entry);
        let dir = dir.join(&format!("{called}{nonce}"));
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
            AdminErrorKind::NotFound => self.had_by_another(),
            _ => error.into(),
        }
    }

    fn had_by_another(&self) -> CatalogError {
        CatalogError::RestoredElsewhere(self.entry.entry.clone())
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
            None => Err(self.had_by_another()),
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
            Some(place) => self.fetch(catalog, &place).await,
            None => Ok(()),
        }
    }

    /// Where another restore of the entry has moved the data.
    pub(super) async fn elsewhere(
        &self,
        catalog: &Catalog,
    ) -> Result<Option<SharePath>, CatalogError> {
        if !self.entry.holds_data() || self.on.attr(&data_of(self.entry)).await?.is_some() {
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
            if self.is_known_at(catalog, moved).await {
                return Err(in_the_way(self.on, moved));
            }
            self.check_taken().await?;
            return Ok(Some(before.data_dir));
        }
        Ok(None)
    }

    /// Moves data back into the entry, if that is still this restore's, and no volume was made of the place
    /// meanwhile.
    pub(super) async fn fetch(
        &self,
        catalog: &Catalog,
        place: &SharePath,
    ) -> Result<(), CatalogError> {
        let trashed = data_of(self.entry);
        let moved = self.on.rename(place, &trashed).await;
        if mutant::is_on(Mutant::DataIsFetchedFromVolumes) {
            return Ok(moved?);
        }
        // Who has taken the entry since may have made a volume of the data where it was.
        let lost = match self.check_taken().await {
            Ok(()) => {
                moved?;
                match self.is_used(catalog, place).await {
                    Ok(false) => return Ok(()),
                    Ok(true) => in_the_way(self.on, place),
                    Err(error) => error,
                }
            }
            Err(lost) => lost,
        };
        match self.on.rename(&trashed, place).await {
            Err(error) if !matches!(error.kind, AdminErrorKind::NotFound) => Err(error.into()),
            // Not there: that one has moved it.
            _ => Err(lost),
        }
    }

    /// Whether a volume has a place that data was moved from. One that is made from now on finds nothing there.
    async fn is_used(&self, catalog: &Catalog, place: &SharePath) -> Result<bool, CatalogError> {
        if catalog.home.is_none() || mutant::is_on(Mutant::PlacesAreAskedForFirst) {
            return Ok(false);
        }
        catalog.catch_up(self.home).await?;
        Ok(self.is_known_at(catalog, place).await)
    }

    /// Whether a volume that this host knows has its data at a place, around it or in it.
    async fn is_known_at(&self, catalog: &Catalog, place: &SharePath) -> bool {
        let used = Record {
            data_dir: place.clone(),
            ..self.record.clone()
        };
        !catalog.overlapping(&used).await.is_empty()
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
}

/// Whether something was not where it was a moment ago.
fn is_missing(error: &CatalogError) -> bool {
    match error {
        CatalogError::Share(error) => matches!(error.kind, AdminErrorKind::NotFound),
        CatalogError::DataGone { .. } => true,
        _ => false,
    }
}
