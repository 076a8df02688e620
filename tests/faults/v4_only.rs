//! A home share whose server speaks only NFSv4: the catalog is kept over a kernel mount.

use std::time::{Duration, Instant};

use anyhow::{Context, ensure};
use lab::{Call, Export, Ganesha, Lab, Nfsvol, Node, PATIENCE, Result, calls, wait_for};
use serde_json::Value;

use crate::kinds::{EXPORT, exports};

const VOLUMES: &str = "/var/lib/nfsvol/mnt/volumes";
/// `--deadline`, and what it takes on a busy machine until the test has the answer.
const ANSWERED: Duration = Duration::from_secs(15 + 30);

/// Of each trial's own: one of them silences it.
fn server(lab: &'static Lab, name: &str) -> Result<Ganesha> {
    Ganesha::start_speaking(lab, name, &exports(), "4")
}

fn serve(node: &'static Node, server: &Ganesha) -> Result<Nfsvol<'static>> {
    let share = server.share(EXPORT);
    let args = [
        ["--share", &share],
        ["--deadline", "15s"],
        ["--mount-deadline", "12s"],
        ["--op-deadline", "2s"],
        ["--poll", "1s"],
    ];
    Nfsvol::start(node, args.as_flattened(), &[])
}

pub(crate) fn works(lab: &'static Lab) -> Result {
    let server = &server(lab, "four-nas")?;
    let node: &'static Node = Box::leak(Box::new(Node::guest(lab, "four")?));
    let nfsvol = serve(node, server)?;
    let ok = |call: Call| -> Result<Value> { calls::one(node, call)?.ok() };
    let listed = || Ok::<_, anyhow::Error>(ok(Call::list())?.to_string());
    let owner = [("uid", "7"), ("gid", "8"), ("mode", "0750")];
    ok(Call::create("db", &owner))?;
    ok(Call::create("db", &owner))?;
    let stat = server
        .node()
        .sh(&format!("stat -c '%u %g %a' {EXPORT}/db"))?;
    ensure!(stat == "7 8 750", "{stat}");
    ensure!(listed()?.contains("\"db\""));
    ok(Call::mount("db", "c1"))?;
    node.sh(&format!("echo kept >{VOLUMES}/db/file"))?;
    ok(Call::unmount("db", "c1"))?;

    ok(Call::remove("db"))?;
    ensure!(!listed()?.contains("\"db\""));
    let trash = nfsvol.command(&["trash", "ls"])?.ok()?;
    ensure!(trash.contains("db"), "{trash}");
    nfsvol.command(&["restore", "db"])?.ok()?;
    ok(Call::mount("db", "c2"))?;
    let kept = node.sh(&format!("cat {VOLUMES}/db/file"))?;
    ensure!(kept == "kept", "{kept}");
    ok(Call::unmount("db", "c2"))?;

    // It falls silent, comes back, and is started anew with other ids.
    server.freeze()?;
    for call in [
        Call::create("new", &[]),
        Call::remove("db"),
        Call::get("db"),
    ] {
        let answer = calls::one(node, call)?;
        lab::note(format!("silent: {answer}"));
        ensure!(answer.took < ANSWERED, "{answer}");
        if answer.call.contains(".Get") {
            answer.ok()?;
        } else {
            let text = answer.fails()?;
            ensure!(text.contains(&server.share(EXPORT)), "{text}");
        }
    }
    server.thaw()?;
    comes_back(node, "thawed").context("after the silence")?;
    let other = Export {
        fsid: 77,
        ..Export::new(EXPORT)
    };
    server.restart(Some(&[other]))?;
    comes_back(node, "restarted").context("with other ids")?;
    // An administrator's `umount -a -t nfs` leaves an empty directory, which is not the share.
    node.sh("umount -l /var/lib/nfsvol/mnt/shares/*")?;
    comes_back(node, "unmounted").context("unmounted")?;
    ok(Call::mount("db", "c3"))?;
    let kept = node.sh(&format!("cat {VOLUMES}/db/file"))?;
    ensure!(kept == "kept", "{kept}");
    ok(Call::unmount("db", "c3"))?;

    // Nothing of it is left mounted after the daemon's end.
    for name in ["db", "new", "thawed", "restarted", "unmounted"] {
        ok(Call::remove(name))?;
    }
    nfsvol.process().stop()?;
    let mounts = node.sh("cat /proc/self/mountinfo")?;
    ensure!(!mounts.contains(&server.share(EXPORT)), "{mounts}");
    Ok(())
}

fn comes_back(node: &Node, volume: &str) -> Result {
    let began = Instant::now();
    let mut last = String::new();
    wait_for("the share to be used again", PATIENCE, || {
        let answer = calls::one(node, Call::create(volume, &[]));
        let Ok(answer) = answer else { return false };
        last = answer.to_string();
        answer.status == 200
    })
    .with_context(|| last.clone())?;
    lab::note(format!("{volume}: {:?}", began.elapsed()));
    Ok(())
}

/// Without the kernel's client there is no way to such a server: that is said, and what to do.
pub(crate) fn needs_the_kernel(lab: &'static Lab) -> Result {
    let server = &server(lab, "four-less-nas")?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, "four-less")?));
    if node.run(&["grep", "-qw", "nfs", "/proc/filesystems"])?.code == 0 {
        return Ok(());
    }
    let _nfsvol = serve(node, server)?;
    let text = calls::one(node, Call::create("db", &[]))?.fails()?;
    lab::note(format!("without the kernel's client: {text}"));
    for word in [
        server.share(EXPORT).as_str(),
        "only NFSv4",
        "NFS client",
        "NFSv3",
    ] {
        ensure!(text.contains(word), "{word}: {text}");
    }
    Ok(())
}
