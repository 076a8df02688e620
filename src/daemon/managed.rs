//! The first process of a managed plugin: runs the daemon, again when it crashed.
//!
//! Docker ends every process of a plugin with its first one, and so the workers of the FUSE data
//! path, on which running containers depend. So the first process does nothing that could fail,
//! and the daemon is its child, whose crash they survive.
//!
//! Docker binds a directory of the host that is there everywhere, with what others have in it, since
//! it makes none; so before anything else that is reduced to nfsvol's own directory below it.

use std::io::Write;
use std::os::unix::fs::DirBuilderExt;
use std::os::unix::process::ExitStatusExt;
use std::path::Path;
use std::time::Duration;

use anyhow::{Context, bail};
use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{MoveMountFlags, OpenTreeFlags, UnmountFlags, move_mount, open_tree, unmount};
use rustix::process::{Pid, Signal, kill_process};
use tokio::process::Command;

/// Between a crash and the next start. Calls of Docker are repeated for much longer.
const PAUSE: Duration = Duration::from_millis(200);
/// What a Rust program that panicked exits with.
const PANICKED: i32 = 101;

/// Leaves of the directory that is bound above `state` nothing but `state`.
///
/// # Errors
/// When the state directory could be lost by that. A kernel that cannot do it (before Linux 5.2) is
/// none: then the rest stays to be seen.
fn see_nothing_but(state: &Path) -> anyhow::Result<()> {
    let Some(above) = state.parent() else {
        return Ok(());
    };
    let make = || {
        let mut dir = std::fs::DirBuilder::new();
        dir.recursive(true).mode(0o700).create(state)
    };
    make().context("making the state directory")?;
    let flags = OpenTreeFlags::OPEN_TREE_CLONE | OpenTreeFlags::OPEN_TREE_CLOEXEC;
    let own = match open_tree(CWD, state, flags) {
        Err(Errno::NOSYS | Errno::PERM) => return Ok(()),
        own => own.context("opening the state directory")?,
    };
    match unmount(above, UnmountFlags::DETACH) {
        // Nothing is bound there.
        Err(Errno::INVAL) => return Ok(()),
        gone => gone.context("leaving the directory above the state directory")?,
    }
    make().context("making a place for the state directory")?;
    let flags = MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH;
    move_mount(&own, "", CWD, state, flags).context("putting the state directory in its place")
}

/// Runs `nfsvol serve`, configured by the environment, until it is stopped.
///
/// # Errors
/// When the daemon cannot be started, or refuses to run: that is not tried again, Docker reports it.
pub(crate) async fn run() -> anyhow::Result<()> {
    let program = std::env::current_exe().context("finding this program")?;
    if let Some(state) = std::env::var_os("NFSVOL_STATE_DIR") {
        see_nothing_but(Path::new(&state))?;
    }
    let stopped = crate::daemon::serve::stopped();
    tokio::pin!(stopped);
    loop {
        let mut daemon = Command::new(&program)
            .arg("serve")
            .env(crate::daemon::serve::MANAGED, "")
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
