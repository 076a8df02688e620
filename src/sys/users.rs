//! Which processes use a file system, whatever the name by which they have it, and which container
//! each belongs to: whom a fence ends.
//!
//! Limit: a thread with a namespace or files of its own (unshare(2)) counts for no more than its
//! process.

use std::collections::BTreeMap;
use std::collections::btree_map::Entry;
use std::io;
use std::path::{Path, PathBuf};

use super::containers;
use super::holders::uses_one_of;
use super::mountinfo::{DeviceId, MountEntry, MountInfo, Place};
use super::proc;
use crate::mutant::{self, Mutant};

/// The programs that copy an image's data into a volume.
const ENGINES: [&str; 2] = ["dockerd", "podman"];

/// A process that uses a file system, and the container that it belongs to.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct User {
    pub(crate) pid: u32,
    /// Never the one that this program runs in itself, whose end would be its own.
    pub(crate) container_id: Option<String>,
    /// A container engine, which copies an image's data into the volume: its end would be that of
    /// all containers.
    pub(crate) is_engine: bool,
    /// Tells it from a later process with the same id.
    started: String,
}

impl User {
    /// Whether the process with this id still is this one.
    #[must_use]
    pub(crate) fn is_alive(&self) -> bool {
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

/// Whether a process has a file of a device in its memory (proc_pid_maps(5)), open or not.
fn maps(proc: &Path, device: DeviceId) -> bool {
    let mark = format!("{:02x}:{:02x}", device.major, device.minor);
    let maps = std::fs::read(proc.join("maps")).unwrap_or_default();
    let maps = String::from_utf8_lossy(&maps);
    maps.lines()
        .any(|line| line.split(' ').nth(3) == Some(&mark))
}

/// The container that this program runs in.
fn own_container() -> Option<String> {
    if mutant::is_on(Mutant::OwnContainerIsKilled) {
        return None;
    }
    let read = |name: &str| std::fs::read_to_string(format!("/proc/self/{name}"));
    let of_cgroup = containers::of_cgroup(&read("cgroup").unwrap_or_default());
    of_cgroup.or_else(|| containers::of_mounts(&read("mountinfo").unwrap_or_default()))
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
pub(crate) fn users(device: DeviceId, own: &[&Path]) -> io::Result<Vec<User>> {
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
        let container = containers::of_cgroup(&cgroup).or_else(|| shown.container_id.clone());
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
pub(crate) fn another_of_us_waits() -> bool {
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
            container_id: containers::of_mounts(&text),
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

#[cfg(test)]
mod tests {
    use super::*;

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
}
