//! nfs-ganesha on a machine of the lab: NFSv3, v4.0 and v4.1 from user space.
//!
//! A v4 client finds an export at the same path as a v3 client.

use std::fmt::Write as _;
use std::fs;
use std::path::PathBuf;
use std::sync::Mutex;

use anyhow::{Context, anyhow};

use super::node::{Node, Process};
use super::process::Task;
use super::{Lab, PATIENCE, Result, wait_for};

pub(crate) const GANESHA: &str = "/usr/bin/ganesha.nfsd";
pub(crate) const RPCBIND: &str = "/usr/sbin/rpcbind";
pub const NFS_PORT: u16 = 2049;
pub const MOUNT_PORT: u16 = 20048;
/// Succeeds when the port mapper knows both services of NFSv3, as it does a moment after they listen, and
/// they answer.
const KNOWN: &str = "for service in 100003 100005; do rpcinfo -T tcp 127.0.0.1 $service 3; done";
/// Seconds of a v4 client's lease, and of the grace after a restart: short, as restarts wait for
/// it.
const LEASE: u32 = 5;
/// Ganesha's default. Guests on a busy machine were seen to get EIO on v4.1, which a missed short
/// lease would explain; that it does is not shown.
pub const LONG_LEASE: u32 = 60;

/// An exported directory.
#[derive(Clone, Debug)]
pub struct Export {
    /// Where clients mount it: `/srv/…` on the server.
    pub path: String,
    /// `no_root_squash`, `root_squash`, `all_squash`.
    pub squash: &'static str,
    pub read_only: bool,
    /// The id of the export and of its file system, by default its place in the list. Both go
    /// into file handles, so another one makes old handles stale.
    pub fsid: u32,
    /// Whether the server may take what it remembers of a file for what the disk holds.
    pub cached: bool,
}

impl Export {
    /// A writable export without squashing.
    pub fn new(path: &str) -> Self {
        Self {
            path: path.to_owned(),
            squash: "no_root_squash",
            read_only: false,
            fsid: 0,
            cached: true,
        }
    }

    /// For trials that change files on the server's disk.
    pub fn uncached(self) -> Self {
        Self {
            cached: false,
            ..self
        }
    }

    pub fn squash(self, squash: &'static str) -> Self {
        Self { squash, ..self }
    }

    pub fn read_only(self) -> Self {
        Self {
            read_only: true,
            ..self
        }
    }
}

/// The server; its exports are directories of its node.
#[derive(Debug)]
pub struct Ganesha {
    node: &'static Node,
    process: Process<'static>,
    exports: Mutex<Vec<Export>>,
    /// `3,4` or fewer.
    protocols: &'static str,
    lease: u32,
}

impl Ganesha {
    /// Boots a machine named `name` and serves these exports from it.
    pub fn start(lab: &'static Lab, name: &str, exports: &[Export]) -> Result<Self> {
        Self::start_with(lab, name, exports, "3,4", LEASE)
    }

    /// As [`Self::start`] with another lease, in seconds.
    pub fn start_leasing(
        lab: &'static Lab,
        name: &str,
        exports: &[Export],
        lease: u32,
    ) -> Result<Self> {
        Self::start_with(lab, name, exports, "3,4", lease)
    }

    /// As [`Self::start`] with other protocols than `3,4`.
    pub fn start_speaking(
        lab: &'static Lab,
        name: &str,
        exports: &[Export],
        protocols: &'static str,
    ) -> Result<Self> {
        Self::start_with(lab, name, exports, protocols, LEASE)
    }

