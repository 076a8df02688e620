//! A state directory on a disk that is full: what needs it fails with its name and leaves nothing
//! half done, the rest goes on, and all is well once there is room.

use anyhow::ensure;
use lab::{Call, Part, Result, trial};
use libtest_mimic::Trial;

use crate::world::{Path, World};

pub(crate) fn trials() -> Vec<Trial> {
    let needs: &[Part] = &[Part::Ganesha, Part::Fuse];
    vec![trial("full-state-disk", needs, |lab| {
        full(World::new(lab, "full-state-disk", Path::Fuse, true)?)
    })]
}

/// What the error of a call must say.
fn names_the_disk(world: &World, call: Call) -> Result {
    let error = world.a.call(call)?.fails()?;
    for part in ["No space left on device", world.a.state(), "free space"] {
        ensure!(error.contains(part), "{part}: {error}");
    }
    Ok(())
}

fn full(world: World) -> Result {
    let (host, state) = (&world.a, world.a.state());
    host.node().sh(&format!(
        "mkdir -p {state}; mount -t tmpfs -o size=1m tmpfs {state}"
    ))?;
    let a = host.start("")?;
    let b = world.b.start("")?;
    host.ok(Call::create("old", &[]))?;
    host.ok(Call::create("held", &[]))?;
    let place = host.mount("held", "h-1")?;
    host.node().sh(&format!("echo kept >{place}/file"))?;

    host.node()
        .sh(&format!("! cat /dev/zero 2>/dev/null >{state}/ballast"))?;
    names_the_disk(&world, Call::create("new", &[]))?;
    ensure!(!world.agree("new")?, "half made");
    ensure!(!world.disk.0.join("new").exists());
    names_the_disk(&world, Call::mount("old", "o-1"))?;
    ensure!(!host.is_mounted("old")?, "{}", host.mounts()?);
    // The second attachment of a volume is refused, and the first one stays.
    names_the_disk(&world, Call::mount("held", "h-2"))?;
    ensure!(host.node().sh(&format!("cat {place}/file"))? == "kept");
    // What needs no room goes on, also after a crash.
    a.kill()?;
    a.up()?;
    ensure!(world.agree("old")? && world.agree("held")?);
    ensure!(host.node().sh(&format!("cat {place}/file"))? == "kept");
    host.ok(Call::unmount("held", "h-1"))?;
    ensure!(!host.is_mounted("held")?);
    host.ok(Call::remove("held"))?;
    ensure!(!world.agree("held")?);

    host.node().sh(&format!("rm {state}/ballast"))?;
    host.ok(Call::create("new", &[]))?;
    for name in ["new", "old"] {
        host.mount(name, "m-1")?;
        host.ok(Call::unmount(name, "m-1"))?;
    }
    ensure!(world.agree("new")?);
    world.end(a, b)
}
