//! `nfsvol doctor` on shares and hosts that are well, and on those that are not.

use std::process::ExitCode;
use std::time::Duration;

use anyhow::{Context, ensure};
use lab::host::{DataPath, Host};
use lab::{Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Part, Result, Shared, trial, wait_for};
use serde_json::Value;

const NFS: &[Part] = &[Part::Ganesha];
const ALL: &[Part] = &[Part::Docker, Part::Ganesha, Part::Fuse];
/// The promises are 3 s and 12 s; this is with room for a machine that does other things too.
const HEALTHY: Duration = Duration::from_secs(15);
const DEAD: Duration = Duration::from_secs(40);

fn main() -> ExitCode {
    lab::main!(|| {
        vec![
            trial("a_healthy_share", NFS, healthy),
            trial("shares_with_a_fault", NFS, faults),
            trial("a_dead_server", NFS, dead),
            trial("a_host", ALL, host),
        ]
    })
}

/// One server for the trials that leave it alone.
static NAS: Shared<Ganesha> = Shared::new();

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| {
        let nas = Ganesha::start(
            lab,
            "nas",
            &[
                Export::new("/srv/export"),
                Export::new("/srv/squashed").squash("root_squash"),
                Export::new("/srv/closed").squash("root_squash"),
                Export::new("/srv/readonly").read_only(),
            ],
        )?;
        nas.node()
            .sh("chmod 0777 /srv/squashed; chmod 0755 /srv/closed")?;
        Ok(nas)
    })
}

/// What `nfsvol doctor --json` said.
struct Said {
    code: i32,
    took: Duration,
    report: Value,
}

impl Said {
    fn on(node: &Node, args: &[&str]) -> Result<Self> {
        let argv: Vec<&str> = [Nfsvol::binary(), "doctor", "--json"]
            .into_iter()
            .chain(args.iter().copied())
            .collect();
        let output = node.run(&argv)?;
        let report = serde_json::from_str(&output.stdout).with_context(|| output.to_string())?;
        Ok(Self {
            code: output.code,
            took: output.took,
            report,
        })
    }

    /// The checks with this name: outcome, what was found and the advice, in one text each.
    fn check(&self, name: &str) -> Result<String> {
        let findings = self.report["findings"].as_array().context("no findings")?;
        let texts: Vec<String> = findings
            .iter()
            .filter(|finding| finding["check"] == name)
            .map(|f| format!("{}: {} -> {}", f["outcome"], f["found"], f["advice"]))
            .collect();
        ensure!(!texts.is_empty(), "no check {name} in {:#}", self.report);
        Ok(texts.join("\n"))
    }

    fn has(&self, check: &str, texts: &[&str]) -> Result {
        let said = self.check(check)?;
        for text in texts {
            ensure!(said.contains(text), "{check}: {text:?} is not in {said}");
        }
        Ok(())
    }
}

fn healthy(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let node = Node::machine(lab, "plain")?;
    let said = Said::on(&node, &["nas:/srv/export"])?;
    ensure!(said.took < HEALTHY, "{:?}", said.took);
    said.has("name", &["ok", &nas.ip()])?;
    said.has("connect", &["ok", "2049"])?;
    said.has("versions", &["ok", "NFSv3 and NFSv4", "20048"])?;
    said.has("export", &["ok"])?;
    said.has("write", &["ok", "read back"])?;
    said.has("root", &["ok", "stays root"])?;
    said.has("clocks", &["ok"])?;
    said.has("mounts", &["ok"])?;
    said.has("engine", &["skipped", "no Docker engine"])?;
    // No daemon runs there, which is a failure of the host.
    said.has(
        "daemon",
        &["failed", "does not run here", "systemctl start"],
    )?;
    ensure!(said.code == 1);
    let left = std::fs::read_dir(nas.local("/srv/export"))?.count();
    ensure!(left == 0, "{left} entries are left on the share");

    // For people.
    let table = node.run(&[Nfsvol::binary(), "doctor", "nas:/srv/export"])?;
    ensure!(table.stdout.contains("FAIL  daemon"), "{table}");
    ensure!(table.stdout.contains("-> Start it"), "{table}");
    ensure!(table.stderr.contains("one check failed"), "{table}");
    Ok(())
}

