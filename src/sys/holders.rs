//! Which processes hold a volume, on the evidence of the kernel's mount namespaces.
//!
//! A container has its own mount namespace with its own mount of the volume, which lives on when
//! the host's mount point has been unmounted, the engine has died or this daemon has forgotten.
//! So the namespaces are asked: one look at `/proc/PID/mountinfo` per namespace, which never
//! waits for a server.
//!
//! Limits: a process of the host's own namespace that merely has a file open below the volume's
//! mount point is not found here (its unmount becomes a lazy one); and when a client renames a
//! directory that containers of its own host hold, their mounts change their source.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use super::mountinfo::{DeviceId, MountEntry, MountInfo, Place};
use super::{containers, proc};
use crate::mutant::{self, Mutant};

/// By what a volume is known in other namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Mark {
    /// The source that mountinfo shows, `nas:/export/db`. It tells the volumes of one share apart,
    /// which the device number of an NFS mount does not, and survives a fresh mount.
    Source(String),
    /// A volume with a file system of its own (FUSE): its device number. When that has gone, the kernel
    /// gives the number to the next file system that is mounted, whatever it is. Known limit: another
    /// FUSE volume's may be taken for this one.
    Device(DeviceId),
}

impl Mark {
    /// Whether a mount shows this volume or a directory below it (`volume-subpath`).
    fn is(&self, entry: &MountEntry) -> bool {
        match self {
            Self::Source(source) => {
                (entry.is_nfs() || entry.is_fuse())
                    && entry
                        .source
                        .strip_prefix(source.as_str())
                        .is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
            }
            Self::Device(device) => {
                let whatever = mutant::is_on(Mutant::NumbersAreVolumes);
                entry.device == *device && (entry.is_fuse() || whatever)
            }
        }
    }

    /// A text that every mountinfo line of this volume holds.
    fn needle(&self) -> String {
        match self {
            // Up to the first character that the kernel may print escaped.
            Self::Source(source) => {
                let plain = |ch: char| !ch.is_whitespace() && ch != '\\' && ch != '#';
                source.chars().take_while(|ch| plain(*ch)).collect()
            }
            Self::Device(device) => format!(" {device} "),
        }
    }
}

/// A process that holds a volume; one per mount namespace and place.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub struct Holder {
    pub pid: u32,
    /// The full id, where the process belongs to a container of Docker or Podman.
    pub container_id: Option<String>,
    pub comm: String,
    /// The file system that it holds: another one than the volume's own mount shows, after the
    /// share had to be mounted anew.
    pub device: DeviceId,
    /// Where the volume is mounted in the process's namespace.
    pub mountpoint: PathBuf,
}

/// A volume whose holders are looked for.
#[derive(Debug, Clone)]
pub(crate) struct Wanted {
    /// By what it may be known.
    pub marks: Vec<Mark>,
    /// Its own mount point.
    pub own: PathBuf,
    /// The directory of this host's mounts of shares, which hold no volume: a volume may be all of a
    /// share.
    pub shares: PathBuf,
}

/// Finds who holds one volume: [`find_all`].
///
/// # Errors
/// When /proc cannot be listed.
pub fn find(held: &Mark, own: &Path) -> io::Result<Vec<Holder>> {
    let wanted = Wanted {
        marks: vec![held.clone()],
        own: own.to_owned(),
        shares: PathBuf::new(),
    };
    Ok(find_all(&[wanted])?.pop().unwrap_or_default())
}

/// Finds who holds each volume, by one look at all namespaces. What is mounted on a volume's own
/// mount point is left out: in this namespace, in those that began as a copy of it, and behind
/// other paths to it.
///
/// Reads a few files of /proc per process and namespace: about 10 µs per process. Blocking, but
/// never for long.
///
/// # Errors
/// When /proc cannot be listed. Processes that end meanwhile are passed over.
pub(crate) fn find_all(wanted: &[Wanted]) -> io::Result<Vec<Vec<Holder>>> {
    let mut found = vec![Vec::new(); wanted.len()];
    if wanted.is_empty() {
        return Ok(found);
    }
    let here = MountInfo::parse(&String::from_utf8_lossy(&std::fs::read(
        "/proc/self/mountinfo",
    )?));
    let known: Vec<_> = wanted
        .iter()
        .map(|volume| {
            let needles: Vec<String> = volume.marks.iter().map(Mark::needle).collect();
            let places = [&volume.own, &volume.shares].map(|path| here.place_of(path));
            (places, needles)
        })
        .collect();
    for pid in namespaces()?.into_values() {
        let proc = proc::directory(pid);
        let Ok(text) = std::fs::read(proc.join("mountinfo")) else {
            continue;
        };
        let text = String::from_utf8_lossy(&text);
        let read = |name: &str| std::fs::read_to_string(proc.join(name)).unwrap_or_default();
        let container =
            || containers::of_cgroup(&read("cgroup")).or_else(|| containers::of_mounts(&text));
        for ((volume, (own, needles)), holders) in wanted.iter().zip(&known).zip(&mut found) {
            if !needles.iter().any(|needle| text.contains(needle)) {
                continue;
            }
            let mounts = mounts_of(&volume.marks, &text, own);
            holders.extend(mounts.into_iter().map(|entry| Holder {
                pid,
                container_id: container(),
                comm: read("comm").trim_end().to_owned(),
                device: entry.device,
                mountpoint: entry.mountpoint,
            }));
        }
    }
    Ok(found)
}

