//! Directory operations and the probe on real NFS servers: nfs-ganesha and the Linux kernel's,
//! over NFSv3 in user space and on a mount of the kernel's client.

#[allow(clippy::unwrap_used)]
#[path = "../crates/nfs/src/admin/scenarios.rs"]
mod scenarios;

use std::path::Path;
use std::process::ExitCode;
use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Export, Ganesha, Knfsd, Lab, Node, PATIENCE, Part, Result, Shared, trial};
use nfs::address::{Share, SharePath};
use nfs::admin::{
    Admin, AdminError, AdminErrorKind, AdminSettings, Attr, Kind, MOUNT_OPTIONS, Made, Refusal,
    is_temporary,
};
use nfs::probe::{Cause, Ports, ReachError, Reached, Step, probe};

/// Given to this binary in a guest: run the scenarios on the directory that follows.
const ON_MOUNT: &str = "on-mount";
const EXPORT: &str = "/srv/export";
/// From a deadline to the answer in the hands of the test, on a machine that is busy with other things.
const SLACK: Duration = Duration::from_secs(10);

fn main() -> ExitCode {
    let args: Vec<String> = std::env::args().skip(1).collect();
    if let [role, dir] = args.as_slice()
        && role == ON_MOUNT
    {
        return on_mount(Path::new(dir));
    }
    let both = &[Part::Ganesha, Part::Guest];
    lab::main!(|| {
        vec![
            trial("ganesha_over_v3", &[Part::Ganesha], ganesha_over_v3),
            trial("knfsd_over_v3", &[Part::Knfsd, Part::Guest], knfsd_over_v3),
            trial("ganesha_mounted_over_v4", both, ganesha_mounted_over_v4),
            trial(
                "probe_tells_the_versions",
                &[Part::Ganesha],
                probe_tells_the_versions,
            ),
            trial("probe_tells_why_not", &[Part::Ganesha], probe_tells_why_not),
            trial(
                "squash_and_read_only_are_told",
                &[Part::Ganesha],
                squash_and_read_only_are_told,
            ),
            trial(
                "frozen_and_killed_servers",
                &[Part::Ganesha],
                frozen_and_killed_servers,
            ),
            trial("figures", &[Part::Ganesha], figures),
        ]
    })
}

static NAS: Shared<Ganesha> = Shared::new();

