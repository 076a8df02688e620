//! This host as its kernel shows it: processes, mounts, durable files.
//!
//! | module | job |
//! |---|---|
//! | `proc` | what /proc tells of processes |
//! | `mountinfo` | the kernel's list of mounts, parsed |
//! | `files` | files that are durable and whole |

pub(crate) mod files;
pub mod mountinfo;
pub(crate) mod proc;