/// Whether a process of any namespace has a file of a volume open or works in it, by whichever of
/// its mounts, the host's own included: `docker cp`, a copy by nfsvol, somebody's shell.
///
/// Blocking, but it never waits for a server.
///
/// # Errors
/// When /proc cannot be listed. Processes that end meanwhile are passed over.
pub(crate) fn in_use(marks: &[Mark]) -> io::Result<bool> {
    let needles: Vec<String> = marks.iter().map(Mark::needle).collect();
    let mut shows: BTreeMap<PathBuf, (Vec<MountEntry>, Vec<u64>)> = BTreeMap::new();
    for pid in proc::ids()? {
        let proc = proc::directory(pid);
        let Ok(namespace) = std::fs::read_link(proc.join("ns/mnt")) else {
            continue;
        };
        let (mounts, ours) = shows.entry(namespace).or_insert_with(|| {
            let text = std::fs::read(proc.join("mountinfo")).unwrap_or_default();
            let text = String::from_utf8_lossy(&text);
            if !needles.iter().any(|needle| text.contains(needle)) {
                return (Vec::new(), Vec::new());
            }
            let all = MountInfo::parse(&text).entries;
            let is_ours = |entry: &&MountEntry| marks.iter().any(|mark| mark.is(entry));
            let ours = all.iter().filter(is_ours).map(|entry| entry.id).collect();
            (all, ours)
        });
        if !ours.is_empty() && uses_one_of(&proc, mounts, ours) {
            return Ok(true);
        }
    }
    Ok(false)
}

/// Whether a process works in, or has a file open of, one of the mounts with these ids.
pub(super) fn uses_one_of(proc: &Path, mounts: &[MountEntry], ids: &[u64]) -> bool {
    let works_in = std::fs::read_link(proc.join("cwd")).is_ok_and(|at| {
        let below = mounts.iter().filter(|e| at.starts_with(&e.mountpoint));
        // Of stacked mounts the last one is seen.
        let on = below.max_by_key(|e| e.mountpoint.as_os_str().len());
        on.is_some_and(|entry| ids.contains(&entry.id))
    });
    let is_of_it = |info: &str| {
        let id = info.lines().find_map(|line| line.strip_prefix("mnt_id:"));
        let id = id.and_then(|id| id.trim().parse::<u64>().ok());
        id.is_some_and(|id| ids.contains(&id))
    };
    works_in
        || std::fs::read_dir(proc.join("fdinfo")).is_ok_and(|files| {
            files
                .flatten()
                .any(|file| std::fs::read_to_string(file.path()).is_ok_and(|info| is_of_it(&info)))
        })
}

/// The first process of each mount namespace, by namespace.
fn namespaces() -> io::Result<BTreeMap<PathBuf, u32>> {
    let mut first: BTreeMap<PathBuf, u32> = BTreeMap::new();
    for pid in proc::ids()? {
        let Ok(namespace) = std::fs::read_link(proc::directory(pid).join("ns/mnt")) else {
            continue; // it has ended, or is a zombie, which holds no mounts
        };
        match first.entry(namespace) {
            Entry::Vacant(vacant) => {
                vacant.insert(pid);
            }
            Entry::Occupied(mut other) => {
                let least = pid.min(*other.get());
                other.insert(least);
            }
        }
    }
    Ok(first)
}

