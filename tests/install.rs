//! What `make install`, the Debian package and the systemd units do, under a real systemd.

use std::collections::BTreeSet;
use std::path::Path;
use std::process::ExitCode;

use anyhow::{Context, ensure};
use lab::docker::Engine;
use lab::{
    Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, Systemd, process, trial, wait_for,
};

const OPERATIONS: &str = include_str!("../docs/OPERATIONS.md");
const CHECKOUT: &str = env!("CARGO_MANIFEST_DIR");
/// Some of the daemon's looks whether an engine runs (every two seconds).
const LOOKS: std::time::Duration = std::time::Duration::from_secs(7);
const VOLUMES: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse, Part::Systemd];

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("make_install_puts_what_the_docs_say", &[], make_install),
            trial("units_are_clean", &[Part::Systemd], units),
            trial("systemd_runs_the_package", VOLUMES, package),
        ]
    })
}

/// A binary without debugging symbols, which packages are made of.
fn binary(lab: &Lab) -> Result<String> {
    let stripped = lab.dir().join("nfsvol");
    let stripped = stripped.to_str().context("the lab's path is not UTF-8")?;
    process::run(&["strip", "-o", stripped, Nfsvol::binary()])?.ok()?;
    Ok(stripped.to_owned())
}

fn make(args: &str) -> Result<String> {
    process::sh(&format!("make --no-print-directory -C {CHECKOUT} {args}"))?.ok()
}

/// Every file below a directory, from `/` on.
fn files(root: &Path) -> Result<BTreeSet<String>> {
    let found = process::sh(&format!(
        "cd {} && find . ! -type d | cut -c2-",
        root.display()
    ))?
    .ok()?;
    Ok(found.lines().map(str::to_owned).collect())
}

fn make_install(lab: &'static Lab) -> Result {
    let root = lab.dir().join("root");
    let put = format!("DESTDIR={} BINARY={}", root.display(), Nfsvol::binary());
    make(&format!("install {put}"))?;
    let table = OPERATIONS
        .split_once("## What `make install` puts where")
        .context("no such heading in docs/OPERATIONS.md")?
        .1;
    let table = table.split("\n## ").next().unwrap_or(table);
    let said: Vec<&str> = table
        .lines()
        .filter_map(|line| line.strip_prefix("| `")?.split('`').next())
        .collect();
    let found = files(&root)?;
    let matches = |file: &str, said: &str| match said.split_once('*') {
        Some((start, end)) => file.starts_with(start) && file.ends_with(end),
        None => file == said,
    };
    for file in &found {
        ensure!(
            said.iter().any(|said| matches(file, said)),
            "not in the docs: {file}"
        );
    }
    for said in &said {
        ensure!(
            found.iter().any(|file| matches(file, said)),
            "not installed: {said}"
        );
    }
    // A manual page that man cannot read says so on standard error.
    for page in found.iter().filter(|file| file.ends_with(".1")) {
        let shown = process::sh(&format!(
            "man --warnings -l {}{page} >/dev/null",
            root.display()
        ))?;
        ensure!(shown.code == 0 && shown.stderr.is_empty(), "{shown}");
    }
    process::sh(&format!(
        "bash -n {}/usr/local/share/bash-completion/completions/nfsvol",
        root.display()
    ))?
    .ok()?;

    // Settings that were changed survive both.
    let settings = root.join("etc/default/nfsvol");
    std::fs::write(&settings, "NFSVOL_SHARE=nas:/export\n")?;
    make(&format!("install {put}"))?;
    let kept = make(&format!("uninstall {put}"))?;
    ensure!(kept.contains("kept"), "{kept}");
    ensure!(files(&root)? == BTreeSet::from(["/etc/default/nfsvol".to_owned()]));
    ensure!(std::fs::read_to_string(&settings)? == "NFSVOL_SHARE=nas:/export\n");
    std::fs::remove_file(&settings)?;
    make(&format!("install {put}"))?;
    make(&format!("uninstall {put}"))?;
    ensure!(files(&root)?.is_empty());
    Ok(())
}

fn units(lab: &'static Lab) -> Result {
    let node = Node::machine(lab, "units")?;
    let root = node.dir().join("root");
    let root = root.display();
    let put = format!("DESTDIR={root} PREFIX=/usr BINARY={}", Nfsvol::binary());
    // systemd-analyze looks for the programs and the manual pages that units name.
    let verified = node.run(&[
        "sh",
        "-euc",
        &format!(
            "make -C {CHECKOUT} install {put} >/dev/null
         mount -t overlay -o lowerdir={root}/usr:/usr overlay /usr
         systemd-analyze verify nfsvol.service nfsvol.socket"
        ),
    ])?;
    ensure!(
        verified.code == 0 && verified.stderr.is_empty(),
        "{verified}"
    );
    Ok(())
}

/// A container that writes to its volume ten times a second.
struct Writer<'a> {
    engine: &'a Engine,
    nas: &'a Ganesha,
}

