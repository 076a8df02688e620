//! Making a volume: its directory aside, its record on the share, the directory put in place.
//!
//! Invariants:
//! - The record appears by one RENAME of a prepared directory, so of several hosts that make a
//!   volume at once exactly one wins, and no host ever sees half a record.
//! - A Create that fails leaves nothing: the record goes first, then the empty data directory.

use std::sync::Arc;

use super::share::{self, Published};
use super::{Catalog, CatalogError, Copy, Stamp, data, trash};
use crate::layout::{self, TrashName};
use crate::mutant::{self, Mutant};
use crate::volume::record::FORMAT;
use crate::volume::{OnRemove, Record, VolumeName, VolumeOptions};
use nfs::admin::Admin;

/// How often a Create starts over because another host was removing the volume just then.
const CREATE_TRIES: usize = 5;

/// Whether a Create call made the volume.
#[derive(Debug, Clone, PartialEq)]
pub(crate) enum Creation {
    New(Arc<Record>),
    Existing(Arc<Record>),
    /// A volume that was removed a moment ago is back, with the options that this call names. It has data,
    /// so it stays whoever has heard of it.
    Recreated(Arc<Record>),
}

/// Where a new volume's data directory comes from.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Source {
    /// It is made, unless it is there.
    Make,
    /// It is there.
    Find,
}

/// When a volume is made: by the clock of the home share's server, which tells when others were removed, if there is
/// one.
async fn made_at(
    home: Option<&Admin>,
    on: &Admin,
    prepared: Option<data::Prepared>,
) -> Result<u64, CatalogError> {
    match (home, prepared) {
        (Some(home), Some(prepared)) if home.share() == on.share() => Ok(prepared.at),
        (Some(home), _) => trash::now(home).await,
        (None, Some(prepared)) => Ok(prepared.at),
        // Nothing is made on the share of a directory that was found, and nobody but this host reads when.
        (None, None) => Ok(chance::host_time()),
    }
}

impl Catalog {
    /// Makes a volume, or finds it with the same options. `home` is the home share, `on` the
    /// share of the data. Makes `.nfsvol/` where it is absent.
    ///
    /// # Errors
    /// [`CatalogError::Different`] when the volume exists with other options, whoever won the
    /// race for its name; otherwise what went wrong, and then nothing was made.
    pub(crate) async fn create(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        name: &VolumeName,
        options: &VolumeOptions,
        default_on_remove: OnRemove,
    ) -> Result<Creation, CatalogError> {
        self.create_from(home, on, name, options, default_on_remove, Source::Make)
            .await
    }

    /// As [`Self::create`], of a data directory as `source` says.
    #[tracing::instrument(level = "debug", skip_all)]
    pub(super) async fn create_from(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        name: &VolumeName,
        options: &VolumeOptions,
        default_on_remove: OnRemove,
        source: Source,
    ) -> Result<Creation, CatalogError> {
        if self.only_here.is_unreadable(name) {
            let reason = "see the log".to_owned();
            return Err(CatalogError::LocalRecord {
                name: name.clone(),
                reason,
            });
        }
        if let Some(home) = home {
            self.init(home).await?;
        }
        for _ in 0..CREATE_TRIES {
            let existing = match home {
                Some(home) if !self.is_only_here(name) => {
                    let before = self.copies.get(name);
                    let there = self.read(home, name).await?;
                    self.note(before.as_ref(), name, there, None).await?
                }
                _ => self.get(name),
            };
            if let Some(record) = existing {
                if let Some(home) = home.filter(|_| !self.is_only_here(name))
                    && let Some(entry) = share::removal(home, &record).await?
                {
                    let share = self.share_of(&record.options)?;
                    if record.moves_data() && share != on.share() {
                        return Err(CatalogError::Removing(record));
                    }
                    self.finish_removal(home, Some(on), &record, &entry).await?;
                    continue;
                }
                return self.existing(on, record, options).await;
            }
            if let Some(made) = self
                .try_create(home, on, name, options, default_on_remove, source)
                .await?
            {
                return Ok(made);
            }
        }
        Err(CatalogError::Unsettled(name.clone()))
    }

