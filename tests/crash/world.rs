//! A share of its own for a trial, with two hosts: one that crashes, and one that looks on.

use std::collections::HashMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering};

use anyhow::{Context, anyhow, bail};
use lab::ganesha::LONG_LEASE;
use lab::process::Task;
use lab::{
    Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Process, Result, Shared, calls, wait_for,
};
use serde_json::Value;

use crate::share::Disk;

const EXPORT: &str = "/srv/crash";

static NAS: Shared<Ganesha> = Shared::new();

/// Which data path the crashing host has.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub(crate) enum Path {
    /// A namespaced machine, whose kernel need not have an NFS client.
    Fuse,
    /// A guest with the kernel's client.
    Kernel,
}

/// Nodes that no trial uses now.
static FREE: Mutex<Vec<(Path, &Node)>> = Mutex::new(Vec::new());

fn take(lab: &'static Lab, path: Path) -> Result<&'static Node> {
    static NEXT: AtomicU32 = AtomicU32::new(0);
    let mut free = FREE.lock().map_err(|_| anyhow!("a trial panicked"))?;
    if let Some(at) = free.iter().position(|(kind, _)| *kind == path) {
        return Ok(free.swap_remove(at).1);
    }
    drop(free);
    let name = format!("host{}", NEXT.fetch_add(1, Ordering::Relaxed));
    let node = match path {
        Path::Fuse => Node::machine(lab, &name)?,
        Path::Kernel => Node::guest(lab, &name)?,
    };
    Ok(Box::leak(Box::new(node)))
}

/// One host of a trial: a node, and where its daemon keeps its state.
pub(crate) struct Host {
    node: &'static Node,
    path: Path,
    state: String,
    /// `--share S`, or nothing.
    home: Vec<String>,
}

impl Host {
    fn args(&self) -> Vec<&str> {
        let path = match self.path {
            Path::Fuse => "fuse",
            Path::Kernel => "kernel",
        };
        let mut args = vec!["--state-dir", &self.state, "--data-path", path];
        args.extend(["--poll", "300ms"]);
        args.extend(self.home.iter().map(String::as_str));
        args
    }

    /// Starts the daemon with these fail points and waits for its socket.
    pub(crate) fn start(&self, points: &str) -> Result<Nfsvol<'static>> {
        Nfsvol::start(self.node, &self.args(), &[("FAILPOINTS", points)])
    }

    /// Starts the daemon with fail points that its start passes, and waits for its end.
    pub(crate) fn dies_at_start(&self, points: &str) -> Result {
        let mut argv = vec![Nfsvol::binary(), "serve"];
        argv.extend(self.args());
        let env = HashMap::from([("FAILPOINTS".to_owned(), points.to_owned())]);
        let task = Task {
            env,
            ..Task::new(&argv)
        };
        let process = Process::new(self.node, "nfsvol", task)?;
        process.start()?;
        process.wait(PATIENCE)
    }

    pub(crate) fn state(&self) -> &str {
        &self.state
    }

    pub(crate) fn node(&self) -> &'static Node {
        self.node
    }

    pub(crate) fn call(&self, call: Call) -> Result<calls::Answer> {
        calls::one(self.node, call)
    }

    pub(crate) fn ok(&self, call: Call) -> Result<Value> {
        self.call(call)?
            .ok()
            .with_context(|| self.node.name().to_owned())
    }

    /// Whether the volume exists, by Get: an answer that tells neither is an error.
    pub(crate) fn knows(&self, volume: &str) -> Result<bool> {
        let answer = self.call(Call::get(volume))?;
        match answer.status {
            200 => Ok(answer.body["Volume"]["Name"] == volume),
            500 if answer.to_string().contains("no such volume") => Ok(false),
            _ => bail!("{answer}"),
        }
    }

    /// Mounts a volume and answers where.
    pub(crate) fn mount(&self, volume: &str, id: &str) -> Result<String> {
        let answer = self.ok(Call::mount(volume, id))?;
        Ok(answer["Mountpoint"]
            .as_str()
            .context("no mount point")?
            .to_owned())
    }

    /// The mounts below the state directory, of volumes and shares.
    pub(crate) fn mounts(&self) -> Result<String> {
        self.node.sh(&format!(
            "grep ' {}/' /proc/self/mountinfo || true",
            self.state
        ))
    }

    pub(crate) fn is_mounted(&self, volume: &str) -> Result<bool> {
        Ok(self.mounts()?.contains(&format!("/mnt/volumes/{volume} ")))
    }

    /// How many attachments of a volume are written down.
    pub(crate) fn attachments(&self, volume: &str) -> Result<usize> {
        let file = format!("{}/attachments/{volume}.json", self.state);
        let script = format!("cat {file} 2>/dev/null || echo '{{}}'");
        let file: Value = serde_json::from_str(&self.node.sh(&script)?)?;
        Ok(file["attachments"].as_array().map_or(0, Vec::len))
    }

    /// Waits until the copy of the catalog follows the share, so that the next start of the
    /// daemon has nothing to write.
    fn settle(&self) -> Result {
        wait_for("the copy to follow the share", PATIENCE, || {
            let script = format!(
                "grep -q true {0}/home.json && ! grep -L stamp {0}/catalog/*.json 2>&1 | grep -q .",
                self.state
            );
            self.node
                .run(&["sh", "-c", &script])
                .is_ok_and(|output| output.code == 0)
        })
    }

    /// Ends the daemon and looks for what it may have left behind; no volume is attached.
    fn check_nothing_left(&self, nfsvol: &Nfsvol) -> Result {
        nfsvol.process().stop()?;
        let left = || {
            self.node.sh(&format!(
                "grep ' {0}/' /proc/self/mountinfo || true
                 ps ax -o args | grep -E '^[^ ]*/nfsvol ' || true
                 find {0} -name '*.tmp' -o -name '*.sock' -o -path '*/attachments/*'
                 find {0}/mnt/volumes -mindepth 1",
                self.state
            ))
        };
        wait_for("everything to be gone", PATIENCE, || {
            left().is_ok_and(|left| left.is_empty())
        })
        .with_context(|| format!("{}: {}", self.node.name(), left().unwrap_or_default()))
    }
}