/// The mounts in which one mountinfo shows the volume, apart from what is mounted on its own place.
fn mounts_of(
    marks: &[Mark],
    mountinfo: &str,
    [own, shares]: &[Option<Place>; 2],
) -> Vec<MountEntry> {
    let info = MountInfo::parse(mountinfo);
    let is_own = |entry: &MountEntry| {
        info.covered(entry).is_some_and(|at| {
            own.as_ref() == Some(&at) || shares.as_ref().is_some_and(|dir| at.is_in(dir))
        })
    };
    let mounts = info
        .entries
        .iter()
        .filter(|entry| marks.iter().any(|mark| mark.is(entry)) && !is_own(entry));
    mounts.cloned().collect()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn who_works_in_a_mount_of_the_host_uses_it() {
        let info = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = std::env::current_dir().unwrap();
        let entries = MountInfo::parse(&info).entries;
        let below = entries.iter().filter(|e| here.starts_with(&e.mountpoint));
        let of_this = below
            .max_by_key(|e| e.mountpoint.as_os_str().len())
            .unwrap();
        // What is in use there is no volume.
        let _back = mutant::put_back(Mutant::NumbersAreVolumes);
        assert!(in_use(&[Mark::Device(of_this.device)]).unwrap());
        let (major, minor) = (4095, 1_048_575);
        let nobodys = DeviceId { major, minor };
        assert!(!in_use(&[Mark::Device(nobodys)]).unwrap());
    }

    /// Of a container in a guest, with a bind of an NFS volume.
    fn container() -> String {
        String::from(
            "300 200 0:40 / / rw - overlay overlay rw,lowerdir=/l\n\
             301 300 0:53 / /data rw,nosuid,nodev,relatime - nfs nas:/export/db rw,vers=3,addr=10.77.0.1\n\
             302 300 0:53 / /sub rw,relatime - nfs4 nas:/export/db/a rw,vers=4.2,addr=10.77.0.1\n\
             303 300 0:53 / /other rw,relatime - nfs nas:/export/db2 rw,vers=3,addr=10.77.0.1\n\
             304 300 0:60 / /f rw,relatime - fuse.nfsvol nfsvol rw,user_id=0\n\
             305 300 0:21 /docker/containers/4f5c/hostname /etc/hostname rw - tmpfs tmpfs rw\n",
        )
    }

    fn places(held: &Mark, own: &str) -> Vec<String> {
        let own = MountInfo::parse(&container()).place_of(Path::new(own));
        let places = mounts_of(
            std::slice::from_ref(held),
            &container(),
            &[own.clone(), None],
        );
        places
            .iter()
            .map(|entry| entry.mountpoint.display().to_string())
            .collect()
    }

    #[test]
    fn an_nfs_volume_is_known_by_its_source() {
        let held = Mark::Source("nas:/export/db".to_owned());
        assert_eq!(places(&held, "/nowhere"), ["/data", "/sub"]);
        assert_eq!(places(&held, "/data"), ["/sub"]);
        assert!(places(&Mark::Source("nas:/export/d".to_owned()), "/nowhere").is_empty());
    }

    #[test]
    fn a_share_that_is_mounted_holds_no_volume_that_is_all_of_it() {
        let info =
            "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:9 / /mnt/shares/5e rw - nfs nas:/db rw\n";
        let marks = [Mark::Source("nas:/db".to_owned())];
        let shares = MountInfo::parse(info).place_of(Path::new("/mnt/shares"));
        assert!(mounts_of(&marks, info, &[None, shares]).is_empty());
        assert_eq!(mounts_of(&marks, info, &[None, None]).len(), 1);
    }

    #[test]
    fn a_fuse_volume_is_known_by_its_device() {
        let device = |minor| Mark::Device(DeviceId { major: 0, minor });
        assert_eq!(places(&device(60), "/nowhere"), ["/f"]);
        assert!(places(&device(6), "/nowhere").is_empty());
        // Of a volume that is gone, whose number the container's own file system has got.
        assert!(places(&device(40), "/nowhere").is_empty());
        let _back = mutant::put_back(Mutant::NumbersAreVolumes);
        assert_eq!(places(&device(40), "/nowhere"), ["/"]);
    }

    #[test]
    fn sources_that_are_printed_escaped_are_found() {
        let line = "1 0 0:5 / /d rw - nfs4 nas:/my\\040db rw";
        let held = Mark::Source("nas:/my db".to_owned());
        let places = mounts_of(&[held], line, &[None, None]);
        assert_eq!(places[0].mountpoint, Path::new("/d"));
    }

    #[test]
    fn a_process_that_has_the_mount_is_found() {
        // Every process sees /proc, which is mounted somewhere in this namespace. It is no volume.
        let _back = mutant::put_back(Mutant::NumbersAreVolumes);
        let info = MountInfo::read_below(Path::new("/proc")).unwrap();
        let proc = info.at(Path::new("/proc")).unwrap();
        let wanted = |own: &str| Wanted {
            marks: vec![Mark::Device(proc.device)],
            own: own.into(),
            shares: PathBuf::new(),
        };
        let found = find_all(&[wanted("/nowhere"), wanted("/proc")]).unwrap();
        let has_proc = |holders: &[Holder]| {
            let mut places = holders.iter().map(|holder| &holder.mountpoint);
            places.any(|place| place == Path::new("/proc"))
        };
        assert!(has_proc(&found[0]) && !has_proc(&found[1]));
    }
}
