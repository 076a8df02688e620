//! The catalog: all records, on the home share and in a durable copy on every host.
//!
//! Invariants:
//! - A volume that this host has ever seen is in the local copy before anybody is told of it, so
//!   "no such volume" is never said of one that Docker knows while the share is silent.
//! - The share's answer wins; nothing leaves the local copy unless the home share itself, known by
//!   its id, answered that the volume is gone.
//! - Without a home share the local records are the only ones; each volume then names its share.
//!
//! Known limit: a volume that another host makes or removes is noticed at the next poll, or when
//! this host is asked for it by name.

mod adopt;
mod create;
mod data;
mod error;
mod expiry;
mod local;
mod recreate;
mod repair;
mod restore;
mod share;
mod sweep;
mod sync;
#[cfg(test)]
mod tests;
mod trash;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;
use std::time::Duration;

use tokio::sync::Mutex;

pub(crate) use self::adopt::Adopted;
pub(crate) use self::create::Creation;
pub(crate) use self::error::CatalogError;
use self::expiry::since_boot;
use self::local::{Copy, LocalCopy, Stamp};
pub(crate) use self::sync::Changes;
pub(crate) use self::trash::{TrashEntry, Trashed};
use crate::layout::{self, TrashName};
use crate::mutant::{self, Mutant};
use crate::sys::files::{write_durably, write_whole};
use crate::volume::{OnRemove, Record, Recreate, VolumeName, VolumeOptions};
use nfs::address::{Server, Share};
use nfs::admin::Admin;
use nfs::connect;

/// How long a Get may wait for the share.
pub(crate) const LOOKUP_WAIT: Duration = Duration::from_millis(250);

/// How long finding a server's addresses may take before two names count as one server's.
const RESOLVE_WAIT: Duration = Duration::from_secs(2);

/// What is known of a name.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Known {
    Here(Arc<Record>),
    /// The share said so, or this host has a complete copy without it.
    Absent,
    /// Neither the share nor a readable local copy could tell.
    Unknown,
}

/// All records that this host knows, and the way to the others.
#[derive(Debug)]
pub(crate) struct Catalog {
    home: Option<Share>,
    host: String,
    state_dir: PathBuf,
    /// Copies of the records on the home share.
    copies: LocalCopy,
    /// Records of volumes made without a home share: they are only here.
    only_here: LocalCopy,
    sync: Mutex<sync::State>,
    /// What lies in the trash, and for how long this host has seen it.
    seen: Mutex<expiry::Seen>,
    /// What a Create does that changes a removed volume's options.
    recreate: Recreate,
    /// Held while `.nfsvol/` is made, so that one process does not race with itself.
    making: Mutex<()>,
}

impl Catalog {
    /// Opens the catalog's files below `state_dir`. Blocks; talks to nobody.
    ///
    /// # Errors
    /// [`CatalogError::State`] when the state directory cannot be made or read.
    pub(crate) fn open(
        state_dir: &Path,
        home: Option<Share>,
        host: &str,
    ) -> Result<Self, CatalogError> {
        let opened = |dir: &str| {
            LocalCopy::open(&state_dir.join(dir)).map_err(CatalogError::state(dir.to_owned()))
        };
        let sync = sync::State::load(state_dir)?;
        Ok(Self {
            home,
            host: host.to_owned(),
            state_dir: state_dir.to_owned(),
            copies: opened("catalog")?,
            only_here: opened("volumes")?,
            sync: sync.into(),
            seen: expiry::Seen::load(state_dir)?.into(),
            recreate: Recreate::default(),
            making: Mutex::default(),
        })
    }

    /// The same catalog once more, for a test that goes on from one moment in several ways: what is
    /// in its files is not looked at again.
    #[cfg(test)]
    pub(crate) fn copy(&self) -> Self {
        Self {
            home: self.home.clone(),
            host: self.host.clone(),
            state_dir: self.state_dir.clone(),
            copies: self.copies.copy(),
            only_here: self.only_here.copy(),
            sync: self.sync.try_lock().unwrap().again().into(),
            seen: self.seen.try_lock().unwrap().clone().into(),
            recreate: self.recreate,
            making: Mutex::default(),
        }
    }

    /// The home share.
    #[must_use]
    pub(crate) fn home(&self) -> Option<&Share> {
        self.home.as_ref()
    }

