//! Docker's engine, asked over its own socket.

use std::path::Path;

use anyhow::{Context, bail};
use bytes::Bytes;
use http_body_util::{BodyExt, Empty};
use hyper::client::conn::http1;
use hyper::header::HOST;
use hyper::{Method, Request};
use hyper_util::rt::TokioIo;
use serde_json::Value;
use tokio::net::UnixStream;

/// Where the engine listens.
pub(crate) const DEFAULT_SOCKET: &str = "/run/docker.sock";
/// The plugin's name for the engine; a managed one has a tag.
pub(crate) const NAMES: [&str; 2] = ["nfsvol", "nfsvol:latest"];

/// One request without a body; null for an answer without one. As long as the engine takes: the
/// caller sets the deadline.
///
/// # Errors
/// When the engine cannot be reached, or refuses: in its own words.
pub(crate) async fn ask(socket: &Path, method: Method, path: &str) -> anyhow::Result<Value> {
    let stream = UnixStream::connect(socket).await?;
    let (mut sender, connection) = http1::handshake(TokioIo::new(stream)).await?;
    // Ends with the sender.
    tokio::spawn(connection);
    let request = Request::builder()
        .method(method)
        .uri(path)
        .header(HOST, "docker")
        .body(Empty::<Bytes>::new())?;
    let response = sender.send_request(request).await?;
    let status = response.status();
    let body = response.into_body().collect().await?.to_bytes();
    let answer = match body.is_empty() {
        true => Value::Null,
        false => serde_json::from_slice(&body).context("the engine's answer is no JSON")?,
    };
    if !status.is_success() && !status.is_redirection() {
        bail!("{}", answer["message"].as_str().unwrap_or(status.as_str()));
    }
    Ok(answer)
}

/// Starts a container that was killed, if its restart policy wants it to run.
///
/// # Errors
/// What the engine answered, such as that its volume cannot be mounted.
pub(crate) async fn start_again(socket: &Path, container: &str) -> anyhow::Result<()> {
    let details = ask(
        socket,
        Method::GET,
        &format!("/containers/{container}/json"),
    )
    .await?;
    let policy = details["HostConfig"]["RestartPolicy"]["Name"].as_str();
    let wanted = matches!(policy, Some("always" | "unless-stopped" | "on-failure"));
    if wanted && details["State"]["Running"] != true {
        tracing::info!(container, "started again after the fence");
        ask(
            socket,
            Method::POST,
            &format!("/containers/{container}/start"),
        )
        .await?;
    }
    Ok(())
}
