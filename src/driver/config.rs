//! What the administrator has decided for this host, checked.

use std::path::{Path, PathBuf};
use std::time::Duration;

use crate::docker::engine;
use crate::host;
use crate::volume::{DataPath, MountOptions, OnRemove, Recreate};
use nfs::address::Share;

/// The longest that one directory operation takes for a command that asks a share itself.
const ASIDE_DEADLINE: Duration = Duration::from_secs(5);

/// The checked settings of a daemon.
#[derive(Debug, Clone)]
pub(crate) struct Config {
    pub(crate) share: Option<Share>,
    pub(crate) host: String,
    pub(crate) state_dir: PathBuf,
    pub(crate) mount_root: PathBuf,
    pub(crate) data_path: DataPath,
    pub(crate) mount_options: MountOptions,
    pub(crate) on_remove: OnRemove,
    pub(crate) recreate: Recreate,
    pub(crate) allow_share: Vec<String>,
    pub(crate) allow_option: Vec<String>,
    pub(crate) trash_time: Duration,
    pub(crate) poll: Duration,
    /// The session time of a member of the cluster; `None` for who only asks.
    pub(crate) session: Option<Duration>,
    /// Where Docker's engine listens.
    pub(crate) docker_socket: PathBuf,
    pub(crate) idle_unmount: Duration,
    pub(crate) op_deadline: Duration,
    /// How long letting go of a volume waits for written data to reach the server.
    pub(crate) flush_wait: Duration,
}

impl Config {
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
            recreate: Recreate::default(),
            allow_share: Vec::new(),
            allow_option: vec!["*".to_owned()],
            trash_time: Duration::MAX,
            poll: Duration::MAX,
            session: None,
            docker_socket: engine::DEFAULT_SOCKET.into(),
            idle_unmount: Duration::ZERO,
            op_deadline: ASIDE_DEADLINE,
            flush_wait: ASIDE_DEADLINE,
        }
    }

    /// What of it matters to the host itself.
    pub(super) fn of_host(&self) -> host::Settings {
        host::Settings {
            state_dir: self.state_dir.clone(),
            mount_root: self.mount_root.clone(),
            is_daemon: self.session.is_some(),
            home: self.share.clone(),
            data_path: self.data_path,
            idle_unmount: self.idle_unmount,
            flush_wait: self.flush_wait,
            docker_socket: self.docker_socket.clone(),
        }
    }

    /// Whether volumes on `share` may be made and mounted here. The home share always may.
    #[must_use]
    pub(crate) fn allows(&self, share: &Share) -> bool {
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
    pub(crate) fn refused_option(&self, options: &MountOptions) -> Option<String> {
        let mut known = MountOptions::default().texts();
        known.extend(self.mount_options.texts());
        let allowed = |word: &str| {
            let name = word.split('=').next().unwrap_or(word);
            self.allow_option.iter().any(|pattern| match name {
                "suid" | "dev" => pattern == name,
                _ => matches(pattern, word) || matches(pattern, name),
            })
        };
        let mut words = options.texts().into_iter();
        words.find(|word| !known.contains(word) && !allowed(word))
    }
}

/// What this host calls itself.
pub(crate) fn host_name() -> String {
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
}
