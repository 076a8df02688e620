//! An Unmount that fails.

use std::thread;

use anyhow::{anyhow, ensure};
use lab::{Call, Lab, Nfsvol, Node, PATIENCE, Result, wait_for};

use crate::{EXPORT, FUSE_ARGS, Host, fresh, nas};

/// The volume seems to be mounted by the kernel's client as well, and something is mounted below that.
const KEPT: &str = "own=/var/lib/nfsvol/mnt/shares/own.VOLUME; mkdir -p $own
    mount -t tmpfs tmpfs $own; mkdir $own/below; mount -t tmpfs tmpfs $own/below";
const FREED: &str = "own=/var/lib/nfsvol/mnt/shares/own.VOLUME; umount $own/below; umount $own";

/// Docker asks once: a volume that could not be unmounted then is let go of when it can be.
pub(crate) fn unmount(lab: &'static Lab) -> Result {
    let (now, before) = thread::scope(|scope| {
        let before = scope.spawn(|| is_let_go_of(lab, "kept-before", "FailedUnmountStays"));
        (is_let_go_of(lab, "kept", ""), before.join())
    });
    ensure!(now?, "an attachment that nobody ends");
    ensure!(!before.map_err(|_| anyhow!("a panic"))??);
    Ok(())
}

fn is_let_go_of(lab: &'static Lab, word: &str, fault: &str) -> Result<bool> {
    let nas = nas(lab)?;
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, &format!("{word}-a"))?));
    let share = nas.share(EXPORT);
    let mut args = vec!["--share", &share];
    args.extend(FUSE_ARGS);
    let nfsvol = Nfsvol::start(node, &args, &[("NFSVOL_MUTANT", fault)])?;
    let (a, b) = (Host { node, nfsvol }, Host::start(lab, nas, word, "b")?);
    let (volume, other) = (fresh("kept"), fresh("kept"));
    a.ok(Call::create(&volume, &[]))?;
    a.ok(Call::mount(&volume, "a"))?;
    node.sh(&KEPT.replace("VOLUME", &volume))?;
    let error = a.fails(Call::unmount(&volume, "a"))?;
    ensure!(error.contains("no other host gets it yet"), "{error}");
    let refused = b.fails(Call::remove(&volume))?;
    ensure!(refused.contains(a.name()), "{refused}");
    node.sh(&FREED.replace("VOLUME", &volume))?;
    // What changes here is told, with all that is true by then.
    a.ok(Call::create(&other, &[]))?;
    a.ok(Call::mount(&other, "a"))?;
    a.ok(Call::unmount(&other, "a"))?;
    let attached = !a.ok(Call::get(&volume))?["Volume"]["Status"]["attachments"].is_null();
    if attached {
        return Ok(false);
    }
    wait_for("the volume to be let go of", PATIENCE, || {
        b.ask(Call::remove(&volume))
            .is_ok_and(|answer| answer.status == 200)
    })?;
    Ok(true)
}
