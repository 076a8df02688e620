//! A process on a node that goes on, and its log.

use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;
use std::sync::atomic::Ordering;
use std::time::Duration;

use anyhow::{Context, anyhow};

use super::Node;
use crate::process::Task;
use crate::{Lab, PATIENCE, Result, wait_for};

/// A daemon on a node. Dropping it leaves it running: the lab's end is its end.
#[derive(Debug)]
pub struct Process<'a> {
    node: &'a Node,
    name: String,
    task: Task,
    log: PathBuf,
    /// Its process id, in which boot of the node.
    pid: Mutex<Option<(u32, u32)>>,
}

impl<'a> Process<'a> {
    /// A daemon that is not started yet.
    pub fn new(node: &'a Node, name: &str, task: Task) -> Result<Self> {
        let log = node.dir.join(format!("logs/{name}.log"));
        Lab::get()?.watch_log(&format!("{} {name}", node.name), &log);
        let task = Task {
            log: Some(log.clone()),
            ..task
        };
        Ok(Self {
            node,
            name: name.to_owned(),
            task,
            log,
            pid: Mutex::default(),
        })
    }

    pub(crate) fn node(&self) -> &'a Node {
        self.node
    }

    /// Starts it, again if it has ended.
    pub fn start(&self) -> Result {
        let pid = self.node.ask(&self.task)?.ok()?.parse()?;
        let boot = self.node.boots.load(Ordering::Relaxed);
        *self.pid.lock().map_err(|_| anyhow!("a trial panicked"))? = Some((pid, boot));
        Ok(())
    }

    /// Its process id on the node; an error if it was not started since the node booted.
    pub fn pid(&self) -> Result<u32> {
        let pid = *self.pid.lock().map_err(|_| anyhow!("a trial panicked"))?;
        pid.filter(|&(_, boot)| boot == self.node.boots.load(Ordering::Relaxed))
            .map(|(pid, _)| pid)
            .with_context(|| format!("{} was not started on {}", self.name, self.node.name))
    }

    /// Sends a signal by name: `TERM`, `STOP`, `CONT`, `KILL`. Behind a `STOP` all its threads stand.
    pub fn signal(&self, signal: &str) -> Result {
        let pid = self.pid()?;
        self.node.ok(&["kill", "-s", signal, &pid.to_string()])?;
        if signal != "STOP" {
            return Ok(());
        }
        // Each thread takes it when it next leaves the kernel.
        let moving = format!("grep -h ^State: /proc/{pid}/task/*/status | grep -v stopped");
        let what = format!("{} on {} to stand", self.name, self.node.name);
        wait_for(&what, PATIENCE, || {
            let argv = ["sh", "-c", moving.as_str()];
            self.node.run(&argv).is_ok_and(|out| out.code == 1)
        })
    }

    /// Whether it runs; not if it was started before the node's last boot.
    pub fn is_running(&self) -> Result<bool> {
        let Ok(pid) = self.pid() else {
            return Ok(false);
        };
        Ok(self.node.run(&["kill", "-s", "0", &pid.to_string()])?.code == 0)
    }

    /// Waits until it has ended.
    pub fn wait(&self, limit: Duration) -> Result {
        let what = format!("{} on {} to end", self.name, self.node.name);
        wait_for(&what, limit, || {
            self.is_running().is_ok_and(|running| !running)
        })
    }

    /// SIGKILL, and waits for the end.
    pub fn kill(&self) -> Result {
        self.signal("KILL")?;
        self.wait(PATIENCE)
    }

    /// SIGTERM, and waits for the end.
    pub fn stop(&self) -> Result {
        self.signal("TERM")?;
        self.wait(PATIENCE)
    }

    /// What it has written so far.
    pub fn log(&self) -> String {
        String::from_utf8_lossy(&fs::read(&self.log).unwrap_or_default()).into_owned()
    }

    /// Waits until its log holds `text`.
    pub fn wait_log(&self, text: &str, limit: Duration) -> Result {
        let what = format!("`{text}` in the log of {} on {}", self.name, self.node.name);
        wait_for(&what, limit, || self.log().contains(text))
    }
}
