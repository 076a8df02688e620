//! Settings of the daemon: flags, each with an environment name, so that the command line,
//! systemd's EnvironmentFile and `docker plugin set` are one mechanism.

use std::path::PathBuf;
use std::time::Duration;

use clap::Args;

use crate::cluster::{LONGEST_SESSION, SHORTEST_SESSION};
use crate::docker::server::Settings;
use crate::driver::{Config, host_name};
use crate::monitor::Address;
use crate::volume::{DataPath, MountOptions, OnRemove, Recreate};
use nfs::address::Share;

/// Where Docker looks for the socket of a plugin called nfsvol (moby: pkg/plugins/discovery.go).
pub(crate) const DEFAULT_SOCKET: &str = "/run/docker/plugins/nfsvol.sock";
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/nfsvol";
/// The longest that dockerd waits for Mount and for the other calls; a deadline must be shorter,
/// since dockerd sends no Unmount for a Mount that it gave up on (moby: volume/drivers/proxy.go).
const DOCKER_MOUNT_PATIENCE: Duration = Duration::from_secs(120);
const DOCKER_PATIENCE: Duration = Duration::from_secs(60);

/// Flags of `nfsvol serve`.
#[derive(Debug, Clone, Args)]
#[command(after_help = "Examples:
  nfsvol serve --share nas:/export
  nfsvol serve --share '[fd00::5]:/export' --mount-options nfsvers=4.1,nconnect=4
  NFSVOL_SHARE=nas:/export nfsvol serve --log debug
  nfsvol serve --share nas:/export --metrics 9469    # then: http://127.0.0.1:9469/
Then:
  docker volume create -d nfsvol db
  docker run -v db:/data --volume-driver nfsvol IMAGE")]
pub struct ServeArgs {
    /// Home share, SERVER:/EXPORT (or embedded:/DIR, a directory of this host, to try it): holds the
    /// catalog and, by default, the volumes
    #[arg(long, env = "NFSVOL_SHARE", value_name = "SHARE")]
    share: Option<Share>,
    /// Unix socket to listen on (unless systemd hands one over)
    #[arg(long, env = "NFSVOL_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    pub socket: PathBuf,
    /// Directory of the local copy of the catalog and of the attachments
    #[arg(long, env = "NFSVOL_STATE_DIR", default_value = DEFAULT_STATE_DIR, value_name = "DIR")]
    state_dir: PathBuf,
    /// Directory below which shares and volumes are mounted [default: STATE_DIR/mnt]
    #[arg(long, env = "NFSVOL_MOUNT_ROOT", value_name = "DIR")]
    mount_root: Option<PathBuf>,
    /// Data path of volumes that do not name one: auto, kernel or fuse
    #[arg(
        long,
        env = "NFSVOL_DATA_PATH",
        default_value = "auto",
        value_name = "PATH"
    )]
    data_path: DataPath,
    /// NFS mount options of volumes that do not name any, as in nfs(5)
    #[arg(
        long,
        env = "NFSVOL_MOUNT_OPTIONS",
        default_value = "",
        value_name = "OPTIONS"
    )]
    mount_options: MountOptions,
    /// What removing a volume does with its data, unless the volume says: trash, retain or delete
    #[arg(
        long,
        env = "NFSVOL_ON_REMOVE",
        default_value = "trash",
        value_name = "POLICY"
    )]
    on_remove: OnRemove,
    /// What a Create does that follows a Remove of the same name within 10 minutes with other options, as
    /// `docker compose up` sends them when options have changed: keep (the data comes back), empty (a
    /// new volume) or refuse
    #[arg(
        long,
        env = "NFSVOL_RECREATE",
        default_value = "keep",
        value_name = "POLICY"
    )]
    recreate: Recreate,
    /// Shares that volumes may name; `*` stands for anything; may be repeated [default: all]
    #[arg(
        long,
        env = "NFSVOL_ALLOW_SHARE",
        value_delimiter = ',',
        value_name = "PATTERN"
    )]
    allow_share: Vec<String>,
    /// NFS mount options that volumes may name; `*` stands for anything but suid and dev, which only
    /// their own names allow; may be repeated
    #[arg(
        long,
        env = "NFSVOL_ALLOW_OPTION",
        value_delimiter = ',',
        default_value = "*",
        value_name = "PATTERN"
    )]
    allow_option: Vec<String>,
    /// How long removed volumes stay in the trash
    #[arg(long, env = "NFSVOL_TRASH_TIME", default_value = "7days", value_parser = positive, value_name = "TIME")]
    trash_time: Duration,
    /// How often the home share is asked for volumes that other hosts made or removed
    #[arg(long, env = "NFSVOL_POLL", default_value = "10s", value_parser = positive, value_name = "TIME")]
    poll: Duration,
    /// How long a host that is dead or cut off keeps its volumes from the others: 3 s to 1 hour
    #[arg(long, env = "NFSVOL_SESSION", default_value = "30s", value_parser = session_time, value_name = "TIME")]
    session: Duration,
    /// Socket of Docker's engine, which is told of this daemon after each start of either; an
    /// exclusive volume's containers are stopped through it when this host is cut off (kernel data
    /// path)
    #[arg(long, env = "NFSVOL_DOCKER_SOCKET", default_value = crate::docker::engine::DEFAULT_SOCKET, value_name = "PATH")]
    pub docker_socket: PathBuf,
    /// How long a share without volumes stays mounted
    #[arg(long, env = "NFSVOL_IDLE_UNMOUNT", default_value = "60s", value_parser = humantime::parse_duration, value_name = "TIME")]
    idle_unmount: Duration,
    /// The longest that Mount takes, below Docker's 120 s
    #[arg(long, env = "NFSVOL_MOUNT_DEADLINE", default_value = "100s", value_parser = below_mount_patience, value_name = "TIME")]
    mount_deadline: Duration,
    /// The longest that any other call takes, below Docker's 60 s
    #[arg(long, env = "NFSVOL_DEADLINE", default_value = "50s", value_parser = below_patience, value_name = "TIME")]
    deadline: Duration,
    /// The longest that one directory operation on a share takes
    #[arg(long, env = "NFSVOL_OP_DEADLINE", default_value = "5s", value_parser = positive, value_name = "TIME")]
    op_deadline: Duration,
    /// Where to serve metrics for Prometheus and the status page: PORT (on 127.0.0.1), IP:PORT, off
    #[arg(
        long,
        env = "NFSVOL_METRICS",
        default_value = "off",
        value_name = "ADDR"
    )]
    pub metrics: Address,
    /// Other names of this host by which metrics and the status page may be asked for
    #[arg(
        long,
        env = "NFSVOL_METRICS_NAME",
        value_delimiter = ',',
        value_name = "NAME"
    )]
    pub metrics_name: Vec<String>,
    /// Log level: off, error, warn, info, debug or trace; modules may have their own, as in
    /// info,nfsvol::docker=debug
    #[arg(
        long,
        env = "NFSVOL_LOG",
        default_value = "info",
        value_name = "FILTER"
    )]
    pub log: String,
    /// Log format: text, json or journald
    #[arg(
        long,
        env = "NFSVOL_LOG_FORMAT",
        default_value = "text",
        value_name = "FORMAT"
    )]
    pub log_format: crate::telemetry::Format,
}