    fn start_with(
        lab: &'static Lab,
        name: &str,
        exports: &[Export],
        protocols: &'static str,
        lease: u32,
    ) -> Result<Self> {
        // The process keeps a reference to its node, and servers live as long as the lab.
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
        let rpcbind = node.spawn("rpcbind", &[RPCBIND, "-f", "-w"])?;
        wait_for("rpcbind", PATIENCE, || {
            node.run(&["test", "-S", "/run/rpcbind.sock"])
                .is_ok_and(|output| output.code == 0)
        })
        .with_context(|| rpcbind.log())?;
        let config = node.dir().join("ganesha.conf");
        let config = config.to_str().context("the lab's path is not UTF-8")?;
        let log = node.dir().join("logs/ganesha.log");
        lab.watch_log(&format!("{name} ganesha"), &log);
        let log = log.to_str().context("the lab's path is not UTF-8")?;
        let argv = [
            GANESHA,
            "-F",
            "-f",
            config,
            "-L",
            log,
            "-p",
            "/run/ganesha.pid",
            "-N",
            "NIV_EVENT",
        ];
        let process = Process::new(node, "ganesha.out", Task::new(&argv))?;
        let exports = Mutex::new(exports.to_vec());
        let server = Self {
            node,
            process,
            exports,
            protocols,
            lease,
        };
        server.up()?;
        Ok(server)
    }

    pub fn node(&self) -> &'static Node {
        self.node
    }

    pub fn ip(&self) -> String {
        self.node.ip()
    }

    /// `IP:/path` of an export, or of a directory below it.
    pub fn share(&self, path: &str) -> String {
        format!("{}:{path}", self.ip())
    }

    /// Where the test process finds a path of the server.
    pub fn local(&self, path: &str) -> PathBuf {
        self.node
            .dir()
            .join("disk")
            .join(path.trim_start_matches('/'))
    }

    /// Starts the server with the exports it has now and waits until it answers.
    pub fn up(&self) -> Result {
        let exports = self
            .exports
            .lock()
            .map_err(|_| anyhow!("a trial panicked"))?
            .clone();
        let mut text = format!(
            "NFS_CORE_PARAM {{ Protocols = {}; NFS_Port = {NFS_PORT}; MNT_Port = {MOUNT_PORT}; \
             Enable_NLM = false; Enable_RQUOTA = false; }}\n\
             NFSV4 {{ Grace_Period = {LEASE}; Lease_Lifetime = {}; }}\n",
            self.protocols, self.lease
        );
        let mut script = "mkdir -p /run/ganesha /var/lib/nfs/ganesha".to_owned();
        for (id, export) in (1..).zip(&exports) {
            write!(script, " {}", export.path)?;
            let access = if export.read_only { "RO" } else { "RW" };
            let cache = if export.cached {
                ""
            } else {
                "Attr_Expiration_Time = 0; "
            };
            let fsid = if export.fsid == 0 { id } else { export.fsid };
            writeln!(
                text,
                "EXPORT {{ Export_Id = {fsid}; Filesystem_id = {fsid}.{fsid}; Path = {path}; \
                 Pseudo = {path}; Access_Type = {access}; Squash = {squash}; \
                 Protocols = {protocols}; Transports = TCP; SecType = sys; {cache}\
                 FSAL {{ Name = VFS; }} }}",
                path = export.path,
                squash = export.squash,
                protocols = self.protocols,
            )?;
        }
        self.node.sh(&script)?;
        fs::write(self.node.dir().join("ganesha.conf"), text)?;
        self.process.start()?;
        let port = (self.ip(), NFS_PORT);
        wait_for("ganesha to answer", PATIENCE, || {
            std::net::TcpStream::connect(&port).is_ok()
                && (!self.protocols.contains('3') || self.node.sh(KNOWN).is_ok())
        })
    }

    /// SIGTERM, as an administrator stops it.
    pub fn stop(&self) -> Result {
        self.process.stop()
    }

    /// SIGKILL, as when the server's computer fails.
    pub fn kill(&self) -> Result {
        self.process.kill()
    }

    /// SIGSTOP: connections stay open and nothing answers.
    pub fn freeze(&self) -> Result {
        self.process.signal("STOP")
    }

    /// SIGCONT.
    pub fn thaw(&self) -> Result {
        self.process.signal("CONT")
    }

    /// SIGKILL and start, with other exports when given.
    pub fn restart(&self, exports: Option<&[Export]>) -> Result {
        if self.process.is_running()? {
            self.kill()?;
        }
        if let Some(exports) = exports {
            *self
                .exports
                .lock()
                .map_err(|_| anyhow!("a trial panicked"))? = exports.to_vec();
        }
        self.up()
    }
}
