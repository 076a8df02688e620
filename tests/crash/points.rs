//! kill -9 of the daemon at every named step (`fail_point!` in the source).
//!
//! [`TABLE`] lists the points with the call that passes them; a point without a row fails
//! [`every_point_has_a_row`]. Each trial has a bystander, a volume that stays attached all the
//! time, and a second host that looks at the same share.

use std::collections::BTreeSet;
use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::Path as FilePath;

use anyhow::{Context, ensure};
use lab::{Call, Nfsvol, PATIENCE, Part, Result, trial, wait_for};
use libtest_mimic::Trial;
use serde_json::json;

use crate::world::{Path, World};

/// The call that is under way when the daemon dies.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Op {
    /// Create on a share that holds nothing of nfsvol's yet.
    First,
    Create,
    Mount,
    Unmount,
    Remove,
    /// Remove of a volume with `on_remove=delete`.
    Delete,
    /// Remove on a host without a home share.
    RemoveHere,
    Restore,
}

use Op::{Create, Delete, First, Mount, Remove, RemoveHere, Restore, Unmount};
use Path::{Fuse, Kernel};

/// Who repeats the call after the crash.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum By {
    SameHost,
    OtherHost,
}

use By::{OtherHost, SameHost};

const TABLE: &[(&str, Op, Path, By)] = &[
    ("home.aside", First, Fuse, SameHost),
    ("home.made", First, Fuse, OtherHost),
    ("create.made", Create, Fuse, SameHost),
    ("create.aside", Create, Fuse, SameHost),
    ("create.drafted", Create, Fuse, SameHost),
    ("create.prepared", Create, Fuse, OtherHost),
    ("create.published", Create, Fuse, SameHost),
    ("create.published", Create, Fuse, OtherHost),
    ("create.parents", Create, Fuse, SameHost),
    ("create.placed", Create, Fuse, SameHost),
    ("state.durable", Create, Fuse, SameHost),
    ("create.kept", Create, Fuse, OtherHost),
    ("mount.held", Mount, Fuse, SameHost),
    ("mount.ready", Mount, Fuse, SameHost),
    ("fuse.started", Mount, Fuse, SameHost),
    ("fuse.told", Mount, Fuse, SameHost),
    ("mount.creating", Mount, Kernel, SameHost),
    ("mount.share", Mount, Kernel, SameHost),
    ("mount.place", Mount, Kernel, SameHost),
    ("mount.attached", Mount, Kernel, SameHost),
    ("mount.attached", Mount, Fuse, SameHost),
    ("state.whole", Mount, Fuse, SameHost),
    ("mount.written", Mount, Fuse, SameHost),
    ("fuse.left", Unmount, Fuse, SameHost),
    ("fuse.taken", Unmount, Fuse, SameHost),
    ("unmount.flushed", Unmount, Kernel, SameHost),
    ("unmount.taken", Unmount, Kernel, SameHost),
    ("unmount.detached", Unmount, Kernel, SameHost),
    ("unmount.detached", Unmount, Fuse, SameHost),
    ("unmount.forgotten", Unmount, Fuse, SameHost),
    ("remove.detached", Remove, Fuse, SameHost),
    ("remove.announced", Remove, Fuse, SameHost),
    ("remove.announced", Remove, Fuse, OtherHost),
    ("remove.begun", Remove, Fuse, SameHost),
    ("remove.begun", Remove, Fuse, OtherHost),
    ("remove.entry", Remove, Fuse, SameHost),
    ("remove.data", Remove, Fuse, OtherHost),
    ("remove.data", Remove, Fuse, SameHost),
    ("remove.finished", Remove, Fuse, SameHost),
    ("remove.forgotten", Remove, Fuse, OtherHost),
    ("remove.finished", Delete, Fuse, SameHost),
    ("purge.renamed", Delete, Fuse, SameHost),
    ("remove.local-entry", RemoveHere, Fuse, SameHost),
    ("remove.local-record", RemoveHere, Fuse, SameHost),
    ("remove.local-data", RemoveHere, Fuse, SameHost),
    ("restore.taken", Restore, Fuse, SameHost),
    ("restore.renamed", Restore, Fuse, SameHost),
    ("restore.data", Restore, Fuse, SameHost),
    ("restore.claims", Restore, Fuse, SameHost),
    ("restore.published", Restore, Fuse, SameHost),
    ("restore.record", Restore, Fuse, SameHost),
];

