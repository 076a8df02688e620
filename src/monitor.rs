//! What operators watch: metrics for Prometheus, and a status page.
//!
//! | module | job |
//! |---|---|
//! | [`view`] | what a daemon is like at one moment: values |
//! | [`metrics`] | a view as metrics |
//! | [`address`] | where both are served |
//! | [`server`] | HTTP for Prometheus and browsers: what is served, to whom |
//! | [`host`] | whether a request's Host names this host |
//!
//! Invariants: only questions are answered, never a change made; an answer is from memory, /proc
//! and the workers' sockets, within [`server::PATIENCE`], and asks no NFS server; nothing that is
//! shown becomes part of the page's own text, because it comes as JSON and is put in as text.
//!
//! Known limit: no encryption and no passwords. Beyond the loopback address everybody who reaches
//! the port may look (docs/SECURITY.md).

pub(crate) mod address;
pub(crate) mod host;
pub(crate) mod metrics;
pub(crate) mod server;
pub(crate) mod view;

pub(crate) use address::Address;

/// What is watched.
pub trait Watched: Send + Sync + 'static {
    /// All metrics, in the OpenMetrics text format.
    fn metrics(&self) -> impl Future<Output = String> + Send;

    /// What the status page shows, with the volumes whose names hold `find`.
    fn page(&self, find: &str) -> impl Future<Output = view::Page> + Send;
}
