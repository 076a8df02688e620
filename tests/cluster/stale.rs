//! What a power failure left of one volume's worker, and another volume's worker.

use anyhow::ensure;
use lab::{Call, Lab, Nfsvol, Node, Result};

use crate::{EXPORT, FUSE_ARGS, fresh, mountpoint, nas};

/// A socket of one volume names the number that another volume's worker has now. Mounting the one
/// must not end the other's worker, and does with the fault put back.
pub(crate) fn stale(lab: &'static Lab) -> Result {
    ensure!(other_lives(lab, "stale", &[])?, "the worker was ended");
    let fault = [("NFSVOL_MUTANT", "AttendantByNumber")];
    ensure!(
        !other_lives(lab, "mutant", &fault)?,
        "the fault is not found"
    );
    Ok(())
}

fn other_lives(lab: &'static Lab, name: &str, env: &[(&str, &str)]) -> Result<bool> {
    let share = nas(lab)?.share(EXPORT);
    let node: &'static Node = Box::leak(Box::new(Node::machine(lab, name)?));
    let mut args = vec!["--share", &share];
    args.extend(FUSE_ARGS);
    let nfsvol = Nfsvol::start(node, &args, env)?;
    let ok = |call| crate::calls::one(node, call)?.ok();
    let (one, other) = (fresh("one"), fresh("other"));
    let exclusive = [("access", "exclusive")];
    ok(Call::create(&one, &exclusive))?;
    ok(Call::create(&other, &exclusive))?;
    let place = mountpoint(&ok(Call::mount(&other, "reader"))?)?;
    node.sh(&format!("echo unsynced >{place}/file"))?;
    let worker = node.sh("pgrep -f '[n]fsvol fuse-worker'")?;
    node.sh(&format!(
        "d=/var/lib/nfsvol/fuse/{one}; mkdir -p $d
         perl -MIO::Socket::UNIX -e 'IO::Socket::UNIX->new(Local => shift, Listen => 1) or die $!' \
         $d/{worker}.sock"
    ))?;
    let mounted = crate::calls::one(node, Call::mount(&one, "writer"))?;
    let lives = node
        .sh(&format!("cat {place}/file"))
        .is_ok_and(|read| read == "unsynced")
        && node.run(&["kill", "-0", &worker])?.code == 0;
    if lives {
        mounted.ok()?;
        let left = node.sh(&format!("ls /var/lib/nfsvol/fuse/{one}"))?;
        ensure!(!left.contains(&format!("{worker}.sock")), "{left}");
        ok(Call::unmount(&one, "writer"))?;
        ok(Call::unmount(&other, "reader"))?;
    }
    nfsvol.process().stop()?;
    Ok(lives)
}
