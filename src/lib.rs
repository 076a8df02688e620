//! Docker volumes that follow a container to any host, on the NFS server you already have.
//!
//! | module | job |
//! |---|---|
//! | [`volume`] | names, options, records: values, no I/O |
//! | [`catalog`] | all records: on the home share, and a durable local copy |
//! | [`cluster`] | which hosts live, what they hold, who may mount an exclusive volume |
//! | [`driver`] | what each call does: attachments, reconciling, background tasks |
//! | [`mount`] | the kernel data path: mounts, binds, who holds them |
//! | [`nfs`] | speaking NFS in user space: addresses, probe, directory operations |
//! | [`plugin`] | the VolumeDriver protocol on a Unix socket, and its client |
//! | [`cli`], [`config`], `serve`, [`telemetry`] | the command line, settings, the daemon, the log |
//! | `doctor` | looks at each step from a share's name to bytes, and at this host |
//! | [`watch`] | metrics for Prometheus and the status page |
//! | `migrate` | volumes of Docker's `local` driver, as the engine tells of them |
//! | `engine` | Docker's engine, asked over its own socket |
//! | [`guard`] | the fence of exclusive volumes on the kernel data path |
//! | [`fuse`] | the data path in user space: NFSv3 through /dev/fuse |
//! | `attendant` | processes that outlive the daemon: workers, guards, the embedded server |
//! | [`embedded`] | an NFS server for one machine: a local directory over loopback |
//! | [`mutant`] | mended faults that tests can put back |
//!
//! Data flows downwards: `plugin` knows no NFS, `volume` does no I/O, and only `mount::sys`,
//! `fuse::sys` and `embedded::sys` hold unsafe code.

mod attendant;
pub mod catalog;
pub mod cli;
pub mod cluster;
pub mod config;
mod doctor;
pub mod driver;
pub mod embedded;
mod engine;
#[cfg(feature = "failpoints")]
mod failpoint;
mod files;
pub mod fuse;
pub mod guard;
mod migrate;
pub mod mount;
pub mod mutant;
pub mod nfs;
pub mod plugin;
mod serve;
pub mod telemetry;
pub mod volume;
pub mod watch;
