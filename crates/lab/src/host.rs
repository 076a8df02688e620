//! A Docker host of the lab as its user sees it: an engine with nfsvol beside it, on either data
//! path, driven by the docker command line.

use anyhow::Context;
use serde_json::Value;

use super::docker::{Engine, IMAGE, Nfsvol};
use super::node::{Linux, Node};
use super::process::Output;
use super::{Lab, Result};

/// How a host's volumes travel, and with that what kind of node it is.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum DataPath {
    /// A namespaced machine with /dev/fuse.
    Fuse,
    /// A guest with the kernel's NFS client.
    Kernel,
}

/// A node with its engine and its nfsvol.
#[derive(Debug)]
pub struct Host {
    engine: Engine,
    nfsvol: Nfsvol<'static>,
}

impl Host {
    /// Boots a node, starts nfsvol with this home share on it, and then the engine.
    pub fn start(lab: &'static Lab, name: &str, data_path: DataPath, share: &str) -> Result<Self> {
        Self::start_with(lab, name, data_path, share, &[], &[])
    }

    /// As [`Self::start`] with further arguments for `nfsvol serve` and for dockerd.
    pub fn start_with(
        lab: &'static Lab,
        name: &str,
        data_path: DataPath,
        share: &str,
        serve: &[&str],
        dockerd: &[&str],
    ) -> Result<Self> {
        let (node, word) = match data_path {
            DataPath::Fuse => (Node::machine(lab, name)?, "fuse"),
            DataPath::Kernel => (Node::guest(lab, name)?, "kernel"),
        };
        Self::on(lab, node, word, share, serve, dockerd)
    }

    /// As [`Self::start`] on the kernel data path of [`Linux::newest`], which takes less of the machine.
    pub fn start_newer(lab: &'static Lab, name: &str, share: &str) -> Result<Self> {
        let node = Node::guest_of(lab, name, Linux::newest())?;
        Self::on(lab, node, "kernel", share, &[], &[])
    }

    fn on(
        lab: &'static Lab,
        node: Node,
        word: &str,
        share: &str,
        serve: &[&str],
        dockerd: &[&str],
    ) -> Result<Self> {
        // Its processes keep references to it, and hosts live as long as the lab.
        let node: &'static Node = Box::leak(Box::new(node));
        let mut args = vec!["--share", share, "--data-path", word];
        args.extend(serve);
        let nfsvol = Nfsvol::start(node, &args, &[])?;
        let engine = Engine::start_with(lab, node, dockerd)?;
        Ok(Self { engine, nfsvol })
    }

    pub fn node(&self) -> &'static Node {
        self.engine.node()
    }

    pub fn engine(&self) -> &Engine {
        &self.engine
    }

    pub fn nfsvol(&self) -> &Nfsvol<'static> {
        &self.nfsvol
    }

    /// Switches the node on again, after its power was cut.
    pub fn boot(&self) -> Result {
        self.node().boot()?;
        self.nfsvol.up()?;
        self.engine.restart()
    }

    /// `docker LINE`, split at white space.
    pub fn docker(&self, line: &str) -> Result<Output> {
        self.engine
            .docker(&line.split_whitespace().collect::<Vec<_>>())
    }

    /// `docker LINE` that must succeed; its standard output.
    pub fn ok(&self, line: &str) -> Result<String> {
        self.docker(line)?.ok()
    }

    /// `docker LINE` that must fail; its standard error.
    pub fn fails(&self, line: &str) -> Result<String> {
        self.docker(line)?.fails()
    }

    /// `docker run OPTIONS busybox sh -euc SCRIPT`.
    pub fn try_run(&self, options: &str, script: &str) -> Result<Output> {
        let mut args = vec!["run", "--network=host", "--volume-driver=nfsvol"];
        args.extend(options.split_whitespace());
        args.extend([IMAGE, "sh", "-euc", script]);
        self.engine.docker(&args)
    }

    /// Runs a script in a container that is removed at its end; its output.
    pub fn run(&self, options: &str, script: &str) -> Result<String> {
        self.try_run(&format!("--rm {options}"), script)?.ok()
    }

    /// Starts a container with this name that runs until it is removed.
    pub fn keep(&self, name: &str, options: &str) -> Result {
        self.try_run(&format!("-d --name={name} {options}"), "exec sleep 3600")?
            .ok()?;
        Ok(())
    }

    /// `docker volume inspect`, or None when there is no such volume.
    pub fn volume(&self, name: &str) -> Result<Option<Value>> {
        let output = self.docker(&format!("volume inspect {name}"))?;
        if output.code != 0 && output.stderr.contains("No such volume") {
            return Ok(None);
        }
        first(&output.ok()?).map(Some)
    }

    /// `docker volume inspect` of a volume that must be there.
    pub fn inspect(&self, name: &str) -> Result<Value> {
        self.volume(name)?
            .with_context(|| format!("no volume {name} on {}", self.node().name()))
    }

    /// `docker inspect -f '{{json .Mounts}}'`.
    pub fn mounts(&self, container: &str) -> Result<Value> {
        let args = ["inspect", "-f", "{{json .Mounts}}", container];
        Ok(serde_json::from_str(&self.engine.ok(&args)?)?)
    }

    /// Whether `docker volume ls` shows it as one of nfsvol's.
    pub fn lists(&self, name: &str) -> Result<bool> {
        let listed = self.ok("volume ls --quiet --filter driver=nfsvol")?;
        Ok(listed.lines().any(|line| line == name))
    }
}

/// The one element of what an inspect answers.
fn first(text: &str) -> Result<Value> {
    let mut values: Vec<Value> = serde_json::from_str(text)?;
    values.pop().with_context(|| format!("empty: {text}"))
}
