//! The first process of a managed plugin: runs the daemon, again when it crashed.
//!
//! Docker ends every process of a plugin with its first one, and so the workers of the FUSE data
//! path, on which running containers depend. So the first process does nothing that could fail,
//! and the daemon is its child, whose crash they survive.

use std::io::Write;
use std::os::unix::process::ExitStatusExt;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

/// Between a crash and the next start. Calls of Docker are repeated for much longer.
const PAUSE: Duration = Duration::from_millis(200);
/// What a Rust program that panicked exits with.
const PANICKED: i32 = 101;

/// Runs `nfsvol serve`, configured by the environment, until it is stopped.
///
/// # Errors
/// When the daemon cannot be started, or refuses to run: that is not tried again, Docker reports it.
pub(super) async fn run() -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    let stopped = crate::serve::stopped();
    tokio::pin!(stopped);
    loop {
        let mut daemon = Command::new(&program)
            .arg("serve")
            .env(crate::serve::MANAGED, "")
            .spawn()
            .context("starting the daemon")?;
        let pid = daemon
            .id()
            .and_then(|id| Pid::from_raw(id.cast_signed()))
            .context("the daemon has no process id")?;
        let (status, stop) = tokio::select! {
            status = daemon.wait() => (status?, false),
            () = &mut stopped => {
                // It may have ended in this instant.
                let _ = kill_process(pid, Signal::TERM);
                (daemon.wait().await?, true)
            }
        };
        let crashed = status.signal().is_some() || status.code() == Some(PANICKED);
        match status.success() {
            true => return Ok(()),
            false if crashed && !stop => {}
            false => bail!("the daemon ended: {status}"),
        }
        let _ = writeln!(std::io::stderr(), "nfsvol: the daemon crashed: {status}");
        tokio::time::sleep(PAUSE).await;
    }
}
