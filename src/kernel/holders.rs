//! Which processes hold a volume, on the evidence of the kernel's mount namespaces.
//!
//! A container has its own mount namespace with its own mount of the volume, which lives on when
//! the host's mount point has been unmounted, the engine has died or this daemon has forgotten.
//! So the namespaces are asked: one look at `/proc/PID/mountinfo` per namespace, which never
//! waits for a server.
//!
//! Limits: a process of the host's own namespace that merely has a file open below the volume's
//! mount point is not found here (its unmount becomes a lazy one); a thread with a namespace or files of
//! its own (unshare(2)) counts for no more than its process; and when a client renames a
//! directory that containers of its own host hold, their mounts change their source.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::{Path, PathBuf};

use serde::{Deserialize, Serialize};

use crate::mutant::{self, Mutant};
use crate::sys::mountinfo::{DeviceId, MountEntry, MountInfo, Place};
use crate::sys::proc;

/// By what a volume is known in other namespaces.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum Held {
    /// The source that mountinfo shows, `nas:/export/db`. It tells the volumes of one share apart,
    /// which the device number of an NFS mount does not, and survives a fresh mount.
    Source(String),
    /// A volume with a file system of its own (FUSE): its device number.
    Device(DeviceId),
}

impl Held {
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
            Self::Device(device) => entry.device == *device,
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
pub struct Wanted {
    /// By what it may be known.
    pub marks: Vec<Held>,
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
pub fn find(held: &Held, own: &Path) -> io::Result<Vec<Holder>> {
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
pub fn find_all(wanted: &[Wanted]) -> io::Result<Vec<Vec<Holder>>> {
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
            let needles: Vec<String> = volume.marks.iter().map(Held::needle).collect();
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
            || container_of_cgroup(&read("cgroup")).or_else(|| container_of_mounts(&text));
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
pub fn in_use(marks: &[Held]) -> io::Result<bool> {
    let needles: Vec<String> = marks.iter().map(Held::needle).collect();
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
            let is_ours = |entry: &&MountEntry| marks.iter().any(|held| held.is(entry));
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
fn uses_one_of(proc: &Path, mounts: &[MountEntry], ids: &[u64]) -> bool {
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

/// Whether a process has a file of a device in its memory (proc_pid_maps(5)), open or not.
fn maps(proc: &Path, device: DeviceId) -> bool {
    let mark = format!("{:02x}:{:02x}", device.major, device.minor);
    let maps = std::fs::read(proc.join("maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    maps.lines()
        .any(|line| line.split(' ').nth(3) == Some(&mark))
}

/// A process that uses a file system, and the container that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct User {
    pub pid: u32,
    /// Never the one that this program runs in itself, whose end would be its own.
    pub container_id: Option<String>,
    /// A container engine, which copies an image's data into the volume: its end would be that of
    /// all containers.
    pub is_engine: bool,
    /// Tells it from a later process with the same id.
    started: String,
}

impl User {
    /// Whether the process with this id still is this one.
    #[must_use]
    pub fn is_alive(&self) -> bool {
        start_of(self.pid) == self.started
    }
}

/// When a process was started, in ticks since the boot (proc_pid_stat(5), field 22); empty when
/// there is none.
fn start_of(pid: u32) -> String {
    let stat = std::fs::read_to_string(format!("/proc/{pid}/stat")).unwrap_or_default();
    proc::stat_fields(&stat)
        .nth(19)
        .unwrap_or_default()
        .to_owned()
}

/// The container that this program runs in.
fn own_container() -> Option<String> {
    if mutant::is_on(Mutant::OwnContainerIsKilled) {
        return None;
    }
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}"));
    let of_cgroup = container_of_cgroup(&read("cgroup").unwrap_or_default());
    of_cgroup.or_else(|| container_of_mounts(&read("mountinfo").unwrap_or_default()))
}

/// Finds every process that can use a file system: those whose mount namespace shows it elsewhere
/// than on `own`, the host's mount points of it, and those that have a file of it open or work in
/// it. A namespace that only began as a copy of the host's, as a service's does, or that follows
/// it, makes nobody a user, nor does this namespace, nor the first process's. Processes of this
/// program outside of containers are left out, of an earlier or later version too.
///
/// Blocking, but it never waits for a server.
///
/// # Errors
/// When /proc cannot be listed, or a process not looked at. Those that end meanwhile are passed over.
pub fn users(device: DeviceId, own: &[&Path]) -> io::Result<Vec<User>> {
    let namespace = |proc: &Path| std::fs::read_link(proc.join("ns/mnt")).ok();
    let program = std::fs::read_link("/proc/self/exe")?;
    let hosts = ["/proc/self", "/proc/1"].map(|proc| namespace(Path::new(proc)));
    let here = std::fs::read("/proc/self/mountinfo")?;
    let places = Places::of(
        &MountInfo::parse(&String::from_utf8_lossy(&here)),
        device,
        own,
    );
    let inside = own_container();
    let mut shows: BTreeMap<PathBuf, Shown> = BTreeMap::new();
    let mut users = Vec::new();
    for pid in proc::ids()? {
        let proc = proc::directory(pid);
        let Some(its) = namespace(&proc) else {
            continue;
        };
        let shown = match shows.entry(its.clone()) {
            Entry::Occupied(known) => known.into_mut(),
            Entry::Vacant(unknown) => match Shown::read(&proc, device, &places)? {
                Some(shown) => unknown.insert(shown),
                None => continue,
            },
        };
        if shown.mounts.is_empty() {
            continue;
        }
        let exe = std::fs::read_link(proc.join("exe")).unwrap_or_default();
        let cgroup = std::fs::read_to_string(proc.join("cgroup")).unwrap_or_default();
        let container = container_of_cgroup(&cgroup).or_else(|| shown.container_id.clone());
        let container = container.filter(|id| inside.as_ref() != Some(id));
        let is_engine = ENGINES.iter().any(|name| program_name(&exe) == *name);
        let is_host = hosts.contains(&Some(its));
        let is_copy = is_host || shown.is_copy(is_engine || container.is_none());
        if is_copy && (is_same_program(&exe, &program) || !shown.is_used_by(&proc)) {
            continue;
        }
        users.push(User {
            pid,
            started: start_of(pid),
            container_id: container,
            is_engine: is_copy && is_engine,
        });
    }
    Ok(users)
}

/// Whether a thread of another process of this program waits in the kernel without being able to go
/// on (state D of proc_pid_stat(5)), as one does whose call to a server gets no answer.
///
/// Never waits for a server itself.
#[must_use]
pub fn another_of_us_waits() -> bool {
    let Ok(program) = std::fs::read_link("/proc/self/exe") else {
        return false;
    };
    let of_us = |pid: &u32| {
        let exe = std::fs::read_link(proc::directory(*pid).join("exe"));
        *pid != std::process::id() && exe.is_ok_and(|exe| is_same_program(&exe, &program))
    };
    let waits = |pid: u32| {
        let tasks = std::fs::read_dir(format!("/proc/{pid}/task"));
        let mut tasks = tasks.into_iter().flatten().flatten();
        tasks.any(|task| {
            let stat = std::fs::read_to_string(task.path().join("stat"));
            stat.is_ok_and(|stat| proc::stat_fields(&stat).next() == Some("D"))
        })
    };
    let mut processes = proc::ids().unwrap_or_default().into_iter();
    processes.any(|pid| of_us(&pid) && waits(pid))
}

/// The programs that copy an image's data into a volume.
const ENGINES: [&str; 2] = ["dockerd", "podman"];

/// The name of a process's program, by its link in /proc, which tells when the file has been replaced.
fn program_name(exe: &Path) -> String {
    let name = exe.file_name().unwrap_or_default().to_string_lossy();
    let name = name.strip_suffix(" (deleted)").unwrap_or(&name);
    name.to_owned()
}

fn is_same_program(exe: &Path, program: &Path) -> bool {
    if mutant::is_on(Mutant::OldProgramIsAnother) {
        return exe == program;
    }
    program_name(exe) == program_name(program)
}

/// Where the host shows a file system.
#[derive(Debug, Default)]
struct Places {
    /// Its own mount points.
    own: Vec<Place>,
    /// And elsewhere, as by a bind that somebody made: services get copies of that, but a container can
    /// have the same bind for itself (`-v /srv:/srv`).
    binds: Vec<Place>,
}

impl Places {
    fn of(here: &MountInfo, device: DeviceId, own: &[&Path]) -> Self {
        let ours = here.entries.iter().filter(|entry| entry.device == device);
        Self {
            own: own.iter().filter_map(|at| here.place_of(at)).collect(),
            binds: ours.filter_map(|entry| here.covered(entry)).collect(),
        }
    }
}

/// What a mount namespace shows of a file system.
#[derive(Debug)]
struct Shown {
    device: DeviceId,
    /// All of the namespace; none when the file system is not among them.
    mounts: Vec<MountEntry>,
    /// The file system is on the host's own mount points only.
    is_on_own: bool,
    /// It is there, and where else the host shows it, only.
    is_where_the_host_has_it: bool,
    container_id: Option<String>,
}

impl Shown {
    /// None when the process has ended.
    fn read(proc: &Path, device: DeviceId, places: &Places) -> io::Result<Option<Self>> {
        let text = match std::fs::read(proc.join("mountinfo")) {
            Ok(text) => text,
            // EINVAL: it exits, and has no namespace any more.
            Err(error) if proc::is_gone(&error) || error.kind() == io::ErrorKind::InvalidInput => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        };
        let text = String::from_utf8_lossy(&text);
        let mut info = MountInfo::default();
        // Most namespaces do not show it: a cheap look before the full parse.
        if text.contains(&format!(" {device} ")) {
            info = MountInfo::parse(&text);
        }
        let ours = info.entries.iter().filter(|entry| entry.device == device);
        let covered: Vec<_> = ours.map(|entry| info.covered(entry)).collect();
        let are_all = |known: &dyn Fn(&Place) -> bool| {
            let mut covered = covered.iter();
            covered.all(|at| at.as_ref().is_some_and(known))
        };
        let is_own = |at: &Place| places.own.contains(at);
        Ok(Some(Self {
            device,
            is_on_own: are_all(&is_own),
            is_where_the_host_has_it: are_all(&|at| is_own(at) || places.binds.contains(at)),
            mounts: if covered.is_empty() {
                Vec::new()
            } else {
                info.entries
            },
            container_id: container_of_mounts(&text),
        }))
    }

    /// Whether it shows nothing but what the host does: whoever is `of_the_host` got copies of all its
    /// mounts, and a container has others because somebody gave them to it.
    fn is_copy(&self, of_the_host: bool) -> bool {
        let all_count = of_the_host || mutant::is_on(Mutant::BindsAreTheHosts);
        self.is_on_own || all_count && self.is_where_the_host_has_it
    }

    /// Whether a process of the namespace has a file of it open or in its memory, or works in it.
    fn is_used_by(&self, proc: &Path) -> bool {
        let ours = self.mounts.iter().filter(|e| e.device == self.device);
        let ids: Vec<u64> = ours.map(|entry| entry.id).collect();
        uses_one_of(proc, &self.mounts, &ids) || maps(proc, self.device)
    }
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
    marks: &[Held],
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
        .filter(|entry| marks.iter().any(|held| held.is(entry)) && !is_own(entry));
    mounts.cloned().collect()
}

/// The container of a process by its control group (cgroups(7)): Docker, Podman and Kubernetes
/// name a group after the container, `docker-<id>.scope`, `libpod-<id>`, or just `<id>`.
fn container_of_cgroup(cgroup: &str) -> Option<String> {
    cgroup
        .lines()
        .find_map(|line| container_in(line.splitn(3, ':').nth(2)?))
}

/// The container of a namespace by its mounts: engines bind a `resolv.conf` or `hostname` from
/// `…/containers/<id>/…` into it.
fn container_of_mounts(mountinfo: &str) -> Option<String> {
    let files = ["/etc/hostname", "/etc/hosts", "/etc/resolv.conf"];
    MountInfo::parse_lines(mountinfo, |line| {
        files.iter().any(|file| line.contains(file))
    })
    .entries
    .iter()
    .filter(|entry| files.iter().any(|file| entry.mountpoint == Path::new(file)))
    .find_map(|entry| container_in(&entry.root))
}

/// The last component of a path that is an id of 64 hexadecimal digits, with or without an
/// engine's prefix and `.scope`.
fn container_in(path: &str) -> Option<String> {
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

    #[test]
    fn who_works_in_a_mount_of_the_host_uses_it() {
        let info = std::fs::read_to_string("/proc/self/mountinfo").unwrap();
        let here = std::env::current_dir().unwrap();
        let entries = MountInfo::parse(&info).entries;
        let below = entries.iter().filter(|e| here.starts_with(&e.mountpoint));
        let of_this = below
            .max_by_key(|e| e.mountpoint.as_os_str().len())
            .unwrap();
        assert!(in_use(&[Held::Device(of_this.device)]).unwrap());
        let (major, minor) = (4095, 1_048_575);
        let nobodys = DeviceId { major, minor };
        assert!(!in_use(&[Held::Device(nobodys)]).unwrap());
    }

    const ID: &str = "4f5c0a6c27a0ba7c77f3c1d3c0e2b0a19a1f4f2b8f1b2c3d4e5f60718293a4b5";

    /// Of a container in a guest, with a bind of an NFS volume.
    fn container() -> String {
        format!(
            "300 200 0:40 / / rw - overlay overlay rw,lowerdir=/l\n\
             301 300 0:53 / /data rw,nosuid,nodev,relatime - nfs nas:/export/db rw,vers=3,addr=10.77.0.1\n\
             302 300 0:53 / /sub rw,relatime - nfs4 nas:/export/db/a rw,vers=4.2,addr=10.77.0.1\n\
             303 300 0:53 / /other rw,relatime - nfs nas:/export/db2 rw,vers=3,addr=10.77.0.1\n\
             304 300 0:60 / /f rw,relatime - fuse.nfsvol nfsvol rw,user_id=0\n\
             305 300 0:21 /docker/containers/{ID}/hostname /etc/hostname rw - tmpfs tmpfs rw\n"
        )
    }

    fn places(held: &Held, own: &str) -> Vec<String> {
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
        let held = Held::Source("nas:/export/db".to_owned());
        assert_eq!(places(&held, "/nowhere"), ["/data", "/sub"]);
        assert_eq!(places(&held, "/data"), ["/sub"]);
        assert!(places(&Held::Source("nas:/export/d".to_owned()), "/nowhere").is_empty());
    }

    #[test]
    fn a_share_that_is_mounted_holds_no_volume_that_is_all_of_it() {
        let info =
            "1 0 8:1 / / rw - ext4 /dev/a rw\n2 1 0:9 / /mnt/shares/5e rw - nfs nas:/db rw\n";
        let marks = [Held::Source("nas:/db".to_owned())];
        let shares = MountInfo::parse(info).place_of(Path::new("/mnt/shares"));
        assert!(mounts_of(&marks, info, &[None, shares]).is_empty());
        assert_eq!(mounts_of(&marks, info, &[None, None]).len(), 1);
    }

    #[test]
    fn a_fuse_volume_is_known_by_its_device() {
        let device = |minor| Held::Device(DeviceId { major: 0, minor });
        assert_eq!(places(&device(60), "/nowhere"), ["/f"]);
        assert!(places(&device(6), "/nowhere").is_empty());
    }

    #[test]
    fn sources_that_are_printed_escaped_are_found() {
        let line = "1 0 0:5 / /d rw - nfs4 nas:/my\\040db rw";
        let held = Held::Source("nas:/my db".to_owned());
        let places = mounts_of(&[held], line, &[None, None]);
        assert_eq!(places[0].mountpoint, Path::new("/d"));
    }

    #[test]
    fn containers_are_known_by_their_control_group() {
        for cgroup in [
            format!("0::/system.slice/docker-{ID}.scope\n"),
            format!("12:cpu:/docker/{ID}\n0::/\n"),
            format!("0::/node1/{ID}\n"),
            format!("0::/machine.slice/libpod-{ID}.scope/container\n"),
        ] {
            assert_eq!(
                container_of_cgroup(&cgroup).as_deref(),
                Some(ID),
                "{cgroup}"
            );
        }
        assert_eq!(
            container_of_cgroup("0::/user.slice/session-3.scope\n"),
            None
        );
    }

    #[test]
    fn containers_without_a_control_group_are_known_by_their_host_name_file() {
        assert_eq!(container_of_mounts(&container()).as_deref(), Some(ID));
    }

    #[test]
    fn who_has_a_file_open_uses_its_file_system_and_who_has_not_does_not() {
        // No program is on this device.
        let dir = tempfile::tempdir_in("/dev/shm").unwrap();
        let place = dir.path().canonicalize().unwrap();
        let info = MountInfo::parse(&std::fs::read_to_string("/proc/self/mountinfo").unwrap());
        let below = info
            .entries
            .iter()
            .filter(|e| place.starts_with(&e.mountpoint));
        let on = below
            .max_by_key(|e| e.mountpoint.as_os_str().len())
            .unwrap();
        let device = on.device;
        let start = |redirect: &str| {
            let script = format!("cd /proc; exec sleep 1000 {redirect}");
            let mut command = std::process::Command::new("/bin/sh");
            command
                .args(["-c", &script])
                .stdin(std::process::Stdio::null());
            command
                .stdout(std::process::Stdio::null())
                .stderr(std::process::Stdio::null());
            command.spawn().unwrap()
        };
        let file = place.join("file");
        let mut one = start(&format!("3>{}", file.display()));
        let mut other = start("");
        // mmap(2), by its number on this machine, and no descriptor.
        let number = if cfg!(target_arch = "x86_64") { 9 } else { 222 };
        let script = format!(
            "open F, '+>', shift or die; print F 'x' x 4096; F->flush; \
             syscall({number}, 0, 4096, 3, 1, fileno(F), 0) > 0 or die; close F; sleep 1000"
        );
        let mut third = std::process::Command::new("perl")
            .args(["-MIO::Handle", "-e", &script])
            .arg(place.join("mapped"))
            .spawn()
            .unwrap();
        let sees = |child: &std::process::Child| {
            let found = users(device, &[]).unwrap();
            found.iter().any(|user| user.pid == child.id())
        };
        let deadline = std::time::Instant::now() + std::time::Duration::from_secs(20);
        while !(sees(&one) && maps(&PathBuf::from(format!("/proc/{}", third.id())), device))
            && std::time::Instant::now() < deadline
        {
            std::thread::sleep(std::time::Duration::from_millis(10));
        }
        let fds = std::fs::read_dir(format!("/proc/{}/fd", third.id())).unwrap();
        assert!(fds.flatten().all(|fd| {
            let at = std::fs::read_link(fd.path()).unwrap_or_default();
            !at.starts_with(&place)
        }));
        let seen = (sees(&one), sees(&other), sees(&third));
        for child in [&mut one, &mut other, &mut third] {
            child.kill().unwrap();
            child.wait().unwrap();
        }
        assert_eq!(seen, (true, false, true));
    }

    #[test]
    fn a_replaced_program_is_the_same() {
        let same = |exe: &str, program: &str| is_same_program(Path::new(exe), Path::new(program));
        for (exe, program) in [
            ("/usr/bin/nfsvol", "/usr/bin/nfsvol (deleted)"),
            ("/usr/bin/nfsvol (deleted)", "/usr/bin/nfsvol"),
            ("/opt/1/nfsvol", "/opt/2/nfsvol"),
        ] {
            assert!(same(exe, program), "{exe} {program}");
        }
        assert!(!same("/usr/bin/dockerd", "/usr/bin/nfsvol"));
        assert_eq!(
            program_name(Path::new("/usr/bin/dockerd (deleted)")),
            "dockerd"
        );
        let _back = mutant::put_back(Mutant::OldProgramIsAnother);
        assert!(!same("/usr/bin/nfsvol", "/usr/bin/nfsvol (deleted)"));
    }

    #[test]
    fn a_namespace_that_only_copies_the_hosts_mounts_does_not_hold_them() {
        let dir = tempfile::tempdir().unwrap();
        let device = DeviceId {
            major: 0,
            minor: 53,
        };
        let root = "22 1 8:1 / / rw - ext4 /dev/a rw\n";
        let at = |id: u32, place: &str| format!("{id} 22 0:53 / {place} rw - nfs4 nas:/db rw\n");
        let own = [Path::new("/mnt/db")];
        let shown = |host: &str, text: &str| {
            let places = Places::of(&MountInfo::parse(&format!("{root}{host}")), device, &own);
            std::fs::write(dir.path().join("mountinfo"), format!("{root}{text}")).unwrap();
            let shown = Shown::read(dir.path(), device, &places).unwrap().unwrap();
            let is_copy = |of_the_host| shown.is_copy(of_the_host);
            ([true, false].map(is_copy), shown.mounts.len())
        };
        let (place, bind) = (at(30, "/mnt/db"), at(31, "/data"));
        let both = format!("{place}{bind}");
        assert_eq!(shown(&place, &place), ([true; 2], 2));
        assert_eq!(shown(&place, &both).0, [false; 2]);
        assert_eq!(shown(&place, &bind).0, [false; 2]);
        assert_eq!(shown(&place, "").1, 0);
        // Somebody has bound it on the host: a service has a copy of that, a container its own.
        assert_eq!(shown(&both, &both).0, [true, false]);
        assert_eq!(shown(&both, &bind).0, [true, false]);
        let _back = mutant::put_back(Mutant::BindsAreTheHosts);
        assert_eq!(shown(&both, &bind).0, [true; 2]);
    }

    #[test]
    fn a_namespace_that_cannot_be_looked_at_is_not_one_without_the_volume() {
        let dir = tempfile::tempdir().unwrap();
        let (major, minor) = (0, 53);
        let read = || Shown::read(dir.path(), DeviceId { major, minor }, &Places::default());
        assert!(read().unwrap().is_none());
        std::fs::create_dir(dir.path().join("mountinfo")).unwrap();
        assert!(read().is_err());
    }

    #[test]
    fn a_process_that_has_the_mount_is_found() {
        // Every process sees /proc, which is mounted somewhere in this namespace.
        let info = MountInfo::read_below(Path::new("/proc")).unwrap();
        let proc = info.at(Path::new("/proc")).unwrap();
        let wanted = |own: &str| Wanted {
            marks: vec![Held::Device(proc.device)],
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
