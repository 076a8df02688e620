//! The volume plugin as dockerd and Podman see it: the VolumeDriver protocol on a Unix socket. The
//! same server takes nfsvol's own calls ([`crate::api`]).
//!
//! | module | job |
//! |---|---|
//! | [`wire`] | what a client sends and gets, as JSON; no I/O |
//! | [`route`] | the one table of paths, and a request's body to a [`route::Call`] |
//! | [`listen`] | the socket: taken from systemd, or made, replaced when stale, removed |
//! | [`server`] | connections, their limits, and a shutdown that cuts nobody off |
//! | [`call`] | one call: its task, its deadline, its undo, its line in the log |
//! | [`calls`] | calls counted and timed, by name and outcome |
//! | `engine` | the engine itself, asked over its own socket |
//!
//! Nothing here knows NFS: what a call does is behind [`VolumeDriver`].
//!
//! Invariants:
//! - Each call runs in a task of its own, so a client that goes away never stops it half-way, and
//!   no call waits for another.
//! - What succeeded and nobody heard of is undone: a mount is unmounted, a new volume is taken
//!   back. That holds for a client that left, for a passed deadline, and for an answer that was
//!   written but never read.
//! - `Get` answers only what is known. For a volume that dockerd knows, every error in answer to
//!   Get means "gone": dockerd then forgets its labels and options for good (moby
//!   daemon/volume/service/store.go). So whatever keeps Get from knowing closes the connection
//!   without an answer, which dockerd reports without forgetting anything. It also sends the
//!   call again then, by mistake with an empty body, so an empty Get is not answered either.
//!
//! Limits: a client that shuts down its writing side while it waits counts as gone. A client that
//! pipelines is taken to have read an answer as soon as its next request is served, and its going
//! away is seen only between requests. No known client does either.

pub(crate) mod call;
pub(crate) mod calls;
pub(crate) mod engine;
pub(crate) mod listen;
pub(crate) mod route;
pub(crate) mod server;
pub(crate) mod wire;

use std::collections::BTreeMap;
use std::path::PathBuf;
use std::time::Instant;

use crate::api::{Question, Reply};

pub use calls::Calls;
pub use listen::Listener;
pub use server::{Settings, run};

/// What a plugin does behind the protocol.
///
/// Methods run concurrently, several for one volume at once too: ordering is the driver's part.
/// An error's text is shown to the user as it is, after its sources are joined to it.
pub trait VolumeDriver: Send + Sync + 'static {
    type Error: std::error::Error + Send + Sync + 'static;

    /// Plugin.Activate: a dockerd (re)started and uses this plugin by its socket. A managed plugin
    /// never hears this. Must return at once.
    fn activated(&self);

    /// What Capabilities answers. Must return at once.
    fn scope(&self) -> Scope;

    /// Makes a volume, or finds it made with equal options.
    fn create(
        &self,
        name: &str,
        opts: BTreeMap<String, String>,
    ) -> impl Future<Output = Result<Created, Self::Error>> + Send;

    /// Takes back a [`Created::New`] whose client will never know of it. Somebody else may have
    /// been told of the volume meanwhile; then it stays.
    fn undo_create(&self, name: &str) -> impl Future<Output = ()> + Send;

    /// Removes a volume; one that is absent counts as removed.
    fn remove(&self, name: &str) -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Mounts a volume for one holder and names the mount point. Answered too late when it ends
    /// after `deadline`, a little before the server gives up in more general words.
    fn mount(
        &self,
        name: &str,
        id: &str,
        deadline: Instant,
    ) -> impl Future<Output = Result<PathBuf, Self::Error>> + Send;

    /// Lets go of one mount of `id`; one that is unknown counts as let go. Also undoes a mount
    /// whose client will never know of it.
    fn unmount(&self, name: &str, id: &str)
    -> impl Future<Output = Result<(), Self::Error>> + Send;

    /// Where a volume is mounted now, if it is.
    fn path(&self, name: &str)
    -> impl Future<Output = Result<Option<PathBuf>, Self::Error>> + Send;

    /// What is known of a volume. An error is treated as [`Lookup::Unknown`].
    fn get(&self, name: &str) -> impl Future<Output = Result<Lookup, Self::Error>> + Send;

    /// All volumes. Clients show no status here, so it may stay empty.
    fn list(&self) -> impl Future<Output = Result<Vec<Volume>, Self::Error>> + Send;

    /// Where the calls of this driver are counted. Must return at once.
    fn calls(&self) -> &Calls;

    /// All that is measured here, in the OpenMetrics text format.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// One of nfsvol's own calls, from its command line.
    fn ask(&self, question: Question) -> impl Future<Output = Result<Reply, Self::Error>> + Send;
}

/// Whether other hosts see the same volumes. Clients only echo it.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Scope {
    Global,
    Local,
}

/// What Create did.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Created {
    /// This call made the volume.
    New,
    /// It was there, with equal options.
    Existing,
}

/// What Get found.
#[derive(Debug, Clone, PartialEq)]
pub enum Lookup {
    Found(Volume),
    /// The volume is known not to exist.
    Absent,
    /// The state cannot be read: nothing is answered. dockerd tries again for 15 s, in vain because
    /// without a body, and then reports an error; so waiting a second or two for the state to
    /// become readable is better than this.
    Unknown,
}

/// A volume as clients show it.
#[derive(Debug, Clone, Default, PartialEq)]
pub struct Volume {
    pub name: String,
    /// Where it is mounted on this host now.
    pub mountpoint: Option<PathBuf>,
    /// RFC 3339.
    pub created_at: Option<String>,
    /// Free-form; `docker volume inspect` shows it word for word.
    pub status: serde_json::Map<String, serde_json::Value>,
}
