//! What /proc tells of processes (proc(5)). Nothing here waits for a server.

use std::io;
use std::os::fd::OwnedFd;
use std::path::PathBuf;

use rustix::event::{PollFd, PollFlags, Timespec, poll};
use rustix::process::{Pid, PidfdFlags, pidfd_open};

use crate::mutant::{self, Mutant};

/// The ids of all processes that are seen here.
///
/// # Errors
/// When /proc cannot be listed.
pub(crate) fn ids() -> io::Result<Vec<u32>> {
    ids_in("/proc")
}

fn ids_in(dir: &str) -> io::Result<Vec<u32>> {
    let id = |entry: io::Result<std::fs::DirEntry>| {
        let name = entry.map(|entry| entry.file_name());
        name.map(|name| name.to_str()?.parse().ok()).transpose()
    };
    std::fs::read_dir(dir)?.filter_map(id).collect()
}

/// Whether an error of a look at a process says that it has ended, and not that it could not be looked
/// at.
pub(crate) fn is_gone(error: &io::Error) -> bool {
    let errno = error.raw_os_error();
    matches!(errno, Some(libc::ENOENT | libc::ESRCH))
}

/// Where /proc tells of a process's files, memory and namespaces: in the directory of a thread that lives,
/// if the main one has ended by itself (pthread_exit(3)), which has none of these any more.
pub(crate) fn directory(pid: u32) -> PathBuf {
    let process = PathBuf::from(format!("/proc/{pid}"));
    let tells = |dir: &PathBuf| std::fs::read_link(dir.join("ns/mnt")).is_ok();
    if tells(&process) || mutant::is_on(Mutant::MainThreadIsAll) {
        return process;
    }
    let threads = ids_in(&format!("/proc/{pid}/task")).unwrap_or_default();
    let mut threads = threads
        .into_iter()
        .map(|thread| process.join(format!("task/{thread}")));
    threads.find(tells).unwrap_or(process)
}

/// A process, whichever has its id now: no later one is taken for it.
///
/// # Errors
/// What pidfd_open(2) says, such as that there is none.
pub(crate) fn open(pid: u32) -> io::Result<OwnedFd> {
    let pid = i32::try_from(pid).ok().and_then(Pid::from_raw);
    let pid = pid.ok_or(io::ErrorKind::InvalidInput)?;
    Ok(pidfd_open(pid, PidfdFlags::empty())?)
}

/// Whether the last thread of a process has ended: its pidfd is readable then (pidfd_open(2)).
pub(crate) fn has_ended(process: &OwnedFd) -> bool {
    let mut shown = [PollFd::new(process, PollFlags::IN)];
    poll(&mut shown, Some(&Timespec::default())).is_ok_and(|ready| ready > 0)
}

/// The fields of a line of proc_pid_stat(5) from the third on, the state: the name before it may hold
/// anything, but ends at the last parenthesis. None when there is no such line.
pub(crate) fn stat_fields(stat: &str) -> impl Iterator<Item = &str> {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    fields.split_ascii_whitespace()
}

/// The threads of a process that have not begun to exit: each is within a system call, or comes back to
/// its program. What cannot be looked at is one.
pub(crate) fn threads_that_go_on(pid: u32) -> Vec<u32> {
    /// Of a thread's flags (linux/sched.h, field 9 of proc_pid_stat(5)).
    const PF_EXITING: u32 = 0x4;
    let mut threads = match ids_in(&format!("/proc/{pid}/task")) {
        Ok(threads) => threads,
        Err(error) if is_gone(&error) => return Vec::new(),
        Err(_) => return vec![pid],
    };
    threads.retain(|thread| {
        let stat = std::fs::read_to_string(format!("/proc/{pid}/task/{thread}/stat"));
        stat.map_or_else(
            |error| !is_gone(&error),
            |stat| {
                let flags = stat_fields(&stat).nth(6).map(str::parse::<u32>);
                !matches!(flags, Some(Ok(flags)) if flags & PF_EXITING != 0)
            },
        )
    });
    threads
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn fields_are_counted_behind_any_name() {
        let third = |stat| stat_fields(stat).next();
        assert_eq!(third("12 (nfsvol) D 1 12 12 0"), Some("D"));
        assert_eq!(third("12 (a) D (b) S 1 12 12 0"), Some("S"));
        assert_eq!(third(""), None);
    }

    #[test]
    fn who_runs_does_not_exit_and_who_has_ended_does() {
        assert!(!threads_that_go_on(std::process::id()).is_empty());
        let mut child = std::process::Command::new("true").spawn().unwrap();
        until_main_thread_has_ended(&child);
        assert!(threads_that_go_on(child.id()).is_empty());
        child.wait().unwrap();
        assert!(threads_that_go_on(child.id()).is_empty());
    }

    #[test]
    fn who_cannot_be_looked_at_has_not_ended() {
        let is_gone = |errno| is_gone(&io::Error::from_raw_os_error(errno));
        assert!(is_gone(libc::ENOENT) && is_gone(libc::ESRCH));
        assert!(!is_gone(libc::EMFILE) && !is_gone(libc::ENOMEM) && !is_gone(libc::EACCES));
    }

    /// Until it is a zombie, if nothing else is left.
    fn until_main_thread_has_ended(child: &std::process::Child) {
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        while stat_fields(&stat()).next() != Some("Z") {
            std::thread::yield_now();
        }
    }

    #[test]
    fn a_process_whose_main_thread_has_ended_is_seen_by_another() {
        // exit(2), which ends one thread, by its number on this machine.
        let exit = if cfg!(target_arch = "x86_64") { 60 } else { 93 };
        let script = format!("threads->create(sub {{ sleep 1000 }}); syscall({exit}, 0)");
        let mut child = std::process::Command::new("perl")
            .args(["-Mthreads", "-e", &script])
            .spawn()
            .unwrap();
        until_main_thread_has_ended(&child);
        let tells = || std::fs::read_link(directory(child.id()).join("exe")).is_ok();
        let (seen, goes_on) = (tells(), threads_that_go_on(child.id()));
        let back = mutant::put_back(Mutant::MainThreadIsAll);
        let seen_before = tells();
        drop(back);
        child.kill().unwrap();
        child.wait().unwrap();
        assert!(seen && !seen_before);
        assert_eq!(goes_on.len(), 1);
    }

    #[test]
    fn this_process_is_among_them() {
        assert!(ids().unwrap().contains(&std::process::id()));
    }
}