fn below(text: &str, patience: Duration, call: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    if time.is_zero() || time >= patience {
        let limit = patience.as_secs();
        return Err(format!(
            "expected more than 0 s and less than {limit} s, for which Docker waits for {call}"
        ));
    }
    Ok(time)
}

/// A time of nothing would ask all the time, or delete for good what is removed by mistake.
fn positive(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    match time.is_zero() {
        true => Err("expected more than 0 s".to_owned()),
        false => Ok(time),
    }
}

fn session_time(text: &str) -> Result<Duration, String> {
    let time = humantime::parse_duration(text).map_err(|e| e.to_string())?;
    if (SHORTEST_SESSION..=LONGEST_SESSION).contains(&time) {
        Ok(time)
    } else {
        Err("expected 3 s to 1 hour".to_owned())
    }
}

fn below_mount_patience(text: &str) -> Result<Duration, String> {
    below(text, DOCKER_MOUNT_PATIENCE, "Mount")
}

fn below_patience(text: &str) -> Result<Duration, String> {
    below(text, DOCKER_PATIENCE, "an answer")
}

impl From<&ServeArgs> for Config {
    fn from(args: &ServeArgs) -> Self {
        Self {
            share: args.share.clone(),
            host: host_name(),
            state_dir: args.state_dir.clone(),
            mount_root: args
                .mount_root
                .clone()
                .unwrap_or_else(|| args.state_dir.join("mnt")),
            data_path: args.data_path,
            mount_options: args.mount_options.clone(),
            on_remove: args.on_remove,
            recreate: args.recreate,
            allow_share: args.allow_share.clone(),
            allow_option: args.allow_option.clone(),
            trash_time: args.trash_time,
            poll: args.poll,
            session: args.share.as_ref().map(|_| args.session),
            docker_socket: args.docker_socket.clone(),
            idle_unmount: args.idle_unmount,
            op_deadline: args.op_deadline,
            flush_wait: args.deadline * 3 / 5,
        }
    }
}

impl From<&ServeArgs> for Settings {
    fn from(args: &ServeArgs) -> Self {
        Self {
            mount_deadline: args.mount_deadline,
            deadline: args.deadline,
            ..Self::default()
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_time_of_nothing_is_refused() {
        assert_eq!(positive("1s"), Ok(Duration::from_secs(1)));
        for text in ["0s", "0ms", "soon"] {
            assert!(positive(text).is_err(), "{text}");
        }
    }

    #[test]
    fn deadlines_stay_below_dockers() {
        assert!(below_mount_patience("119s").is_ok());
        assert!(
            below_mount_patience("2m")
                .unwrap_err()
                .contains("less than 120 s")
        );
        assert!(below_patience("0s").is_err());
    }
}
