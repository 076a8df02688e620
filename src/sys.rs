//! This host as its kernel shows it: processes, mounts, durable files.
//!
//! | module | job |
//! |---|---|
//! | `proc` | what /proc tells of processes |
//! | `mountinfo` | the kernel's list of mounts, parsed |
//! | `holders` | which processes hold a volume, on the evidence of mount namespaces |
//! | `users` | which processes use a file system |
//! | `containers` | which container a process belongs to |
//! | `files` | files that are durable and whole |

mod containers;
pub(crate) mod files;
pub(crate) mod holders;
pub(crate) mod mountinfo;
pub(crate) mod proc;
pub(crate) mod users;