fn faults(lab: &'static Lab) -> Result {
    nas(lab)?;
    let node = Node::machine(lab, "asking")?;
    let on = |share: &str| Said::on(&node, &[share]);

    let said = on("nas:/srv/squashed")?;
    said.has("write", &["ok"])?;
    said.has("root", &["warning", "root_squash", ":nocopy"])?;

    let said = on("nas:/srv/closed")?;
    said.has("export", &["ok"])?;
    said.has("write", &["failed", "permission denied", "no_root_squash"])?;

    let said = on("nas:/srv/readonly")?;
    said.has("write", &["failed", "read-only", "read-write"])?;

    let said = on("nas:/srv/absent")?;
    said.has("export", &["no such export", "/srv/export"])?;

    let said = on("nowhere.invalid:/srv")?;
    // No such name, or no name server: that depends on the machine.
    said.has("name", &["failed", "/etc/"])?;
    said.has("connect", &["skipped"])?;

    // Nobody has this address.
    let said = on("10.77.0.250:/srv")?;
    said.has("name", &["ok"])?;
    said.has("connect", &["failed"])?;
    ensure!(said.took < DEAD, "{:?}", said.took);
    Ok(())
}

fn dead(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "dying", &[Export::new("/srv/export")])?;
    let node = Node::machine(lab, "patient")?;
    nas.freeze()?;
    let said = Said::on(&node, &["dying:/srv/export"])?;
    ensure!(said.took < DEAD, "{:?}", said.took);
    said.has("connect", &["ok"])?;
    said.has("versions", &["failed", "gave no answer", "server's load"])?;
    nas.thaw()?;
    nas.stop()?;
    let said = Said::on(&node, &["dying:/srv/export"])?;
    said.has(
        "connect",
        &["failed", "refused", "is the NFS server running"],
    )?;
    said.has("write", &["skipped"])?;
    Ok(())
}

fn host(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "home", &[Export::new("/srv/export")])?;
    let host = Host::start(lab, "worker", DataPath::Fuse, "home:/srv/export")?;
    let (node, engine) = (host.node(), host.engine());
    wait_for("Docker to be told of the plugin", PATIENCE, || {
        Said::on(node, &[]).is_ok_and(|said| said.has("plugin", &["ok"]).is_ok())
    })?;
    engine.ok(&["volume", "create", "-d", "nfsvol", "-o", "mode=0700", "db"])?;
    engine.ok(&[
        "run",
        "-d",
        "--name",
        "holder",
        "--network",
        "host",
        "--volume-driver",
        "nfsvol",
        "-v",
        "db:/data",
        lab::docker::IMAGE,
        "sleep",
        "1000",
    ])?;
    let said = Said::on(node, &[])?;
    ensure!(
        said.code == 0 && said.report["share"] == "home:/srv/export",
        "{:#}",
        said.report
    );
    ensure!(said.took < HEALTHY, "{:?}", said.took);
    said.has("daemon", &["ok", "1 volumes, 1 attachments"])?;
    said.has("engine", &["ok", "Docker 2"])?;
    said.has("options", &["ok"])?;
    said.has("mounts", &["ok", "1 answer"])?;
    said.has("fuse", &["ok"])?;

    // Another host makes the volume anew with other options; Docker here shows its own.
    let unheard = ["--docker-socket", "/run/another.sock"];
    let other = Host::start_with(
        lab,
        "other",
        DataPath::Fuse,
        "home:/srv/export",
        &unheard,
        &[],
    )?;
    Said::on(other.node(), &[])?.has("plugin", &["warning", "--docker-socket"])?;
    engine.ok(&["rm", "-f", "holder"])?;
    wait_for("the volume to be free", PATIENCE, || {
        other.engine().ok(&["volume", "rm", "db"]).is_ok()
    })?;
    other
        .engine()
        .ok(&["volume", "create", "-d", "nfsvol", "-o", "mode=0750", "db"])?;
    wait_for("the options to differ", PATIENCE, || {
        Said::on(node, &[]).is_ok_and(|said| {
            said.has("options", &["warning", "db", "0700", "0750"])
                .is_ok()
        })
    })?;

    // A worker dies under a container; a server dies under a mount.
    other.engine().ok(&[
        "run",
        "-d",
        "--name",
        "holder",
        "--network",
        "host",
        "--volume-driver",
        "nfsvol",
        "-v",
        "db:/data",
        lab::docker::IMAGE,
        "sleep",
        "1000",
    ])?;
    let id = other.engine().ok(&["inspect", "-f", "{{.Id}}", "holder"])?;
    nas.freeze()?;
    let said = Said::on(other.node(), &[])?;
    ensure!(said.took < DEAD, "{:?}", said.took);
    said.has("versions", &["failed"])?;
    nas.thaw()?;
    other
        .node()
        .sh("kill -9 $(pgrep -f '[n]fsvol fuse-worker')")?;
    let said = Said::on(other.node(), &[])?;
    said.has(
        "mounts",
        &["failed", "/db has lost its worker", &id[..12], "restart"],
    )?;
    ensure!(said.code == 1);
    Ok(())
}
