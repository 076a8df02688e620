//! NFSv3 in user space: what a share is called, whether it can be reached and why not, directory
//! operations on it, and a client with many calls in flight.
//!
//! ```
//! # fn main() -> Result<(), Box<dyn std::error::Error>> {
//! # if !rustix::process::geteuid().is_root() {
//! #     return Ok(()); // which the embedded server needs
//! # }
//! # tokio::runtime::Builder::new_current_thread().enable_all().build()?.block_on(async {
//! # let (dir, state) = (tempfile::tempdir()?, tempfile::tempdir()?);
//! # let settings = embedded::Settings { state_dir: state.path().to_owned(), privileged_only: false };
//! # let server = embedded::serve(dir.path(), "127.0.0.1:0".parse()?, &settings).await?;
//! # let (port, export) = (server.addr.port(), dir.path().display());
//! use nfs::address::{Share, SharePath};
//! use nfs::admin::{Admin, AdminSettings, Made};
//!
//! let share: Share = format!("127.0.0.1:{export}").parse()?;
//! let settings = AdminSettings {
//!     nfs_port: Some(port),
//!     mount_port: Some(port),
//!     ..AdminSettings::default()
//! };
//! let on = Admin::v3(share, settings);
//! let letters = SharePath::parse("letters")?;
//! assert!(matches!(on.mkdir(&letters, 0o755).await?, Made::New(_)));
//! assert_eq!(on.mkdir(&letters, 0o755).await?, Made::Exists);
//! on.write(&letters.join("a"), b"first").await?;
//! assert_eq!(on.read(&letters.join("a"), 100).await?.as_deref(), Some(&b"first"[..]));
//! assert_eq!(on.read(&letters.join("b"), 100).await?, None);
//! # server.shutdown().await;
//! # Ok(())
//! # })
//! # }
//! ```
//!
//! | module | job | by |
//! |---|---|---|
//! | [`address`] | what a share and a path on it are called | values, no I/O |
//! | [`connect`] | names to addresses, connections that carry one call at a time | nfs3_client |
//! | [`probe`] | is a share there, step by step; a breaker for one that is not | nfs3_client |
//! | [`admin`] | directory operations, each within a deadline | nfs3_client, or a mount |
//! | [`rpc`] | many calls in flight, repeated over connections that break | a client of its own |
//! | [`mutant`] | mended faults that tests can put back | |
//!
//! Invariants:
//! - everything ends by its deadline, whatever the server does;
//! - no length that a server names is believed before its bytes are there: nothing that it sends
//!   makes this code panic, or take more memory than a bounded record for each connection;
//! - what may have been done is not taken for undone: an error says whether the outcome is known.
//!
//! A comment that begins with `//=` cites what RFC 1813, 5531 or 4506 asks of a client
//! (docs/RFC.md lists it, by section), above the line that obeys it; `//= test` and its name stand
//! above what shows it.
//!
//! Known limits: TCP only; AUTH_UNIX only, so no Kerberos; no locks (NLM). The port mapper and MOUNT
//! are asked in two ways, one for each of the two clients.

pub mod address;
pub mod admin;
pub mod connect;
pub mod mutant;
pub mod probe;
pub mod rpc;
