//! Settings of the daemon: flags, each with an environment name, so that the command line,
//! systemd's EnvironmentFile and `docker plugin set` are one mechanism.

use std::path::{Path, PathBuf};
use std::time::Duration;

use clap::Args;

use crate::cluster::{LONGEST_SESSION, SHORTEST_SESSION};
use crate::nfs::address::Share;
use crate::plugin::server::Settings;
use crate::volume::{DataPath, MountOptions, OnRemove};
use crate::watch::Address;

/// Where Docker looks for the socket of a plugin called nfsvol (moby: pkg/plugins/discovery.go).
pub const DEFAULT_SOCKET: &str = "/run/docker/plugins/nfsvol.sock";
pub(crate) const DEFAULT_STATE_DIR: &str = "/var/lib/nfsvol";
/// The longest that dockerd waits for Mount and for the other calls; a deadline must be shorter,
/// since dockerd sends no Unmount for a Mount that it gave up on (moby: volume/drivers/proxy.go).
const DOCKER_MOUNT_PATIENCE: Duration = Duration::from_secs(120);
const DOCKER_PATIENCE: Duration = Duration::from_secs(60);

/// The longest that one directory operation takes for a command that asks a share itself.
const ASIDE_DEADLINE: Duration = Duration::from_secs(5);

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
    /// Socket of Docker's engine: an exclusive volume's containers are stopped through it when this
    /// host is cut off (kernel data path)
    #[arg(long, env = "NFSVOL_DOCKER_SOCKET", default_value = crate::engine::DEFAULT_SOCKET, value_name = "PATH")]
    docker_socket: PathBuf,
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
    /// info,nfsvol::plugin=debug
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

/// The checked settings of a daemon.
#[derive(Debug, Clone)]
pub struct Config {
    pub share: Option<Share>,
    pub host: String,
    pub state_dir: PathBuf,
    pub mount_root: PathBuf,
    pub data_path: DataPath,
    pub mount_options: MountOptions,
    pub on_remove: OnRemove,
    pub allow_share: Vec<String>,
    pub allow_option: Vec<String>,
    pub trash_time: Duration,
    pub poll: Duration,
    /// The session time of a member of the cluster; `None` for who only asks.
    pub session: Option<Duration>,
    /// Where Docker's engine listens.
    pub docker_socket: PathBuf,
    pub idle_unmount: Duration,
    pub op_deadline: Duration,
    /// How long letting go of a volume waits for written data to reach the server.
    pub flush_wait: Duration,
}

impl Config {
    /// The settings of a daemon on this host.
    #[must_use]
    pub fn new(args: &ServeArgs) -> Self {
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

    /// The settings for asking a share once, with its state below `dir`.
    pub(crate) fn aside(share: Share, dir: &Path) -> Self {
        Self {
            share: Some(share),
            host: host_name(),
            state_dir: dir.to_owned(),
            mount_root: dir.join("mnt"),
            data_path: DataPath::default(),
            mount_options: MountOptions::default(),
            on_remove: OnRemove::default(),
            allow_share: Vec::new(),
            allow_option: vec!["*".to_owned()],
            trash_time: Duration::MAX,
            poll: Duration::MAX,
            session: None,
            docker_socket: crate::engine::DEFAULT_SOCKET.into(),
            idle_unmount: Duration::ZERO,
            op_deadline: ASIDE_DEADLINE,
            flush_wait: ASIDE_DEADLINE,
        }
    }

    /// Whether volumes on `share` may be made and mounted here. The home share always may.
    #[must_use]
    pub fn allows(&self, share: &Share) -> bool {
        let text = share.to_string();
        self.allow_share.is_empty()
            || self.share.as_ref() == Some(share)
            || self
                .allow_share
                .iter()
                .any(|pattern| matches(pattern, &text))
    }
}

impl Config {
    /// The first of a volume's mount options that may not be used here. The daemon's own, and the
    /// defaults, always may.
    #[must_use]
    pub fn refused_option(&self, options: &MountOptions) -> Option<String> {
        let (defaults, own) = (
            MountOptions::default().to_string(),
            self.mount_options.to_string(),
        );
        let known: Vec<&str> = defaults.split(',').chain(own.split(',')).collect();
        let allowed = |word: &str| {
            let name = word.split('=').next().unwrap_or(word);
            self.allow_option.iter().any(|pattern| match name {
                "suid" | "dev" => pattern == name,
                _ => matches(pattern, word) || matches(pattern, name),
            })
        };
        let text = options.to_string();
        let mut words = text.split(',');
        words
            .find(|word| !known.contains(word) && !allowed(word))
            .map(str::to_owned)
    }
}

fn host_name() -> String {
    rustix::system::uname()
        .nodename()
        .to_string_lossy()
        .into_owned()
}

/// Whether `text` matches a pattern in which `*` stands for anything.
fn matches(pattern: &str, text: &str) -> bool {
    let Some((first, rest)) = pattern.split_once('*') else {
        return pattern == text;
    };
    let Some(mut text) = text.strip_prefix(first) else {
        return false;
    };
    let mut parts: Vec<&str> = rest.split('*').collect();
    let last = parts.pop().unwrap_or_default();
    for part in parts {
        let Some(at) = text.find(part) else {
            return false;
        };
        text = &text[at + part.len()..];
    }
    text.ends_with(last)
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
    fn patterns_match_shares() {
        for (pattern, share, yes) in [
            ("nas:/export", "nas:/export", true),
            ("nas:/export", "nas:/export2", false),
            ("nas:/*", "nas:/export/db", true),
            ("*:/export/*", "10.0.0.1:/export/a", true),
            ("*:/export/*/x", "n:/export/a/b/x", true),
            ("*:/export/*/x", "n:/export/a/b/y", false),
            ("*", "anything:/x", true),
        ] {
            assert_eq!(matches(pattern, share), yes, "{pattern} {share}");
        }
    }

    #[test]
    fn a_time_of_nothing_is_refused() {
        assert_eq!(positive("1s"), Ok(Duration::from_secs(1)));
        for text in ["0s", "0ms", "soon"] {
            assert!(positive(text).is_err(), "{text}");
        }
    }

    #[test]
    fn options_that_give_rights_have_to_be_allowed_by_name() {
        let config = |patterns: &[&str], own: &str| Config {
            allow_option: patterns.iter().map(|p| (*p).to_owned()).collect(),
            mount_options: own.parse().unwrap(),
            ..Config::aside("nas:/export".parse().unwrap(), Path::new("/nowhere"))
        };
        let refused =
            |config: &Config, options: &str| config.refused_option(&options.parse().unwrap());
        let default = config(&["*"], "");
        assert_eq!(refused(&default, "nfsvers=4.1,nconnect=4,ro"), None);
        assert_eq!(refused(&default, "suid").as_deref(), Some("suid"));
        assert_eq!(refused(&default, "dev,nfsvers=3").as_deref(), Some("dev"));
        assert_eq!(refused(&config(&["*", "suid"], ""), "suid,soft"), None);
        assert_eq!(
            refused(&config(&["*"], "dev"), "dev"),
            None,
            "the administrator's own"
        );
        let few = config(&["nconnect", "sec=krb5*"], "");
        assert_eq!(refused(&few, "nconnect=4,sec=krb5p,hard,nosuid"), None);
        assert_eq!(refused(&few, "sec=sys").as_deref(), Some("sec=sys"));
        assert_eq!(refused(&few, "soft").as_deref(), Some("soft"));
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
