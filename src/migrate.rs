//! Moving in from Docker's `local` driver: its volumes, and the containers that use them, as the
//! engine tells of them; a volume that becomes one of nfsvol's ([`volume`]), also by copying its files
//! ([`copy`], [`verify`]).

mod copy;
#[cfg(test)]
mod tests;
mod tree;
mod verify;
mod volume;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::time::Duration;

use anyhow::{Context, bail};
use hyper::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

pub(crate) use self::copy::{Copied, Copier};
use self::tree::measure;
pub(crate) use self::volume::{Copying, Progress, no_directory, take_over};
use crate::docker::engine;

/// The engine answers from its own files; more means that it hangs.
const ENGINE: Duration = Duration::from_secs(30);
/// Volumes with `{"driver":["local"]}`, so that no plugin is asked.
const LOCAL: &str = "/volumes?filters=%7B%22driver%22%3A%5B%22local%22%5D%7D";
/// The driver that a container's mount names for them.
const DRIVER: &str = "local";

/// A volume of the `local` driver.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct LocalVolume {
    pub(crate) name: String,
    /// `type`, `o` and `device`; none of these for a plain directory of the host.
    pub(crate) options: BTreeMap<String, String>,
    /// Where its files are, or are mounted while a container runs.
    pub(crate) mountpoint: PathBuf,
    pub(crate) users: Vec<User>,
}

/// A container that has a volume.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) container: String,
    /// Running, paused or restarting.
    pub(crate) is_up: bool,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Listed {
    name: String,
    mountpoint: PathBuf,
    options: Option<BTreeMap<String, String>>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Container {
    id: String,
    names: Vec<String>,
    state: String,
    mounts: Vec<Mount>,
}

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Mount {
    #[serde(default)]
    name: String,
    #[serde(default)]
    driver: String,
}

impl LocalVolume {
    /// Whether it mounts a directory of an NFS server.
    pub(crate) fn is_nfs(&self) -> bool {
        let kind = self.options.get("type").map(String::as_str);
        matches!(kind, Some("nfs" | "nfs4"))
    }

    /// What the driver mounts for it while a container runs; `None` for a plain directory of the host
    /// (which may have a `size`). Until then its directory is empty, wherever its files are.
    pub(crate) fn mounts(&self) -> Option<String> {
        let mut mounted = self.options.iter().filter(|(key, _)| *key != "size");
        mounted.any(|(_, value)| !value.is_empty()).then(|| {
            let get = |key| self.options.get(key).map_or("", String::as_str);
            let (kind, device, o) = (get("type"), get("device"), get("o"));
            match o
                .split(',')
                .any(|word| matches!(word.trim(), "bind" | "rbind"))
            {
                true => format!("the directory {device} of this host (type={kind}, o={o})"),
                false => format!("{device} with type={kind}"),
            }
        })
    }

    /// The one of that name.
    ///
    /// # Errors
    /// When there is none.
    pub(crate) fn named<'a>(found: &'a [Self], name: &str) -> anyhow::Result<&'a Self> {
        let volume = found.iter().find(|volume| volume.name == name);
        volume.with_context(|| {
            format!("Docker's local driver has no volume {name}; `docker volume ls` lists them")
        })
    }

    /// Containers that use it now.
    pub(crate) fn up(&self) -> impl Iterator<Item = &str> {
        let up = self.users.iter().filter(|user| user.is_up);
        up.map(|user| user.container.as_str())
    }
}

/// All volumes of the engine's `local` driver, by name.
///
/// # Errors
/// When the engine does not answer, or not in its own language.
pub(crate) async fn local_volumes(docker: &Path) -> anyhow::Result<Vec<LocalVolume>> {
    let mut answer = get(docker, LOCAL).await?;
    let listed: Option<Vec<Listed>> = serde_json::from_value(answer["Volumes"].take())
        .context("the engine's list of volumes is not understood")?;
    let containers: Vec<Container> =
        serde_json::from_value(get(docker, "/containers/json?all=1").await?)
            .context("the engine's list of containers is not understood")?;
    let mut volumes: Vec<LocalVolume> = listed
        .into_iter()
        .flatten()
        .map(|volume| LocalVolume {
            users: users(&containers, &volume.name),
            name: volume.name,
            options: volume.options.unwrap_or_default(),
            mountpoint: volume.mountpoint,
        })
        .collect();
    volumes.sort_by(|a, b| a.name.cmp(&b.name));
    Ok(volumes)
}

fn users(containers: &[Container], volume: &str) -> Vec<User> {
    let has = |container: &&Container| {
        let mut mounts = container.mounts.iter();
        mounts.any(|mount| mount.driver == DRIVER && mount.name == volume)
    };
    let using = containers.iter().filter(has);
    using
        .map(|container| User {
            container: match container.names.first() {
                Some(name) => name.trim_start_matches('/').to_owned(),
                None => container.id.chars().take(12).collect(),
            },
            is_up: matches!(&*container.state, "running" | "paused" | "restarting"),
        })
        .collect()
}

async fn get(docker: &Path, path: &str) -> anyhow::Result<Value> {
    match timeout(ENGINE, engine::ask(docker, Method::GET, path)).await {
        Ok(answer) => answer.with_context(|| {
            format!(
                "asking Docker's engine at {} (--docker-socket)",
                docker.display()
            )
        }),
        Err(_) => bail!(
            "Docker's engine does not answer within {ENGINE:?}: `journalctl -u docker` says what it \
             waits for"
        ),
    }
}
