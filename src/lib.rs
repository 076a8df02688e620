//! Docker volumes that follow a container to any host, on the NFS server you already have.
//!
//! | room | job | imports |
//! |---|---|---|
//! | [`cli`] | the command line | `config` `doctor` `driver` `embedded` `engine` `fuse` `guard` `migrate` `nfs` `plugin` `serve` `telemetry` `volume` |
//! | `serve` | the daemon, put together | `config` `driver` `plugin` `watch` |
//! | [`driver`] | what each call does: attachments, reconciling, background tasks | `catalog` `chance` `cluster` `config` `embedded` `engine` `failpoint` `files` `fuse` `guard` `mount` `mutant` `nfs` `plugin` `proc` `volume` `watch` |
//! | [`config`] | settings of the daemon | `cluster` `engine` `nfs` `plugin` `telemetry` `volume` `watch` |
//! | `doctor` | looks at each step from a share's name to bytes, and at this host | `engine` `fuse` `mount` `nfs` `plugin` `proc` `volume` |
//! | `migrate` | volumes of Docker's `local` driver, as the engine tells of them | `engine` |
//! | [`guard`] | the fence of exclusive volumes on the kernel data path | `attendant` `chance` `engine` `files` `fuse` `mount` `mutant` `proc` `telemetry` `volume` |
//! | [`fuse`] | the data path in user space: NFSv3 through /dev/fuse | `attendant` `chance` `failpoint` `mount` `mutant` `nfs` `proc` `telemetry` `volume` |
//! | [`mount`] | the kernel data path: mounts, binds, who holds them | `failpoint` `mutant` `nfs` `proc` `volume` |
//! | [`embedded`] | an NFS server for one machine: a local directory over loopback | `attendant` |
//! | [`catalog`] | all records: on the home share, and a durable local copy | `chance` `cluster` `failpoint` `files` `mutant` `nfs` `volume` |
//! | [`cluster`] | which hosts live, what they hold, who may mount an exclusive volume | `mutant` `nfs` `volume` |
//! | [`watch`] | metrics for Prometheus and the status page | `plugin` |
//! | [`plugin`] | the VolumeDriver protocol on a Unix socket, and its client | |
//! | [`volume`] | names, options, mount options, records: values, no I/O | `nfs` |
//! | [`nfs`] | speaking NFS in user space: addresses, probe, directory operations, RPC | `chance` `mutant` |
//! | `engine` | Docker's engine, asked over its own socket | |
//! | `attendant` | processes that outlive the daemon: workers, guards, the embedded server | `mutant` |
//! | [`telemetry`] | the log | |
//! | `files` | files that are durable and whole | `failpoint` |
//! | `proc` | what /proc tells of processes | `mutant` |
//! | `failpoint` | points at which a test kills the process | |
//! | `chance` | random numbers, the time of day and since the boot | |
//! | [`mutant`] | mended faults that tests can put back | |
//!
//! Each room imports what its row says and nothing that stands above it; tests/rooms.rs holds the
//! code to that. Only `mount::sys`, `fuse::sys`, `embedded::sys` and `chance::sys` hold unsafe code.
//!
//! docs/ARCHITECTURE.md has the same list, and follows a Mount, a Remove and a write through the
//! files.

mod attendant;
pub mod catalog;
mod chance;
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
mod proc;
mod serve;
pub mod telemetry;
pub mod volume;
pub mod watch;
