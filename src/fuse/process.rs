//! What the worker asks /proc about the processes whose requests it serves: their supplementary
//! groups, and whether they have been killed.
//!
//! Known limit: a worker in a process namespace of its own sees process id 0 for the callers
//! outside; these have no supplementary groups then, and their death is not noticed.

use std::collections::HashMap;
use std::fs;
use std::sync::{Arc, Mutex};
use std::time::{Duration, Instant};

use crate::sys::proc;
use nfs::rpc::Cred;

/// How long the groups of a process are trusted: a `setgroups` counts after this time.
const GROUPS_TRUSTED: Duration = Duration::from_secs(2);
/// The most processes remembered; beyond it the memory starts anew.
const PROCESSES: usize = 256;
/// SIGKILL in the signal masks of /proc/PID/status (bit 9, counted from 1).
const SIGKILL_BIT: u64 = 1 << 8;
/// `PF_SIGNALED` of the kernel's sched.h: the thread dies by a signal.
const PF_SIGNALED: u64 = 0x400;

/// Process, user and group.
type Caller = (u32, u32, u32);

#[derive(Debug, Default)]
pub(super) struct Processes {
    known: Mutex<HashMap<Caller, (Instant, Cred)>>,
}

impl Processes {
    /// The credential of a request's caller.
    pub(super) fn cred(&self, uid: u32, gid: u32, pid: u32) -> Cred {
        // Root's groups add nothing: it has all rights, or the server squashes it whole.
        if uid == 0 || pid == 0 {
            return Cred::new(uid, gid);
        }
        let key = (pid, uid, gid);
        let now = Instant::now();
        let mut known = self.known.lock().unwrap_or_else(|e| e.into_inner());
        if let Some((when, cred)) = known.get(&key)
            && now.duration_since(*when) < GROUPS_TRUSTED
        {
            return cred.clone();
        }
        if known.len() >= PROCESSES {
            known.clear();
        }
        let status = fs::read_to_string(format!("/proc/{pid}/status")).unwrap_or_default();
        let cred = Cred {
            uid,
            gid,
            groups: groups(&status),
        };
        known.insert(key, (now, cred.clone()));
        cred
    }
}

fn groups(status: &str) -> Arc<[u32]> {
    status
        .lines()
        .find_map(|line| line.strip_prefix("Groups:"))
        .into_iter()
        .flat_map(str::split_ascii_whitespace)
        .filter_map(|group| group.parse().ok())
        .collect()
}

/// The thread that made a request, watched for its death.
#[derive(Debug)]
pub(super) struct Watched {
    tid: u32,
    /// Its process, once it was seen alive.
    process: Option<u32>,
}

impl Watched {
    pub(super) fn new(tid: u32) -> Self {
        Self { tid, process: None }
    }

    /// Whether it waits only for us before it dies by a signal: SIGKILL is pending, or it is on its
    /// way out already and closes its files.
    ///
    /// A thread that is gone has ended without waiting for the request (asynchronous I/O): then
    /// what becomes of its process counts.
    pub(super) fn is_killed(&mut self) -> bool {
        if self.tid == 0 {
            return false;
        }
        if let Some(status) = status(self.tid) {
            self.process = process(&status);
            return is_dying(self.tid, &status);
        }
        match self.process {
            Some(process) if process != self.tid => {
                status(process).is_none_or(|status| is_dying(process, &status))
            }
            process => process.is_some(),
        }
    }
}

fn status(tid: u32) -> Option<String> {
    fs::read_to_string(format!("/proc/{tid}/status")).ok()
}

fn is_dying(tid: u32, status: &str) -> bool {
    let stat = fs::read_to_string(format!("/proc/{tid}/stat")).unwrap_or_default();
    has_sigkill(status) || dies_by_signal(&stat)
}

fn process(status: &str) -> Option<u32> {
    let of = |line: &str| line.strip_prefix("Tgid:")?.trim().parse().ok();
    status.lines().find_map(of)
}

fn has_sigkill(status: &str) -> bool {
    status
        .lines()
        .filter_map(|line| {
            line.strip_prefix("SigPnd:")
                .or_else(|| line.strip_prefix("ShdPnd:"))
        })
        .filter_map(|mask| u64::from_str_radix(mask.trim(), 16).ok())
        .any(|mask| mask & SIGKILL_BIT != 0)
}

/// Field 9 of /proc/PID/stat.
fn dies_by_signal(stat: &str) -> bool {
    proc::stat_fields(stat)
        .nth(6)
        .and_then(|flags| flags.parse::<u64>().ok())
        .is_some_and(|flags| flags & PF_SIGNALED != 0)
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn groups_are_those_of_the_status_file() {
        let status = "Name:\tsh\nUid:\t1\t1\t1\t1\nGroups:\t4 24 1000 \nNStgid:\t7\n";
        assert_eq!(*groups(status), [4, 24, 1000]);
        assert!(groups("Name:\tsh\nGroups:\t\n").is_empty());
    }

    #[test]
    fn a_pending_sigkill_is_seen() {
        assert!(has_sigkill("SigPnd:\t0000000000000100\nShdPnd:\t0\n"));
        assert!(!has_sigkill(
            "SigPnd:\t0000000000000200\nShdPnd:\t0000000000004000\n"
        ));
    }

    #[test]
    fn flags_are_found_behind_any_name() {
        let stat = |flags: u64| format!("7 (a) b)) D 1 7 7 0 -1 {flags} 0 0 0");
        assert!(dies_by_signal(&stat(0x40_0400)));
        assert!(!dies_by_signal(&stat(0x40_0004)));
    }

    #[test]
    fn this_process_lives_and_a_child_that_was_killed_does_not() {
        assert!(!Watched::new(std::process::id()).is_killed());
        let mut child = std::process::Command::new("sleep")
            .arg("60")
            .spawn()
            .unwrap();
        let mut watched = Watched::new(child.id());
        assert!(!watched.is_killed());
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(watched.is_killed());
    }

    #[test]
    fn a_thread_that_ended_normally_was_not_killed() {
        let (told, tid) = std::sync::mpsc::channel();
        let (go, wait) = std::sync::mpsc::channel::<()>();
        let thread = std::thread::spawn(move || {
            let tid = rustix::thread::gettid().as_raw_nonzero().get();
            told.send(tid.cast_unsigned()).unwrap();
            wait.recv().unwrap();
        });
        let tid = tid.recv().unwrap();
        let mut watched = Watched::new(tid);
        assert!(!watched.is_killed());
        go.send(()).unwrap();
        thread.join().unwrap();
        // The kernel takes it out of /proc a moment after it has told the joiner.
        while status(tid).is_some() {
            std::thread::yield_now();
        }
        assert!(!watched.is_killed());
        assert!(!Watched::new(tid).is_killed(), "never seen alive");
    }
}
