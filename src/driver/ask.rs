//! Answers to nfsvol's own command line, which need more than what [`super::status`] shows.

use super::membership::LOOK_WAIT;
use super::{Driver, DriverError};
use crate::api::daemon::DaemonStatus;
use crate::api::volumes::{Aborted, Adopted, Inspected, VolumeLine};
use crate::api::{
    Abort, Adopt, Answers, Ask, Inspect, Ls, Purged, Question, Repair, Repaired, Reply, Restore,
    Restored, Status, Trash, TrashEntry, TrashPurge,
};
use crate::home::CatalogError;
use crate::volume::{DataPath, VolumeName};
use nfs::admin::Admin;

impl Driver {
    pub(super) async fn reply(&self, question: Question) -> Result<Reply, DriverError> {
        match question {
            Question::Ls(ask) => self.reply_to(ask).await,
            Question::Inspect(ask) => self.reply_to(ask).await,
            Question::Status(ask) => self.reply_to(ask).await,
            Question::TrashLs(ask) => self.reply_to(ask).await,
            Question::Restore(ask) => self.reply_to(ask).await,
            Question::TrashPurge(ask) => self.reply_to(ask).await,
            Question::Abort(ask) => self.reply_to(ask).await,
            Question::Adopt(ask) => self.reply_to(ask).await,
            Question::Repair(ask) => self.reply_to(ask).await,
        }
    }

    async fn reply_to<A: Ask>(&self, ask: A) -> Result<Reply, DriverError>
    where
        Self: Answers<A, Error = DriverError>,
    {
        Ok(Reply::of(&self.answer(ask).await?))
    }
}

impl Answers<Ls> for Driver {
    type Error = DriverError;

    async fn answer(&self, Ls {}: Ls) -> Result<Vec<VolumeLine>, DriverError> {
        self.membership.look_soon().await;
        let unread = self.catalog.unread().await;
        // Of ten thousand volumes that takes a while, and renewals must not wait for it.
        Ok(tokio::task::block_in_place(|| self.volume_lines(&unread)))
    }
}

impl Answers<Inspect> for Driver {
    type Error = DriverError;

    async fn answer(&self, Inspect { name }: Inspect) -> Result<Inspected, DriverError> {
        let name: VolumeName = name.parse()?;
        self.membership.look_soon().await;
        self.read_soon(&name).await;
        let record = self.find(&name).await?;
        let record = record.ok_or_else(|| CatalogError::Absent(name.clone()))?;
        Ok(Inspected {
            name: record.name.clone(),
            created: record.created.clone(),
            mountpoint: self.host.mountpoint(&name),
            status: self.volume_status(&record).await,
        })
    }
}

impl Answers<Status> for Driver {
    type Error = DriverError;

    async fn answer(&self, Status {}: Status) -> Result<DaemonStatus, DriverError> {
        Ok(self.daemon_status())
    }
}

impl Answers<Trash> for Driver {
    type Error = DriverError;

    async fn answer(&self, Trash {}: Trash) -> Result<Vec<TrashEntry>, DriverError> {
        let home = self.trash_share().await?;
        let entries = self.catalog.trash(&home).await?.into_iter();
        let entries = entries.map(|entry| TrashEntry {
            entry: entry.entry,
            name: entry.name,
            removed: entry.removed,
            record: entry.record,
        });
        Ok(entries.collect())
    }
}

impl Answers<Restore> for Driver {
    type Error = DriverError;

    async fn answer(&self, ask: Restore) -> Result<Restored, DriverError> {
        let rename = ask.rename.map(|name| name.parse()).transpose()?;
        self.restore(&ask.name, rename).await
    }
}

impl Answers<TrashPurge> for Driver {
    type Error = DriverError;

    async fn answer(&self, ask: TrashPurge) -> Result<Purged, DriverError> {
        self.purge(ask).await
    }
}

impl Answers<Abort> for Driver {
    type Error = DriverError;

    async fn answer(&self, Abort { name }: Abort) -> Result<Aborted, DriverError> {
        self.abort(name.parse()?).await
    }
}

impl Answers<Adopt> for Driver {
    type Error = DriverError;

    async fn answer(&self, ask: Adopt) -> Result<Adopted, DriverError> {
        self.adopt(ask).await
    }
}

impl Answers<Repair> for Driver {
    type Error = DriverError;

    async fn answer(&self, ask: Repair) -> Result<Vec<Repaired>, DriverError> {
        self.repair(ask).await
    }
}

impl Driver {
    /// Reads a record anew if the home share answers soon: a server that was restarted may have torn it.
    async fn read_soon(&self, name: &VolumeName) {
        let read = async {
            if let Some(home) = self.shares.home().await? {
                self.catalog.fetch(&home, name).await?;
            }
            Ok::<_, DriverError>(())
        };
        // What it was has to do, with a warning if it cannot be read.
        let _ = tokio::time::timeout(LOOK_WAIT, read).await;
    }

    /// Frees everybody who waits for a volume whose server is away.
    async fn abort(&self, name: VolumeName) -> Result<Aborted, DriverError> {
        let held = self.host.attachments().get(&name);
        let by_kernel = held
            .as_ref()
            .is_some_and(|held| held.how.data_path == DataPath::Kernel);
        if by_kernel && !self.host.paths().is_own(&name) {
            return Err(DriverError::AbortByKernel(name));
        }
        if held.is_none() && !self.host.paths().is_own(&name) && !self.host.paths().is_served(&name)
        {
            // A home share that is away does not say whether there is one.
            return Err(match self.find(&name).await {
                Ok(None) => CatalogError::Absent(name).into(),
                Ok(Some(_)) | Err(_) => DriverError::NotMounted(name),
            });
        }
        self.host.paths().abort(&name).await?;
        Ok(Aborted { aborted: name })
    }

    pub(super) async fn trash_share(&self) -> Result<Admin, DriverError> {
        self.shares
            .home()
            .await?
            .ok_or_else(|| CatalogError::NoHome("the trash").into())
    }

    async fn restore(
        &self,
        wanted: &str,
        rename: Option<VolumeName>,
    ) -> Result<Restored, DriverError> {
        let home = self.trash_share().await?;
        let entry = self.catalog.find_in_trash(&home, wanted).await?;
        let name = rename.as_ref().unwrap_or(&entry.name);
        // The entry's as well: it may be restored under other names by calls of this daemon.
        let _locks = self.host.lock_both(name, &entry.name).await;
        let entry = self.catalog.find_in_trash(&home, &entry.entry).await?;
        let on = self.shares.data(&entry.record.options).await?;
        let record = self
            .catalog
            .restore(&home, &on, &entry, rename.as_ref())
            .await?;
        self.watch.trash_changed();
        Ok(Restored {
            name: record.name.clone(),
            entry: entry.entry,
            removed: entry.removed,
        })
    }
}
