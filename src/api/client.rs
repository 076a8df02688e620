//! The other end of the socket, for nfsvol's own command line.

use std::io;
use std::path::{Path, PathBuf};
use std::time::Duration;

use bytes::Bytes;
use http_body_util::{BodyExt, Full};
use hyper::client::conn::http1::{self, SendRequest};
use hyper::header::HOST;
use hyper::{Request, StatusCode};
use hyper_util::rt::TokioIo;
use serde::Deserialize;
use tokio::net::UnixStream;

use super::Ask;

/// How long to wait for an answer: a little more than the daemon takes at most
/// (`deadline` in docker/server.rs), so that its own error comes first.
const DEADLINE: Duration = Duration::from_secs(60);

/// Why there is no answer.
#[derive(Debug, thiserror::Error)]
pub enum ClientError {
    #[error(
        "nfsvol does not run here: there is no socket {0}. Start it (systemctl start nfsvol), or \
         say where its socket is with --socket"
    )]
    Absent(PathBuf),
    #[error("no permission for the socket {0}: run this as root")]
    Permission(PathBuf),
    #[error(
        "nobody listens on the socket {0}: nfsvol has ended without a clean stop. Start it again \
         (systemctl start nfsvol); `journalctl -u nfsvol` says why it ended"
    )]
    Refused(PathBuf),
    #[error("cannot connect to the socket {path}")]
    Connect { path: PathBuf, source: io::Error },
    #[error(
        "nfsvol did not answer {call} within {DEADLINE:?}: `journalctl -u nfsvol` says what it \
         waits for"
    )]
    Deadline { call: &'static str },
    #[error(
        "nfsvol closed the connection in the middle of {call}: `journalctl -u nfsvol` says why"
    )]
    Lost {
        call: &'static str,
        source: hyper::Error,
    },
    /// The daemon's own words.
    #[error("{0}")]
    Failed(String),
    #[error(
        "what answers on the socket does not speak nfsvol's language: {call} got {status} and \
         {quote:?}. Is the daemon of the same version (nfsvol --version)?"
    )]
    Strange {
        call: &'static str,
        status: StatusCode,
        quote: String,
    },
    #[error("cannot write the request {call} as JSON")]
    Request {
        call: &'static str,
        source: serde_json::Error,
    },
}

const START: &str = "Start it (systemctl start nfsvol), or say where its socket is with --socket";
const START_AGAIN: &str =
    "Start it again (systemctl start nfsvol); `journalctl -u nfsvol` says why it ended";

impl ClientError {
    /// What happened, without what to do next.
    #[must_use]
    pub fn message(&self) -> String {
        let text = self.to_string();
        let hint = self.hint().unwrap_or_default();
        let message = text.strip_suffix(hint).unwrap_or(&text);
        message.trim_end_matches([' ', '.', ':']).to_owned()
    }

    /// What to do next, where something can be said: the text's end.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match self {
            Self::Absent(_) => START,
            Self::Permission(_) => "run this as root",
            Self::Refused(_) => START_AGAIN,
            Self::Deadline { .. } => "`journalctl -u nfsvol` says what it waits for",
            Self::Lost { .. } => "`journalctl -u nfsvol` says why",
            Self::Strange { .. } => "Is the daemon of the same version (nfsvol --version)?",
            Self::Connect { .. } | Self::Failed(_) | Self::Request { .. } => return None,
        })
    }
}

/// A connection to a running nfsvol.
#[derive(Debug)]
pub struct Client {
    sender: SendRequest<Full<Bytes>>,
}

#[derive(Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Failed {
    err: String,
}

impl Client {
    /// Connects to the socket at `path`.
    ///
    /// # Errors
    /// [`ClientError`]: nobody is there, or no permission.
    pub async fn connect(path: &Path) -> Result<Self, ClientError> {
        let stream = UnixStream::connect(path).await.map_err(|source| {
            let path = path.to_owned();
            match source.kind() {
                io::ErrorKind::NotFound => ClientError::Absent(path),
                io::ErrorKind::PermissionDenied => ClientError::Permission(path),
                io::ErrorKind::ConnectionRefused => ClientError::Refused(path),
                _ => ClientError::Connect { path, source },
            }
        })?;
        let lost = |source| ClientError::Lost {
            call: "the connection",
            source,
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // Ends with the sender. Its error is the error of the call that it broke.
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Asks, and waits for the answer.
    ///
    /// # Errors
    /// [`ClientError::Failed`] is the daemon's answer; the others mean that there is none.
    pub async fn ask<A: Ask>(&mut self, ask: &A) -> Result<A::Answer, ClientError> {
        let path = A::PATH;
        let call = path.trim_start_matches('/');
        let body = match serde_json::to_vec(ask) {
            Ok(body) => Full::new(body.into()),
            Err(source) => return Err(ClientError::Request { call, source }),
        };
        let mut request = Request::post(path)
            .header(HOST, "nfsvol")
            .body(body)
            .map_err(|error| ClientError::Failed(format!("{call} is not a route: {error}")))?;
        *request.version_mut() = hyper::Version::HTTP_11;
        let exchange = async {
            // The answer before this one was read before the connection had turned to the next.
            self.sender.ready().await?;
            let response = self.sender.send_request(request).await?;
            let status = response.status();
            let body = response.into_body().collect().await?.to_bytes();
            Ok((status, body))
        };
        let (status, body) = match tokio::time::timeout(DEADLINE, exchange).await {
            Err(_) => return Err(ClientError::Deadline { call }),
            Ok(Err(source)) => return Err(ClientError::Lost { call, source }),
            Ok(Ok(answer)) => answer,
        };
        let understood = match status {
            StatusCode::OK => serde_json::from_slice(&body).ok().map(Ok),
            _ => serde_json::from_slice(&body)
                .ok()
                .map(|Failed { err }| Err(ClientError::Failed(err))),
        };
        understood.unwrap_or_else(|| {
            Err(ClientError::Strange {
                call,
                status,
                quote: String::from_utf8_lossy(&body).chars().take(120).collect(),
            })
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_to_do_is_the_end_of_each_text() {
        let path = || PathBuf::from("/run/nfsvol.sock");
        let call = "Nfsvol.Ls";
        for (error, message) in [
            (
                ClientError::Absent(path()),
                "nfsvol does not run here: there is no socket /run/nfsvol.sock",
            ),
            (
                ClientError::Permission(path()),
                "no permission for the socket /run/nfsvol.sock",
            ),
            (
                ClientError::Refused(path()),
                "nobody listens on the socket /run/nfsvol.sock: nfsvol has ended without a clean stop",
            ),
            (
                ClientError::Deadline { call },
                "nfsvol did not answer Nfsvol.Ls within 60s",
            ),
            (
                ClientError::Strange {
                    call,
                    status: StatusCode::OK,
                    quote: String::new(),
                },
                "what answers on the socket does not speak nfsvol's language: Nfsvol.Ls got 200 OK \
                 and \"\"",
            ),
            (ClientError::Failed("no. no".to_owned()), "no. no"),
        ] {
            assert_eq!(error.message(), message);
            assert!(
                error
                    .to_string()
                    .ends_with(error.hint().unwrap_or_default())
            );
        }
    }
}