/// The volume of the call under way.
const VOLUME: &str = "vol";
/// The volume that stays attached.
const BYSTANDER: &str = "by";
/// Where its data lies; the parent is made with it.
const DIR: &str = "deep/vol";

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials: Vec<Trial> = TABLE
        .iter()
        .map(|&(point, op, path, by)| {
            let needs: &[Part] = match path {
                Fuse => &[Part::Ganesha, Part::Fuse],
                Kernel => &[Part::Ganesha, Part::Fuse, Part::Guest],
            };
            let name = format!("{point}-{op:?}-{path:?}-{by:?}").to_lowercase();
            let share = name.replace('.', "-");
            trial(name, needs, move |lab| {
                // A guest is slow to boot: one serves all its trials, one after another.
                static GUEST: std::sync::Mutex<()> = std::sync::Mutex::new(());
                let _alone = (path == Kernel).then(|| GUEST.lock());
                let world = World::new(lab, &share, path, op != RemoveHere)?;
                crash(world, point, op, path, by)
            })
        })
        .collect();
    trials.push(trial("every_point_has_a_row", &[], |_| {
        every_point_has_a_row()
    }));
    trials
}

/// The names of the fail points in the source, which this table must know, and no others.
fn every_point_has_a_row() -> Result {
    fn collect(dir: &FilePath, points: &mut BTreeSet<String>) -> Result {
        for entry in fs::read_dir(dir)? {
            let path = entry?.path();
            if path.is_dir() {
                collect(&path, points)?;
                continue;
            }
            let text = fs::read_to_string(&path)?;
            let mut calls = text.split("fail_point!(\"");
            calls.next();
            points.extend(calls.filter_map(|rest| Some(rest.split_once('"')?.0.to_owned())));
        }
        Ok(())
    }
    let mut points = BTreeSet::new();
    collect(
        &FilePath::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut points,
    )?;
    let rows: BTreeSet<String> = TABLE.iter().map(|row| row.0.to_owned()).collect();
    let differ: Vec<_> = points.symmetric_difference(&rows).collect();
    ensure!(
        differ.is_empty(),
        "a point without a row, or a row without its point: {differ:?}"
    );
    Ok(())
}

fn crash(world: World, point: &str, op: Op, path: Path, by: By) -> Result {
    let share = world.share.clone();
    let on: &[(&str, &str)] = if op == RemoveHere {
        &[("share", &share)]
    } else {
        &[]
    };
    let options: Vec<(&str, &str)> = on
        .iter()
        .copied()
        .chain(match op {
            Delete => vec![("on_remove", "delete")],
            // Not by the mount that the bystander keeps.
            Mount if path == Kernel => vec![("options", "nfsvers=3")],
            _ => vec![],
        })
        .chain([("subdir", "deep/{name}"), ("uid", "1000"), ("mode", "0750")])
        .collect();
    let create = Call::create(VOLUME, &options);

    // As it was before the call.
    if op != First {
        let a = world.a.start("")?;
        prepare(&world, op, on, &create)?;
        world.settle(&a)?;
    }

    // The call, and the crash.
    if op == First {
        world.a.dies_at_start(&armed(point))?;
    } else {
        let a = world.a.start(&armed(point))?;
        let answer = world.a.call(match op {
            First | Create => create.clone(),
            Mount => Call::mount(VOLUME, "m-1"),
            Unmount => Call::unmount(VOLUME, "m-1"),
            Remove | Delete | RemoveHere => Call::remove(VOLUME),
            Restore => restore(),
        })?;
        a.process()
            .wait(PATIENCE)
            .with_context(|| format!("{point} was not passed: {answer}"))?;
        // What is deleted later is deleted behind the answer, which may or may not come in time.
        let answered = point == "purge.renamed";
        ensure!(answered || answer.status != 200, "{answer}");
    }
    world.disk.check_at_any_time()?;
    if !matches!(op, First | Delete) {
        let found = world.disk.find("precious")?;
        ensure!(found.len() == 1, "data is in one place: {found:?}");
    }

    // As it is after: wholly before the call or wholly after it, on both hosts.
    let (a, b) = (world.a.start("")?, world.b.start("")?);
    if op != First {
        bystander_is_attached(&world)?;
    }
    let other = by == OtherHost;
    match op {
        First | Create => created(&world, &create, other)?,
        Mount => mounted(&world)?,
        Unmount => unmounted(&world)?,
        Remove | Delete => removed(&world, op, other, &b)?,
        RemoveHere => removed_here(&world, &b)?,
        Restore => restored(&world, &b)?,
    }
    if op != First {
        bystander_is_attached(&world)?;
        world.a.ok(Call::unmount(BYSTANDER, "by-1"))?;
        ensure!(!world.a.is_mounted(BYSTANDER)?, "{}", world.a.mounts()?);
    }
    world.end(a, b)
}

