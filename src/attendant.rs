//! Processes that outlive the daemon: FUSE workers, guards, the embedded server.
//!
//! An *attendant* serves one directory of the state directory. It is started by a daemon, found
//! again by the daemons that come after, asked, waited for, and ended. While it serves it holds a
//! lock, which the kernel lets go of when the process ends, however that comes.
//!
//! Invariants:
//! - an attendant lives as long as its lock is held, and only then; what one that is gone has left
//!   (after a power failure: a socket, a number) says nothing, and is removed when it is seen;
//! - nothing is signalled by a number: a signal goes through a pidfd that was opened while the lock
//!   was held, and whose number the holder itself wrote;
//! - names are random and never used again, so that a lock has one holder ever.
//!
//! An attendant named `NAME` keeps in its directory:
//!
//! | file | job |
//! |---|---|
//! | `NAME.lock` | locked (flock) while it serves; holds its process id |
//! | `NAME.sock` | where it is asked: one line of JSON for one |
//!
//! Attendants of the first release have `<pid>.sock` and no lock; they live as long as their socket
//! takes connections, and the kernel says which process listens. The embedded server has no socket;
//! its lock is always called `server`.
//!
//! Known limit: an attendant in a process namespace that the daemon does not share is found and
//! asked, but cannot be killed.
//!
//! | module | job |
//! |---|---|
//! | `lock` | a lock that tells whether its holder lives |
//! | `post` | the attendant's side: to be found, and to leave |
//! | `seen` | the daemon's side: find, ask, wait, end |
//! | `start` | how one is started, and what both sides do then |
//! | `talk` | what they say to each other: lines of JSON |

pub(crate) mod lock;
mod post;
mod seen;
mod start;
mod talk;
#[cfg(test)]
mod tests;

pub(crate) use post::Post;
pub(crate) use seen::{Attendant, gone, lives, living};
pub(crate) use start::{close_standard_streams, command, detach, give, hear, spare, tell};
pub(crate) use talk::{receive, send};

/// How often a lock is looked at by who waits for it.
pub(crate) const POLL: std::time::Duration = std::time::Duration::from_millis(20);
const LOCK: &str = "lock";
const SOCKET: &str = "sock";
