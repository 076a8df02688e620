//! What Docker's engine knows of the plugin and of its volumes.

use std::collections::BTreeMap;
use std::path::Path;
use std::time::Duration;

use hyper::Method;
use serde::Deserialize;
use serde_json::Value;
use tokio::time::timeout;

use super::Finding;
use crate::api::volumes::{VolumeLine, VolumeStatus};
use crate::api::{Client, Inspect};
use crate::docker::engine::NAMES;
use crate::volume::VolumeOptions;

/// The engine asks its plugins for their volumes, and waits for one that does not answer.
const ENGINE: Duration = Duration::from_secs(4);

#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Volume {
    name: String,
    driver: String,
    options: Option<BTreeMap<String, String>>,
}

/// Looks at the engine; `ours` is what `nfsvol ls` shows.
pub(super) async fn examine(
    docker: &Path,
    socket: &Path,
    ours: Option<&[VolumeLine]>,
) -> Vec<Finding> {
    let info = match timeout(ENGINE, get(docker, "/info")).await {
        Ok(Ok(info)) => info,
        Ok(Err(error)) => {
            return vec![Finding::skipped(
                "engine",
                format!("no Docker engine at {}: {error:#}", docker.display()),
            )];
        }
        Err(_) => {
            return vec![Finding::failed(
                "engine",
                format!("Docker's engine does not answer within {ENGINE:?}"),
                "`journalctl -u docker` says what it waits for",
            )];
        }
    };
    let version = info["ServerVersion"].as_str().unwrap_or("?");
    let mut findings = vec![Finding::ok("engine", format!("Docker {version}"))];
    let knows = info["Plugins"]["Volume"]
        .as_array()
        .is_some_and(|list| list.iter().any(|name| NAMES.iter().any(|n| name == n)));
    findings.push(match knows {
        true => Finding::ok("plugin", "the engine knows it"),
        false => Finding::warning(
            "plugin",
            "the engine has not used nfsvol since it started",
            "`docker volume ls` makes it known, and Swarm places tasks only where it is; a daemon does \
             that by itself within seconds, if its `--docker-socket` is the engine's",
        ),
    });
    if let Some(ours) = ours {
        findings.push(drift(docker, socket, ours).await);
    }
    findings
}

/// Options that Docker shows for a volume and that are not those of the catalog.
async fn drift(docker: &Path, socket: &Path, ours: &[VolumeLine]) -> Finding {
    let compared = timeout(ENGINE, async {
        let volumes = get(docker, "/volumes").await?;
        let volumes: Vec<Volume> = serde_json::from_value(volumes["Volumes"].clone())?;
        let mut client = Client::connect(socket).await?;
        let mut differ = Vec::new();
        for volume in volumes.iter().filter(|v| NAMES.contains(&&*v.driver)) {
            let Some(shown) = volume.options.as_ref().filter(|o| !o.is_empty()) else {
                continue;
            };
            if !ours.iter().any(|line| line.name().as_str() == volume.name) {
                continue;
            }
            let name = volume.name.clone();
            let VolumeStatus::Known(status) = client.ask(&Inspect { name }).await?.status else {
                continue;
            };
            let recorded = VolumeOptions::parse(&status.options)?;
            let unlike = match VolumeOptions::parse(shown) {
                Ok(shown) => recorded.differences(&shown),
                Err(error) => vec![error.to_string()],
            };
            if !unlike.is_empty() {
                differ.push(format!("{}: {}", volume.name, unlike.join(", ")));
            }
        }
        anyhow::Ok(differ)
    });
    match compared.await {
        Ok(Ok(differ)) if differ.is_empty() => {
            Finding::ok("options", "Docker shows what the catalog holds")
        }
        Ok(Ok(differ)) => Finding::warning(
            "options",
            differ.join("; "),
            "the catalog's options hold (Status.options); Docker shows what was typed on this \
             host until the volume is forgotten here",
        ),
        Ok(Err(error)) => Finding::skipped("options", format!("not compared: {error:#}")),
        Err(_) => Finding::skipped("options", "not compared in time"),
    }
}

async fn get(docker: &Path, path: &str) -> anyhow::Result<Value> {
    crate::docker::engine::ask(docker, Method::GET, path).await
}