/// The setting that makes the daemon die at a point.
fn armed(point: &str) -> String {
    format!("{point}=return")
}

fn restore() -> Call {
    Call::new("Nfsvol.Restore", &json!({ "Name": VOLUME }))
}

fn prepare(world: &World, op: Op, on: &[(&str, &str)], create: &Call) -> Result {
    let a = &world.a;
    a.ok(Call::create(BYSTANDER, on))?;
    let place = a.mount(BYSTANDER, "by-1")?;
    a.node().sh(&format!("echo stays >{place}/file"))?;
    if op == Create {
        a.ok(Call::create(VOLUME, &[("subdir", "older/{name}")]))?;
        fs::write(world.disk.0.join("older/vol/precious"), "kept\n")?;
    } else {
        a.ok(create.clone())?;
        fs::write(world.disk.0.join(DIR).join("precious"), "kept\n")?;
    }
    match op {
        // An older volume of this name lies in the trash.
        Create | Restore => {
            a.ok(Call::remove(VOLUME))?;
        }
        Unmount => {
            let place = a.mount(VOLUME, "m-1")?;
            a.node().sh(&format!("echo new >{place}/written"))?;
        }
        First | Mount | Remove | Delete | RemoveHere => {}
    }
    Ok(())
}

fn bystander_is_attached(world: &World) -> Result {
    let answer = world.a.ok(Call::get(BYSTANDER))?;
    let place = answer["Volume"]["Mountpoint"].as_str();
    let place = place.context("no mount point")?;
    ensure!(world.a.attachments(BYSTANDER)? == 1);
    ensure!(world.a.is_mounted(BYSTANDER)?, "{}", world.a.mounts()?);
    let read = world.a.node().sh(&format!("cat {place}/file"))?;
    ensure!(read == "stays", "{read}");
    Ok(())
}

fn created(world: &World, create: &Call, other: bool) -> Result {
    let (a, b) = (&world.a, &world.b);
    if world.agree(VOLUME)? {
        // Whoever uses the volume next makes it whole.
        let place = b.mount(VOLUME, "b-1")?;
        b.node().sh(&format!("test -z \"$(ls -A {place})\""))?;
        b.ok(Call::unmount(VOLUME, "b-1"))?;
    }
    let again = if other { b } else { a };
    again.ok(create.clone())?;
    ensure!(world.agree(VOLUME)?);
    world.disk.check_at_rest()?;
    let made = fs::metadata(world.disk.0.join(DIR))?;
    ensure!(
        (made.uid(), made.mode() & 0o7777) == (1000, 0o750),
        "{made:?}"
    );
    let refused = a.call(Call::create(VOLUME, &[("uid", "7")]))?.fails()?;
    ensure!(refused.contains("uid"), "{refused}");
    for host in [a, b] {
        let place = host.mount(VOLUME, "m-2")?;
        host.node().sh(&format!("echo {place} >>{place}/shared"))?;
        host.ok(Call::unmount(VOLUME, "m-2"))?;
    }
    let shared = fs::read_to_string(world.disk.0.join(DIR).join("shared"))?;
    ensure!(shared.lines().count() == 2, "{shared}");
    // The older volume is where it was.
    for precious in world.disk.find("precious")? {
        let entry = precious.components().rev().nth(2).context("no entry")?;
        let entry = entry.as_os_str().to_string_lossy();
        a.ok(Call::new(
            "Nfsvol.Restore",
            &json!({ "Name": entry, "As": "older" }),
        ))?;
        ensure!(world.disk.0.join("older/older/precious").exists());
    }
    Ok(())
}