    async fn existing(
        &self,
        on: &Admin,
        record: Arc<Record>,
        asked: &VolumeOptions,
    ) -> Result<Creation, CatalogError> {
        let differences = record.options.differences(asked);
        if !differences.is_empty() {
            return Err(CatalogError::Different {
                name: record.name.clone(),
                differences,
                created_by: record.created_by.clone(),
                created: record.created.clone(),
            });
        }
        // A crash may have come between the record and its directory.
        if !data::exists(on, &record.data_dir).await? {
            data::place(on, &record).await?;
        }
        Ok(Creation::Existing(record))
    }

    /// One attempt to make the volume; `None` when another host was first.
    async fn try_create(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        name: &VolumeName,
        options: &VolumeOptions,
        default_on_remove: OnRemove,
        source: Source,
    ) -> Result<Option<Creation>, CatalogError> {
        let id = layout::random_id().map_err(CatalogError::state("random bytes"))?;
        let data_dir = options.data_dir(name)?;
        let prepared = match source {
            Source::Make => data::prepare(on, name, &id, &data_dir, options.owner).await?,
            Source::Find if data::exists(on, &data_dir).await? => None,
            Source::Find => return Err(data::absent(on, name, &data_dir)),
        };
        fail::fail_point!("create.aside", |_| crate::failpoint::die());
        let now = made_at(home, on, prepared).await?;
        let mut record = Record {
            format: FORMAT,
            name: name.clone(),
            id,
            created: layout::rfc3339(now),
            created_by: self.host.clone(),
            options: options.clone(),
            data_dir,
            on_remove: options.on_remove.unwrap_or(default_on_remove),
            made: prepared.map(|p| p.fileid),
            squashed: prepared.is_some_and(|p| p.squashed),
            recreated: None,
        };
        if source == Source::Make
            && let Some(entry) = self.removed_lately(home, on, &record, now).await?
        {
            if prepared.is_some() {
                data::discard_prepared(on, &record.id).await;
            }
            return self.recreate(home, on, &entry, &record).await;
        }
        let failed = match self
            .publish_and_place(home, on, &mut record, prepared.is_some())
            .await
        {
            Ok(Published::Won) => return Ok(Some(Creation::New(Arc::new(record)))),
            Ok(Published::Lost) => Ok(None),
            Err(error) => Err(error),
        };
        if prepared.is_some() {
            data::discard_prepared(on, &record.id).await;
        }
        failed
    }

    async fn publish_and_place(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        record: &mut Record,
        prepared: bool,
    ) -> Result<Published, CatalogError> {
        if let Some(home) = home
            && share::publish(home, record).await? == Published::Lost
        {
            return Ok(Published::Lost);
        }
        fail::fail_point!("create.published", |_| crate::failpoint::die());
        let done = async {
            if let Some(home) = home {
                self.check_around(home, record).await?;
                if !prepared
                    && !mutant::is_on(Mutant::FoundIsThereForEver)
                    && !data::exists(on, &record.data_dir).await?
                {
                    // It has gone with a removal that was over before its mark was looked for.
                    return Ok(Published::Lost);
                }
            }
            let placed = self.place_and_keep(home, on, record, prepared).await;
            placed.map(|()| Published::Won)
        };
        match done.await {
            Ok(Published::Won) => Ok(Published::Won),
            taken_back @ (Ok(Published::Lost)
            | Err(CatalogError::Removing(_) | CatalogError::Excluded { .. })) => {
                if let Some(home) = home {
                    self.retract(home, record, None).await?;
                }
                taken_back
            }
            Err(error) if home.is_some() => Err(CatalogError::HalfMade {
                record: Arc::new(record.clone()),
                source: error.into(),
            }),
            Err(error) => {
                self.undo(None, on, record, false).await;
                Err(error)
            }
        }
    }

    /// Refuses a new volume whose directory overlaps with that of a volume which is being removed, or
    /// which it must not share its data with. The remover marks, then looks at the volumes; a new volume
    /// is published, then the marks are looked at: one of them sees the other. So do two new ones.
    pub(super) async fn check_around(
        &self,
        home: &Admin,
        record: &Record,
    ) -> Result<(), CatalogError> {
        if !record.may_overlap() || mutant::is_on(Mutant::RemoveTrustsItsList) {
            return Ok(());
        }
        self.catch_up(home).await?;
        for other in self.overlapping(record).await {
            let excluded = record.excludes(&other) && !mutant::is_on(Mutant::ExclusiveByName);
            if !excluded && !other.moves_data() {
                continue;
            }
            let is_removed = share::removal(home, &other).await?.is_some();
            if is_removed && other.moves_data() {
                return Err(CatalogError::Removing(other));
            }
            if excluded && !is_removed {
                return Err(CatalogError::Excluded {
                    path: record.data_dir.clone(),
                    other: other.name.clone(),
                    other_path: other.data_dir.clone(),
                });
            }
        }
        Ok(())
    }

