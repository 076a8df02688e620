//! Docker Engine 26.1, which is Debian 13's, beside the engine of all other tests: the same volumes,
//! the main job.

use std::process::ExitCode;

use anyhow::ensure;
use lab::docker::Engine;
use lab::{DataPath, Export, Ganesha, Host, Lab, Nfsvol, Node, Part, Result, trial};
use serde_json::Value;

const PARTS: &[Part] = &[Part::Docker, Part::NewerEngine, Part::Ganesha, Part::Fuse];
const VERSION: &str = "26.1.";

fn main() -> ExitCode {
    lab::main!(|| vec![trial("a_volume_moves_between_engines", PARTS, moves)])
}

/// Starts the engine on a machine, below a root file system of its own; what nfsvol mounts there
/// arrives in it. (A chroot would not do: runc changes the root itself.)
fn start(lab: &'static Lab, node: &'static Node) -> Result<Engine> {
    let url = format!("unix://{}/docker.sock", node.dir().display());
    let script = format!(
        "root=$(mktemp -d -p {dir} engine-XXXXXX)
         mkdir $root/upper $root/work $root/new $root/data
         mount -t overlay -o lowerdir={lower},upperdir=$root/upper,workdir=$root/work \
             overlay $root/new
         cd $root/new
         for shared in proc sys dev run var/lib/nfsvol; do
             mkdir -p $shared
             mount --rbind /$shared $shared
         done
         mkdir -p old var/lib/docker ./{dir}
         touch etc/hosts
         mount --bind $root/data var/lib/docker
         mount --bind {dir} ./{dir}
         mount --bind /etc/hosts etc/hosts
         pivot_root . old
         cd /
         umount -l /old
         exec dockerd --iptables=false --ip6tables=false --bridge=none --storage-driver=overlay2 \
             --cgroup-parent /{cgroup}/{name} -H unix:///run/docker.sock -H {url}",
        dir = node.dir().display(),
        lower = lab::NEWER_ENGINE,
        cgroup = lab.cgroup(),
        name = node.name(),
    );
    let argv = [
        "unshare",
        "--mount",
        "--propagation",
        "slave",
        "sh",
        "-euc",
        &script,
    ];
    node.spawn("dockerd-26", &argv)?;
    Engine::started(node, url)
}

fn moves(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new("/srv/export")])?;
    let share = nas.share("/srv/export");
    let older = Host::start(lab, "older", DataPath::Fuse, &share)?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "newer")?));
    let _nfsvol = Nfsvol::start(node, &["--share", &share, "--data-path", "fuse"], &[])?;
    let newer = start(lab, node)?;
    let version = newer.ok(&["version", "-f", "{{.Server.Version}}"])?;
    ensure!(version.starts_with(VERSION), "{version}");

    newer.ok(&["volume", "create", "-d", "nfsvol", "-o", "mode=0750", "db"])?;
    let shown: Vec<Value> = serde_json::from_str(&newer.ok(&["volume", "inspect", "db"])?)?;
    ensure!(shown[0]["Status"]["data_dir"] == "db", "{shown:?}");
    newer.run_in("db", "echo newer >/data/file")?;
    let read = older.run("-v db:/data", "cat /data/file; echo older >>/data/file")?;
    ensure!(read == "newer", "{read}");
    let read = newer.run_in("db", "cat /data/file")?;
    ensure!(read == "newer\nolder", "{read}");

    // Copied in and out, also while the container does not run (moby mounts by another ID).
    let volume = ["-v", "db:/data", "--network", "host", lab::docker::IMAGE];
    let keep = ["run", "-d", "--name", "keep"].into_iter().chain(volume);
    let keep: Vec<&str> = keep.chain(["sleep", "1000"]).collect();
    newer.ok(&keep)?;
    let copied = lab.dir().join("copied");
    let to = copied.display().to_string();
    newer.ok(&["cp", "keep:/data/file", &to])?;
    ensure!(std::fs::read_to_string(&copied)? == "newer\nolder\n");
    std::fs::write(&copied, "copied\n")?;
    newer.ok(&["cp", &to, "keep:/data/copied"])?;
    newer.ok(&["stop", "-t", "0", "keep"])?;
    newer.ok(&["cp", &to, "keep:/data/stopped"])?;
    let read = older.run("-v db:/data", "cat /data/copied /data/stopped")?;
    ensure!(read == "copied\ncopied", "{read}");

    // A volume is kept from removal by its container, and goes with its last one.
    let refused = newer.docker(&["volume", "rm", "db"])?.fails()?;
    ensure!(refused.contains("in use"), "{refused}");
    newer.ok(&["rm", "-f", "keep"])?;
    newer.ok(&["volume", "rm", "db"])?;
    ensure!(!nas.local("/srv/export").join("db").exists());

    // Other options for the name: the data is there again.
    newer.ok(&["volume", "create", "-d", "nfsvol", "-o", "mode=0700", "db"])?;
    let read = newer.run_in("db", "cat /data/file")?;
    ensure!(read == "newer\nolder", "{read}");
    Ok(())
}
