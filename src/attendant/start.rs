//! How an attendant is started, and what both sides do then: it gets its task as a line on standard
//! input, and answers with one on standard output.

use std::fs::File;
use std::io::{self, Write};
use std::path::Path;
use std::process::Stdio;

use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::process::{Child, Command};

use super::talk;

/// What runs `program` as an attendant, which writes its log to a file.
pub(crate) fn command(program: &Path, subcommand: &str, log: File) -> Command {
    let mut command = Command::new(program);
    command
        .arg(subcommand)
        .stdin(Stdio::piped())
        .stdout(Stdio::piped())
        .stderr(log);
    command
}

/// Gives a process that was started its task.
///
/// # Errors
/// When it does not read it.
pub(crate) async fn give<T: Serialize>(child: &mut Child, task: &T) -> io::Result<()> {
    match child.stdin.take() {
        Some(mut stdin) => talk::send(&mut stdin, task).await,
        None => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Hears how its start went.
///
/// # Errors
/// When it ended without a word.
pub(crate) async fn hear<A: DeserializeOwned>(child: &mut Child) -> io::Result<A> {
    match &mut child.stdout {
        Some(stdout) => talk::receive(stdout).await,
        None => Err(io::ErrorKind::BrokenPipe.into()),
    }
}

/// Leaves the session and the working directory of whoever started this process, so that the end
/// of a terminal or of the daemon's process group does not reach it.
///
/// # Errors
/// When it cannot change to the root directory.
pub(crate) fn detach() -> io::Result<()> {
    // Fails only for a process that leads a group already, as when a person started it.
    let _ = rustix::process::setsid();
    std::env::set_current_dir("/")
}

/// Makes the OOM killer take this process after others, with -1000 never: what it serves would be
/// lost to all who use it.
pub(crate) fn spare(score: i16) {
    // Without CAP_SYS_RESOURCE, nothing below what the process was started with.
    if let Err(error) = std::fs::write("/proc/self/oom_score_adj", score.to_string()) {
        tracing::warn!("the OOM killer may take this process before others: {error}");
    }
}

/// Says how the start went.
///
/// # Errors
/// When whoever started this process is gone.
pub(crate) fn tell<T: Serialize>(started: &T) -> io::Result<()> {
    let mut line = serde_json::to_vec(started)?;
    line.push(b'\n');
    let mut out = io::stdout().lock();
    out.write_all(&line)?;
    out.flush()
}

/// The daemon reads what comes; when it is gone, nothing may be written there.
pub(crate) fn close_standard_streams() {
    if let Ok(null) = File::options().read(true).write(true).open("/dev/null") {
        let _ = rustix::stdio::dup2_stdin(&null);
        let _ = rustix::stdio::dup2_stdout(&null);
    }
}
