//! The volume driver: what each call of Docker's protocol does.
//!
//! Invariants:
//! - Get, List, Path and Capabilities never wait for a server; Get asks the share only for a name
//!   that the local copy does not hold, and not for long.
//! - Calls for one volume follow each other ([`Host::lock`]); no lock is held across another volume's
//!   I/O, but for the one document that tells the other hosts of several volumes.
//! - A Mount that fails leaves nothing behind; one that succeeded is on disk before it is answered.
//!
//! The [`Driver`] has five parts, which keep their fields to themselves: the settings, the catalog
//! ([`crate::home`]), this host ([`crate::host`]), the way to shares and the membership. In the other
//! files are the calls, which put the parts together.
//!
//! | module | job |
//! |---|---|
//! | [`config`] | what the administrator has decided for this host |
//! | [`membership`] | this host as one of several: its session, its holds |
//! | [`elsewhere`] | what the other hosts hold, as of the last look |
//! | [`adopt`] | volumes of directories that are there |
//! | [`calls`], [`ask`] | the calls of the protocol, and of the command line |
//! | [`create`], [`mount`], [`remove`] | what they do to a volume |
//! | [`shares`] | reaching shares, their admin path and health |
//! | [`repair`] | putting back what is torn on the home share |
//! | [`status`] | what people see |
//! | [`view`] | what operators see: metrics and the status page |
//! | [`tasks`] | polling, checking in the background |
//! | [`trash`] | emptying the trash, and sweeping what crashes left |

mod adopt;
mod ask;
mod calls;
mod config;
mod create;
mod elsewhere;
mod error;
mod membership;
mod mount;
mod remove;
mod repair;
#[cfg(test)]
mod search;
mod shares;
mod status;
mod tasks;
mod trash;
mod view;

use std::collections::HashMap;
use std::sync::{Arc, Mutex};

use tokio_util::task::TaskTracker;

pub(crate) use self::config::{Config, host_name};
pub(crate) use self::error::DriverError;
use self::membership::Membership;
use self::shares::Shares;
use crate::docker::Calls;
use crate::home::{Catalog, Known, LOOKUP_WAIT};
use crate::host::Host;
use crate::mutant::{self, Mutant};
use crate::volume::{Record, VolumeName};

/// The driver of one host.
#[derive(Debug)]
pub(crate) struct Driver {
    config: Config,
    /// Which volumes there are.
    catalog: Arc<Catalog>,
    /// How servers are reached.
    shares: Arc<Shares>,
    /// What is attached and mounted here.
    host: Arc<Host>,
    /// What the other hosts are told, and what they hold.
    membership: Arc<Membership>,
    /// Volumes that a Create has just made and nobody else has been told of, by record id: what
    /// may be taken back.
    fresh: Mutex<HashMap<VolumeName, String>>,
    /// What runs in the background.
    tasks: TaskTracker,
    calls: Calls,
    watch: view::Watch,
}

impl Driver {
    /// Opens the state directory and repairs what a crash left. Blocks; talks to no server.
    ///
    /// # Errors
    /// When the state directory or the mount root cannot be used.
    pub(crate) fn open(config: Config) -> Result<Self, DriverError> {
        let host = Arc::new(Host::open(config.of_host())?);
        let catalog = Catalog::open(&config.state_dir, config.share.clone(), &config.host)?;
        let catalog = Arc::new(catalog.recreating(config.recreate));
        let frame = membership::frame(&config);
        let shares = Arc::new(Shares::new(&config, Arc::clone(&host), &frame));
        let parts = (Arc::clone(&host), Arc::clone(&catalog), Arc::clone(&shares));
        let membership = Membership::open(&config, parts)?;
        Ok(Self {
            catalog,
            shares,
            host,
            membership: Arc::new(membership),
            fresh: Mutex::default(),
            tasks: TaskTracker::new(),
            calls: Calls::default(),
            watch: view::Watch::default(),
            config,
        })
    }

    /// The name of this host.
    #[must_use]
    pub(crate) fn host(&self) -> &str {
        &self.config.host
    }

    /// What is known of a name, asking the share if need be.
    async fn look_up(&self, name: &VolumeName) -> Known {
        match self.catalog.get(name) {
            Some(record) => Known::Here(record),
            None => self.ask_share(name).await,
        }
    }

    /// The same for Docker, which makes no volume where it is told that there is one: not without a
    /// look at the share, if it answers in time.
    async fn confirm(&self, name: &VolumeName) -> Known {
        match self.catalog.is_confirmed(name).await {
            true => self.look_up(name).await,
            false => self.ask_share(name).await,
        }
    }

    async fn ask_share(&self, name: &VolumeName) -> Known {
        // One time for both: reaching the share, and asking it.
        let mut deadline = tokio::time::Instant::now() + LOOKUP_WAIT;
        let home = tokio::time::timeout_at(deadline, self.shares.home()).await;
        let home = home.ok().and_then(Result::ok).flatten();
        if mutant::is_on(Mutant::GetWaitsTwice) {
            deadline = tokio::time::Instant::now() + LOOKUP_WAIT;
        }
        self.catalog.confirm(home.as_ref(), name, deadline).await
    }

    /// A volume that a call is for; where nothing is known of it, the share's own error says why.
    async fn find(&self, name: &VolumeName) -> Result<Option<Arc<Record>>, DriverError> {
        match self.look_up(name).await {
            Known::Here(record) => Ok(Some(record)),
            Known::Unknown if !mutant::is_on(Mutant::UnreadIsAbsent) => {
                match self.shares.home().await? {
                    Some(home) => Ok(self.catalog.fetch(&home, name).await?),
                    None => Ok(None),
                }
            }
            Known::Unknown | Known::Absent => Ok(None),
        }
    }
}

#[cfg(test)]
mod tests;
