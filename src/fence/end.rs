//! Taking an exclusive volume away from this host.
//!
//! 1. The containers that hold it are killed through Docker's engine, which then does not start
//!    them again by itself; what does not end in time, or has no engine, is killed by its process
//!    id. Each is waited for: the files that it no longer shows it still closes, which is a call.
//! 2. While `syncfs` sends what they wrote, `umount -f` ends each such call of the kernel's NFS
//!    client (EIO), so that the pages count as failed and are thrown away.
//! 3. The connections to the server are cut, with what TCP has not delivered yet ([`super::cut`]).
//! 4. The mount goes, and with it the superblock.
//!
//! Who is killed while the kernel works for it (a `splice`, a rename behind a lock) goes on to the end
//! of that call, and may send something by it. So steps 2 and 3 come again until nobody was within a
//! call when they began; what is left then only exits. A container engine is not killed: its end
//! would be that of all containers. Its copy into the volume fails.
//!
//! Limits: what was written cannot be thrown away while the volume's directory is not open
//! ([`super::root`]); the report says so. With pNFS, calls to data servers are not ended by `umount -f`.

use std::collections::{BTreeMap, BTreeSet};
use std::io;
use std::os::fd::OwnedFd;
use std::path::Path;
use std::sync::mpsc;
use std::time::{Duration, Instant};

use hyper::Method;
use rustix::mount::{UnmountFlags, unmount};
use rustix::process::{Signal, pidfd_send_signal};

use super::cut::{self, Barrier};
use super::root::Root;
use super::{Fenced, Task};
use crate::docker::engine;
use crate::mutant::{self, Mutant};
use crate::sys::mountinfo::MountInfo;
use crate::sys::proc;
use crate::sys::users::{self, User};
use chance::since_boot;

/// Between two rounds of killing, and of ending calls.
const ROUND: Duration = Duration::from_millis(20);
/// After this the rest is left as it is, and said.
const LIMIT: Duration = Duration::from_secs(15);
/// So many rounds without a waiting process of this program, because one goes from call to call.
const QUIET: u32 = 5;
/// How long one unmount may take, and what has to come before it: it waits for no data any more.
const UNMOUNT: Duration = Duration::from_secs(2);

/// The file systems of the kernel's NFS client, mounted or not: version, server, port, device, …
const NFS_VOLUMES: &str = "/proc/fs/nfsfs/volumes";

fn is_among(device: &str, volumes: &str) -> bool {
    volumes
        .lines()
        .any(|line| line.split_whitespace().nth(3) == Some(device))
}

/// Takes the volume away; `until` is when the right ended. The barrier is what is still to be
/// lowered.
pub(super) async fn fence(task: &Task, until: u64, root: Root) -> (Fenced, Barrier) {
    let (began, began_at) = (Instant::now(), since_boot());
    let under_way = Duration::from_millis(task.fence.under_way.into());
    // A quarter: what the engine does not do is done here, and that takes a moment too.
    let (containers, ending) = kill_containers(task, under_way / 4).await;
    tracing::info!(?containers, after = ?began.elapsed(), "the engine was asked to kill");
    let work = Work {
        task: task.clone(),
        root,
        began,
        killed: BTreeSet::new(),
        ending,
        barrier: Barrier::default(),
        troubles: Vec::new(),
        done: None,
    };
    let done = tokio::task::spawn_blocking(move || work.take_away()).await;
    let work = done.unwrap_or_else(|error| Work {
        task: task.clone(),
        root: Root::of(task),
        began,
        killed: BTreeSet::new(),
        ending: BTreeMap::new(),
        barrier: Barrier::default(),
        troubles: vec![format!("a step of the fence failed: {error}")],
        done: None,
    });
    let took = work
        .done
        .unwrap_or_else(since_boot)
        .saturating_sub(began_at);
    let by = Duration::from_nanos(until) + under_way;
    let fenced = Fenced {
        at: chance::host_time(),
        containers,
        killed: work.killed.len(),
        took_ms: u64::try_from(took.as_millis()).unwrap_or(u64::MAX),
        settled: false,
        in_time: work.done.is_some_and(|done| done <= by),
        troubles: work.troubles,
    };
    tracing::warn!(volume = %task.volume, ?fenced, "taken away from this host");
    (fenced, work.barrier)
}

