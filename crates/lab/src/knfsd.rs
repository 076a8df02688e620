//! The Linux kernel's NFS server (v3, v4.0, v4.1, v4.2) in a guest, on an XFS image with
//! reflinks.

use anyhow::Context;

use super::node::Node;
use super::{Lab, PATIENCE, Result, process, wait_for};

pub(crate) const EXPORTFS: &str = "/usr/sbin/exportfs";
pub(crate) const MKFS_XFS: &str = "/usr/sbin/mkfs.xfs";
/// What clients mount, with every version.
pub const EXPORT: &str = "/export";
/// Where it is on the server. Its parent is the root that a v4 client sees, as the guest's own
/// root file system cannot be exported.
const ROOT: &str = "/srv";

/// Seconds; after a restart, clients of v4 may open files after this long. The kernel wants 10.
const LEASE: u32 = 10;

/// The server; `no_root_squash`, writable, at [`EXPORT`] or what it was told to export.
#[derive(Debug)]
pub struct Knfsd {
    node: Node,
    /// Below the image, with further options of each.
    exports: Vec<(String, String)>,
}

impl Knfsd {
    /// Boots a guest named `name` that serves an XFS image of this size (`1G`).
    pub fn start(lab: &'static Lab, name: &str, size: &str) -> Result<Self> {
        Self::start_exporting(lab, name, size, &[(EXPORT, "sync")])
    }

    /// As [`Self::start`], with these directories of the image exported (at or below [`EXPORT`]),
    /// each with options of its own.
    pub fn start_exporting(
        lab: &'static Lab,
        name: &str,
        size: &str,
        exports: &[(&str, &str)],
    ) -> Result<Self> {
        let image = lab.dir().join(format!("{name}.xfs"));
        process::sh(&format!(
            "truncate -s {size} {0} && mkfs.xfs -q -m reflink=1 {0}",
            image.display()
        ))?
        .ok()?;
        let node = Node::guest_with(lab, name, "512M", vec![image])?;
        let exports = exports.iter();
        let exports = exports
            .map(|&(path, options)| (path.to_owned(), options.to_owned()))
            .collect();
        let server = Self { node, exports };
        server.up()?;
        Ok(server)
    }

    /// Starts the server on the booted guest.
    fn up(&self) -> Result {
        let mut exported = String::new();
        for (id, (path, options)) in (1..).zip(&self.exports) {
            exported.push_str(&format!(
                "mkdir -p {ROOT}{path}
                 exportfs -o rw,no_root_squash,insecure,fsid={id},no_subtree_check,{options} '*:{path}'
                 "
            ));
        }
        self.node
            .sh(&format!(
                "modprobe -d /tmp/modules nfsd
                 mkdir -p {ROOT}{EXPORT}; mount /dev/ubdb {ROOT}{EXPORT}
                 printf '[exports]\\nrootdir={ROOT}\\n' >/etc/nfs.conf
                 mount -t tmpfs tmpfs /var/lib/nfs
                 cd /var/lib/nfs; mkdir sm sm.bak v4recovery rpc_pipefs; touch etab rmtab; cd /
                 mount -t nfsd nfsd /proc/fs/nfsd
                 rpcbind -w
                 {exported}
                 rpc.nfsd --lease-time {LEASE} --grace-time {LEASE} 4
                 rpc.mountd --port 20048"
            ))
            .context("starting the kernel's NFS server")?;
        let ports = [
            format!("{}:2049", self.ip()),
            format!("{}:20048", self.ip()),
        ];
        wait_for("the kernel's NFS server", PATIENCE, || {
            ports
                .iter()
                .all(|port| std::net::TcpStream::connect(port).is_ok())
        })
    }

    /// The exported directory as the server's node sees it.
    pub fn local(&self) -> String {
        format!("{ROOT}{EXPORT}")
    }

    pub fn node(&self) -> &Node {
        &self.node
    }

    pub fn ip(&self) -> String {
        self.node.ip()
    }

    /// `IP:/export`.
    pub fn share(&self) -> String {
        format!("{}:{EXPORT}", self.ip())
    }

    /// Power off and on: the server forgets its clients, the data stays.
    pub fn reboot(&self) -> Result {
        self.node.reboot()?;
        self.up()
    }
}
