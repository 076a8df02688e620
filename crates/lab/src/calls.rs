//! Calls on nfsvol's socket as dockerd makes them, from the node that nfsvol runs on.
//!
//! The calls run in a process on the node (the test binary again, as `lab-calls`), one after
//! another on one connection, or on several side by side, so their times hold no part of the lab.

use std::io::{BufRead, BufReader, Read, Write};
use std::os::unix::net::UnixStream;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, bail};
use serde::{Deserialize, Serialize};
use serde_json::{Value, json};

use super::Result;
use super::docker::Nfsvol;
use super::node::Node;
use super::process::Task;

/// The longest that one call is waited for: dockerd's own patience for Mount.
const CALL_LIMIT: Duration = Duration::from_secs(120);

/// One call, made `times` times with `{n}` in its body replaced by 0, 1, …
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Call {
    path: String,
    body: String,
    times: usize,
}

impl Call {
    /// A call of the volume driver protocol (`Create`), or one of nfsvol's own (`Nfsvol.Status`).
    pub fn new(name: &str, body: &Value) -> Self {
        let path = if name.contains('.') {
            format!("/{name}")
        } else {
            format!("/VolumeDriver.{name}")
        };
        Self {
            path,
            body: body.to_string(),
            times: 1,
        }
    }

    pub fn times(self, times: usize) -> Self {
        Self { times, ..self }
    }

    pub fn create(name: &str, opts: &[(&str, &str)]) -> Self {
        let opts: serde_json::Map<String, Value> = opts
            .iter()
            .map(|&(key, value)| (key.to_owned(), json!(value)))
            .collect();
        Self::new("Create", &json!({ "Name": name, "Opts": opts }))
    }

    pub fn get(name: &str) -> Self {
        Self::new("Get", &json!({ "Name": name }))
    }

    pub fn list() -> Self {
        Self::new("List", &json!({}))
    }

    pub fn mount(name: &str, id: &str) -> Self {
        Self::new("Mount", &json!({ "Name": name, "ID": id }))
    }

    pub fn unmount(name: &str, id: &str) -> Self {
        Self::new("Unmount", &json!({ "Name": name, "ID": id }))
    }

    pub fn remove(name: &str) -> Self {
        Self::new("Remove", &json!({ "Name": name }))
    }
}

/// What came back for one call.
#[derive(Clone, Debug, Serialize, Deserialize)]
pub struct Answer {
    pub call: String,
    /// 0 when the connection was closed without an answer.
    pub status: u16,
    pub body: Value,
    pub took: Duration,
}

impl Answer {
    /// The answer's body, if the call succeeded.
    pub fn ok(self) -> Result<Value> {
        if self.status != 200 {
            bail!("{self}");
        }
        Ok(self.body)
    }

    /// The error's text, if the call failed.
    pub fn fails(self) -> Result<String> {
        match (self.status, self.body["Err"].as_str()) {
            (500, Some(text)) if !text.is_empty() => Ok(text.to_owned()),
            _ => bail!("should have failed: {self}"),
        }
    }
}

impl std::fmt::Display for Answer {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        let Self {
            call, status, took, ..
        } = self;
        write!(f, "{call} answered {status} after {took:?}: {}", self.body)
    }
}

/// Makes these calls one after another on the node's nfsvol.
pub fn all(node: &Node, calls: &[Call]) -> Result<Vec<Answer>> {
    side_by_side(node, &[calls.to_vec()])?
        .pop()
        .context("no answer")
}

/// Makes several series of calls at once, each on a connection of its own.
pub fn side_by_side(node: &Node, series: &[Vec<Call>]) -> Result<Vec<Vec<Answer>>> {
    let exe = std::env::current_exe()?;
    let exe = exe.to_str().context("the path is not UTF-8")?;
    let task = Task {
        stdin: serde_json::to_string(series)?,
        ..Task::new(&[exe, "lab-calls", Nfsvol::SOCKET])
    };
    Ok(serde_json::from_str(&node.run_task(&task)?.ok()?)?)
}

