//! What a node does from its start to its agent.

use std::fs;
use std::path::{Path, PathBuf};
use std::process::Command;
use std::sync::atomic::Ordering;

use super::{AGENT, Kind, Linux, Node, UML};
use crate::{Lab, Result, Shared, checkout, process};

impl Node {
    pub(super) fn machine_command(&self, exe: &str, script: &Path) -> Result<Command> {
        let (name, link) = (&self.name, self.link());
        process::sh(&format!(
            "ip netns add {name}
             ip link add {link} type veth peer name eth0 address {hardware} netns {name}
             ip link set {link} master br0 up
             ip -n {name} link set lo up
             ip -n {name} addr add {v4}/24 dev eth0
             ip -n {name} -6 addr add {v6}/64 dev eth0 nodad
             ip -n {name} link set eth0 up
             ip -n {name} route add default via 10.77.0.1",
            v4 = self.ip(),
            v6 = self.ip6(),
            hardware = self.address.hardware(),
        ))?
        .ok()?;
        let mut command = Command::new("nsenter");
        command
            .arg(format!("--net=/run/netns/{name}"))
            .args([
                "unshare",
                "--mount",
                "--uts",
                "--ipc",
                "--pid",
                "--fork",
                "--kill-child",
            ])
            .args([
                "--mount-proc",
                "--propagation",
                "private",
                "--",
                exe,
                "lab-init",
                "sh",
                "-eu",
            ])
            .arg(script);
        Ok(command)
    }

    pub(super) fn guest_command(
        &self,
        exe: &str,
        script: &Path,
        linux: Linux,
        (memory, disks): (&str, &[PathBuf]),
    ) -> Result<Command> {
        let link = self.link();
        process::sh(&format!(
            "ip tuntap add dev {link} mode tap && ip link set {link} master br0 up"
        ))?
        .ok()?;
        let mut command = Command::new("unshare");
        command
            .env("LD_PRELOAD", xstate_shim()?)
            .args(["--pid", "--fork", "--kill-child", "--", exe, "lab-init"])
            .arg(format!("{}{UML}", linux.root()))
            .arg(format!("mem={memory}"))
            .args([
                "root=/dev/root",
                "rootfstype=hostfs",
                "rootflags=/",
                "ro",
                "quiet",
            ])
            .args(["con=null", "con0=null,fd:1", "uml_dir=/run/uml"])
            .arg(format!(
                "umid={}-{}",
                self.name,
                self.boots.load(Ordering::Relaxed)
            ))
            .arg(format!("vec0:transport=tap,ifname={link},depth=128,gro=1"))
            .arg(format!("ubda={}", self.dir.join("disk.img").display()));
        if linux == Linux::V7_2 {
            command.arg("seccomp=on"); // six times as quick as ptrace; 6.1 does not have it
        }
        for (letter, disk) in ('b'..).zip(disks) {
            command.arg(format!("ubd{letter}={}", disk.display()));
        }
        command.arg(format!("init={}", script.display()));
        Ok(command)
    }

