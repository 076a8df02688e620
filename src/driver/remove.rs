//! Remove.

use std::sync::PoisonError;

use super::{Driver, DriverError};
use crate::home::Catalog;
use crate::volume::VolumeName;
use nfs::admin::Admin;

impl Driver {
    pub(super) async fn remove_volume(&self, name: &VolumeName) -> Result<(), DriverError> {
        let _lock = self.host.lock(name).await;
        let home = self.shares.scoped_home().await?;
        let known = match &home {
            // What may be deleted is asked of the share, whatever the local copy says.
            Some(home) => self.catalog.fetch(home, name).await?,
            None => self.catalog.get(name),
        };
        self.fresh
            .lock()
            .unwrap_or_else(PoisonError::into_inner)
            .remove(name);
        let Some(record) = known else { return Ok(()) };
        self.host.check_free(&record).await?;
        let together = self.membership.together();
        let on = together.data_to_move(home.as_ref(), &record).await?;
        // Also without an attachment: a Mount that a crash interrupted may have left a mount.
        self.host.detach(name).await?;
        self.host.attachments().retain(name, |_| false);
        fail::fail_point!("remove.detached", |_| crate::failpoint::die());
        self.membership.let_go(name).await;
        self.membership.tell_soon();
        let removed = self.membership.together();
        let entry = removed.remove(home.as_ref(), on.as_ref(), &record).await?;
        fail::fail_point!("remove.forgotten", |_| crate::failpoint::die());
        self.watch.trash_changed();
        if let Some(entry) = entry {
            self.purge_later(home, on, entry);
        }
        Ok(())
    }

    /// Deletes a trash entry without making the caller wait; a sweep finishes what fails.
    fn purge_later(&self, home: Option<Admin>, on: Option<Admin>, entry: String) {
        tokio::spawn(async move {
            if let Err(error) = Catalog::purge(home.as_ref(), on.as_ref(), &entry).await {
                tracing::warn!(entry, %error, "not deleted yet; the next sweep goes on");
            }
        });
    }
}
