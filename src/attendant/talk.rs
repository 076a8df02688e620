//! What a daemon and an attendant say to each other: one JSON object per line.

use std::io;
use std::os::fd::{AsRawFd, OwnedFd};
use std::path::{Path, PathBuf};
use std::time::Duration;

use rustix::fs::{Mode, OFlags};
use serde::Serialize;
use serde::de::DeserializeOwned;
use tokio::io::{AsyncBufReadExt, AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt, BufReader};
use tokio::net::UnixStream;

/// The longest line either side takes, in bytes.
const MAX_LINE: u64 = 64 * 1024;

/// Reads one line of JSON.
pub(crate) async fn receive<T: DeserializeOwned>(
    stream: &mut (impl AsyncRead + Unpin),
) -> io::Result<T> {
    let mut line = Vec::new();
    let mut reader = BufReader::new(stream.take(MAX_LINE));
    if reader.read_until(b'\n', &mut line).await? == 0 {
        return Err(io::ErrorKind::UnexpectedEof.into());
    }
    Ok(serde_json::from_slice(&line)?)
}

/// Writes one line of JSON.
pub(crate) async fn send<T: Serialize>(
    stream: &mut (impl AsyncWrite + Unpin),
    value: &T,
) -> io::Result<()> {
    let mut line = serde_json::to_vec(value)?;
    line.push(b'\n');
    stream.write_all(&line).await?;
    stream.flush().await
}

/// A path for a socket in a directory whose own path may be too long for one (107 bytes), and
/// what keeps it good.
pub(super) fn socket_path(dir: &Path, name: &str) -> io::Result<(OwnedFd, PathBuf)> {
    let flags = OFlags::PATH | OFlags::DIRECTORY | OFlags::CLOEXEC;
    let dir = rustix::fs::open(dir, flags, Mode::empty())?;
    let path = PathBuf::from(format!("/proc/self/fd/{}/{name}", dir.as_raw_fd()));
    Ok((dir, path))
}

/// Says one thing to a process behind a socket in a directory, and hears one.
pub(super) async fn exchange<A: Serialize, B: DeserializeOwned>(
    dir: &Path,
    socket: &str,
    said: &A,
    patience: Duration,
) -> io::Result<B> {
    let exchange = async {
        let (_dir, path) = socket_path(dir, socket)?;
        let mut stream = UnixStream::connect(path).await?;
        send(&mut stream, said).await?;
        receive(&mut stream).await
    };
    tokio::time::timeout(patience, exchange)
        .await
        .unwrap_or_else(|_| Err(io::ErrorKind::TimedOut.into()))
}