/// A share with its two hosts.
pub(crate) struct World {
    pub(crate) a: Host,
    pub(crate) b: Host,
    pub(crate) disk: Disk,
    pub(crate) share: String,
    with_home: bool,
}

impl World {
    /// `path` is the crashing host's; without a home each volume has to name the share.
    pub(crate) fn new(lab: &'static Lab, name: &str, path: Path, with_home: bool) -> Result<Self> {
        let nas = NAS.get(|| {
            let exports = [Export::new(EXPORT).uncached()];
            Ganesha::start_leasing(lab, "nas", &exports, LONG_LEASE)
        })?;
        let dir = format!("{EXPORT}/{name}");
        let local = nas.local(&dir);
        std::fs::create_dir(&local)?;
        let share = nas.share(&dir);
        let host = |path, home: bool| -> Result<Host> {
            Ok(Host {
                node: take(lab, path)?,
                path,
                state: format!("/var/lib/nfsvol/{name}"),
                home: if home {
                    vec!["--share".to_owned(), share.clone()]
                } else {
                    Vec::new()
                },
            })
        };
        Ok(Self {
            a: host(path, with_home)?,
            b: host(Path::Fuse, true)?,
            disk: Disk(local),
            share,
            with_home,
        })
    }

    /// Waits until nothing is left to write on host a, and kills its daemon.
    pub(crate) fn settle(&self, nfsvol: &Nfsvol) -> Result {
        if self.with_home && self.disk.own("volumes").exists() {
            self.a.settle()?;
        }
        nfsvol.kill()
    }

    /// Waits until both hosts say the same of a volume, and answers whether it exists.
    pub(crate) fn agree(&self, volume: &str) -> Result<bool> {
        let mut said = (None, None);
        wait_for("both hosts to agree", PATIENCE, || {
            said = (self.a.knows(volume).ok(), self.b.knows(volume).ok());
            said.0.is_some() && said.0 == said.1
        })
        .with_context(|| format!("{volume}: {said:?}"))?;
        said.0.context("nobody knows")
    }

    /// Sweeps, ends both daemons, finds nothing left of them, and frees the nodes.
    pub(crate) fn end(self, a: Nfsvol, b: Nfsvol) -> Result {
        self.disk.check_at_rest()?;
        self.disk.age_leftovers()?;
        a.kill()?;
        // A start sweeps the home share; that is a's, or b's where a has none.
        b.kill()?;
        let (a, b) = (self.a.start("")?, self.b.start("")?);
        wait_for("tmp/ to be swept", PATIENCE, || {
            self.disk.leftovers().is_empty()
        })
        .with_context(|| format!("{:?}", self.disk.leftovers()))?;
        self.a.check_nothing_left(&a)?;
        self.b.check_nothing_left(&b)?;
        let mut free = FREE.lock().map_err(|_| anyhow!("a trial panicked"))?;
        free.extend([&self.a, &self.b].map(|host| (host.path, host.node)));
        Ok(())
    }
}
