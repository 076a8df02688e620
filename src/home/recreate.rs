//! A Create that follows a Remove of the same name with other options: Docker's Compose changes the options
//! of a volume so, in two calls. The volume that was removed comes back, with the new options.
//!
//! It is a restore ([`super::restore`]) of a record with other options, so what goes for that goes for this:
//! whatever moment it is cut off at, the entry in the trash tells what it is, and the next one goes on with it,
//! by the name of the directory that has taken the entry ([`layout::RECREATING`]): the record in it may have the
//! options that are asked for by then.
//!
//! Invariants: only the last removal of a name counts, and only for [`LATELY`]. What a restore is about to bring
//! back is left to that. What comes back has its id, so it keeps the claims to an exclusive volume, also while
//! it is none.
//!
//! Known limits: options are compared as they count, so one that is given with its default is equal to one
//! that is not given. As with a restore, another host that makes a volume of a directory around an exclusive
//! one's or in it at the same moment is not seen. Without a home share only what this host has made comes back.

use std::time::Duration;

use super::Catalog;
use super::create::Creation;
use super::error::CatalogError;
use super::trash::{self, TrashEntry};
use crate::layout;
use crate::mutant::{self, Mutant};
use crate::volume::{OnRemove, Record, Recreate};
use nfs::admin::{Admin, Attr};

/// For so long after its removal, by the server's clock, a volume that is made with other options is the same
/// one. Compose makes both calls within seconds, and waits for its containers before; by hand it is a matter of
/// minutes. Who makes a volume of the name later means another one, and would not expect the data of this one.
const LATELY: Duration = Duration::from_secs(600);
/// Where another host was first, it is given so long to finish.
const PAUSE: Duration = Duration::from_millis(200);

/// Whether the data of a removed volume can come back: it lies in its entry, and nothing where it is to come; or it
/// is there, as where a recreate was cut off.
async fn data_waits(on: &Admin, entry: &TrashEntry) -> Result<bool, CatalogError> {
    let (made, place) = (entry.record.made, &entry.record.data_dir);
    let is_it = |there: Option<Attr>| there.is_some_and(|there| made == Some(there.fileid));
    let there = on.attr(place).await?;
    Ok(match trash::has_data(on, entry).await? {
        true => there.is_none(),
        // Another host may have brought it there in between.
        false => is_it(there) || is_it(on.attr(place).await?),
    })
}

impl Catalog {
    /// The same catalog, with what a Create does that changes a removed volume's options.
    #[must_use]
    pub(crate) fn recreating(mut self, recreate: Recreate) -> Self {
        self.recreate = recreate;
        self
    }

    /// The removed volume that a Create of `draft` changes the options of. `now` is the time of the home share's
    /// server, or without a home share of that of the data.
    pub(super) async fn removed_lately(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        draft: &Record,
        now: u64,
    ) -> Result<Option<TrashEntry>, CatalogError> {
        if self.recreate == Recreate::Empty {
            return Ok(None);
        }
        let at = home.unwrap_or(on);
        let Some(trash) = at.attr(&layout::trash()).await? else {
            return Ok(None);
        };
        // Each removal changes it, so most often it need not be listed.
        if now.saturating_sub(trash.mtime.secs) > LATELY.as_secs() {
            return Ok(None);
        }
        let entry = match trash::last_of(&at.unscoped(), &draft.name).await {
            Ok(Some(entry)) => entry,
            Ok(None) => return Ok(None),
            Err(error @ CatalogError::Record { .. }) => {
                tracing::warn!(volume = %draft.name, %error, "what was removed last stays in the trash");
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let is_late = entry.removed_secs.abs_diff(now) > LATELY.as_secs();
        let is_others = home.is_none() && entry.record.created_by != self.host;
        if is_late || is_others || !self.is_place_of(&entry, draft) {
            return Ok(None);
        }
        let is_changed = (entry.is_whole() || mutant::is_on(Mutant::RecreatesTakeRestores))
            && entry.record.on_remove == OnRemove::Trash
            && !entry.record.options.differences(&draft.options).is_empty();
        let is_it =
            (entry.is_recreated() || is_changed) && data_waits(&on.unscoped(), &entry).await?;
        Ok(is_it.then_some(entry))
    }

    /// Whether a removed volume had its name, share and directory, which nfsvol made.
    fn is_place_of(&self, entry: &TrashEntry, draft: &Record) -> bool {
        let place = |record: &Record| {
            let share = record.share(self.home()).cloned();
            (record.name.clone(), share, record.data_dir.clone())
        };
        entry.record.made.is_some() && place(&entry.record) == place(draft)
    }

    /// Brings a removed volume back, with the options of `draft`; `None` when another host was first.
    pub(super) async fn recreate(
        &self,
        home: Option<&Admin>,
        on: &Admin,
        entry: &TrashEntry,
        draft: &Record,
    ) -> Result<Option<Creation>, CatalogError> {
        let differences = entry.record.options.differences(&draft.options);
        let removed = entry.removed.clone();
        if self.recreate == Recreate::Refuse {
            return Err(CatalogError::RemovedLately {
                name: draft.name.clone(),
                entry: entry.entry.clone(),
                removed,
                differences,
            });
        }
        let record = Record {
            options: draft.options.clone(),
            on_remove: draft.on_remove,
            recreated: Some(removed),
            ..entry.record.clone()
        };
        if let Some(home) = home {
            // Its directory may have become another volume's too, while it was there.
            let found = Record {
                made: None,
                ..record.clone()
            };
            self.check_around(home, &found).await?;
        }
        let (at, on) = (home.unwrap_or(on).unscoped(), on.unscoped());
        match self
            .bring_back(&at, &on, entry, record, layout::RECREATING)
            .await
        {
            Ok(record) => {
                tracing::info!(volume = %record.name, entry = entry.entry, changed = differences.join("; "),
                    "removed and made anew with other options: its data was kept");
                Ok(Some(Creation::Recreated(record)))
            }
            Err(CatalogError::RestoredElsewhere(_) | CatalogError::NameTaken(_)) => {
                tokio::time::sleep(PAUSE).await;
                Ok(None)
            }
            Err(error) => Err(error),
        }
    }
}
