//! Kernels and servers that are each in use and do not go together over some version of NFS.
//!
//! A fresh mount is looked at before anybody gets it ([`Call::Look`](super::sys::Call::Look)): what
//! the server answers decides, never the name of a kernel or server. Each pair that is known has a
//! row here: the error that shows it, why, and what helps.
//!
//! Known limit: a share that stays mounted while the daemon is started anew is not looked at again,
//! so volumes that are mounted from then on do not carry the warning.

use rustix::io::Errno;

use super::error::Attempt;

/// A pair that does not go together.
struct Trap {
    /// What a look at the fresh mount fails with.
    shown_by: Errno,
    why: &'static str,
    /// What makes the left out versions work.
    way_out: &'static str,
}

const TRAPS: [Trap; 1] = [
    // An unknown operation ends the whole compound (RFC 8881, 15.1.3.4), and with it every listing.
    Trap {
        shown_by: Errno::REMOTEIO,
        why: "this kernel asks for delegations of directories, and the server refuses the whole \
              request (Linux 6.19 or later with nfs-ganesha before 9.11)",
        way_out: "update the server, or load the kernel's module nfsv4 with \
                  directory_delegations=N, or ask for nfsvers=4.0 or 3",
    },
];

/// Why a mount whose first use failed so is not to be used.
pub(super) fn why(errno: Errno) -> Option<&'static str> {
    find(errno).map(|trap| trap.why)
}

fn find(errno: Errno) -> Option<&'static Trap> {
    TRAPS.iter().find(|trap| trap.shown_by == errno)
}

/// What helps against the traps among these attempts.
pub(super) fn way_out(attempts: &[Attempt]) -> Option<&'static str> {
    attempts
        .iter()
        .find_map(|attempt| find(attempt.errno))
        .map(|trap| trap.way_out)
}

/// Says which versions were left out in favour of one that works.
pub(super) fn warning(attempts: &[Attempt]) -> Option<String> {
    let trapped = |attempt: &&Attempt| why(attempt.errno).is_some();
    let versions: Vec<String> = attempts
        .iter()
        .filter(trapped)
        .map(|attempt| format!("NFSv{}", attempt.version))
        .collect();
    let first = attempts.iter().find(trapped)?;
    let trap = find(first.errno)?;
    Some(format!(
        "{} not used: {}; what helps: {}",
        versions.join(" and "),
        trap.why,
        trap.way_out
    ))
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::volume::NfsVersion;

    #[test]
    fn only_versions_that_do_not_go_together_are_warned_of() {
        let attempt = |version, errno| Attempt {
            version,
            errno,
            detail: String::new(),
        };
        let refused = attempt(NfsVersion::V4_2, Errno::PROTONOSUPPORT);
        let trapped = attempt(NfsVersion::V4_1, Errno::REMOTEIO);
        let attempts = [refused, trapped];
        assert_eq!(warning(&attempts[..1]), None);
        assert_eq!(way_out(&attempts[..1]), None);
        let text = warning(&attempts).unwrap();
        assert!(text.starts_with("NFSv4.1 not used: this kernel"), "{text}");
    }
}
