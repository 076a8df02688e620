//! Asking a share itself, as where no daemon runs: a driver without a socket, whose state is
//! thrown away afterwards.

use anyhow::{Context, bail};
use hyper::Method;
use serde_json::Value;

use crate::docker::VolumeDriver;
use crate::docker::route::{Call, Route};
use crate::driver::Config;
use crate::driver::Driver;
use crate::nfs::address::{Server, Share};

/// Answers what the daemon would answer on `route`.
///
/// # Errors
/// When the share cannot be reached, holds no volumes of nfsvol, or refuses.
pub(super) async fn ask(share: &Share, route: &str, body: &Value) -> anyhow::Result<Value> {
    if *share.server() == Server::Embedded {
        bail!("{share} is served by its daemon: leave --share out");
    }
    let Call::Ask(question) =
        Route::find(&Method::POST, route)?.parse(body.to_string().as_bytes())?
    else {
        bail!("{route} is not a question for a share");
    };
    let state = tempfile::tempdir().context("making a directory for the catalog's copy")?;
    let driver = Driver::open(Config::aside(share.clone(), state.path()))?;
    let answer = async {
        driver.read_catalog().await?;
        driver.ask(question).await
    };
    let answer = answer.await;
    driver.stop().await;
    Ok(answer?)
}
