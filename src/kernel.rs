//! The kernel data path: volumes through the kernel's own NFS client.
//!
//! | module | job |
//! |---|---|
//! | [`path`] | attach, detach, health, idle shares: what the driver calls |
//! | `own` | a mount of an exclusive volume's own |
//! | [`stats`] | what the kernel's NFS client has carried, parsed |
//! | `shares` | the share mounts below the mount root, and the calls on them |
//! | `share` | mounting a share: versions, parameters, fsopen or mount(2) |
//! | `bind` | from a mounted share to a volume's own mount |
//! | `lane` | blocking calls with a deadline |
//! | `trap` | kernels and servers that do not go together |
//! | `sys` | system calls that need unsafe code |

mod bind;
mod error;
mod lane;
mod own;
pub(crate) mod path;
mod share;
mod shares;
pub(crate) mod stats;
mod sys;
mod trap;

pub(crate) use error::MountError;
pub use path::{Attach, Endpoint, KernelPath, KernelSettings};
pub(crate) use path::{MountedVolume, ShareTraffic};

pub(crate) use own::OwnMount;
