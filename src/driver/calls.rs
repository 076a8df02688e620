//! The driver as the plugin protocol calls it.

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use serde_json::Map;

use super::{Driver, DriverError};
use crate::api::{Question, Reply};
use crate::docker::{Calls, Created, Lookup, Scope, Volume, VolumeDriver};
use crate::home::{Creation, Known};
use crate::monitor::Watched;
use crate::volume::{Record, VolumeName, VolumeOptions};

impl Driver {
    fn shown(&self, record: &Record, status: Map<String, serde_json::Value>) -> Volume {
        // Also before it is mounted: an engine shows a container's volume with the path that it
        // was told when the container was made.
        let place = || self.host.paths().mountpoint(&record.name);
        Volume {
            name: record.name.to_string(),
            mountpoint: Some(self.host.mountpoint(&record.name).unwrap_or_else(place)),
            created_at: Some(record.created.clone()),
            status,
        }
    }
}

impl VolumeDriver for Driver {
    type Error = DriverError;

    fn activated(&self) {
        self.host.engine_started();
    }

    fn scope(&self) -> Scope {
        if self.config.share.is_some() {
            Scope::Global
        } else {
            Scope::Local
        }
    }

    async fn create(
        &self,
        name: &str,
        opts: BTreeMap<String, String>,
    ) -> Result<Created, DriverError> {
        let name: VolumeName = name.parse()?;
        let options = VolumeOptions::parse(&opts)?;
        match self.create_volume(&name, options).await? {
            Creation::New(_) => Ok(Created::New),
            Creation::Existing(_) | Creation::Recreated(_) => Ok(Created::Existing),
        }
    }

    async fn undo_create(&self, name: &str) {
        if let Ok(name) = name.parse() {
            self.take_back(&name).await;
        }
    }

    async fn remove(&self, name: &str) -> Result<(), DriverError> {
        // What cannot be a name is no volume, and removing what is absent succeeds.
        let Ok(name) = name.parse() else {
            return Ok(());
        };
        self.remove_volume(&name).await
    }

    async fn mount(&self, name: &str, id: &str, deadline: Instant) -> Result<PathBuf, DriverError> {
        self.mount_volume(&name.parse()?, id, deadline).await
    }

    async fn unmount(&self, name: &str, id: &str) -> Result<(), DriverError> {
        let Ok(name) = name.parse() else {
            return Ok(());
        };
        self.unmount_volume(&name, id).await
    }

    async fn path(&self, name: &str) -> Result<Option<PathBuf>, DriverError> {
        Ok(self.host.mountpoint(&name.parse()?))
    }

    async fn get(&self, name: &str) -> Result<Lookup, DriverError> {
        let Ok(name) = name.parse::<VolumeName>() else {
            return Ok(Lookup::Absent);
        };
        Ok(match self.confirm(&name).await {
            Known::Here(record) => {
                let status = self.volume_status(&record).await.to_map();
                Lookup::Found(self.shown(&record, status))
            }
            Known::Absent => Lookup::Absent,
            Known::Unknown => Lookup::Unknown,
        })
    }

    async fn list(&self) -> Result<Vec<Volume>, DriverError> {
        Ok(self
            .catalog
            .list()
            .iter()
            .map(|record| self.shown(record, Map::new()))
            .collect())
    }

    fn calls(&self) -> &Calls {
        &self.calls
    }

    async fn metrics(&self) -> String {
        Watched::metrics(self).await
    }

    async fn ask(&self, question: Question) -> Result<Reply, DriverError> {
        self.reply(question).await
    }
}