/// Asks the engine to kill the containers that hold the volume, for so long; their ids, and their
/// processes.
async fn kill_containers(task: &Task, patience: Duration) -> (Vec<String>, Ending) {
    let mut users = users(task).unwrap_or_default();
    // Where an engine runs in a container itself, that is not one of its own.
    users.retain(|user| !user.is_engine || mutant::is_on(Mutant::NestedEngineIsKilled));
    let of_containers = users.iter().filter(|user| user.container_id.is_some());
    let ending = of_containers.filter_map(|user| Some((user.pid, process(user).ok()?)));
    let ending = ending.collect();
    let ids: BTreeSet<String> = users.into_iter().filter_map(|u| u.container_id).collect();
    let kills = ids.iter().map(|id| {
        let (docker, path) = (task.docker.clone(), format!("/containers/{id}/kill"));
        // It goes on when nobody waits any more: an engine that is slow only comes later.
        tokio::spawn(async move {
            if let Err(error) = engine::ask(&docker, Method::POST, &path).await {
                tracing::warn!(%error, path, "the engine does not kill a container");
            }
        })
    });
    let kills: Vec<_> = kills.collect();
    let all = async {
        for kill in kills {
            let _ = kill.await;
        }
    };
    let _ = tokio::time::timeout(patience, all).await;
    (ids.into_iter().collect(), ending)
}

fn users(task: &Task) -> io::Result<Vec<User>> {
    users::users(task.device, &[&task.place, &task.share_place])
}

/// Processes that are to end, by their ids.
type Ending = BTreeMap<u32, OwnedFd>;

/// The steps that may wait for the kernel.
struct Work {
    task: Task,
    root: Root,
    began: Instant,
    killed: BTreeSet<u32>,
    ending: Ending,
    barrier: Barrier,
    troubles: Vec<String>,
    /// When nothing could be sent for the volume any more, by [`since_boot`]; none if that is not known.
    done: Option<Duration>,
}

impl Work {
    fn take_away(mut self) -> Self {
        if self.throw_away_for_good() {
            self.done = Some(since_boot());
        }
        if !self.have_ended() {
            self.wait_for_ends();
            // An end may write a word: that the owner of a robust futex is dead (futex(2)).
            let thrown_away = self.throw_away();
            if !self.is_ok(thrown_away) {
                self.done = None;
            }
        }
        self.let_our_own_go();
        // The last unmount may wait for the server, with nothing of the volume's data.
        self.root.close();
        self.unmount(&self.task.share_place.clone());
        if self.has_outlived() {
            self.done = None;
            self.trouble(
                "its file system lives on: something uses it that no process shows (a loop device, \
                 a file that io_uring has), or that has it by a bind which somebody made on the host"
                    .to_owned(),
            );
        }
        self
    }

    /// Says what could not be done, once.
    fn trouble(&mut self, trouble: String) {
        if !self.troubles.contains(&trouble) {
            self.troubles.push(trouble);
        }
    }

    /// Notes why a step could not be done.
    fn is_ok(&mut self, step: Result<(), String>) -> bool {
        step.map_err(|trouble| self.trouble(trouble)).is_ok()
    }

    /// Whether nobody could write any more when what was written was thrown away.
    fn throw_away_for_good(&mut self) -> bool {
        loop {
            self.kill_users();
            tracing::info!(killed = ?self.killed, after = ?self.began.elapsed(), "no process goes on with it");
            let within_calls = self.within_calls();
            let thrown_away = self.throw_away();
            tracing::info!(after = ?self.began.elapsed(), ?within_calls, ?thrown_away, "what was written");
            // A container that was being started may have got it meanwhile: now nobody can.
            self.unmount(&self.task.place.clone());
            let mut users = self.users();
            if let Some(users) = &mut users {
                users.retain(|user| !self.is_ending(user));
            }
            let has_nobody = users.as_ref().is_some_and(Vec::is_empty) && within_calls.is_empty();
            if self.is_over() || has_nobody && (thrown_away.is_ok() || !self.root.is_open()) {
                // What TCP was given since.
                let is_cut = self.cut();
                if !has_nobody {
                    self.trouble(format!(
                        "processes live on: {users:?}, or are killed and within a call: {within_calls:?}"
                    ));
                }
                return self.is_ok(thrown_away) && has_nobody && is_cut;
            }
            self.wait_for_calls(&within_calls);
        }
    }

    /// The threads of the killed for which the kernel still does what they asked of it.
    fn within_calls(&mut self) -> Vec<u32> {
        if self.have_ended() || mutant::is_on(Mutant::KilledCallsAreOver) {
            return Vec::new();
        }
        let killed = self.ending.keys().copied();
        killed.flat_map(proc::threads_that_go_on).collect()
    }

    /// Waits a round at least, and until one of those that were within a call has come out of it: what
    /// it has written by that is not to wait for the others.
    fn wait_for_calls(&mut self, before: &[u32]) {
        loop {
            self.wait_a_round();
            if self.is_over() || is_one_out(before, &self.within_calls()) {
                return;
            }
        }
    }

