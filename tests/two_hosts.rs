//! One share, two Docker hosts: what is written on one is read on the other, whatever happened to
//! the container and the host that wrote it.

use std::process::ExitCode;
use std::thread;

use anyhow::{Context, anyhow, ensure};
use lab::ganesha::LONG_LEASE;
use lab::{
    DataPath, Export, Ganesha, Host, Knfsd, Lab, PATIENCE, Part, Result, Shared, trial, wait_for,
};

/// A volume, the server that its data is on, and the NFS version that it is mounted with.
struct Volume {
    name: &'static str,
    on: Server,
    version: &'static str,
}

#[derive(Clone, Copy, PartialEq, Eq)]
enum Server {
    Ganesha,
    Knfsd,
}

const fn volume(name: &'static str, on: Server, version: &'static str) -> Volume {
    Volume { name, on, version }
}

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial(
                "kernel",
                &[Part::Docker, Part::Ganesha, Part::Guest, Part::Knfsd],
                |lab| {
                    let volumes = [
                        volume("ganesha-3", Server::Ganesha, "3"),
                        volume("ganesha-4.0", Server::Ganesha, "4.0"),
                        volume("ganesha-4.1", Server::Ganesha, "4.1"),
                        volume("knfsd-3", Server::Knfsd, "3"),
                        volume("knfsd-4.2", Server::Knfsd, "4.2"),
                    ];
                    handed_over(lab, DataPath::Kernel, &volumes)
                },
            ),
            trial(
                "fuse",
                &[
                    Part::Docker,
                    Part::Ganesha,
                    Part::Fuse,
                    Part::Guest,
                    Part::Knfsd,
                ],
                |lab| {
                    let volumes = [
                        volume("fuse-ganesha", Server::Ganesha, "3"),
                        volume("fuse-knfsd", Server::Knfsd, "3"),
                    ];
                    handed_over(lab, DataPath::Fuse, &volumes)
                },
            ),
        ]
    })
}

/// Metrics tell what the volumes have carried: by volume (FUSE), by mount (kernel).
fn counted(host: &Host, data_path: DataPath) -> Result {
    let (written, volumes) = match data_path {
        DataPath::Fuse => (
            "nfsvol_volume_written_bytes_total{",
            "nfsvol_workers{state=\"serving\"}",
        ),
        DataPath::Kernel => ("nfsvol_mount_written_bytes_total{", "nfsvol_mount_volumes{"),
    };
    let sum = |text: &str, name: &str| {
        let lines = text.lines().filter(|line| line.starts_with(name));
        let values = lines.filter_map(|line| line.rsplit(' ').next()?.parse::<f64>().ok());
        values.sum::<f64>()
    };
    let mut text = String::new();
    wait_for("what was written to be counted", PATIENCE, || {
        text = host.nfsvol().metrics().unwrap_or_default();
        let attached = sum(&text, "nfsvol_volume_attachments{");
        // Each volume got a line of some ten letters.
        attached > 1.0
            && (sum(&text, volumes) - attached).abs() < 0.5
            && sum(&text, written) >= 10.0 * attached
    })
    .with_context(|| text.clone())
}

fn handed_over(lab: &'static Lab, data_path: DataPath, volumes: &[Volume]) -> Result {
    static GANESHA: Shared<Ganesha> = Shared::new();
    static KNFSD: Shared<Knfsd> = Shared::new();
    let word = match data_path {
        DataPath::Fuse => "fuse",
        DataPath::Kernel => "kernel",
    };
    let exports = ["/srv/fuse", "/srv/kernel"].map(Export::new);
    let nas = GANESHA.get(|| Ganesha::start_leasing(lab, "nas", &exports, LONG_LEASE))?;
    let knfsd = KNFSD.get(|| Knfsd::start(lab, "knfsd", "512M"))?;
    let home = nas.share(&format!("/srv/{word}"));
    let start = |letter: &str| Host::start(lab, &format!("{word}-{letter}"), data_path, &home);
    let (b, a) = thread::scope(|scope| {
        let a = scope.spawn(|| start("a"));
        (start("b"), a.join())
    });
    let (a, b) = (a.map_err(|_| anyhow!("a start panicked"))??, b?);

    // A makes the volumes and writes; its container still runs when the power goes.
    let mut options = String::new();
    for Volume { name, on, version } in volumes {
        let share = match on {
            Server::Ganesha => home.clone(),
            Server::Knfsd => knfsd.share(),
        };
        a.ok(&format!(
            "volume create -d nfsvol -o share={share} -o options=nfsvers={version} {name}"
        ))?;
        options.push_str(&format!(" -v {name}:/v/{name}"));
    }
    let obsolete = format!("{word}-obsolete");
    a.ok(&format!("volume create -d nfsvol {obsolete}"))?;
    let write = "for v in /v/*; do echo ${v##*/} of a >$v/file; done; echo written
                 exec sleep 3600";
    let writer = format!("-d --name=writer {options} -v {obsolete}:/v/{obsolete}");
    a.try_run(&writer, write)?.ok()?;
    wait_for("A to write", PATIENCE, || {
        a.ok("logs writer").is_ok_and(|said| said == "written")
    })
    .with_context(|| format!("{:?}", a.docker("logs writer")))?;
    for Volume { name, version, .. } in volumes {
        let status = &a.inspect(name)?["Status"];
        ensure!(
            status["nfs_version"] == *version && status["data_path"] == word,
            "{status}"
        );
    }
    counted(&a, data_path)?;
    a.node().power_off()?;

    // B sees all of it, without A and without the options.
    for Volume { name, version, .. } in volumes {
        let seen = b.inspect(name)?;
        let status = &seen["Status"];
        ensure!(seen["Driver"] == "nfsvol", "{seen}");
        ensure!(status["created_by"] == format!("{word}-a"), "{seen}");
        let options = status["options"]["options"].as_str().unwrap_or_default();
        ensure!(options.contains(&format!("nfsvers={version}")), "{seen}");
        ensure!(b.lists(name)?);
    }
    let read = "for v in /v/*; do cat $v/file; done";
    let script = format!("{read}; for v in /v/*; do echo ${{v##*/}} of b >>$v/file; done");
    let lines = |hosts: &[&str]| {
        let each = volumes
            .iter()
            .flat_map(|v| hosts.iter().map(move |h| format!("{} of {h}", v.name)));
        each.collect::<Vec<_>>().join("\n")
    };
    let seen = b.run(&options, &script)?;
    ensure!(seen == lines(&["a"]), "{seen}");
    // What a dead host held is free once its session has ended, and until then B says so.
    let refused = b.fails(&format!("volume rm {obsolete}"))?;
    ensure!(refused.contains(a.node().name()), "{refused}");
    wait_for("A's hold to end", PATIENCE, || {
        b.ok(&format!("volume rm {obsolete}")).is_ok()
    })?;

    // A comes back: it has what B wrote, and no longer what B removed.
    a.boot()?;
    let seen = a.run(&options, read)?;
    ensure!(seen == lines(&["a", "b"]), "{seen}");
    wait_for("A to follow the removal", PATIENCE, || {
        a.lists(&obsolete).is_ok_and(|listed| !listed)
    })?;
    ensure!(a.volume(&obsolete)?.is_none());
    // The container that the power cut ended holds nothing any more.
    a.ok("rm writer")?;
    for Volume { name, .. } in volumes {
        a.ok(&format!("volume rm {name}"))?;
    }
    wait_for("B to follow", PATIENCE, || {
        let listed = |v: &Volume| b.lists(v.name).unwrap_or(true);
        !volumes.iter().any(listed)
    })
}
