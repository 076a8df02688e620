//! What Docker needs once after each of its starts, and of ours.
//!
//! It learns of a plugin at its first use, and Swarm places tasks only where that has happened. And
//! it does not try again to start a container whose volume could not be mounted at the boot, even
//! with `restart: always`: that is done here, until none is left.
//!
//! The engine's socket is connected to only while a `dockerd` runs: systemd listens there too, and a
//! connection would start an engine that an administrator has stopped. Nothing is kept open that an
//! engine would wait for when it stops: its end is that of its process.
//!
//! Limits: a container that somebody stopped after its start had failed is started too; `docker
//! update --restart=no` leaves it alone. A rootless engine is not found, nor is one of another name.

use std::os::fd::OwnedFd;
use std::path::{Path, PathBuf};
use std::time::Duration;

use hyper::Method;
use serde_json::Value;
use tokio::time::sleep;

use crate::docker::engine::{self, NAMES};
use crate::sys::proc;

/// The program of Docker's engine.
const ENGINE: &str = "dockerd";
/// Between two looks whether an engine runs.
const LOOK: Duration = Duration::from_secs(2);
/// Between two rounds, at first and at last. A start waits by itself for Mount's deadline.
const PAUSE: Duration = Duration::from_secs(2);
const LONGEST_PAUSE: Duration = Duration::from_secs(60);
/// Containers that do not run, as `{"status":["exited","created"]}`.
const STOPPED: &str =
    "/containers/json?all=1&filters=%7B%22status%22%3A%5B%22exited%22%2C%22created%22%5D%7D";
/// What an engine notes of a container whose volume a plugin could not mount.
const NOT_MOUNTED: &str = "VolumeDriver.Mount";

/// Tells the engine at `docker` of this plugin after each start of either, for ever. Containers that wait are
/// started after the engine's starts only: of those before ours it is not known who has stopped them.
pub(super) async fn announce(docker: PathBuf) {
    let mut was_there = true;
    loop {
        match running(&docker) {
            Some(engine) => {
                tokio::select! {
                    () = ended(engine) => {}
                    () = attend(&docker, was_there) => {}
                }
                was_there = false;
            }
            None => was_there = false,
        }
        sleep(LOOK).await;
    }
}

/// The engine that may be behind the socket: one of this host, not one in a container or a rootless one.
fn running(docker: &Path) -> Option<OwnedFd> {
    let file = |pid: &str, file| PathBuf::from(format!("/proc/{pid}/{file}"));
    let is_engine = |pid: &u32| {
        let pid = pid.to_string();
        let name = std::fs::read_to_string(file(&pid, "comm"));
        let is_here = |of| {
            let [its, own] = [&*pid, "self"].map(|pid| std::fs::read_link(file(pid, of)));
            its.is_ok_and(|its| own.is_ok_and(|own| its == own))
        };
        name.is_ok_and(|name| name.trim_end() == ENGINE) && is_here("ns/pid") && is_here("ns/net")
    };
    if !docker.exists() {
        return None;
    }
    let pid = proc::ids().ok()?.into_iter().find(is_engine)?;
    proc::open(pid).ok()
}

async fn ended(engine: OwnedFd) {
    while !proc::has_ended(&engine) {
        sleep(LOOK).await;
    }
}

/// Does not end: an engine that is not ready yet is tried again.
async fn attend(docker: &Path, was_there: bool) {
    while let Err(error) = once(docker, was_there).await {
        tracing::debug!(%error, "Docker's engine is not to be talked to yet");
        sleep(LOOK).await;
    }
    std::future::pending().await
}

/// Has the engine ask all plugins for their volumes, and starts containers that wait for ours.
async fn once(docker: &Path, was_there: bool) -> anyhow::Result<()> {
    engine::ask(docker, Method::GET, "/volumes").await?;
    tracing::debug!("Docker's engine knows this plugin");
    if was_there {
        return Ok(());
    }
    let mut pause = PAUSE;
    loop {
        let waiting = waiting(docker).await?;
        if waiting.is_empty() {
            return Ok(());
        }
        for container in waiting {
            let start = format!("/containers/{container}/start");
            match engine::ask(docker, Method::POST, &start).await {
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