    /// What a node does first; ends as the agent.
    pub(super) fn boot_script(&self, exe: &str) -> String {
        let dir = self.dir.display();
        let hosts = self.dir.with_file_name("hosts");
        let hosts = hosts.display();
        let checkout = checkout();
        // A checkout below /srv, /run or (in a guest) /tmp is seen through what is mounted there.
        let (kernel, disk, checkout_again, agent) = match self.kind {
            Kind::Machine => (
                String::new(),
                format!(
                    "disk={dir}/disk; mkdir -p $disk/checkout; rm -f {dir}/agent.sock
                     mount --bind {checkout} $disk/checkout"
                ),
                format!("mount --bind $disk/checkout {checkout}"),
                format!("exec {exe} lab-agent unix:{dir}/agent.sock"),
            ),
            Kind::Guest { linux, .. } => (
                self.guest_kernel(linux),
                // The node's directory is on the machine: logs are read there.
                format!(
                    "mount -t tmpfs tmpfs /mnt
                     mount -t hostfs -o {dir} none {dir}
                     mount /dev/ubda /mnt; disk=/mnt"
                ),
                format!("mount -t hostfs -o {checkout} none {checkout}"),
                format!("exec {exe} lab-init {exe} lab-agent {}:{AGENT}", self.ip()),
            ),
        };
        format!(
            "#!/bin/sh -eu
             export PATH=/usr/sbin:/usr/bin:/sbin:/bin HOME=/root
             {kernel}
             {disk}
             hostname {name}
             mount --make-rshared /
             for private in etc var/lib; do
                 mkdir -p $disk/$private.upper $disk/$private.work
                 upper=$disk/$private.upper,workdir=$disk/$private.work
                 mount -t overlay -o lowerdir=/$private,upperdir=$upper overlay /$private
             done
             for own in docker nfsvol; do
                 mkdir -p $disk/$own /var/lib/$own
                 mount --bind $disk/$own /var/lib/$own
             done
             mkdir -p $disk/srv
             mount --bind $disk/srv /srv
             mount --bind {hosts} /etc/hosts
             mount -t tmpfs -o mode=0755 tmpfs /run
             mkdir -p /run/lock /run/docker/plugins
             [ -e {checkout}/Cargo.toml ] || {{ mkdir -p {checkout}; {checkout_again}; }}
             {agent}
            ",
            name = self.name,
        )
    }

    /// What the machine has done already and a guest's kernel has not.
    fn guest_kernel(&self, linux: Linux) -> String {
        format!(
            "mount -t proc proc /proc
             mount -t sysfs sysfs /sys
             mountpoint -q /dev || mount -t devtmpfs devtmpfs /dev
             mkdir -p /dev/pts /dev/shm /dev/mqueue
             [ -e /dev/fd ] || ln -s /proc/self/fd /dev/fd
             mount -t devpts -o mode=0600,ptmxmode=0666 devpts /dev/pts
             mount -t tmpfs tmpfs /dev/shm
             mount -t mqueue mqueue /dev/mqueue
             mount -t tmpfs -o mode=1777 tmpfs /tmp
             mount -t tmpfs -o mode=0755 tmpfs /sys/fs/cgroup
             while read -r name _ _ enabled; do
                 [ \"$enabled\" = 1 ] || continue
                 mkdir -p /sys/fs/cgroup/$name
                 mount -t cgroup -o $name cgroup /sys/fs/cgroup/$name
             done </proc/cgroups
             mkdir -p /tmp/modules/lib/modules
             ln -s {linux}/usr/lib/uml/modules/$(uname -r) /tmp/modules/lib/modules/$(uname -r)
             for module in overlay fuse nfsv3 nfsv4 bridge veth br_netfilter; do
                 modprobe -d /tmp/modules $module
             done
             ip link set lo up
             ip link set vec0 address {hardware}
             ip addr add {v4}/24 dev vec0
             ip -6 addr add {v6}/64 dev vec0 nodad
             ip link set vec0 up",
            linux = linux.root(),
            v4 = self.ip(),
            v6 = self.ip6(),
            hardware = self.address.hardware(),
        )
    }
}

/// What lets linux.uml run on processors with AMX (xstate.c), built once with the C compiler that
/// Rust links with.
fn xstate_shim() -> Result<PathBuf> {
    static SHIM: Shared<PathBuf> = Shared::new();
    let shim = SHIM.get(|| {
        let lab = Lab::get()?.dir();
        let (source, shim) = (lab.join("xstate.c"), lab.join("xstate.so"));
        fs::write(&source, include_str!("xstate.c"))?;
        let argv = ["cc", "-shared", "-fPIC", "-O2", "-o"].map(PathBuf::from);
        let argv: Vec<_> = argv
            .iter()
            .chain([&shim, &source])
            .filter_map(|arg| arg.to_str())
            .collect();
        process::run(&argv)?.ok()?;
        Ok(shim)
    })?;
    Ok(shim.clone())
}
