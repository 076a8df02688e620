//! Docker volumes that follow a container to any host, on the NFS server you already have.
//!
//! | room | job | imports |
//! |---|---|---|
//! | [`cli`] | the command line | `api` `daemon` `docker` `doctor` `driver` `fence` `fuse` `local_server` `migrate` `nfs` `telemetry` `volume` |
//! | [`daemon`] | the daemon as a process: settings, put together, kept running, made known to Docker | `cluster` `docker` `driver` `monitor` `nfs` `sys` `telemetry` `volume` |
//! | `driver` | what each call does, together with other hosts; background tasks | `api` `chance` `cluster` `docker` `failpoint` `fence` `fuse` `home` `host` `kernel` `layout` `local_server` `monitor` `mutant` `nfs` `sys` `volume` |
//! | `host` | what is attached and mounted on this host, and which processes hold it | `chance` `fence` `fuse` `kernel` `mutant` `nfs` `sys` `volume` |
//! | `doctor` | looks at each step from a share's name to bytes, and at this host | `api` `docker` `fuse` `kernel` `nfs` `sys` `volume` |
//! | `migrate` | volumes of Docker's `local` driver, as the engine tells of them | `api` `docker` `volume` |
//! | [`fence`] | takes an exclusive volume away on the kernel data path | `attendant` `chance` `docker` `mutant` `sys` `telemetry` `volume` |
//! | [`fuse`] | the data path in user space: NFSv3 through /dev/fuse | `attendant` `chance` `failpoint` `mutant` `nfs` `sys` `telemetry` `volume` |
//! | [`kernel`] | the kernel data path: mounts of shares, and of volumes | `failpoint` `mutant` `nfs` `sys` `volume` |
//! | `local_server` | the embedded server as a process that outlives the daemon | `attendant` `embedded` |
//! | [`home`] | the home share: all records, their durable local copy, the trash | `chance` `cluster` `failpoint` `layout` `mutant` `nfs` `sys` `volume` |
//! | [`cluster`] | which hosts live, what they hold, who may mount an exclusive volume | `layout` `mutant` `nfs` `volume` |
//! | [`layout`] | what lies where in `.nfsvol/`, and its names | `chance` `nfs` `volume` |
//! | [`monitor`] | metrics for Prometheus and the status page | `docker` `volume` |
//! | [`docker`] | Docker's protocol of volume drivers on a Unix socket, its client, and the engine | `api` |
//! | [`api`] | nfsvol's own calls: requests and answers as types, and asking them | `nfs` `sys` `volume` |
//! | [`volume`] | names, options, mount options, records, rights: values, no I/O | `nfs` |
//! | `attendant` | processes that outlive the daemon: workers, guards, the embedded server | `mutant` |
//! | [`telemetry`] | the log | |
//! | [`sys`] | this host as its kernel shows it: processes, mounts, durable files | `failpoint` `mutant` |
//! | `failpoint` | points at which a test kills the process | |
//! | [`mutant`] | mended faults that tests can put back | `mutants` |
//!
//! Each room imports what its row says and nothing that stands above it; tests/rooms.rs holds the
//! code to that. Rooms are private; what tests and benchmarks need of them is named in [`doors`].
//! Below the rooms stand crates of the workspace (`crates/`), which know nothing of volumes and of
//! the daemon, but for `lab`, which only tests use:
//!
//! | crate | job | imports |
//! |---|---|---|
//! | `lab` | real Docker hosts, NFS servers and kernel NFS clients on one machine | |
//! | [`nfs`] | speaking NFS in user space: addresses, probe, directory operations, RPC | `chance` `mutants` |
//! | [`embedded`] | an NFS server for one machine: a local directory over loopback | |
//! | [`chance`] | random numbers, the time of day and since the boot | |
//! | [`mutants`] | lists of mended faults that tests can put back | |
//!
//! Only the modules `sys` of `kernel` and `fuse`, and of the crates `embedded` and `chance`, hold unsafe
//! code.
//!
//! docs/ARCHITECTURE.md has the same list, and follows a Mount, a Remove and a write through the
//! files.

mod api;
mod attendant;
mod cli;
mod cluster;
mod daemon;
mod docker;
mod doctor;
mod driver;
#[cfg(feature = "failpoints")]
mod failpoint;
mod fence;
mod fuse;
mod home;
mod host;
mod kernel;
mod layout;
mod local_server;
mod migrate;
mod monitor;
mod mutant;
mod sys;
mod telemetry;
mod volume;

pub use cli::main;

/// What tests and benchmarks use of the rooms, by their names. Nobody else may rely on it: all else is
/// private, so that the compiler tells what nobody uses.
#[doc(hidden)]
pub mod doors {
    pub mod api {
        pub use crate::api::{Client, ClientError, Inspect, Ls, Question, Reply};
    }
    pub mod cluster {
        pub use crate::cluster::{
            Beat, Claimed, Entry, Env, Host, HostDoc, Member, Renewal, Stamp, Store, Times,
        };
        pub mod removal {
            pub use crate::cluster::removal::{Bound, announce, bind, forestall, withdraw};
        }
    }
    pub mod docker {
        pub use crate::docker::listen::ListenError;
        pub use crate::docker::server::Unfinished;
        pub use crate::docker::{
            Calls, Created, Listener, Lookup, Scope, Settings, Volume, VolumeDriver, run,
        };
    }
    pub mod fuse {
        pub use crate::fuse::{Attach, FuseOptions, FusePath, WorkerStatus};
        pub mod worker {
            pub use crate::fuse::worker::{SUBCOMMAND, run};
        }
    }
    pub mod kernel {
        pub use crate::kernel::{Attach, Endpoint, KernelPath, KernelSettings};
    }
    pub mod layout {
        pub use crate::layout::{aside, removing, volume};
    }
    pub mod monitor {
        pub use crate::monitor::Watched;
        pub use crate::monitor::host::Names;
        pub use crate::monitor::server::serve;
        pub use crate::monitor::view::Page;
    }
    #[cfg(feature = "failpoints")]
    pub mod mutant {
        pub use crate::mutant::{Mutant, put_back};
    }
    pub mod sys {
        pub use crate::sys::holders::{Mark, find};
    }
    pub mod volume {
        pub use crate::volume::{Access, MountOptions, Right, VolumeName, VolumeOptions};
    }
}
