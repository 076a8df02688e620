//! Commands and their output, and the two helper roles of the test binary: the init of a PID
//! namespace, and the agent that runs commands on a node of the lab.

use std::collections::HashMap;
use std::fs::File;
use std::io::{BufRead, BufReader, Read, Write};
use std::net::TcpListener;
use std::os::unix::net::UnixListener;
use std::os::unix::process::{CommandExt, ExitStatusExt};
use std::path::PathBuf;
use std::process::{Command, ExitCode, Stdio};
use std::sync::mpsc;
use std::thread;
use std::time::{Duration, Instant};

use anyhow::{Context, anyhow, bail};
use rustix::process::{Pid, Signal, WaitOptions};
use serde::{Deserialize, Serialize};

use super::{PATIENCE, Result};

/// What a command answered.
#[derive(Clone, Debug)]
pub struct Output {
    /// The command line, for messages.
    pub command: String,
    /// Exit code; 128 + the signal's number when one ended it.
    pub code: i32,
    pub stdout: String,
    pub stderr: String,
    pub took: Duration,
}

impl Output {
    /// The standard output without white space at its end, if the command succeeded.
    pub fn ok(self) -> Result<String> {
        if self.code != 0 {
            bail!("{self}");
        }
        Ok(self.stdout.trim_end().to_owned())
    }

    /// The standard error, if the command failed.
    pub fn fails(self) -> Result<String> {
        if self.code == 0 {
            bail!("should have failed: {self}");
        }
        Ok(self.stderr.trim_end().to_owned())
    }
}

impl std::fmt::Display for Output {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        write!(
            f,
            "`{}` answered {} after {:?}",
            self.command, self.code, self.took
        )?;
        for (name, text) in [("out", &self.stdout), ("err", &self.stderr)] {
            if !text.trim().is_empty() {
                write!(f, "\n{name}: {}", text.trim_end())?;
            }
        }
        Ok(())
    }
}

/// A command for an agent, or for this process's own namespaces.
#[derive(Clone, Debug, Default, Serialize, Deserialize)]
pub struct Task {
    pub argv: Vec<String>,
    pub env: HashMap<String, String>,
    pub stdin: String,
    /// The command and all of its process group are killed after this long, [`PATIENCE`] without one.
    pub limit: Option<Duration>,
    /// Start it in the background with its output appended to this file; answer its pid.
    pub log: Option<PathBuf>,
}

impl Task {
    pub fn new(argv: &[&str]) -> Self {
        Self {
            argv: argv.iter().map(|&arg| arg.to_owned()).collect(),
            ..Self::default()
        }
    }

    fn command(&self) -> Result<Command> {
        let (program, args) = self.argv.split_first().context("an empty command line")?;
        let mut command = Command::new(program);
        command.args(args).envs(&self.env).process_group(0);
        Ok(command)
    }

    /// Runs the command to its end in this process's namespaces.
    pub fn run(&self) -> Result<Output> {
        let shown = self.argv.join(" ");
        let start = Instant::now();
        let mut child = self
            .command()?
            .stdin(Stdio::piped())
            .stdout(Stdio::piped())
            .stderr(Stdio::piped())
            .spawn()
            .with_context(|| format!("starting `{shown}`"))?;
        let group = pid(child.id())?;
        if let Some(mut stdin) = child.stdin.take() {
            let input = self.stdin.clone();
            // A command may end without reading its input.
            thread::spawn(move || stdin.write_all(input.as_bytes()));
        }
        let stdout = collect(child.stdout.take());
        let stderr = collect(child.stderr.take());
        let limit = self.limit.unwrap_or(PATIENCE);
        let status = loop {
            if let Some(status) = child.try_wait()? {
                break status;
            }
            if start.elapsed() > limit {
                // It may have ended in this instant.
                let _ = rustix::process::kill_process_group(group, Signal::KILL);
                bail!("`{shown}` did not end within {limit:?}");
            }
            thread::sleep(Duration::from_millis(2));
        };
        // A child that the command left behind may hold its output open.
        let grace = Duration::from_millis(500);
        Ok(Output {
            command: shown,
            code: status
                .code()
                .or_else(|| status.signal().map(|n| 128 + n))
                .unwrap_or(-1),
            stdout: stdout.recv_timeout(grace).unwrap_or_default(),
            stderr: stderr.recv_timeout(grace).unwrap_or_default(),
            took: start.elapsed(),
        })
    }

    /// Starts the command in the background and answers its pid; a thread reaps it.
    pub(crate) fn start(&self) -> Result<u32> {
        let log = self
            .log
            .as_ref()
            .context("a background command needs a log")?;
        let log = File::options()
            .create(true)
            .append(true)
            .open(log)
            .with_context(|| format!("opening {}", log.display()))?;
        let mut child = self
            .command()?
            .stdin(Stdio::null())
            .stdout(log.try_clone()?)
            .stderr(log)
            .spawn()
            .with_context(|| format!("starting `{}`", self.argv.join(" ")))?;
        let pid = child.id();
        thread::spawn(move || child.wait());
        Ok(pid)
    }
}