    /// Whether the kernel's client still has the file system: a lazy unmount leaves it to whoever
    /// uses it. Waits for it to end.
    fn has_outlived(&self) -> bool {
        let deadline = Instant::now() + UNMOUNT;
        let device = self.task.device.to_string();
        loop {
            let volumes = std::fs::read_to_string(NFS_VOLUMES).unwrap_or_default();
            if !is_among(&device, &volumes) {
                return false;
            }
            if Instant::now() > deadline {
                return true;
            }
            std::thread::sleep(ROUND);
        }
    }

    fn is_over(&self) -> bool {
        self.began.elapsed() > LIMIT
    }

    /// None when that is not known.
    fn users(&mut self) -> Option<Vec<User>> {
        let users = users(&self.task);
        users
            .map_err(|error| self.trouble(format!("reading /proc: {error}")))
            .ok()
    }

    /// Kills whoever has the volume, and waits for the ends of all; after [`Self::patience`] no longer
    /// for those that wait for another volume's server: what others wrote is not to wait for that.
    fn kill_users(&mut self) {
        loop {
            let users = self.users();
            // Those that the engine was asked to kill may live still, or have let the volume go.
            for process in self.ending.values() {
                let _ = pidfd_send_signal(process, Signal::KILL);
            }
            // An engine's copy into the volume fails, as its calls do, and it goes on without.
            let all = users.iter().flatten();
            for user in all.clone().filter(|user| !user.is_engine) {
                if let Ok(process) = kill(user) {
                    self.killed.insert(user.pid);
                    self.ending.insert(user.pid, process);
                }
            }
            let tried = self.began.elapsed() > self.patience();
            let left = all.clone().any(|user| !self.is_ending(user));
            let is_known = users.is_some();
            let nobody = all.count() == 0 && self.have_ended();
            if self.is_over() || is_known && (nobody || tried && !left) {
                return;
            }
            self.wait_a_round();
        }
    }

    /// Half of what a host has for a fence: the rest is quick.
    fn patience(&self) -> Duration {
        Duration::from_millis(self.task.fence.under_way.into()) / 2
    }

    fn is_ending(&self, user: &User) -> bool {
        self.ending.contains_key(&user.pid)
    }

    /// Waits for the last of the killed: the files that it no longer shows it still closes.
    fn wait_for_ends(&mut self) {
        while !(self.have_ended() && self.users().is_some_and(|users| users.is_empty())) {
            if self.is_over() {
                let pids: Vec<_> = self.ending.keys().collect();
                self.trouble(format!("processes end slowly: {pids:?}"));
                return;
            }
            self.wait_a_round();
        }
    }

    /// Whether nothing is left of what is to end, by the engine or by us.
    fn have_ended(&mut self) -> bool {
        self.ending.retain(|_, process| !proc::has_ended(process));
        self.ending.is_empty()
    }

    /// The daemon writes a volume back when its container has ended. What it is at gets its error here,
    /// as all others did: nobody can end a call of a file system that is mounted nowhere.
    fn let_our_own_go(&self) {
        let deadline = Instant::now() + UNMOUNT;
        let mut quiet = 0;
        while quiet < QUIET && Instant::now() < deadline {
            self.wait_a_round();
            quiet = match users::another_of_us_waits() {
                true => 0,
                false => quiet + 1,
            };
        }
    }

    /// Has the kernel's client send all it has, and ends every call that would; or says why that cannot
    /// be done.
    fn throw_away(&mut self) -> Result<(), String> {
        self.end_calls();
        self.cut();
        let Some(root) = self.root.get(ROUND) else {
            if !self.is_there() || mutant::is_on(Mutant::NothingThrownAwayIsDone) {
                return Ok(());
            }
            let place = self.task.share_place.display();
            return Err(format!(
                "what was written could not be thrown away: {place} does not open"
            ));
        };
        let (tell, told) = mpsc::channel();
        let synced = std::thread::Builder::new()
            .name("guard-sync".to_owned())
            .spawn(move || {
                // The second has what was written again while the first one ran.
                for _ in 0..2 {
                    let _ = rustix::fs::syncfs(&root);
                }
                let _ = tell.send(());
            });
        synced.map_err(|error| format!("no thread for syncfs: {error}"))?;
        while let Err(mpsc::RecvTimeoutError::Timeout) = told.recv_timeout(ROUND) {
            self.end_calls();
            if self.is_over() {
                return Err("what was written could not be thrown away".to_owned());
            }
        }
        Ok(())
    }