    async fn place_and_keep(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        record: &mut Record,
        prepared: bool,
    ) -> Result<(), CatalogError> {
        // How the volume's directory looks now, so that nobody has to read the record again.
        let stamp = async {
            let attr = home?.attr(&layout::volume(&record.name)).await;
            attr.ok()?.as_ref().map(Stamp::from)
        };
        let place = async {
            match prepared {
                true => data::place(on, record).await.map(Some),
                false => Ok(None),
            }
        };
        let (mut stamp, placed) = tokio::join!(stamp, place);
        if let Some(placed) = placed? {
            let made = match placed {
                data::Placed::There => record.made,
                data::Placed::Remade(fileid) => Some(fileid),
                data::Placed::Found => None,
            };
            if made != record.made {
                record.made = made;
                stamp = None;
                if let Some(home) = home {
                    share::rewrite(home, record).await?;
                }
            }
        }
        fail::fail_point!("create.placed", |_| crate::failpoint::die());
        let copy = Copy {
            record: Arc::new(record.clone()),
            stamp,
        };
        let copies = if home.is_some() {
            &self.copies
        } else {
            &self.only_here
        };
        tokio::task::block_in_place(|| copies.put(copy))
            .map_err(CatalogError::state("writing the volume's record"))
    }

    /// Takes back a volume that was made by a call whose caller is gone or that failed half-way:
    /// its record, and its data directory while that is empty. `marked`: its removal is, so that no host
    /// has it or will ([`crate::cluster::removal`]).
    pub(crate) async fn undo(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        record: &Record,
        marked: bool,
    ) {
        let undone = async {
            let mark = match home {
                // Not as this call has looked it up.
                Some(home) => share::removal(&home.scoped(), record).await?,
                None => None,
            };
            if let (Some(home), true, None) = (home, marked, &mark) {
                // Another host has finished the removal; the volume may have been restored since.
                let now = self.fetch(&home.scoped(), &record.name).await;
                return now.map(drop);
            }
            let used = data::is_used(on, record).await?;
            // Somebody who is no host of this cluster may have written to it.
            if used == Some(true) {
                if let (Some(home), Some(mark)) = (home, &mark) {
                    share::unmark(home, record, mark).await?;
                }
                return Ok(());
            }
            if let Some(home) = home
                && !self.retract(home, record, mark.as_ref()).await?
            {
                return Ok(());
            }
            if used.is_some() {
                on.remove_dir(&record.data_dir).await?;
            }
            self.forget_removed(record).await?;
            tokio::task::block_in_place(|| self.only_here.remove(&record.name))
                .map_err(CatalogError::state("removing a record"))
        };
        if let Err(error) = undone.await {
            tracing::warn!(volume = %record.name, %error, "could not be taken back; it stays");
        }
    }

    /// Takes a record from the share, if it is still the volume's, with the mark of this removal: what was
    /// moved is looked at, and put back if it is another one, or one that was removed and restored.
    async fn retract(
        &self,
        home: &Admin,
        record: &Record,
        mark: Option<&TrashName>,
    ) -> Result<bool, CatalogError> {
        let volume = layout::volume(&record.name);
        let aside = layout::tmp().join(&format!("{}.undo", record.id));
        home.rename(&volume, &aside).await?;
        let look = async {
            let is_it = trash::is_in(home, &aside, record).await?
                && share::removal_in(home, &aside, record).await?.as_ref() == mark;
            Ok::<_, CatalogError>(is_it)
        };
        let is_it = look.await;
        if matches!(is_it, Ok(true)) || mutant::is_on(Mutant::UndoneByName) {
            share::discard(home, &aside).await;
        } else {
            // Nor does what could not be looked at stay where a sweep would delete it.
            home.rename(&aside, &volume).await?;
        }
        is_it
    }
}