/// Reads a pipe to its end in the background.
fn collect(pipe: Option<impl Read + Send + 'static>) -> mpsc::Receiver<String> {
    let (sender, receiver) = mpsc::channel();
    thread::spawn(move || {
        let mut bytes = Vec::new();
        if let Some(mut pipe) = pipe {
            // What was read until an error is what there is to show.
            let _ = pipe.read_to_end(&mut bytes);
        }
        sender.send(String::from_utf8_lossy(&bytes).into_owned())
    });
    receiver
}

pub fn pid(id: u32) -> Result<Pid> {
    i32::try_from(id)
        .ok()
        .and_then(Pid::from_raw)
        .with_context(|| format!("no pid: {id}"))
}

/// Runs a command in this process's namespaces.
pub fn run(argv: &[&str]) -> Result<Output> {
    Task::new(argv).run()
}

/// Runs a shell script in this process's namespaces.
pub fn sh(script: &str) -> Result<Output> {
    run(&["sh", "-euc", script])
}

/// `lab-init COMMAND…`: the first process of a PID namespace or of a guest. Starts the command,
/// reaps every orphan, and ends with the command's exit code.
pub(crate) fn init(argv: &[String]) -> Result<ExitCode> {
    let (program, args) = argv.split_first().context("lab-init needs a command")?;
    let child = Command::new(program).args(args).spawn()?;
    let child = pid(child.id())?;
    loop {
        match rustix::process::wait(WaitOptions::empty()) {
            Ok(Some((pid, status))) if pid == child => {
                let code = status
                    .exit_status()
                    .or_else(|| status.terminating_signal().map(|signal| 128 + signal));
                let code = code.and_then(|code| u8::try_from(code).ok()).unwrap_or(1);
                return Ok(ExitCode::from(code));
            }
            Ok(_) | Err(rustix::io::Errno::INTR) => {}
            Err(errno) => return Err(errno).context("waiting for children"),
        }
    }
}

#[derive(Serialize, Deserialize)]
struct Reply {
    error: Option<String>,
    code: i32,
    stdout: String,
    stderr: String,
    took: Duration,
}

/// `lab-agent unix:PATH|HOST:PORT`: runs the commands that come in, one on each connection.
pub(crate) fn agent(args: &[String]) -> Result<ExitCode> {
    let address = args.first().context("lab-agent needs an address")?;
    if let Some(path) = address.strip_prefix("unix:") {
        for stream in UnixListener::bind(path)?.incoming() {
            let stream = stream?;
            thread::spawn(move || serve(stream.try_clone()?, stream));
        }
    } else {
        for stream in TcpListener::bind(address)?.incoming() {
            let stream = stream?;
            thread::spawn(move || serve(stream.try_clone()?, stream));
        }
    }
    Ok(ExitCode::SUCCESS)
}

fn serve(input: impl Read, mut output: impl Write) -> Result {
    let mut line = String::new();
    BufReader::new(input).read_line(&mut line)?;
    let task: Task = serde_json::from_str(&line)?;
    let outcome = if task.log.is_some() {
        task.start().map(|pid| Output {
            command: String::new(),
            code: 0,
            stdout: pid.to_string(),
            stderr: String::new(),
            took: Duration::ZERO,
        })
    } else {
        task.run()
    };
    let reply = match outcome {
        Ok(Output {
            code,
            stdout,
            stderr,
            took,
            ..
        }) => Reply {
            error: None,
            code,
            stdout,
            stderr,
            took,
        },
        Err(error) => Reply {
            error: Some(format!("{error:#}")),
            code: -1,
            stdout: String::new(),
            stderr: String::new(),
            took: Duration::ZERO,
        },
    };
    serde_json::to_writer(&mut output, &reply)?;
    output.write_all(b"\n")?;
    Ok(output.flush()?)
}

/// Sends a task over a connection to an agent and waits for its answer.
pub(crate) fn ask(mut stream: impl Read + Write, task: &Task) -> Result<Output> {
    serde_json::to_writer(&mut stream, task)?;
    stream.write_all(b"\n")?;
    stream.flush()?;
    let mut line = String::new();
    BufReader::new(stream)
        .read_line(&mut line)
        .with_context(|| format!("waiting for `{}`", task.argv.join(" ")))?;
    let reply: Reply = serde_json::from_str(&line)
        .with_context(|| format!("the agent went away during `{}`", task.argv.join(" ")))?;
    if let Some(error) = reply.error {
        return Err(anyhow!(error));
    }
    Ok(Output {
        command: task.argv.join(" "),
        code: reply.code,
        stdout: reply.stdout,
        stderr: reply.stderr,
        took: reply.took,
    })
}
