//! NFSv3 in user space, mounted through FUSE: the data path for hosts whose kernel has no NFS,
//! and for those that must never hang on a server.
//!
//! | module | job |
//! |---|---|
//! | [`path`] | the daemon's side: start, find and end workers |
//! | [`control`] | what daemon and worker say to each other |
//! | [`worker`] | the process that serves one volume |
//! | `glue` | FUSE requests to operations |
//! | `fs`, `open`, `make`, `set`, `names`, `hidden`, `dir` | the operations: async functions, no FUSE types |
//! | `read`, `write`, `extents`, `room` | data: what is held of a file, and the memory for it |
//! | `writeback` | how it reaches the server |
//! | `inode`, `attr`, `own` | what is known of files, for how long it is trusted, who changed it |
//! | `known`, `caches` | how many files are known, and what the kernel is told |
//! | [`options`] | settings, in the words of NFS mount options |
//! | `rights` | whether mode bits or the server decide |
//! | `process` | what /proc knows about callers |
//!
//! What it promises to applications, and what not, is in docs/SEMANTICS.md.

mod attr;
mod caches;
pub(crate) mod control;
mod dir;
mod error;
mod extents;
mod fence;
mod fs;
mod glue;
mod hidden;
mod inode;
mod known;
#[cfg(test)]
mod liberties;
mod make;
mod names;
mod open;
pub(crate) mod options;
mod own;
pub(crate) mod path;
mod process;
mod read;
mod rights;
mod room;
#[cfg(test)]
mod scripted;
mod set;
#[cfg(test)]
mod simulation;
mod sys;
mod task;
mod turns;
pub(crate) mod worker;
mod write;
mod writeback;

pub use control::WorkerStatus;

pub use options::FuseOptions;
pub(crate) use options::OptionError;
pub use path::{Attach, FusePath};
pub(crate) use path::{FuseError, Surveyed};
