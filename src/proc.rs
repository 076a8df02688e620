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
    fn this_process_is_among_them() {
        assert!(ids().unwrap().contains(&std::process::id()));
    }
}
