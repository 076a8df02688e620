//! `nfsvol doctor`.

use std::path::{Path, PathBuf};

use anyhow::bail;

use crate::daemon::settings::{DEFAULT_SOCKET, DEFAULT_STATE_DIR};
use crate::doctor::{Questions, examine};
use nfs::address::Share;

#[derive(Debug, clap::Args)]
pub(super) struct DoctorArgs {
    /// The share to look at [default: the daemon's home share]
    #[arg(env = "NFSVOL_SHARE", value_name = "SHARE")]
    share: Option<Share>,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Socket of the daemon
    #[arg(long, env = "NFSVOL_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// Socket of Docker's engine
    #[arg(long, env = "NFSVOL_DOCKER_SOCKET", default_value = crate::docker::engine::DEFAULT_SOCKET, value_name = "PATH")]
    docker_socket: PathBuf,
}

pub(super) async fn doctor(args: DoctorArgs) -> anyhow::Result<()> {
    let report = examine(Questions {
        share: args.share,
        socket: args.socket,
        docker: args.docker_socket,
        mount_root: Path::new(DEFAULT_STATE_DIR).join("mnt"),
    })
    .await;
    let text = match args.json {
        true => format!("{}\n", serde_json::to_string_pretty(&report)?),
        false => report.table(),
    };
    super::print(text.as_bytes())?;
    match report.failed() {
        0 => Ok(()),
        1 => bail!("one check failed"),
        several => bail!("{several} checks failed"),
    }
}
