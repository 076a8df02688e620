//! What Docker needs once after each of its starts (nfsvol-announce.service).
//!
//! It learns of a plugin at its first use, and Swarm places tasks only where that has happened. And
//! it does not try again to start a container whose volume could not be mounted at the boot, even
//! with `restart: always`: that is done here, until none is left.
//!
//! Limit: a container that somebody stopped after its start had failed is started too; `docker
//! update --restart=no` leaves it alone.

use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde_json::Value;
use tokio::time::sleep;

use crate::docker::engine::{self, NAMES};

/// Between two rounds, at first and at last. A start waits by itself for Mount's deadline.
const PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Containers that do not run, as `{"status":["exited","created"]}`.
const STOPPED: &str =
    "/containers/json?all=1&filters=%7B%22status%22%3A%5B%22exited%22%2C%22created%22%5D%7D";
/// What an engine notes of a container whose volume a plugin could not mount.
const NOT_MOUNTED: &str = "VolumeDriver.Mount";

#[derive(Debug, clap::Args)]
pub(crate) struct AnnounceArgs {
    /// Socket of Docker's engine
    #[arg(long, default_value = engine::DEFAULT_SOCKET, value_name = "PATH")]
    docker_socket: PathBuf,
}

pub(crate) async fn announce(args: AnnounceArgs) -> anyhow::Result<()> {
    let docker = args.docker_socket;
    engine::ask(&docker, Method::GET, "/volumes").await?;
    let mut pause = PAUSE;
    loop {
        let waiting = waiting(&docker).await?;
        if waiting.is_empty() {
            return Ok(());
        }
        for container in waiting {
            let start = format!("/containers/{container}/start");
            match engine::ask(&docker, Method::POST, &start).await {
                Ok(_) => tracing::info!(container, "started: its volume can be mounted now"),
                Err(error) => tracing::warn!(container, %error, "not started; going on trying"),
            }
        }
        sleep(pause).await;
        pause = (pause * 2).min(LONGEST_PAUSE);
    }
}

/// The containers that should run and do not, because a volume of ours could not be mounted.
async fn waiting(docker: &Path) -> anyhow::Result<Vec<String>> {
    let stopped = engine::ask(docker, Method::GET, STOPPED).await?;
    let mut waiting = Vec::new();
    for container in stopped.as_array().into_iter().flatten() {
        let Some(id) = container["Id"].as_str() else {
            continue;
        };
        // It may have been removed in this instant.
        let details = engine::ask(docker, Method::GET, &format!("/containers/{id}/json")).await;
        if details.is_ok_and(|details| is_waiting(&details)) {
            waiting.push(id.to_owned());
        }
    }
    Ok(waiting)
}

fn is_waiting(container: &Value) -> bool {
    let policy = container["HostConfig"]["RestartPolicy"]["Name"].as_str();
    let error = container["State"]["Error"].as_str().unwrap_or_default();
    let ours = |mount: &Value| NAMES.iter().any(|name| mount["Driver"] == *name);
    matches!(policy, Some("always" | "unless-stopped"))
        && error.contains(NOT_MOUNTED)
        && container["Mounts"]
            .as_array()
            .is_some_and(|mounts| mounts.iter().any(ours))
}