    /// The share that holds a volume's data.
    ///
    /// # Errors
    /// [`CatalogError::NoShare`] when neither the volume nor the host names one.
    pub(crate) fn share_of<'a>(
        &'a self,
        options: &'a VolumeOptions,
    ) -> Result<&'a Share, CatalogError> {
        options
            .share
            .as_ref()
            .or_else(|| self.home())
            .ok_or(CatalogError::NoShare)
    }

    /// A record by the local copy alone.
    #[must_use]
    pub(crate) fn get(&self, name: &VolumeName) -> Option<Arc<Record>> {
        self.only_here
            .get(name)
            .or_else(|| self.copies.get(name))
            .map(|copy| copy.record)
    }

    /// Every record of the local copy, by name.
    #[must_use]
    pub(crate) fn list(&self) -> Vec<Arc<Record>> {
        let mut copies = self.only_here.all();
        copies.extend(self.copies.all());
        copies.sort_by(|a, b| a.record.name.cmp(&b.record.name));
        copies.dedup_by(|a, b| a.record.name == b.record.name);
        copies.into_iter().map(|copy| copy.record).collect()
    }

    /// How many records the local copy holds.
    #[must_use]
    pub(crate) fn len(&self) -> usize {
        self.copies.len() + self.only_here.len()
    }

    /// Whether the volume was made without a home share: no other host knows it.
    #[must_use]
    pub(crate) fn is_only_here(&self, name: &VolumeName) -> bool {
        self.only_here.get(name).is_some()
    }

    /// What is known of a name that the local copy does not hold: asks the share, until `deadline`.
    pub(crate) async fn look_up(
        &self,
        home: Option<&Admin>,
        name: &VolumeName,
        deadline: tokio::time::Instant,
    ) -> Known {
        if let Some(record) = self.get(name) {
            return Known::Here(record);
        }
        if self.only_here.is_unreadable(name) {
            return Known::Unknown;
        }
        if self.home.is_none() {
            return Known::Absent;
        }
        if let Some(home) = home {
            match tokio::time::timeout_at(deadline, self.fetch(home, name)).await {
                Ok(Ok(Some(record))) => return Known::Here(record),
                Ok(Ok(None)) => return Known::Absent,
                Ok(Err(error)) => {
                    tracing::debug!(volume = %name, %error, "the share does not tell")
                }
                Err(_) => tracing::debug!(volume = %name, "the share is silent"),
            }
        }
        // A complete copy without the name: no host said the volume exists while this one could
        // listen, and what Docker knows of it was in the copy first.
        if self.copies.is_unreadable(name) || !self.sync.lock().await.tells_of(name) {
            Known::Unknown
        } else {
            Known::Absent
        }
    }

    /// Reads one record from the home share into the local copy; `None` when it is not there.
    ///
    /// # Errors
    /// [`CatalogError`] when the share cannot tell, or is another one than it was.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn fetch(
        &self,
        home: &Admin,
        name: &VolumeName,
    ) -> Result<Option<Arc<Record>>, CatalogError> {
        if self.is_only_here(name) {
            return Ok(self.get(name));
        }
        // Another call may make the volume after this one has found it absent.
        let before = self.copies.get(name);
        let record = self.read(home, name).await?;
        if record.is_none() {
            // Not there, if this is the share that the copy is of, and its list is there.
            self.verify(home).await?;
            if before.is_some() && !mutant::is_on(Mutant::NoListNoVolume) {
                share::has_volumes(home).await?;
            }
        }
        self.note(before.as_ref(), name, record, None).await
    }

    async fn read(&self, home: &Admin, name: &VolumeName) -> Result<Option<Record>, CatalogError> {
        let unread = self.sync.lock().await.unread().contains_key(name);
        let is_known = unread || self.copies.get(name).is_some();
        let read = match is_known && !mutant::is_on(Mutant::NoRecordNoVolume) {
            true => share::read_known(home, name).await,
            false => share::read(home, name).await,
        };
        self.sync.lock().await.note(name, &read);
        read
    }

    /// The volumes whose record on the home share could not be read when it was looked at last, and why.
    pub(crate) async fn unread(&self) -> BTreeMap<VolumeName, String> {
        self.sync.lock().await.unread().clone()
    }

    /// As [`fetch`](Self::fetch), but reads the record only if the volume's directory has changed
    /// since that was done last.
    ///
    /// # Errors
    /// As [`fetch`](Self::fetch).
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn revalidate(
        &self,
        home: &Admin,
        name: &VolumeName,
    ) -> Result<Option<Arc<Record>>, CatalogError> {
        if self.is_only_here(name) {
            return Ok(self.get(name));
        }
        // Seen before the record is read, so never newer than it.
        let Some(attr) = home.attr(&layout::volume(name)).await? else {
            return self.fetch(home, name).await;
        };
        let stamp = Some(Stamp::from(&attr));
        match self.copies.get(name).filter(|copy| copy.stamp == stamp) {
            Some(copy) => Ok(Some(copy.record)),
            None => {
                let read = share::read(home, name).await;
                self.sync.lock().await.note(name, &read);
                let Some(record) = read? else {
                    return self.fetch(home, name).await;
                };
                self.note(None, name, Some(record), stamp).await
            }
        }
    }

    /// Puts into the local copy what a share that was just recognised holds under a name, of which
    /// `before` was known when it was asked.
    async fn note(
        &self,
        before: Option<&Copy>,
        name: &VolumeName,
        record: Option<Record>,
        stamp: Option<Stamp>,
    ) -> Result<Option<Arc<Record>>, CatalogError> {
        let record = record.map(Arc::new);
        match &record {
            Some(record) => self.keep(record.clone(), stamp).await?,
            None => drop(self.forget(before, name).await?),
        }
        Ok(record)
    }

    /// Puts a record of the home share into the local copy.
    async fn keep(&self, record: Arc<Record>, stamp: Option<Stamp>) -> Result<(), CatalogError> {
        let known = self.copies.get(&record.name);
        let same = |copy: &Copy| copy.record == record && (stamp.is_none() || copy.stamp == stamp);
        if known.as_ref().is_some_and(same) {
            return Ok(());
        }
        let copy = Copy { record, stamp };
        tokio::task::block_in_place(|| self.copies.put(copy))
            .map_err(CatalogError::state("writing a record"))
    }

    /// Forgets a volume of which `before` was known when it was found to be gone; whether that is
    /// known still.
    async fn forget(&self, before: Option<&Copy>, name: &VolumeName) -> Result<bool, CatalogError> {
        if self.copies.get(name).is_none() && !self.copies.is_unreadable(name) {
            return Ok(false);
        }
        let is_it = |now: Option<&Copy>| {
            let id = |copy: &Copy| copy.record.id.clone();
            now.map(id) == before.map(id) || mutant::is_on(Mutant::ForgottenByName)
        };
        tokio::task::block_in_place(|| self.copies.remove_if(name, is_it))
            .map_err(CatalogError::state("removing a record"))
    }

    /// Checks the volume before it is mounted: its data directory is in place, or is put there.
    ///
    /// # Errors
    /// [`CatalogError::DataGone`] when its directory has gone, and what the share answered.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(crate) async fn ready(on: &Admin, record: &Record) -> Result<(), CatalogError> {
        if !data::exists(on, &record.data_dir).await? {
            if record.made.is_none() {
                return Err(data::gone(on, record));
            }
            data::place(on, record).await?;
        }
        Ok(())
    }

    /// Finds out whether a share would take a removed volume, before anything has changed.
    ///
    /// # Errors
    /// What a share answered that is away, read-only or full.
    pub(crate) async fn try_removal(on: &Admin, record: &Record) -> Result<(), CatalogError> {
        trash::try_out(on, record).await
    }

    /// Makes sure that a record is still its volume's on the share.
    ///
    /// # Errors
    /// [`CatalogError::Absent`] when another volume has the name, or none.
    pub(crate) async fn check_same(home: &Admin, record: &Record) -> Result<(), CatalogError> {
        share::check_same(home, record).await
    }

    /// Makes sure that nobody has used a volume that was just made: its directory is empty.
    ///
    /// # Errors
    /// [`CatalogError::Used`] when it is not.
    pub(crate) async fn check_unused(on: &Admin, record: &Record) -> Result<(), CatalogError> {
        match data::is_used(on, record).await? {
            Some(true) => Err(CatalogError::Used(record.name.clone())),
            _ => Ok(()),
        }
    }

    /// Removes a volume; its data goes where `on_remove` says. `on` is the share of its data, for a
    /// record that [moves it](Record::moves_data). Returns the trash entry to purge at once, for
    /// `on_remove=delete`.
    ///
    /// # Errors
    /// What the share answered; a removal that has begun is finished by the next call, by any host.
    pub(crate) async fn remove(
        &self,
        home: Option<&Admin>,
        on: Option<&Admin>,
        record: &Record,
    ) -> Result<Option<String>, CatalogError> {
        self.remove_marked(home, on, record, false).await
    }

    /// As [`remove`](Self::remove), of a volume whose removal has begun. Where it shows no more,
    /// another host has finished it, and what has the name by now is another volume.
    ///
    /// # Errors
    /// As [`remove`](Self::remove).
    pub(crate) async fn finish(
        &self,
        home: Option<&Admin>,
        on: Option<&Admin>,
        record: &Record,
    ) -> Result<Option<String>, CatalogError> {
        let begun = !mutant::is_on(Mutant::MarkedUnseen);
        self.remove_marked(home, on, record, begun).await
    }

    async fn remove_marked(
        &self,
        home: Option<&Admin>,
        on: Option<&Admin>,
        record: &Record,
        begun: bool,
    ) -> Result<Option<String>, CatalogError> {
        let on = on.filter(|_| record.moves_data());
        let entry = match home.filter(|_| !self.is_only_here(&record.name)) {
            Some(home) => {
                // Marked already, by whoever looked at the other hosts' holds, or by a crash.
                let entry = match share::removal(home, record).await? {
                    Some(entry) => entry,
                    None if begun => {
                        self.forget_removed(record).await?;
                        return Ok(None);
                    }
                    None => {
                        if let Some(on) = on.filter(|on| on.share() != home.share()) {
                            trash::try_out(on, record).await?;
                        }
                        trash::try_out(home, record).await?;
                        share::begin_removal(home, &self.host, record).await?
                    }
                };
                fail::fail_point!("remove.begun", |_| crate::failpoint::die());
                let is_in_trash = self.finish_removal(home, on, record, &entry).await?;
                is_in_trash.then_some(entry)
            }
            None => {
                let entry = match on {
                    Some(on) if self.other_user(None, record).await?.is_none() => {
                        let mut seen = self.seen.lock().await;
                        seen.note(on.share());
                        self.write_seen(&seen)?;
                        drop(seen);
                        trash::remove_local(on, record).await?
                    }
                    _ => None,
                };
                tokio::task::block_in_place(|| self.only_here.remove(&record.name))
                    .map_err(CatalogError::state("removing the volume's record"))?;
                entry
            }
        };
        // Where the data stays, its record is what can be restored.
        let is_deleted = record.on_remove == OnRemove::Delete;
        Ok(entry.filter(|_| is_deleted).map(|e| e.entry()))
    }

    /// Finishes a removal whose mark is binding. Only now is it looked who else uses the directory:
    /// a volume that is made of it from now on finds the mark ([`Self::create`]). Whether the volume is in
    /// the trash.
    async fn finish_removal(
        &self,
        home: &Admin,
        on: Option<&Admin>,
        record: &Record,
        entry: &TrashName,
    ) -> Result<bool, CatalogError> {
        let mut on = on.filter(|_| record.moves_data());
        if on.is_some() {
            if !mutant::is_on(Mutant::RemoveTrustsItsList) {
                self.catch_up(home).await?;
            }
            if self.other_user(Some(home), record).await?.is_some() {
                on = None;
            }
        }
        let finished = trash::finish_removal(home, on, record, entry).await?;
        fail::fail_point!("remove.finished", |_| crate::failpoint::die());
        match finished {
            true => self.forget_removed(record).await?,
            // What has the name by now, the volume itself perhaps.
            false => drop(self.fetch(&home.scoped(), &record.name).await?),
        }
        Ok(finished)
    }

    /// Forgets a volume that was removed, unless it has been made anew.
    async fn forget_removed(&self, record: &Record) -> Result<(), CatalogError> {
        let before = self.copies.get(&record.name);
        let before = before.filter(|copy| copy.record.id == record.id);
        self.forget(before.as_ref(), &record.name).await.map(drop)
    }

    /// Another volume whose directory is the removed one's, lies in it or holds it.
    async fn other_user(
        &self,
        home: Option<&Admin>,
        record: &Record,
    ) -> Result<Option<Arc<Record>>, CatalogError> {
        for other in self.overlapping(record).await {
            // What is being removed itself, and never had data of its own, uses nothing.
            if other.made.is_none()
                && let Some(home) = home.filter(|_| !self.is_only_here(&other.name))
                && share::removal(home, &other).await?.is_some()
            {
                continue;
            }
            tracing::warn!(volume = %record.name, other = %other.name, path = %record.data_dir,
                "the data directory stays: another volume uses it");
            return Ok(Some(other));
        }
        Ok(None)
    }

    /// The volumes, as far as they are known here, whose directory overlaps with a record's.
    async fn overlapping(&self, record: &Record) -> Vec<Arc<Record>> {
        let home = self.home();
        let mut found = Vec::new();
        for other in self.list() {
            if other.name != record.name
                && other.overlaps(record, home)
                && let (Some(share), Some(its)) = (record.share(home), other.share(home))
                && may_be_one_server(share.server(), its.server()).await
            {
                found.push(other);
            }
        }
        found
    }

    /// What is in the trash of a share.
    ///
    /// # Errors
    /// What the share answered.
    pub(crate) async fn trash(&self, home: &Admin) -> Result<Vec<TrashEntry>, CatalogError> {
        trash::list(home).await
    }

    /// The names of what is in the trash of a share, oldest first.
    ///
    /// # Errors
    /// What the share answered.
    pub(crate) async fn trash_names(&self, home: &Admin) -> Result<Vec<Trashed>, CatalogError> {
        trash::names(home).await
    }

    /// Finds the newest trash entry called `wanted` (a volume's name or an entry's).
    ///
    /// # Errors
    /// [`CatalogError::NotInTrash`], with the nearest name.
    pub(crate) async fn find_in_trash(
        &self,
        home: &Admin,
        wanted: &str,
    ) -> Result<TrashEntry, CatalogError> {
        trash::find(home, wanted).await
    }

    /// Deletes a trash entry for good, with the data that is on another share. That goes first: as
    /// long as the entry is there, the data is not forgotten.
    ///
    /// # Errors
    /// What a share answered; the rest is deleted by a later sweep.
    pub(crate) async fn purge(
        home: Option<&Admin>,
        on: Option<&Admin>,
        entry: &str,
    ) -> Result<(), CatalogError> {
        if let Some(on) = on.filter(|on| home.map(Admin::share) != Some(on.share())) {
            trash::purge(on, entry).await?;
        }
        match home {
            Some(home) => trash::purge(home, entry).await,
            None => Ok(()),
        }
    }

    /// Trash entries of a share that are older than `age`, and those that are not kept at all.
    /// Takes away those that a crash left empty.
    ///
    /// Costs a listing of the trash, the reading of each entry that this host has not seen before,
    /// and, of each one that is old by the clocks, a look at its remover's.
    ///
    /// # Errors
    /// What the share answered.
    pub(crate) async fn expired(
        &self,
        admin: &Admin,
        age: Duration,
    ) -> Result<Vec<TrashEntry>, CatalogError> {
        if self.is_home(admin) {
            self.init(admin).await?;
        } else if admin.attr(&layout::trash()).await?.is_none() {
            return Ok(Vec::new());
        }
        let clocks = self.clocks(admin).await?;
        let names = trash::entry_names(admin).await?;
        let unread: Vec<TrashName> = {
            let mut seen = self.seen.lock().await;
            seen.look(admin.share(), since_boot(), &names);
            let is_new = |name: &&TrashName| seen.entry(admin.share(), name).at_once.is_none();
            names.iter().filter(is_new).cloned().collect()
        };
        let mut expired = self.read_new(admin, &unread).await?;
        for name in &names {
            let seen = self.seen.lock().await.entry(admin.share(), name).clone();
            let is_old = |age: Duration| seen.seen >= age.as_secs() || clocks.may_be_old(name, age);
            // Without a record there is nothing to keep, nor anything to be lost.
            if seen.at_once.is_none() && is_old(trash::LEFT_OVER) {
                trash::clear_bare(admin, name).await?;
            }
            let known = expired.iter().any(|entry| entry.entry == name.entry());
            if !known
                && (seen.at_once == Some(true) || is_old(age))
                && let Some(entry) = self.if_old(admin, name, &seen, age).await?
            {
                expired.push(entry);
            }
        }
        let mut seen = self.seen.lock().await;
        if !self.is_home(admin) && names.is_empty() {
            seen.forget_empty(admin.share());
        }
        self.write_seen(&seen)?;
        expired.sort_by(|a, b| (a.removed_secs, &a.entry).cmp(&(b.removed_secs, &b.entry)));
        Ok(expired)
    }

    /// Reads entries for the first time; returns those that are to be deleted whatever their age.
    async fn read_new(
        &self,
        admin: &Admin,
        names: &[TrashName],
    ) -> Result<Vec<TrashEntry>, CatalogError> {
        let read = trash::read(admin, names.to_vec()).await;
        let mut seen = self.seen.lock().await;
        let mut at_once = Vec::new();
        for (name, entry) in names.iter().zip(read) {
            let Some(entry) = entry else { continue };
            let is_deleted = entry.is_deleted();
            seen.entry(admin.share(), name).at_once = Some(is_deleted);
            if is_deleted {
                at_once.push(entry);
            }
        }
        Ok(at_once)
    }

    /// The entry, if it is older than `age` by what this host has seen or by clocks that agree.
    async fn if_old(
        &self,
        admin: &Admin,
        name: &TrashName,
        seen: &expiry::Entry,
        age: Duration,
    ) -> Result<Option<TrashEntry>, CatalogError> {
        let read = trash::read(admin, vec![name.clone()]).await;
        let Some(entry) = read.into_iter().flatten().next() else {
            return Ok(None);
        };
        if seen.seen >= age.as_secs() || seen.at_once == Some(true) {
            return Ok(Some(entry));
        }
        let removers = trash::removers_time(admin, &entry).await?;
        let created = layout::secs(&entry.record.created);
        Ok(expiry::is_true(name, removers, created).then_some(entry))
    }

    /// The shares that this host keeps a trash on although no volume may name them any more.
    pub(crate) async fn trash_shares(&self) -> Vec<Share> {
        self.seen.lock().await.shares()
    }

    /// Deletes what crashes left in `.nfsvol/` of a share, if that is there.
    ///
    /// # Errors
    /// The first thing that the share answered; the others were deleted.
    pub(crate) async fn sweep(&self, admin: &Admin) -> Result<usize, CatalogError> {
        if admin.attr(&layout::tmp()).await?.is_none() {
            return Ok(0);
        }
        let clocks = self.clocks(admin).await?;
        if !clocks.agree() {
            tracing::warn!(share = %admin.share(), "the server's clock is not this host's: \
                what is left over stays until they agree");
            return Ok(0);
        }
        let records = self.list();
        let waits = |id: &str| records.iter().any(|record| record.id == id);
        let (swept, result) = sweep::sweep(admin, clocks, waits).await;
        if swept > 0 {
            tracing::info!(swept, share = %admin.share(), "left-over entries of .nfsvol deleted");
        }
        result.map(|()| swept)
    }

    fn is_home(&self, admin: &Admin) -> bool {
        self.home() == Some(admin.share())
    }

    async fn clocks(&self, admin: &Admin) -> Result<expiry::Clocks, CatalogError> {
        let server = trash::now(admin).await?;
        let host = chance::host_time();
        Ok(expiry::Clocks { server, host })
    }

    fn write_seen(&self, seen: &expiry::Seen) -> Result<(), CatalogError> {
        // What is lost in a power failure is only a time that has to pass once more.
        write_whole(&self.state_dir.join(expiry::FILE), &seen.to_json())
            .map_err(CatalogError::state(expiry::FILE))
    }

    fn write_sync_state(&self, state: &sync::State) -> Result<(), CatalogError> {
        write_durably(&self.state_dir.join(sync::FILE), &state.to_json())
            .map_err(CatalogError::state(sync::FILE))
    }
}

/// Whether two servers may be one under two names: they are two only if they have no address in
/// common.
async fn may_be_one_server(one: &Server, other: &Server) -> bool {
    if one == other || mutant::is_on(Mutant::ServersByName) {
        return one == other;
    }
    if [one, other].contains(&&Server::Embedded) {
        return false;
    }
    let addresses = tokio::join!(
        connect::resolve(one, RESOLVE_WAIT),
        connect::resolve(other, RESOLVE_WAIT)
    );
    match addresses {
        (Ok(one), Ok(other)) => one.iter().any(|address| other.contains(address)),
        // What cannot be told apart is not.
        _ => true,
    }
}