    /// Whether the host has the file system, mounted where the guard knows it or elsewhere.
    fn is_there(&self) -> bool {
        let volumes = std::fs::read_to_string(NFS_VOLUMES).unwrap_or_default();
        self.is_ours(&self.task.share_place) || is_among(&self.task.device.to_string(), &volumes)
    }

    /// Whoever waits for the server in the kernel goes on when its call ends.
    fn wait_a_round(&self) {
        self.end_calls();
        std::thread::sleep(ROUND);
    }

    /// Ends the calls under way, as `umount -f` does. The mount stays: a directory of it is open.
    fn end_calls(&self) {
        let place = &self.task.share_place;
        if self.root.is_open() && self.is_ours(place) {
            let flags = UnmountFlags::FORCE | UnmountFlags::NOFOLLOW;
            let _ = unmount(place, flags);
        }
    }

    fn is_ours(&self, place: &Path) -> bool {
        let info = MountInfo::read_below(place).unwrap_or_default();
        info.at(place)
            .is_some_and(|entry| entry.device == self.task.device)
    }

    fn unmount(&mut self, place: &Path) {
        if !self.is_ours(place) {
            return;
        }
        for flags in [UnmountFlags::FORCE, UnmountFlags::DETACH] {
            let (target, flags) = (place.to_owned(), flags | UnmountFlags::NOFOLLOW);
            let _ = within(UNMOUNT, "guard-unmount", move || unmount(target, flags));
            if !self.is_ours(place) {
                break;
            }
        }
        if self.is_ours(place) {
            self.trouble(format!("still mounted: {}", place.display()));
            return;
        }
        let _ = std::fs::remove_dir(place);
    }

    /// Ends the connections to the server, or keeps their packets here; whether that is done.
    fn cut(&mut self) -> bool {
        let Some(server) = self.task.server else {
            self.trouble("the server's address is not known".to_owned());
            return false;
        };
        let found = match cut::connections(server) {
            Ok(found) => found,
            Err(error) => {
                self.trouble(format!("connections not found: {error}"));
                return false;
            }
        };
        let mut are_cut = true;
        for connection in found {
            let cut = connection.destroy().or_else(|error| {
                tracing::info!(%error, "a connection cannot be ended; its packets are kept here");
                self.barrier.raise(&connection)
            });
            if let Err(error) = cut {
                self.trouble(format!("a connection is not cut: {error}"));
                are_cut = false;
            }
        }
        are_cut
    }
}

/// Whether one of those that were within a call is not any more.
fn is_one_out(before: &[u32], now: &[u32]) -> bool {
    let one = before.iter().any(|thread| !now.contains(thread));
    now.is_empty() || one && !mutant::is_on(Mutant::LastCallIsWaitedFor)
}

fn kill(user: &User) -> io::Result<OwnedFd> {
    let process = process(user)?;
    pidfd_send_signal(&process, Signal::KILL)?;
    Ok(process)
}

fn process(user: &User) -> io::Result<OwnedFd> {
    let process = proc::open(user.pid)?;
    // The id may have been given to another process before it was opened.
    if !user.is_alive() {
        return Err(io::ErrorKind::NotFound.into());
    }
    Ok(process)
}

/// Runs what may wait for the kernel on a thread, for so long; `None` when it has not returned.
fn within<T: Send + 'static>(
    limit: Duration,
    name: &str,
    call: impl FnOnce() -> T + Send + 'static,
) -> Option<T> {
    let (tell, told) = mpsc::channel();
    let thread = std::thread::Builder::new().name(name.to_owned());
    thread
        .spawn(move || {
            let _ = tell.send(call());
        })
        .ok()?;
    told.recv_timeout(limit).ok()
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_file_system_is_found_by_its_device() {
        let volumes = "NV SERVER   PORT DEV          FSID                              FSC\n\
                       v4 0a000001  801 0:45         0:0                               no\n";
        assert!(is_among("0:45", volumes));
        assert!(!is_among("0:4", volumes) && !is_among("0:45", ""));
    }

    #[test]
    fn what_one_has_written_does_not_wait_for_the_calls_of_others() {
        assert!(is_one_out(&[1, 2], &[1]) && is_one_out(&[1, 2], &[1, 3]));
        assert!(is_one_out(&[], &[]) && is_one_out(&[1], &[]));
        assert!(!is_one_out(&[1, 2], &[1, 2]));
        let _back = mutant::put_back(Mutant::LastCallIsWaitedFor);
        assert!(!is_one_out(&[1, 2], &[1]) && is_one_out(&[1], &[]));
    }
}
