//! Which container a process belongs to, as engines name its control group and its mounts.

use std::path::Path;

use super::mountinfo::MountInfo;

/// The container of a process by its control group (cgroups(7)): Docker, Podman and Kubernetes
/// name a group after the container, `docker-<id>.scope`, `libpod-<id>`, or just `<id>`.
pub(super) fn of_cgroup(cgroup: &str) -> Option<String> {
    cgroup
        .lines()
        .find_map(|line| id_in(line.splitn(3, ':').nth(2)?))
}

/// The container of a namespace by its mounts: engines bind a `resolv.conf` or `hostname` from
/// `…/containers/<id>/…` into it.
pub(super) fn of_mounts(mountinfo: &str) -> Option<String> {
    let files = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
    MountInfo::parse_lines(mountinfo, |line| {
        files.iter().any(|file| line.contains(file))
    })
    .entries
    .iter()
    .filter(|entry| files.iter().any(|file| entry.mountpoint == Path::new(file)))
    .find_map(|entry| id_in(&entry.root))
}

/// The last component of a path that is an id of 64 hexadecimal digits, with or without an
/// engine's prefix and `.scope`.
fn id_in(path: &str) -> Option<String> {
    path.rsplit('/').find_map(|part| {
        let part = part.strip_suffix(".scope").unwrap_or(part);
        let id = part.rsplit('-').next()?;
        let digits = id.bytes().all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'));
        (id.len() == 64 && digits).then(|| id.to_owned())
    })
}

#[cfg(test)]
mod tests {
    use super::*;

    const ID: &str = "4f5c0a6c27a0ba7c77f3c1d3c0e2b0a19a1f4f2b8f1b2c3d4e5f60718293a4b5";

    #[test]
    fn containers_are_known_by_their_control_group() {
        for cgroup in [
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("12:cpu:/docker/{ID}\n0::/\n"),
            format!("0::/node1/{ID}\n"),
            format!("0::/machine.slice/libpod-{ID}.scope/container\n"),
        ] {
            assert_eq!(of_cgroup(&cgroup).as_deref(), Some(ID), "{cgroup}");
        }
        assert_eq!(of_cgroup("0::/user.slice/session-3.scope\n"), None);
    }

    #[test]
    fn containers_without_a_control_group_are_known_by_their_host_name_file() {
        let shown = format!(
            "300 200 0:40 / / rw - overlay overlay rw,lowerdir=/l\n\
             305 300 0:21 /docker/containers/{ID}/hostname /etc/hostname rw - tmpfs tmpfs rw\n"
        );
        assert_eq!(of_mounts(&shown).as_deref(), Some(ID));
    }
}
