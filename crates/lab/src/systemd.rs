//! A machine of the lab that is run by systemd: real units, ordering, sockets and restarts.
//!
//! systemd is the first process of PID and cgroup namespaces of its own on the node. It finds the
//! units that are installed on the node, and of this machine's only those of [`TARGETS`] and
//! Docker: nothing else of the machine is started. There is no journal, so that services log to
//! a file of the node.

use std::fs;
use std::path::PathBuf;

use anyhow::{Context, ensure};

use super::docker::{DOCKERD, Engine};
use super::node::{Node, Process};
use super::process::Output;
use super::{Lab, PATIENCE, Result, wait_for};

pub(crate) const SYSTEMD: &str = "/usr/lib/systemd/systemd";
/// What the units of nfsvol and Docker refer to, as systemd itself brings it.
const TARGETS: &str = "basic sockets multi-user paths timers slices network network-online \
                       local-fs local-fs-pre swap umount shutdown";

/// systemd on a node.
#[derive(Debug)]
pub struct Systemd {
    node: &'static Node,
    process: Process<'static>,
}

impl Systemd {
    /// Boots systemd on a machine that has just booted; what was enabled before is started.
    pub fn boot(lab: &'static Lab, node: &'static Node) -> Result<Self> {
        let dir = node.dir().display();
        let group = format!("{}/{}", lab.cgroup(), node.name());
        let script = format!(
            r#"
            # Programs can be installed; that lasts, as /etc and /var/lib do.
            mkdir -p {dir}/disk/usr.upper {dir}/disk/usr.work
            mount -t overlay -o lowerdir=/usr,upperdir={dir}/disk/usr.upper,workdir={dir}/disk/usr.work \
                overlay /usr
            # Says on some machines that no service may be started.
            rm -f /usr/sbin/policy-rc.d
            if [ ! -e {dir}/disk/units ]; then
                rm -rf /etc/systemd/system; mkdir /etc/systemd/system {dir}/disk/units
            fi
            mkdir -p /run/units /run/tree
            for target in {TARGETS}; do ln -s /usr/lib/systemd/system/$target.target /run/units; done
            printf '[Unit]\n' >/run/units/sysinit.target
            ln -s /usr/lib/systemd/system/docker.service /usr/lib/systemd/system/docker.socket /run/units
            for unit in nfsvol.service nfsvol.socket; do
                ln -s /usr/lib/systemd/system/$unit /run/units
            done
            mkdir /run/units/service.d /run/units/docker.service.d
            printf '[Service]\nStandardOutput=append:%s\nStandardError=inherit\n' {log} \
                >/run/units/service.d/lab.conf
            cat >/run/units/docker.service.d/lab.conf <<END
[Service]
ExecStart=
ExecStart={DOCKERD} -H fd:// -H {url} --bridge=none --storage-driver=overlay2 --cgroup-parent /{group}
END
            # The tree in which systemd keeps its units, from a cgroup of this node on.
            if [ "$(stat -fc %T /sys/fs/cgroup)" = cgroup2fs ]; then
                kind=cgroup2 tree=/sys/fs/cgroup
                mount -t cgroup2 cgroup /run/tree
            else
                kind='cgroup -o none,name=systemd' tree=/sys/fs/cgroup/systemd
                mount -t cgroup -o none,name=systemd cgroup /run/tree
            fi
            mkdir -p /run/tree/{group}
            echo $$ >/run/tree/{group}/cgroup.procs
            umount /run/tree
            exec unshare --mount --pid --cgroup --fork --kill-child --mount-proc \
                --propagation private sh -euc '
                mount --make-rshared /
                umount '$tree' || mkdir -p '$tree'
                mount -t '"$kind"' cgroup '$tree'
                exec env -i container=lab PATH=/usr/sbin:/usr/bin:/sbin:/bin \
                    SYSTEMD_UNIT_PATH=/etc/systemd/system:/run/units \
                    {SYSTEMD} --system --unit=multi-user.target --log-target=console'
            "#,
            url = url(node),
            log = log(node).display(),
        );
        lab.watch_log(&format!("{} units", node.name()), &log(node));
        let process = node.spawn("systemd", &["sh", "-euc", &script])?;
        let systemd = Self { node, process };
        wait_for("systemd to answer", PATIENCE, || {
            systemd
                .run("systemctl show --property=Version")
                .is_ok_and(|output| output.code == 0)
        })
        .with_context(|| systemd.process.log())?;
        Ok(systemd)
    }

    /// What the services have written.
    pub fn log(&self) -> String {
        fs::read_to_string(log(self.node)).unwrap_or_default()
    }

    /// Runs a shell script where systemd runs.
    pub(crate) fn run(&self, script: &str) -> Result<Output> {
        let pid = self.process.pid()?.to_string();
        let children = self
            .node
            .ok(&["cat", &format!("/proc/{pid}/task/{pid}/children")])?;
        let init = children.trim();
        ensure!(
            !init.is_empty(),
            "systemd does not run: {}",
            self.process.log()
        );
        self.node.run(&[
            "nsenter", "--target", init, "--mount", "--pid", "--cgroup", "sh", "-euc", script,
        ])
    }

    /// As [`Self::run`]; its output, and an error if it failed.
    pub fn sh(&self, script: &str) -> Result<String> {
        self.run(script)?.ok()
    }

    /// Docker's engine, once systemd has started it.
    pub fn engine(&self) -> Result<Engine> {
        Engine::started(self.node, url(self.node))
    }
}

fn log(node: &Node) -> PathBuf {
    node.dir().join("logs/units.log")
}

fn url(node: &Node) -> String {
    format!("unix://{}", node.dir().join("docker.sock").display())
}
