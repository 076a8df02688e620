//! The last steps of a restore: what was taken becomes a volume again (5 to 8 in [`super`]).
//!
//! Invariant: what is moved or deleted by its name is looked at where it lies then, and put back if it is
//! another volume's, or whole.

use super::{LOOKS, Restoring, data_of, layers, records};
use crate::home::error::CatalogError;
use crate::home::{share, trash};
use crate::layout::{self, RESTORED_FROM};
use crate::mutant::{self, Mutant};
use crate::volume::{Access, Record};
use nfs::address::SharePath;
use nfs::admin::{Admin, AdminError, AdminErrorKind};

/// What a restore finds where it has published.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum Published {
    Whole,
    /// Something of it is missing.
    InPart,
    /// Another volume.
    Another,
    Nothing,
}

/// The highest epoch of claims, 0 where there is none in their directory.
async fn highest_epoch(home: &Admin, claims: &SharePath) -> Result<Option<u64>, AdminError> {
    let entries = home.list(claims).await?;
    Ok(entries.map(|entries| {
        let epochs = entries.iter().filter_map(|e| e.name.to_str()?.parse().ok());
        epochs.max().unwrap_or(0)
    }))
}

/// Deletes what a volume was restored from, beside its record, as long as `keep_going` says so. It is moved
/// aside first: by then it may be another volume's.
pub(in crate::home) async fn delete_taken(
    home: &Admin,
    volume: &SharePath,
    record: &Record,
    keep_going: &(dyn Fn() -> bool + Sync),
) -> Result<(), CatalogError> {
    if !keep_going() {
        return Ok(());
    }
    let nonce = layout::random_id().map_err(CatalogError::state("random bytes"))?;
    let (from, aside) = (
        volume.join(RESTORED_FROM),
        layout::tmp().join(&format!("{nonce}.restored")),
    );
    match home.rename(&from, &aside).await {
        Err(error) if matches!(error.kind, AdminErrorKind::NotFound) => return Ok(()),
        moved => moved?,
    }
    match holds(home, &aside, record).await? {
        true => home.remove_tree(&aside, keep_going).await.map(drop)?,
        false => home.rename(&aside, &from).await?,
    }
    Ok(())
}

/// Whether a directory holds a volume's record, or what restores have taken of it.
async fn holds(home: &Admin, dir: &SharePath, record: &Record) -> Result<bool, CatalogError> {
    match records(home, dir, &record.name).await {
        Ok(there) => Ok(there.iter().any(|there| there.id == record.id)),
        Err(CatalogError::Record { .. }) => Ok(false),
        Err(error) => Err(error),
    }
}

impl Restoring<'_> {
    /// Brings the claims to an exclusive volume out of what was taken; whether there were any. A host that
    /// was slow may have made others in what an earlier restore had taken: the highest epoch tells. A volume
    /// whose options have changed may have been exclusive before, and may be so again.
    pub(in crate::home) async fn bring_claims(&self) -> Result<bool, CatalogError> {
        let recreated =
            self.record.recreated.is_some() && !mutant::is_on(Mutant::RecreatedClaimsBeginAnew);
        if (self.record.options.access != Access::Exclusive && !recreated)
            || mutant::is_on(Mutant::RestoredClaimsBeginAnew)
        {
            return Ok(false);
        }
        let claims = layout::claims(&self.record.name, &self.record.id);
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
        Err(self.had_by_another())
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
    pub(in crate::home) async fn publish(&self) -> Result<(), CatalogError> {
        self.take_again().await?;
        let claimed = self.bring_claims().await?;
        fail::fail_point!("restore.claims", |_| crate::failpoint::die());
        self.put_in_place(claimed).await
    }

    /// Puts the volume in its place. `claimed`: with claims.
    pub(in crate::home) async fn put_in_place(&self, claimed: bool) -> Result<(), CatalogError> {
        let (home, volume) = (self.home, layout::volume(&self.record.name));
        if mutant::is_on(Mutant::RestoreDeletesFirst) {
            share::delete_tree(home, &self.dir.join(RESTORED_FROM)).await?;
        }
        let failed = home.rename(&self.dir, &volume).await.err();
        fail::fail_point!("restore.published", |_| crate::failpoint::die());
        let dials = home.dials();
        match (self.look_at(&volume, claimed).await?, failed) {
            (Published::Whole, None) => {
                let is_same_server = || home.dials() == dials;
                let deleted = delete_taken(home, &volume, &self.record, &is_same_server);
                if let Err(error) = deleted.await {
                    tracing::warn!(volume = %self.record.name, %error,
                        "restored; what it was restored from stays until it is swept");
                }
                Ok(())
            }
            // The reply was lost, or it is another restore's: what was taken is for a sweep, or for that one.
            (Published::Whole, Some(_)) => Ok(()),
            (Published::InPart, _) => self.put_back(&volume, claimed).await,
            (Published::Another, _) => Err(CatalogError::NameTaken(self.record.name.clone())),
            (Published::Nothing, Some(error)) => Err(self.lost(error)),
            (Published::Nothing, None) => {
                // Removed since, or forgotten by the server, but for an empty directory perhaps.
                let _ = home.remove_dir(&volume).await;
                Err(self.had_by_another())
            }
        }
    }

    /// Looks at what was published: a server may have forgotten a part of it on the way.
    async fn look_at(&self, at: &SharePath, claimed: bool) -> Result<Published, CatalogError> {
        let (home, record) = (self.home, &self.record);
        if mutant::is_on(Mutant::RestoredUnseen) {
            return Ok(Published::Whole);
        }
        match trash::record_in(home, at, &record.name).await {
            Ok(Some(there)) if there.id == record.id => {}
            Ok(Some(_)) => return Ok(Published::Another),
            Ok(None) | Err(CatalogError::Record { .. }) => {
                return Ok(match holds(home, at, record).await? {
                    true => Published::InPart,
                    false => Published::Nothing,
                });
            }
            Err(error) => return Err(error),
        }
        let claims = at.join(layout::claims(&record.name, &record.id).name());
        let in_part = (claimed && home.attr(&claims).await?.is_none())
            || (self.entry.holds_data() && self.on.attr(&data_of(self.entry)).await?.is_some());
        Ok(match in_part {
            true => Published::InPart,
            false => Published::Whole,
        })
    }

    /// Puts what was published in part back into the entry, where it is found again.
    pub(in crate::home) async fn put_back(
        &self,
        volume: &SharePath,
        claimed: bool,
    ) -> Result<(), CatalogError> {
        let home = self.home;
        tracing::warn!(volume = %self.record.name, "the server forgot a part of its restore: put back");
        home.mkdir(&self.dir.parent(), 0o755).await?;
        let moved = home.rename(volume, &self.dir).await;
        moved.map_err(|error| self.lost(error))?;
        // Another host may have made a volume of the name meanwhile, or have restored this one.
        if !mutant::is_on(Mutant::PutBackUnseen)
            && self.look_at(&self.dir, claimed).await? != Published::InPart
        {
            home.rename(&self.dir, volume).await?;
        }
        Err(self.had_by_another())
    }
}