fn nas(lab: &'static Lab) -> Result<&'static Ganesha> {
    NAS.get(|| {
        let exports = [
            Export::new(EXPORT),
            Export::new("/srv/squashed").squash("root_squash"),
            Export::new("/srv/fixed").read_only(),
            Export::new("/srv/figures"),
        ];
        Ganesha::start(lab, "nas", &exports)
    })
}

/// Runs a trial's asynchronous part. One runtime for all, since connections belong to theirs.
fn run<T>(work: impl Future<Output = T>) -> Result<T> {
    static RUNTIME: Shared<tokio::runtime::Runtime> = Shared::new();
    let runtime = RUNTIME.get(|| {
        Ok(tokio::runtime::Builder::new_multi_thread()
            .worker_threads(2)
            .enable_all()
            .build()?)
    })?;
    Ok(runtime.block_on(work))
}

fn admin(share: &str, op_deadline: Duration) -> Result<Admin> {
    let settings = AdminSettings {
        op_deadline,
        ..AdminSettings::default()
    };
    Ok(Admin::v3(share.parse()?, settings))
}

fn path(text: &str) -> Result<SharePath> {
    Ok(SharePath::parse(text)?)
}

fn ask(share: &str, ports: Ports) -> Result<std::result::Result<Reached, ReachError>> {
    let share: Share = share.parse()?;
    run(probe(&share, ports, Duration::from_secs(5)))
}

/// What a server must hold for the scenarios.
const PREPARE: &str = "mkdir -p links && ln -s /etc links/out";

fn ganesha_over_v3(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    nas.node().sh(&format!("cd {EXPORT}; {PREPARE}"))?;
    let share = format!("[{}]:{EXPORT}", nas.node().ip6());
    run(scenarios::all(&admin(&share, Duration::from_secs(5))?))
}

fn knfsd_over_v3(lab: &'static Lab) -> Result {
    let server = Knfsd::start(lab, "knfsd", "1G")?;
    server
        .node()
        .sh(&format!("cd {}; {PREPARE}", server.local()))?;
    run(scenarios::all(&admin(
        &server.share(),
        Duration::from_secs(20),
    )?))
}

fn ganesha_mounted_over_v4(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    nas.node().sh("mkdir /srv/export/mounted")?;
    nas.node().sh(&format!("cd {EXPORT}/mounted; {PREPARE}"))?;
    let guest = Node::guest(lab, "client")?;
    let share = nas.share("/srv/export/mounted");
    guest.sh(&format!(
        "mkdir -p /tmp/nfs; mount.nfs -o nolock,vers=4.1,tcp,{MOUNT_OPTIONS} {share} /tmp/nfs"
    ))?;
    let exe = std::env::current_exe()?;
    guest.ok(&[exe.to_str().context("not UTF-8")?, ON_MOUNT, "/tmp/nfs"])?;
    Ok(())
}

fn on_mount(dir: &Path) -> ExitCode {
    let outcome = "nas:/srv/export".parse().map(|share| {
        let settings = AdminSettings {
            op_deadline: Duration::from_secs(30),
            ..AdminSettings::default()
        };
        run(scenarios::all(&Admin::mounted(
            share,
            dir.to_owned(),
            settings,
        )))
    });
    match outcome {
        Ok(Ok(())) => ExitCode::SUCCESS,
        other => {
            eprintln!("{other:?}");
            ExitCode::FAILURE
        }
    }
}

fn probe_tells_the_versions(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let v6 = format!("[{}]:{EXPORT}", nas.node().ip6());
    for share in [nas.share(EXPORT), v6] {
        let reached = ask(&share, Ports::default())??;
        ensure!(reached.v3 && reached.v4, "{reached:?}");
        ensure!(
            reached.nfs_port == 2049 && reached.mount_port == Some(20048),
            "{reached:?}"
        );
        ensure!(
            reached.fsinfo.is_some_and(|limits| limits.rtmax >= 65536),
            "{reached:?}"
        );
    }
    let four = Ganesha::start_speaking(lab, "four", &[Export::new(EXPORT)], "4")?;
    let reached = ask(&four.share(EXPORT), Ports::default())??;
    ensure!(
        reached.v4 && !reached.v3 && reached.v3_error.is_none(),
        "{reached:?}"
    );
    let error = run(admin(&four.share(EXPORT), Duration::from_secs(5))?.space())?;
    let error = error.err().context("v3 cannot work here")?;
    let AdminErrorKind::Reach(reason) = &error.kind else {
        anyhow::bail!("{error}");
    };
    ensure!(matches!(reason.cause, Cause::Version { .. }), "{error}");
    four.stop()
}

fn probe_tells_why_not(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let reached = ask(&nas.share("/srv/nothing"), Ports::default())??;
    ensure!(!reached.v3 && reached.v4, "{reached:?}");
    let text = reached.v3_error.context("no reason")?.to_string();
    ensure!(
        text.contains("no such export; the server exports: "),
        "{text}"
    );
    ensure!(text.contains(EXPORT), "{text}");

    let ports = Ports {
        nfs: Some(2050),
        mount: None,
    };
    let Err(error) = ask(&nas.share(EXPORT), ports)? else {
        anyhow::bail!("nobody listens there");
    };
    ensure!(
        (error.step, error.cause.clone()) == (Step::Connect, Cause::Refused),
        "{error}"
    );

    // An address of the lab's network that no node has: nobody answers for it.
    let Err(error) = ask(&format!("10.77.0.254:{EXPORT}"), Ports::default())? else {
        anyhow::bail!("nobody is there");
    };
    ensure!(
        error.step == Step::Connect && error.is_transient(),
        "{error}"
    );
    Ok(())
}

fn squash_and_read_only_are_told(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let dir = path("data")?;
    nas.node()
        .sh("chmod 0755 /srv/squashed; chown root /srv/squashed")?;
    let squashed = admin(&nas.share("/srv/squashed"), Duration::from_secs(5))?;
    let error = run(squashed.mkdir(&dir, 0o755))?.err().context("made")?;
    ensure!(
        error.kind == AdminErrorKind::Access(Refusal::Access),
        "{error}"
    );
    ensure!(error.to_string().contains("no_root_squash"), "{error}");
    nas.node().sh("chmod 0777 /srv/squashed")?;
    ensure!(matches!(run(squashed.mkdir(&dir, 0o755))??, Made::New(_)));
    let error = run(squashed.set_owner(&dir, 999, 999, 0o755))?
        .err()
        .context("changed")?;
    ensure!(matches!(error.kind, AdminErrorKind::Access(_)), "{error}");

    let fixed = admin(&nas.share("/srv/fixed"), Duration::from_secs(5))?;
    let error = run(fixed.mkdir(&dir, 0o755))?.err().context("made")?;
    ensure!(error.kind == AdminErrorKind::ReadOnly, "{error}");
    Ok(())
}

/// Each failure ends within its deadline and is told as what it is; afterwards all is well again
/// without a restart, also when the server comes back with other handles.
fn frozen_and_killed_servers(lab: &'static Lab) -> Result {
    let server = Ganesha::start(lab, "frail", &[Export::new(EXPORT)])?;
    let deadline = Duration::from_secs(3);
    let share = admin(&server.share(EXPORT), deadline)?;
    let dir = path("d")?;
    share.keep_handles(std::slice::from_ref(&dir));
    // By somebody with more patience: only what follows the fault has to be quick.
    let patient = admin(&server.share(EXPORT), Duration::from_secs(20))?;
    ensure!(matches!(run(patient.mkdir(&dir, 0o755))??, Made::New(_)));
    let file = dir.join("f");
    run(patient.write(&file, b"kept"))??;
    comes_back(&share, &file)?;

    server.freeze()?;
    for _ in 0..3 {
        let begun = Instant::now();
        let error = run(share.attr(&file))?
            .err()
            .context("a frozen server answered")?;
        ensure!(error.is_transient(), "{error}");
        ensure!(begun.elapsed() < deadline + SLACK, "{:?}", begun.elapsed());
    }
    let begun = Instant::now();
    let error = run(share.attr(&file))?
        .err()
        .context("a frozen server answered")?;
    // At once: it is known to be silent.
    ensure!(
        begun.elapsed() < deadline / 2,
        "{error}: {:?}",
        begun.elapsed()
    );
    server.thaw()?;
    comes_back(&share, &file)?;

    server.kill()?;
    let error = run(share.attr(&file))?
        .err()
        .context("a dead server answered")?;
    ensure!(matches!(error.kind, AdminErrorKind::Reach(_)), "{error}");
    server.up()?;
    comes_back(&share, &file)?;

    let other = Export {
        fsid: 77,
        ..Export::new(EXPORT)
    };
    server.restart(Some(&[other]))?;
    comes_back(&share, &file)?;
    server.stop()
}

fn comes_back(share: &Admin, file: &SharePath) -> Result {
    let begun = Instant::now();
    loop {
        match run(share.read(file, 100))? {
            Ok(contents) => {
                ensure!(contents.as_deref() == Some(b"kept"), "{contents:?}");
                return Ok(());
            }
            Err(error) => {
                ensure!(error.is_transient(), "{error}");
                ensure!(begun.elapsed() < PATIENCE, "{error}");
            }
        }
        std::thread::sleep(Duration::from_millis(100));
    }
}

/// The calls that a catalog costs, and that they are few.
fn figures(lab: &'static Lab) -> Result {
    let share = admin(&nas(lab)?.share("/srv/figures"), Duration::from_secs(5))?;
    let dir = path("volumes")?;
    share.keep_handles(std::slice::from_ref(&dir));
    run(async {
        let count = |before| share.rpc_count() - before;
        share.mkdir(&dir, 0o755).await?;
        let begun = Instant::now();
        for n in 0..2000 {
            share
                .mkdir(&dir.join(&format!("volume-{n}")), 0o755)
                .await?;
        }
        lab::note(format!("2,000 directories made in {:?}", begun.elapsed()));
        let (begun, before) = (Instant::now(), share.rpc_count());
        let listed = share.list(&dir).await?.context("absent")?;
        lab::note(format!(
            "listed in {:?} with {} RPCs",
            begun.elapsed(),
            count(before)
        ));
        ensure!(
            listed.len() == 2000 && count(before) <= 8,
            "{} RPCs",
            count(before)
        );
        ensure!(listed.iter().all(|entry| entry.attr.is_some()));
        let before = share.rpc_count();
        for entry in listed.iter().take(100) {
            let name = entry.name.to_str().context("not UTF-8")?;
            share.attr(&dir.join(name)).await?.context("absent")?;
        }
        ensure!(count(before) == 100, "{} RPCs", count(before));
        ensure!(share.remove_tree(&dir, &|| true).await?.removed == 2001);
        Ok(())
    })?
}