/// Makes one call.
pub fn one(node: &Node, call: Call) -> Result<Answer> {
    all(node, &[call])?.pop().context("no answer")
}

/// The smallest of the times that is at least as long as `percent` of them.
pub fn percentile(answers: &[Answer], percent: usize) -> Duration {
    let mut times: Vec<Duration> = answers.iter().map(|answer| answer.took).collect();
    times.sort();
    let rank = (times.len() * percent).div_ceil(100).saturating_sub(1);
    times.get(rank).copied().unwrap_or_default()
}

/// `lab-calls SOCKET`: reads series of calls from standard input, writes the answers to standard
/// output.
pub(crate) fn main(args: &[String]) -> Result<ExitCode> {
    let socket = args.first().context("lab-calls needs a socket")?;
    let series: Vec<Vec<Call>> = serde_json::from_reader(std::io::stdin())?;
    let answers: Vec<Vec<Answer>> = std::thread::scope(|scope| {
        let threads: Vec<_> = series
            .iter()
            .map(|calls| scope.spawn(move || make(socket, calls)))
            .collect();
        let ended = threads.into_iter().map(|thread| thread.join());
        ended.map(std::result::Result::unwrap_or_default).collect()
    });
    serde_json::to_writer(std::io::stdout(), &answers)?;
    Ok(ExitCode::SUCCESS)
}

fn make(socket: &str, calls: &[Call]) -> Vec<Answer> {
    let mut connection = Connection::new(socket);
    calls
        .iter()
        .flat_map(|call| (0..call.times).map(move |n| (call, n)))
        .map(|(call, n)| connection.make_nth(call, n))
        .collect()
}

/// Calls one after another, from a process on the node itself; the connection is kept.
#[derive(Debug)]
pub struct Connection {
    socket: String,
    stream: Option<BufReader<UnixStream>>,
}

impl Connection {
    pub fn new(socket: &str) -> Self {
        Self {
            socket: socket.to_owned(),
            stream: None,
        }
    }

    /// Makes a call once.
    pub fn make(&mut self, call: &Call) -> Answer {
        self.make_nth(call, 0)
    }

    fn make_nth(&mut self, call: &Call, n: usize) -> Answer {
        let body = call.body.replace("{n}", &n.to_string());
        let start = Instant::now();
        let answered = ask(&mut self.stream, &self.socket, &call.path, &body);
        let took = start.elapsed();
        let (status, body) = answered.unwrap_or_else(|error| {
            self.stream = None;
            (0, json!(format!("{error:#}")))
        });
        Answer {
            call: format!("{} {}", call.path, call.body),
            status,
            body,
            took,
        }
    }
}

/// As Docker's client does: HTTP/1.1 with an empty Host, on a connection that is kept.
fn ask(
    connection: &mut Option<BufReader<UnixStream>>,
    socket: &str,
    path: &str,
    body: &str,
) -> Result<(u16, Value)> {
    let stream = match connection {
        Some(stream) => stream,
        None => {
            let stream = UnixStream::connect(socket)?;
            stream.set_read_timeout(Some(CALL_LIMIT))?;
            connection.insert(BufReader::new(stream))
        }
    };
    let request = format!(
        "POST {path} HTTP/1.1\r\nHost: \r\nContent-Length: {}\r\n\r\n{body}",
        body.len()
    );
    stream.get_mut().write_all(request.as_bytes())?;
    let mut line = String::new();
    stream.read_line(&mut line)?;
    let status = line
        .split(' ')
        .nth(1)
        .context("closed without an answer")?
        .parse()?;
    let mut length = 0;
    loop {
        line.clear();
        stream.read_line(&mut line)?;
        let Some((name, value)) = line.trim_end().split_once(':') else {
            break;
        };
        if name.eq_ignore_ascii_case("content-length") {
            length = value.trim().parse()?;
        }
    }
    let mut body = vec![0; length];
    stream.read_exact(&mut body)?;
    Ok((status, serde_json::from_slice(&body)?))
}
