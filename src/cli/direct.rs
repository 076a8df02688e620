//! Asking a share itself, as where no daemon runs: a driver without a socket, whose state is
//! thrown away afterwards.

use anyhow::{Context, bail};

use crate::api::{Answers, Ask};
use crate::driver::{Config, Driver, DriverError};
use nfs::address::{Server, Share};

/// Answers what the daemon would answer.
///
/// # Errors
/// When the share cannot be reached, holds no volumes of nfsvol, or refuses.
pub(super) async fn ask<A: Ask>(share: &Share, ask: A) -> anyhow::Result<A::Answer>
where
    Driver: Answers<A, Error = DriverError>,
{
    if *share.server() == Server::Embedded {
        bail!("{share} is served by its daemon: leave --share out");
    }
    let state = tempfile::tempdir().context("making a directory for the catalog's copy")?;
    let driver = Driver::open(Config::aside(share.clone(), state.path()))?;
    let answer = async {
        driver.read_catalog().await?;
        driver.answer(ask).await
    };
    let answer = answer.await;
    driver.stop().await;
    Ok(answer?)
}
