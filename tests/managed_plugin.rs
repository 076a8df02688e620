//! nfsvol as a managed plugin: made without a registry, configured by Docker, and what its
//! containers notice when it crashes, is disabled or upgraded.

use std::process::ExitCode;
use std::time::Instant;

use anyhow::ensure;
use lab::docker::{Engine, IMAGE};
use lab::ganesha::LONG_LEASE;
use lab::host::DataPath;
use lab::{Export, Ganesha, Lab, Linux, Node, PATIENCE, Part, Result, Shared, trial, wait_for};

/// One server for all trials.
static NAS: Shared<Ganesha> = Shared::new();

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("fuse", &[Part::Docker, Part::Ganesha, Part::Fuse], |lab| {
                managed(lab, DataPath::Fuse)
            }),
            trial(
                "kernel",
                &[Part::Docker, Part::Ganesha, Part::Guest],
                |lab| managed(lab, DataPath::Kernel),
            ),
        ]
    })
}

fn managed(lab: &'static Lab, data_path: DataPath) -> Result {
    let (name, export) = match data_path {
        DataPath::Fuse => ("host", "/srv/fuse"),
        DataPath::Kernel => ("guest", "/srv/kernel"),
    };
    let nas = NAS.get(|| {
        let exports = [Export::new("/srv/fuse"), Export::new("/srv/kernel")];
        Ganesha::start_leasing(lab, "nas", &exports, LONG_LEASE)
    })?;
    let volumes = nas.local(export);
    let node = match data_path {
        DataPath::Fuse => Node::machine(lab, name)?,
        DataPath::Kernel => Node::guest_of(lab, name, Linux::newest())?,
    };
    let node: &'static Node = Box::leak(Box::new(node));
    let engine = Engine::start(lab, node)?;
    let docker = |line: &str| engine.ok(&line.split_whitespace().collect::<Vec<_>>());
    let refused = |line: &str| {
        engine
            .docker(&line.split_whitespace().collect::<Vec<_>>())?
            .fails()
    };

    engine.managed_plugin()?;
    docker(&format!("plugin set nfsvol NFSVOL_SHARE=nas:{export}"))?;
    let start = Instant::now();
    docker("plugin enable nfsvol")?;
    docker("volume create -d nfsvol db")?;
    engine.run_in("db", "echo kept >/data/file")?;
    // The promise is 2 s to the first Mount, without the container's start (`make bench`).
    lab::note(format!(
        "{name}: from the plugin's start to the end of a container {:?}",
        start.elapsed()
    ));
    ensure!(std::fs::read_to_string(volumes.join("db/file"))? == "kept\n");
    ensure!(volumes.join(".nfsvol/volumes/db/record.json").is_file());

    // Of the host's directories its processes see their own alone.
    node.sh("mkdir -p /var/lib/docker/plugins/of-another-plugin")?;
    for process in ["managed-plugin", "serve"] {
        let seen = node.sh(&format!(
            "pid=$(pgrep -f '^/nfsvol {process}'); ls -A /proc/$pid/root/mnt/host; \
             grep -c of-another-plugin /proc/$pid/mountinfo || true"
        ))?;
        ensure!(seen == "nfsvol\n0", "{process}: {seen}");
    }
    let state = node.sh("ls /var/lib/docker/plugins/nfsvol")?;
    ensure!(state.contains("attachments"), "{state}");

    // A volume in use is kept, and its holder is told of: the plugin sees the host's processes.
    let hold = |name: &str| -> Result {
        docker(&format!(
            "run -d --name {name} --network host --volume-driver nfsvol -v db:/data {IMAGE} \
             sleep 1000"
        ))?;
        Ok(())
    };
    hold("holder")?;
    let id = docker("inspect -f {{.Id}} holder")?;
    wait_for("Status to name the container", PATIENCE, || {
        docker("volume inspect db").is_ok_and(|status| status.contains(&id))
    })?;
    let reads = |name: &str| engine.docker(&["exec", name, "cat", "/data/file"]);
    ensure!(reads("holder")?.ok()? == "kept");
    ensure!(refused("plugin disable nfsvol")?.contains("in use"));

    // A crash of the daemon is not noticed.
    let works_again = || {
        wait_for("the plugin to work again", PATIENCE, || {
            engine
                .docker(&["volume", "inspect", "db"])
                .is_ok_and(|output| output.code == 0)
        })
    };
    node.sh("kill -9 $(pgrep -f '^/nfsvol serve')")?;
    works_again()?;
    ensure!(reads("holder")?.ok()? == "kept");

    // Docker restarts a plugin whose first process has ended, with all its processes; a container
    // goes on if the kernel's NFS client is its data path, and after its restart if FUSE is.
    let survives = |what: &str| -> Result {
        let output = reads("holder")?;
        match data_path {
            DataPath::Kernel => ensure!(output.ok()? == "kept", "after {what}"),
            DataPath::Fuse => {
                let error = output.fails()?;
                ensure!(
                    error.contains("endpoint is not connected"),
                    "{what}: {error}"
                );
            }
        }
        Ok(())
    };
    node.sh("kill -9 $(pgrep -f '^/nfsvol managed-plugin')")?;
    works_again()?;
    survives("a crash of the plugin")?;
    engine.run_in("db", "grep kept /data/file")?;
    docker("restart -t 0 holder")?;
    ensure!(reads("holder")?.ok()? == "kept");

    // So does `disable -f`; new containers are refused then.
    docker("plugin disable -f nfsvol")?;
    survives("disable -f")?;
    let said = engine
        .docker(&[
            "run",
            "--rm",
            "--volume-driver",
            "nfsvol",
            "-v",
            "db:/data",
            IMAGE,
            "true",
        ])?
        .fails()?;
    ensure!(said.contains("found but disabled"), "{said}");

    // An upgrade keeps settings and volumes.
    engine.managed_plugin()?;
    docker("plugin enable nfsvol")?;
    survives("an upgrade")?;
    docker("restart -t 0 holder")?;
    ensure!(reads("holder")?.ok()? == "kept");
    ensure!(docker("volume ls -q")? == "db");

    // dockerd is killed, and so are the plugin and the container: no Unmount comes for it, ever.
    engine.dockerd().kill()?;
    node.sh("kill -9 $(pgrep -f '^/nfsvol managed-plugin') $(pgrep -f '^sleep 1000')")?;
    engine.restart()?;
    docker("rm -f holder")?;
    // After a start of the engine its earlier containers count for 25 s, and nfsvol looks once a minute.
    wait_for(
        "what nobody stands behind to be let go of",
        PATIENCE,
        || docker("volume inspect db").is_ok_and(|status| !status.contains("\"epoch\"")),
    )?;

    // Away with it all.
    docker("volume rm db")?;
    ensure!(!volumes.join("db").exists());
    docker("plugin disable nfsvol")?;
    docker("plugin rm nfsvol")?;
    let left = node
        .sh("pgrep -f '^/nfsvol' || true; grep -E ' (fuse.nfsvol|nfs4?) ' /proc/mounts || true")?;
    ensure!(left.is_empty(), "{left}");
    Ok(())
}
