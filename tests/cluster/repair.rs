//! What a server's power failure has torn on the home share, and `nfsvol repair`.

use std::fs;

use anyhow::ensure;
use lab::{Call, Export, Ganesha, Lab, PATIENCE, Result, wait_for};

use crate::{EXPORT, Host, fresh};

/// A record is empty, one is missing, and `format.json` is empty: what a server may bring back that
/// forgets its last seconds.
pub(crate) fn repair(lab: &'static Lab) -> Result {
    let nas = Ganesha::start(lab, "repair-nas", &[Export::new(EXPORT)])?;
    let (a, b) = (
        Host::start(lab, &nas, "repair", "a")?,
        Host::start(lab, &nas, "repair", "b")?,
    );
    let (empty, missing, whole) = (fresh("empty"), fresh("missing"), fresh("whole"));
    for volume in [&empty, &missing, &whole] {
        a.ok(Call::create(volume, &[("access", "exclusive")]))?;
        a.ok(Call::mount(volume, "it"))?;
        a.ok(Call::unmount(volume, "it"))?;
    }
    nas.stop()?;
    let own = nas.local(EXPORT).join(".nfsvol");
    let record = |volume: &str| own.join("volumes").join(volume).join("record.json");
    let before = fs::read(record(&empty))?;
    fs::write(record(&empty), "")?;
    fs::remove_file(record(&missing))?;
    fs::write(own.join("format.json"), "")?;
    nas.up()?;

    // A host that found the server away asks it again a moment later.
    wait_for("the torn share to be found out", PATIENCE, || {
        let refused = a.fails(Call::create(&fresh("new"), &[]));
        refused.is_ok_and(|refused| refused.contains("nfsvol repair"))
    })?;
    // A host that has never read it says what is wrong with it, and not that it is none.
    let c = Host::start(lab, &nas, "repair", "c")?;
    let refused = c.fails(Call::mount(&empty, "it"))?;
    ensure!(refused.contains("nfsvol repair"), "{refused}");
    let aborted = c.nfsvol.command(&["abort", &empty])?;
    ensure!(
        aborted.code == 1 && aborted.stderr.contains("is not mounted on this host"),
        "{aborted:?}"
    );
    let doctor = a.nfsvol.command(&["doctor"])?;
    for torn in ["format.json", &empty, &missing] {
        let said = doctor.stdout.lines().find(|line| line.contains(torn));
        ensure!(
            said.is_some_and(|l| l.starts_with("FAIL  records")),
            "{doctor:?}"
        );
    }
    ensure!(doctor.stdout.contains("-> nfsvol repair"), "{doctor:?}");
    // What shows the volume warns, also from a copy.
    let inspected = a.nfsvol.command(&["inspect", &empty])?;
    for shown in [inspected, a.nfsvol.command(&["ls"])?] {
        let way_out = format!("nfsvol repair {empty}");
        ensure!(
            shown.code == 0 && shown.stdout.contains(&way_out),
            "{shown:?}"
        );
    }
    let inspected = c.nfsvol.command(&["inspect", &empty])?;
    let listed = c.nfsvol.command(&["ls"])?;
    ensure!(
        inspected.code == 1 && inspected.stderr.contains("nfsvol repair"),
        "{inspected:?}"
    );
    let row = listed
        .stdout
        .lines()
        .any(|line| line.trim().starts_with(&empty));
    ensure!(row && listed.stdout.contains("nfsvol repair"), "{listed:?}");
    let shown = a.nfsvol.command(&["repair"])?;
    ensure!(shown.code == 1, "it asks: {shown:?}");
    for torn in ["format.json", &empty, &missing] {
        let line = shown.stdout.lines().find(|line| line.contains(torn));
        ensure!(line.is_some_and(|l| l.contains("would be")), "{shown:?}");
    }
    ensure!(!shown.stdout.contains(&whole), "{shown:?}");
    ensure!(fs::read(record(&empty))?.is_empty(), "nothing was changed");
    let done = a.nfsvol.command(&["repair", "--yes"])?;
    ensure!(done.code == 0, "{done:?}");
    let tables = done.stdout.lines().filter(|line| line.contains("RESULT"));
    ensure!(tables.count() == 1, "{done:?}");
    ensure!(fs::read(record(&empty))? == before, "another record");
    wait_for("the other host to find nothing torn", PATIENCE, || {
        let again = b.nfsvol.command(&["repair"]);
        again.is_ok_and(|said| said.code == 0 && said.stdout.contains("nothing is torn"))
    })?;

    let doctor = a.nfsvol.command(&["doctor"])?;
    ensure!(doctor.stdout.contains("ok    records"), "{doctor:?}");
    for host in [&b, &a] {
        for volume in [&empty, &missing, &whole] {
            host.ok(Call::mount(volume, "it"))?;
            host.ok(Call::unmount(volume, "it"))?;
        }
    }
    a.ok(Call::create(&fresh("new"), &[]))?;
    // What was removed is not brought back.
    b.ok(Call::remove(&empty))?;
    let gone = a.nfsvol.command(&["repair", "--yes", &empty])?;
    ensure!(
        gone.code == 1 && gone.stderr.contains("no such volume"),
        "{gone:?}"
    );
    let aborted = a.nfsvol.command(&["abort", &fresh("nobody")])?;
    ensure!(
        aborted.code == 1 && aborted.stderr.contains("no such volume"),
        "{aborted:?}"
    );
    Ok(())
}
