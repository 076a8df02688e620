//! What a trial needs from the machine, and whether it is there.

use std::path::Path;

use super::{before, docker, ganesha, knfsd, node, systemd, tool};

/// The root file system of Docker Engine 26.1, which crates/lab/setup makes.
pub const NEWER_ENGINE: &str = "/var/cache/nfsvol-lab/trixie";

/// What a trial needs from the machine.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Part {
    Root,
    Docker,
    Ganesha,
    Guest,
    Knfsd,
    NewerEngine,
    NewerLinux,
    Fuse,
    Podman,
    Compose,
    Services,
    Systemd,
    Browser,
    Prometheus,
    Judges,
    Soak,
    Before,
}

/// Why the machine cannot run these parts, if so.
pub(crate) fn missing(parts: &[Part]) -> Option<String> {
    let absent = |path: &str, package: &str| {
        (!Path::new(path).exists()).then(|| format!("{path} is absent (apt install {package})"))
    };
    parts.iter().find_map(|part| match part {
        Part::Root => (!rustix::process::geteuid().is_root()).then(|| "needs root".to_owned()),
        Part::Docker => absent(docker::DOCKERD, "docker.io")
            .or_else(|| absent(docker::BUSYBOX, "busybox-static")),
        Part::Ganesha => absent(ganesha::GANESHA, "nfs-ganesha nfs-ganesha-vfs")
            .or_else(|| absent(ganesha::RPCBIND, "rpcbind")),
        Part::Guest => absent(node::UML, "user-mode-linux")
            .or_else(|| absent("/dev/net/tun", "a kernel with tun")),
        Part::Knfsd => absent(knfsd::EXPORTFS, "nfs-kernel-server")
            .or_else(|| absent(knfsd::MKFS_XFS, "xfsprogs")),
        Part::Systemd => absent(systemd::SYSTEMD, "systemd"),
        Part::Services => absent("/usr/bin/redis-server", "redis-server")
            .or_else(|| absent("/usr/sbin/mariadbd", "mariadb-server"))
            .or_else(|| absent("/usr/lib/postgresql", "postgresql")),
        Part::Browser => absent("/usr/bin/chromium", "chromium")
            .or_else(|| absent("/usr/bin/chromedriver", "chromium-driver")),
        Part::Prometheus => absent("/usr/bin/prometheus", "prometheus"),
        Part::NewerEngine => (!Path::new(NEWER_ENGINE).exists())
            .then(|| format!("{NEWER_ENGINE} is absent (crates/lab/setup makes it)")),
        Part::NewerLinux => (!Path::new(node::NEWER_LINUX).exists()).then(|| {
            format!(
                "{} is absent (crates/lab/setup makes it)",
                node::NEWER_LINUX
            )
        }),
        Part::Compose => absent("/usr/bin/docker-compose", "docker-compose"),
        Part::Soak => absent("/usr/bin/fio", "fio")
            .or_else(|| absent("/usr/bin/stress-ng", "stress-ng"))
            .or_else(|| absent("/usr/bin/sqlite3", "sqlite3")),
        Part::Judges => ["pjdfstest", "fsx"]
            .map(tool)
            .into_iter()
            .find(|tool| !Path::new(tool).exists())
            .map(|tool| format!("{tool} is absent (`make judges` installs it)")),
        Part::Before => {
            let before = before();
            let is_absent = !Path::new(&before).exists();
            is_absent.then(|| format!("{before} is absent (`make baseline` builds it)"))
        }
        Part::Podman => absent("/usr/bin/podman", "podman crun"),
        Part::Fuse => absent("/dev/fuse", "a kernel with fuse")
            .or_else(|| absent("/usr/bin/fusermount3", "fuse3")),
    })
}