fn mounted(world: &World) -> Result {
    let a = &world.a;
    ensure!(world.agree(VOLUME)?);
    let place = a.mount(VOLUME, "m-1")?;
    let read = a.node().sh(&format!("cat {place}/precious"))?;
    ensure!(read == "kept", "{read}");
    ensure!(
        a.mounts()?
            .matches(&format!("/mnt/volumes/{VOLUME} "))
            .count()
            == 1,
        "{}",
        a.mounts()?
    );
    a.ok(Call::unmount(VOLUME, "m-1"))?;
    let counted = a.attachments(VOLUME)? > 0;
    ensure!(a.is_mounted(VOLUME)? == counted, "{}", a.mounts()?);
    // A Mount that was written down before its answer was lost counts, until nothing stands
    // behind it for long enough.
    let mut last = String::new();
    wait_for("the volume to be removed", PATIENCE, || {
        let answer = a.call(Call::remove(VOLUME));
        last = answer
            .as_ref()
            .map_or_else(ToString::to_string, ToString::to_string);
        answer.is_ok_and(|answer| answer.status == 200)
    })
    .with_context(|| last)?;
    ensure!(!a.is_mounted(VOLUME)?, "{}", a.mounts()?);
    Ok(())
}

fn unmounted(world: &World) -> Result {
    let a = &world.a;
    a.ok(Call::unmount(VOLUME, "m-1"))?;
    ensure!(!a.is_mounted(VOLUME)?, "{}", a.mounts()?);
    let written = fs::read_to_string(world.disk.0.join(DIR).join("written"))?;
    ensure!(written == "new\n", "{written}");
    let place = a.mount(VOLUME, "m-2")?;
    a.node()
        .sh(&format!("cat {place}/precious {place}/written"))?;
    a.ok(Call::unmount(VOLUME, "m-2"))?;
    ensure!(!a.is_mounted(VOLUME)?, "{}", a.mounts()?);
    a.ok(Call::remove(VOLUME))?;
    Ok(())
}

fn removed(world: &World, op: Op, other: bool, b: &Nfsvol) -> Result {
    let a = &world.a;
    let again = if other { &world.b } else { a };
    again.ok(Call::remove(VOLUME))?;
    a.ok(Call::remove(VOLUME))?;
    ensure!(!world.agree(VOLUME)?, "removed, and still there");
    ensure!(!world.disk.0.join(DIR).exists());
    if op == Delete {
        return wait_for("the trash to be emptied", PATIENCE, || {
            world.disk.names("trash").is_empty()
        })
        .with_context(|| format!("{:?}", world.disk.names("trash")));
    }
    ensure!(world.disk.names("trash").len() == 1);
    again.ok(restore())?;
    ensure!(world.agree(VOLUME)?);
    ensure!(world.disk.0.join(DIR).join("precious").exists());
    tidied(world, b)
}

/// What a restore leaves that had to ask the server again is swept once it is old.
fn tidied(world: &World, b: &Nfsvol) -> Result {
    let files = || world.disk.names(&format!("volumes/{VOLUME}"));
    if files().len() > 1 {
        world.disk.age_restored(VOLUME)?;
        b.kill()?;
        b.up()?;
    }
    wait_for("what was left to be swept", PATIENCE, || files().len() == 1)
}

fn removed_here(world: &World, b: &Nfsvol) -> Result {
    let a = &world.a;
    a.ok(Call::remove(VOLUME))?;
    ensure!(!a.knows(VOLUME)?);
    ensure!(!world.disk.0.join(DIR).exists());
    let entries = world.disk.names("trash");
    ensure!(entries.len() == 1, "{entries:?}");
    world.b.ok(restore())?;
    ensure!(world.disk.0.join(DIR).join("precious").exists());
    tidied(world, b)
}

fn restored(world: &World, b: &Nfsvol) -> Result {
    let (a, disk) = (&world.a, &world.disk);
    if !world.agree(VOLUME)? {
        a.ok(restore())?;
    }
    ensure!(world.agree(VOLUME)?);
    ensure!(disk.0.join(DIR).join("precious").exists());
    // What a restore that had published has left goes away once it is old.
    disk.age_restored(VOLUME)?;
    // An entry that was emptied as well, by its name.
    for entry in disk.names("trash") {
        fs::rename(
            disk.own("trash").join(&entry),
            disk.own("trash")
                .join(format!("{VOLUME}.20200101T000000Z.01234567")),
        )?;
    }
    b.kill()?;
    b.up()?;
    wait_for("what was left to be swept", PATIENCE, || {
        disk.names("trash").is_empty() && disk.names(&format!("volumes/{VOLUME}")).len() == 1
    })
}
