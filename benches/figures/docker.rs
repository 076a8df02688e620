//! HTTP on a Unix socket, as simple as it gets, and an engine's API driven through it.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use lab::Result;
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

const PATIENCE: Duration = Duration::from_secs(120);

/// One request on a connection of its own; the answer's body, if it is a success.
pub(crate) fn ask(socket: &str, method: &str, path: &str, body: &str) -> Result<Vec<u8>> {
    let mut stream = UnixStream::connect(socket)?;
    stream.set_read_timeout(Some(PATIENCE))?;
    let request = format!(
        "{method} {path} HTTP/1.1\r\nHost: docker\r\nConnection: close\r\n\
         Content-Type: application/json\r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.write_all(request.as_bytes())?;
    let mut stream = BufReader::new(stream);
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line.split(' ').nth(1).context("no answer")?.to_owned();
    let mut length = None;
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = Some(value.trim().parse()?);
        }
    }
    let mut answer = Vec::new();
    if method != "HEAD" {
        stream
            .take(length.unwrap_or(u64::MAX))
            .read_to_end(&mut answer)?;
    }
    if !status.starts_with('2') {
        let text = String::from_utf8_lossy(&answer);
        bail!("{method} {path} answered {status}: {text}");
    }
    Ok(answer)
}

/// What [`run`] does: cycles of `volumes` volumes, `together` of them in one container.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Cycle {
    pub(crate) driver: String,
    /// `{n}` stands for the volume's number.
    pub(crate) options: Value,
    pub(crate) volumes: usize,
    pub(crate) together: usize,
    pub(crate) image: String,
}

/// Creates volumes, attaches and detaches each of them in a container, removes them; answers the
/// seconds of each step, over all volumes. A container is made but never run: asking for the
/// state of a path in it attaches its volumes and detaches them, as for `docker cp`.
pub(crate) fn run(socket: &str, script: &str) -> Result<Vec<f64>> {
    let cycle: Cycle = serde_json::from_str(script)?;
    let mut times = [0.0; 4];
    let numbers: Vec<usize> = (0..cycle.volumes).collect();
    for group in numbers.chunks(cycle.together) {
        let name = |n: usize| format!("bench-{}-{n}", cycle.driver);
        let mut clock = Instant::now();
        let mut lap = |step: usize| {
            times[step] += clock.elapsed().as_secs_f64();
            clock = Instant::now();
        };
        for &n in group {
            let options = cycle.options.to_string().replace("{n}", &n.to_string());
            let options: Value = serde_json::from_str(&options)?;
            let body = json!({ "Name": name(n), "Driver": cycle.driver, "DriverOpts": options });
            ask(socket, "POST", "/v1.41/volumes/create", &body.to_string())?;
        }
        lap(0);
        let mounts: Vec<Value> = group
            .iter()
            .map(|&n| {
                json!({ "Type": "volume", "Source": name(n), "Target": format!("/v/{n}"),
                    "VolumeOptions": { "NoCopy": true } })
            })
            .collect();
        let body = json!({ "Image": cycle.image, "Cmd": ["true"],
            "HostConfig": { "Mounts": mounts, "NetworkMode": "none" } });
        let made = ask(
            socket,
            "POST",
            "/v1.41/containers/create",
            &body.to_string(),
        )?;
        let made: Value = serde_json::from_slice(&made)?;
        let id = made["Id"].as_str().context("no container")?;
        lap(1);
        ask(
            socket,
            "HEAD",
            &format!("/v1.41/containers/{id}/archive?path=/bin"),
            "",
        )?;
        lap(2);
        ask(socket, "DELETE", &format!("/v1.41/containers/{id}"), "")?;
        lap(1);
        for &n in group {
            let path = format!("/v1.41/volumes/{}", name(n));
            ask(socket, "DELETE", &path, "")?;
        }
        lap(3);
    }
    Ok(times.to_vec())
}