impl Writer<'_> {
    fn start(&self) -> Result {
        self.engine.ok(&[
            "run",
            "-d",
            "--name",
            "writer",
            "--restart",
            "always",
            "--network",
            "host",
            "--volume-driver",
            "nfsvol",
            "-v",
            "db:/data",
            lab::docker::IMAGE,
            "sh",
            "-c",
            "while echo beat >>/data/beats; do sleep 0.1; done",
        ])?;
        self.goes_on()
    }

    /// More arrives at the NFS server.
    fn goes_on(&self) -> Result {
        let size =
            || std::fs::metadata(self.nas.local("/srv/export/db/beats")).map_or(0, |f| f.len());
        let before = size();
        wait_for("the container to write", PATIENCE, || size() > before)
            .with_context(|| format!("{:?}", self.engine.docker(&["ps", "-a"])))
    }

    fn started_at(&self) -> Result<String> {
        self.engine.ok(&[
            "inspect",
            "-f",
            "{{.State.StartedAt}} {{.RestartCount}}",
            "writer",
        ])
    }
}

fn package(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "nas", &[Export::new("/srv/export")])?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "host")?));
    let dir = node.dir().display();
    // Compressing well takes half a minute.
    let package = process::sh(&format!(
        "DPKG_DEB_COMPRESSOR_TYPE=gzip DPKG_DEB_COMPRESSOR_LEVEL=1 \
         {CHECKOUT}/packaging/deb.sh {} {dir}",
        binary(lab)?
    ))?
    .ok()?;
    let package = package
        .split('\'')
        .nth(3)
        .with_context(|| package.clone())?;

    // A user installs the package on a host that runs Docker, and names a share.
    let systemd = Systemd::boot(lab, node)?;
    systemd.sh("systemctl enable --now docker.service 2>&1")?;
    let engine = systemd.engine()?;
    let install = format!("dpkg -i {package} 2>&1");
    systemd.sh(&install)?;
    systemd.sh("echo NFSVOL_SHARE=nas:/srv/export >>/etc/default/nfsvol
         echo NFSVOL_LOG_FORMAT=text >>/etc/default/nfsvol
         echo NFSVOL_MOUNT_DEADLINE=10s >>/etc/default/nfsvol
         systemctl restart nfsvol")?;
    engine.hears_of_the_plugin()?;
    let writer = Writer {
        engine: &engine,
        nas: &nas,
    };
    writer.start()?;

    // A namespace of its own would hide what it mounts from Docker.
    let seen = systemd.sh("for unit in nfsvol docker; do
             readlink /proc/$(systemctl show --value -p MainPID $unit)/ns/mnt
         done | uniq | wc -l
         stat -c %a /run/docker/plugins/nfsvol.sock")?;
    ensure!(seen == "1\n600", "{seen}");

    // Neither a restart, nor kill -9, nor an upgrade is noticed by the container.
    let since = writer.started_at()?;
    let workers = "pgrep -f '[n]fsvol fuse-worker' | tr '\\n' ' '";
    let worker = systemd.sh(workers)?;
    ensure!(!worker.trim().is_empty());
    for disturb in [
        "systemctl restart nfsvol",
        "systemctl kill -s KILL --kill-who=main nfsvol",
        &install,
    ] {
        systemd.sh(disturb)?;
        // Its socket is there all the time.
        ensure!(engine.ok(&["volume", "ls", "-q"])?.contains("db"));
        writer.goes_on()?;
        ensure!(writer.started_at()? == since, "{disturb}");
        ensure!(systemd.sh(workers)? == worker, "{disturb}");
    }
    ensure!(
        systemd
            .sh("cat /etc/default/nfsvol")?
            .contains("nas:/srv/export")
    );

    // A power failure; when the NFS server comes back, Docker has given up on the container.
    node.power_off()?;
    nas.stop()?;
    node.boot()?;
    let systemd = Systemd::boot(lab, node)?;
    wait_for("Docker to give up", PATIENCE, || {
        engine
            .ok(&[
                "inspect",
                "-f",
                "{{.State.Status}} {{.State.Error}}",
                "writer",
            ])
            .is_ok_and(|state| state.starts_with("exited") && state.contains("VolumeDriver.Mount"))
    })
    .with_context(|| systemd.log())?;
    nas.up()?;
    writer.goes_on().with_context(|| systemd.log())?;
    ensure!(writer.started_at()? != since);

    // An engine that was stopped stays so, though systemd would start it for whoever connects.
    engine.ok(&["rm", "-f", "writer"])?;
    systemd.sh("systemctl stop docker.service 2>&1; systemctl restart nfsvol")?;
    std::thread::sleep(LOOKS);
    let states = systemd.sh("systemctl is-active docker.socket docker.service nfsvol || true")?;
    ensure!(states == "active\ninactive\nactive", "{states}");
    systemd.sh("systemctl start docker.service 2>&1")?;
    engine.hears_of_the_plugin()?;

    // Away with it: no socket is left behind, and no record is lost.
    systemd.sh("dpkg --purge nfsvol 2>&1")?;
    let left = systemd.sh(
        "ls -d /usr/bin/nfsvol /etc/default/nfsvol /run/docker/plugins/nfsvol.sock \
            /etc/systemd/system/*/nfsvol* /var/lib/nfsvol/catalog 2>/dev/null || true",
    )?;
    ensure!(left == "/var/lib/nfsvol/catalog", "{left}");
    Ok(())
}
