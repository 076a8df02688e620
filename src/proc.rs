//! What /proc tells of processes (proc(5)). Nothing here waits for a server.

use std::io;

/// The ids of all processes that are seen here.
///
/// # Errors
/// When /proc cannot be listed.
pub(crate) fn ids() -> io::Result<Vec<u32>> {
    let id = |entry: io::Result<std::fs::DirEntry>| {
        let name = entry.map(|entry| entry.file_name());
        name.map(|name| name.to_str()?.parse().ok()).transpose()
    };
    std::fs::read_dir("/proc")?.filter_map(id).collect()
}

/// The fields of a line of proc_pid_stat(5) from the third on, the state: the name before it may hold
/// anything, but ends at the last parenthesis. None when there is no such line.
pub(crate) fn stat_fields(stat: &str) -> impl Iterator<Item = &str> {
    let fields = stat.rsplit_once(')').map_or("", |(_, fields)| fields);
    fields.split_ascii_whitespace()
}

/// Whether all threads of a process have begun to exit, or have ended: none of them is within a system
/// call, nor comes back to its program.
pub(crate) fn is_exiting(pid: u32) -> bool {
    /// Of a thread's flags (linux/sched.h, field 9 of proc_pid_stat(5)).
    const PF_EXITING: u32 = 0x4;
    let Ok(threads) = std::fs::read_dir(format!("/proc/{pid}/task")) else {
        return true;
    };
    threads.flatten().all(|thread| {
        let stat = std::fs::read_to_string(thread.path().join("stat")).unwrap_or_default();
        let flags = stat_fields(&stat).nth(6).map(str::parse::<u32>);
        flags.is_none_or(|flags| flags.is_ok_and(|flags| flags & PF_EXITING != 0))
    })
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
        assert!(!is_exiting(std::process::id()));
        let mut child = std::process::Command::new("true").spawn().unwrap();
        // Ended, and not waited for: a zombie.
        let stat = || std::fs::read_to_string(format!("/proc/{}/stat", child.id())).unwrap();
        while stat_fields(&stat()).next() != Some("Z") {
            std::thread::yield_now();
        }
        assert!(is_exiting(child.id()));
        child.wait().unwrap();
    }

    #[test]
    fn this_process_is_among_them() {
        assert!(ids().unwrap().contains(&std::process::id()));
    }
}
