//! `nfsvol serve`: the daemon, put together.

use std::sync::Arc;

use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
use tokio::signal::unix::{SignalKind, signal};
use tokio_util::sync::CancellationToken;

use super::announce::announce;
use super::settings::ServeArgs;
use crate::docker::{Listener, Settings, VolumeDriver, server};
use crate::driver::{Config, Driver};
use crate::monitor::{self, host::Names};

/// In the environment of a daemon that is a managed plugin.
pub(crate) const MANAGED: &str = "NFSVOL_MANAGED";

/// Runs the daemon until SIGTERM or SIGINT.
///
/// The socket is served before any server is spoken to, so that a dockerd that starts at the same
/// time finds it.
///
/// # Errors
/// When the socket, the state directory or the mount root cannot be used, or when calls did not
/// end in time at the stop.
pub(crate) async fn serve(args: &ServeArgs) -> anyhow::Result<()> {
    // Before anything is told or done: a stop that comes during the start is a clean one too.
    let stopped = stopped();
    let config = Config::from(args);
    let listener = Listener::open(&args.socket).await?;
    let share = config.share.as_ref().map(ToString::to_string);
    tracing::info!(
        version = env!("CARGO_PKG_VERSION"),
        socket = %args.socket.display(),
        share = share.as_deref().unwrap_or("none: each volume names its share"),
        state_dir = %config.state_dir.display(),
        "serving"
    );
    raise_descriptor_limit();
    let driver = Arc::new(Driver::open(config)?);
    let stop = CancellationToken::new();
    if std::env::var_os(MANAGED).is_some() {
        // dockerd activates a managed plugin itself: it starts it when it starts.
        driver.activated();
    } else {
        tokio::spawn(announce(args.docker_socket.clone()));
    }
    driver.start(&stop);
    if let Some(address) = args.metrics.get() {
        let names = args.metrics_name.iter().cloned();
        let names = Names::new(names.chain([driver.host().to_owned()]));
        let page = monitor::server::run(address, names, driver.clone(), stop.clone());
        tokio::spawn(page);
    }
    let served = server::run(listener, driver.clone(), Settings::from(args), stopped).await;
    stop.cancel();
    driver.stop().await;
    served?;
    tracing::info!("stopped; mounted volumes stay mounted");
    Ok(())
}

/// The soft limit is usually 1,024, as many as the server serves connections at once.
fn raise_descriptor_limit() {
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit {
        current: limit.maximum,
        ..limit
    };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "limit of open files not raised");
    }
}

/// Ends at SIGTERM or SIGINT. They are caught from the call on, which is made within a runtime, not
/// from the first poll.
pub(crate) fn stopped() -> impl Future<Output = ()> {
    let caught = signal(SignalKind::terminate())
        .and_then(|term| Ok((term, signal(SignalKind::interrupt())?)));
    async {
        let Ok((mut term, mut int)) = caught else {
            tracing::error!("signals cannot be caught; only kill -9 stops this daemon");
            return std::future::pending().await;
        };
        tokio::select! {
            _ = term.recv() => {}
            _ = int.recv() => {}
        }
    }
}
