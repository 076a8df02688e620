//! Answers to nfsvol's own command line.

use serde_json::{Value, json};

use super::cluster::LOOK_WAIT;
use super::{Driver, DriverError};
use crate::docker::Ask;
use crate::home::CatalogError;
use crate::nfs::admin::Admin;
use crate::volume::{DataPath, VolumeName};

impl Driver {
    pub(super) async fn answer(&self, question: Ask) -> Result<Value, DriverError> {
        match question {
            Ask::Ls => {
                self.look_soon().await;
                let unread = self.catalog.unread().await;
                // Of ten thousand volumes that takes a while, and renewals must not wait for it.
                Ok(tokio::task::block_in_place(|| self.volume_lines(&unread)).into())
            }
            Ask::Inspect { name } => self.inspect(&name.parse()?).await,
            Ask::Status => Ok(self.daemon_status()),
            Ask::TrashLs => {
                let home = self.trash_share().await?;
                Ok(json!(self.catalog.trash(&home).await?))
            }
            Ask::Restore { name, rename } => {
                let rename = rename.map(|r| r.parse::<VolumeName>()).transpose()?;
                self.restore(&name, rename).await
            }
            Ask::TrashPurge(purge) => self.purge(purge).await,
            Ask::Abort { name } => self.abort(&name.parse()?).await,
            Ask::Adopt(adoption) => self.adopt(adoption).await,
            Ask::Repair { name, dry_run } => self.repair(name, dry_run).await,
        }
    }

    async fn inspect(&self, name: &VolumeName) -> Result<Value, DriverError> {
        self.look_soon().await;
        self.read_soon(name).await;
        let record = self.find(name).await?;
        let record = record.ok_or_else(|| CatalogError::Absent(name.clone()))?;
        Ok(json!({
            "name": record.name,
            "created": record.created,
            "mountpoint": self.mountpoint(name),
            "status": self.volume_status(&record).await,
        }))
    }

    /// Reads a record anew if the home share answers soon: a server that was restarted may have torn it.
    async fn read_soon(&self, name: &VolumeName) {
        let read = async {
            if let Some(home) = self.home().await? {
                self.catalog.fetch(&home, name).await?;
            }
            Ok::<_, DriverError>(())
        };
        // What it was has to do, with a warning if it cannot be read.
        let _ = tokio::time::timeout(LOOK_WAIT, read).await;
    }

    /// Frees everybody who waits for a volume whose server is away.
    async fn abort(&self, name: &VolumeName) -> Result<Value, DriverError> {
        let held = self.attachments.get(name);
        let by_kernel = held
            .as_ref()
            .is_some_and(|held| held.how.data_path == DataPath::Kernel);
        if by_kernel && !self.paths.is_own(name) {
            return Err(DriverError::AbortByKernel(name.clone()));
        }
        if held.is_none() && !self.paths.is_own(name) && !self.paths.is_served(name) {
            // A home share that is away does not say whether there is one.
            return Err(match self.find(name).await {
                Ok(None) => CatalogError::Absent(name.clone()).into(),
                Ok(Some(_)) | Err(_) => DriverError::NotMounted(name.clone()),
            });
        }
        self.paths.abort(name).await?;
        Ok(json!({ "aborted": name }))
    }

    pub(super) async fn trash_share(&self) -> Result<Admin, DriverError> {
        self.home()
            .await?
            .ok_or_else(|| CatalogError::NoHome("the trash").into())
    }

    async fn restore(
        &self,
        wanted: &str,
        rename: Option<VolumeName>,
    ) -> Result<Value, DriverError> {
        let home = self.trash_share().await?;
        let entry = self.catalog.find_in_trash(&home, wanted).await?;
        let name = rename.as_ref().unwrap_or(&entry.name);
        // The entry's as well: it may be restored under other names by calls of this daemon.
        let _locks = self.locks.lock_both(name, &entry.name).await;
        let entry = self.catalog.find_in_trash(&home, &entry.entry).await?;
        let on = self.data_admin(&entry.record.options).await?;
        let record = self
            .catalog
            .restore(&home, &on, &entry, rename.as_ref())
            .await?;
        self.watch.trash_changed();
        Ok(json!({ "name": record.name, "entry": entry.entry, "removed": entry.removed }))
    }
}
