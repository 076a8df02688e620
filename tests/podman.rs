//! Podman is a second client of the same protocol, on the same volumes as Docker.
//!
//! It takes HTTP 200 for success without looking at `Err`, and waits for 5 s unless its
//! configuration says otherwise (libpod/plugin/volume_api.go).

use std::process::ExitCode;
use std::time::Duration;

use anyhow::ensure;
use lab::docker::{BUSYBOX, IMAGE};
use lab::{
    Call, DataPath, Export, Ganesha, Host, Lab, Nfsvol, Node, PATIENCE, Part, Result, calls, trial,
    wait_for,
};
use serde_json::Value;

const PARTS: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse, Part::Podman];

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("podman_and_docker_share_volumes", PARTS, volumes),
            trial("commands_end_nothing_that_is_in_use", PARTS, many_commands),
        ]
    })
}

/// A host with Podman and nfsvol, set up as docs/OPERATIONS.md says.
struct PodmanHost {
    node: &'static Node,
    _nfsvol: Nfsvol<'static>,
}

impl PodmanHost {
    fn start(lab: &'static Lab, name: &str, share: &str) -> Result<Self> {
        let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
        let nfsvol = Nfsvol::start(node, &["--share", share, "--data-path", "fuse"], &[])?;
        // In a container without cgroups and images of its own kind; the plugin's entry is what
        // users write.
        node.sh(&format!(
            r#"# crun takes cgroup v1 or v2, not both at once.
            if mountpoint -q /sys/fs/cgroup/unified; then umount /sys/fs/cgroup/unified; fi
            mkdir -p /etc/containers /srv/podman /srv/root/bin /srv/root/data
            cat >/etc/containers/containers.conf <<END
[containers]
cgroups = "disabled"
netns = "host"
[engine]
cgroup_manager = "cgroupfs"
events_logger = "file"
volume_plugin_timeout = 120
[engine.volume_plugins]
nfsvol = "{socket}"
END
            printf '[storage]\ndriver = "vfs"\nrunroot = "/run/podman"\ngraphroot = "/srv/podman"\n' \
                >/etc/containers/storage.conf
            echo '{{"default": [{{"type": "insecureAcceptAnything"}}]}}' >/etc/containers/policy.json
            cp {BUSYBOX} /srv/root/bin/busybox
            for tool in sh cat ls stat; do ln -s busybox /srv/root/bin/$tool; done
            echo from-the-image >/srv/root/data/first
            tar -C /srv/root -cf /srv/root.tar .
            podman import -q /srv/root.tar {IMAGE}"#,
            socket = Nfsvol::SOCKET
        ))?;
        Ok(Self {
            node,
            _nfsvol: nfsvol,
        })
    }

    fn ok(&self, line: &str) -> Result<String> {
        self.node.sh(&format!("podman {line}"))
    }

    fn fails(&self, line: &str) -> Result<String> {
        self.node
            .run(&["sh", "-c", &format!("podman {line}")])?
            .fails()
    }

    fn run(&self, volume: &str, script: &str) -> Result<String> {
        self.ok(&format!("run --rm -v {volume} {IMAGE} sh -euc '{script}'"))
    }
}

fn volumes(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new("/srv/export")])?;
    let share = nas.share("/srv/export");
    let podman = PodmanHost::start(lab, "podman", &share)?;
    let docker = Host::start(lab, "docker", DataPath::Fuse, &share)?;

    podman.ok("volume create --driver nfsvol --opt mode=0750 --label team=db db")?;
    let local = nas.local("/srv/export").join("db");
    ensure!(local.is_dir());
    let listed = podman.ok("volume ls --format '{{.Driver}} {{.Name}}'")?;
    ensure!(listed == "nfsvol db", "{listed}");
    let shown: Value = serde_json::from_str(&podman.ok("volume inspect db")?)?;
    ensure!(shown[0]["Driver"] == "nfsvol", "{shown}");

    // Written by one engine, read by the other.
    podman.run("db:/data", "echo podman >/data/file")?;
    ensure!(std::fs::read_to_string(local.join("file"))? == "podman\n");
    let read = docker.run("-v db:/data", "cat /data/file; echo docker >>/data/file")?;
    ensure!(read == "podman", "{read}");
    let read = podman.run("db:/data", "cat /data/file")?;
    ensure!(read == "podman\ndocker", "{read}");

    // A container that runs keeps its volume.
    podman.ok(&format!(
        "run -d --name holder -v db:/data {IMAGE} sh -c 'while :; do busybox sleep 1; done'"
    ))?;
    let refused = podman.fails("volume rm db")?;
    ensure!(
        refused.contains("in use") || refused.contains("being used"),
        "{refused}"
    );
    podman.ok("rm -f -t 0 holder")?;

    // What the driver refuses arrives in words, and leaves nothing.
    let refused = podman.fails("volume create --driver nfsvol --opt mod=0750 other")?;
    ensure!(refused.contains("mode"), "{refused}");
    ensure!(!nas.local("/srv/export").join("other").exists());

    podman.ok("volume rm db")?;
    ensure!(!local.exists());
    // At its next poll.
    wait_for("docker to hear of it", PATIENCE, || {
        matches!(docker.volume("db"), Ok(None))
    })
}

/// Each of Podman's commands activates the plugin, as a start of an engine does. What it counts itself
/// stays, and so does a volume in whose mount on the host somebody works, as a copy does; one that
/// nothing stands behind goes.
fn many_commands(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas-2", &[Export::new("/srv/export")])?;
    let podman = PodmanHost::start(lab, "podman-2", &nas.share("/srv/export"))?;
    podman.ok("volume create --driver nfsvol db")?;
    let place = podman.ok("volume mount db")?;
    podman.node.sh(&format!("echo kept >{place}/file"))?;
    for volume in ["copied", "idle"] {
        podman.ok(&format!("volume create --driver nfsvol {volume}"))?;
        calls::one(podman.node, Call::mount(volume, "nfsvol-migrate"))?.ok()?;
    }
    let copied = "/var/lib/nfsvol/mnt/volumes/copied";
    let copy = format!("cd {copied}; exec sleep 1000");
    let copies = podman.node.spawn("copy", &["sh", "-euc", &copy])?;
    // Attachments of an earlier engine count for 20 s, and are looked at 25 s after its start.
    let looked_at = Duration::from_secs(25 + 20 + 5);
    let began = std::time::Instant::now();
    while began.elapsed() < looked_at {
        podman.ok("volume ls")?;
        std::thread::sleep(Duration::from_secs(4));
    }
    let read = podman.node.sh(&format!("cat {place}/file"))?;
    ensure!(read == "kept", "{read}");
    let attached = |volume: &str| {
        let got = calls::one(podman.node, Call::get(volume))?.ok()?;
        Result::Ok(!got["Volume"]["Status"]["attachments"].is_null())
    };
    wait_for("what nobody stands behind to go", PATIENCE, || {
        podman.ok("volume ls").is_ok() && attached("idle").is_ok_and(|attached| !attached)
    })?;
    ensure!(attached("copied")?);
    podman.node.sh(&format!("mountpoint -q {copied}"))?;
    copies.kill()?;
    podman.ok("volume unmount db")?;
    podman.ok("volume rm db")?;
    ensure!(!nas.local("/srv/export").join("db").exists());
    Ok(())
}
