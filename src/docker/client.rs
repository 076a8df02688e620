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
use serde::{Deserialize, Serialize};
use serde_json::Value;
use tokio::net::UnixStream;

/// How long to wait for an answer: a little more than the daemon takes at most
/// ([`super::Settings::deadline`]), so that its own error comes first.
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
    Deadline { call: String },
    #[error(
        "nfsvol closed the connection in the middle of {call}: `journalctl -u nfsvol` says why"
    )]
    Lost { call: String, source: hyper::Error },
    /// The daemon's own words.
    #[error("{0}")]
    Failed(String),
    #[error(
        "what answers on the socket does not speak nfsvol's language: {call} got {status} and \
         {quote:?}. Is the daemon of the same version (nfsvol --version)?"
    )]
    Strange {
        call: String,
        status: StatusCode,
        quote: String,
    },
    #[error("cannot write the request {call} as JSON")]
    Request {
        call: String,
        source: serde_json::Error,
    },
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
            call: "the connection".to_owned(),
            source,
        };
        let (sender, connection) = http1::handshake(TokioIo::new(stream)).await.map_err(lost)?;
        // Ends with the sender. Its error is the error of the call that it broke.
        tokio::spawn(connection);
        Ok(Self { sender })
    }

    /// Calls one route, such as `/Nfsvol.Status`, with a JSON body.
    ///
    /// # Errors
    /// [`ClientError::Failed`] is the daemon's answer; the others mean that there is none.
    pub async fn call(&mut self, path: &str, body: &impl Serialize) -> Result<Value, ClientError> {
        let call = path.trim_start_matches('/').to_owned();
        let body = match serde_json::to_vec(body) {
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
