//! Servers that list directories otherwise than most do.

use std::collections::BTreeMap;
use std::fs;
use std::os::unix::fs::{FileTypeExt, PermissionsExt};
use std::path::Path;

use anyhow::ensure;
use lab::liar::{Liar, Lie};
use lab::process::run;
use lab::{Lab, Result};
use libtest_mimic::Trial;

use crate::{EXPORT, Host, fuse_trial, nas};

/// More than one answer of READDIRPLUS holds.
const FILES: usize = 2500;

pub(crate) fn trials() -> Vec<Trial> {
    let mut trials = vec![fuse_trial(
        "who_may_read_a_directory_and_not_search_it_sees_names",
        readable,
    )];
    trials.push(fuse_trial("names_longer_than_linux_has", long));
    let lies = [
        ("a_server_without_readdirplus", Lie::NamesOnly),
        ("entries_without_handles", Lie::Bare),
        ("places_that_are_lost", Lie::Strict),
    ];
    trials.extend(lies.map(|(name, lie)| fuse_trial(name, move |lab| odd(lab, name, lie))));
    trials
}

/// What tools see of a directory with all kinds of entries, and that they can remove it.
fn odd(lab: &'static Lab, name: &str, lie: Lie) -> Result {
    let nas = nas(lab)?;
    let dir = name.replace('_', "-");
    let liar = Liar::start(lab, &format!("{dir}-liar"), &nas.ip(), &[2049, 20048])?;
    liar.tell(Some(lie))?;
    let host = Host::mount_at(liar.ip(), nas, &dir, "")?;
    let local = nas.local(EXPORT).join(&dir);
    let tree = local.join("tree");
    fs::create_dir_all(tree.join("sub/below"))?;
    std::os::unix::fs::symlink("sub", tree.join("link"))?;
    run(&["mkfifo", &tree.join("fifo").display().to_string()])?.ok()?;
    for n in 0..FILES {
        fs::write(tree.join(format!("sub/file{n}")), "x")?;
    }
    let seen = host.join("tree");
    ensure!(kinds(&seen)? == kinds(&tree)?);
    ensure!(kinds(&seen.join("sub"))? == kinds(&tree.join("sub"))?);
    let text = seen.display().to_string();
    let found = run(&["find", &text, "-type", "f"])?.ok()?;
    ensure!(found.lines().count() == FILES, "{}", found.lines().count());
    let listed = run(&["ls", "-l", &format!("{text}/sub")])?.ok()?;
    ensure!(
        listed.lines().count() == FILES + 2,
        "{}",
        listed.lines().count()
    );
    // One at a time, as a program does that does not read all names first.
    let mut removed = 0;
    for entry in fs::read_dir(seen.join("sub"))? {
        let path = entry?.path();
        if path.file_name().is_some_and(|name| name != "below") {
            fs::remove_file(path)?;
            removed += 1;
        }
    }
    ensure!(removed == FILES, "{removed} were removed");
    run(&["rm", "-r", &text])?.ok()?;
    ensure!(!tree.exists(), "rm -r left something");
    Ok(())
}

/// They are left out, and the others are there.
fn long(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let liar = Liar::start(lab, "long-liar", &nas.ip(), &[2049, 20048])?;
    let host = Host::mount_at(liar.ip(), nas, "long-names", "")?;
    let local = nas.local(EXPORT).join("long-names");
    for n in 0..FILES {
        fs::write(local.join(format!("file{n}")), "x")?;
    }
    liar.tell(Some(Lie::Long))?;
    let seen = fs::read_dir(&*host)?.count();
    ensure!(seen == FILES - FILES / 10, "{seen}");
    Ok(())
}

/// Names and what they are.
fn kinds(dir: &Path) -> Result<BTreeMap<String, char>> {
    let entries = fs::read_dir(dir)?.map(|entry| {
        let entry = entry?;
        let kind = entry.file_type()?;
        let kind = match () {
            () if kind.is_dir() => 'd',
            () if kind.is_symlink() => 'l',
            () if kind.is_fifo() => 'p',
            () if kind.is_file() => 'f',
            () => '?',
        };
        Ok((entry.file_name().to_string_lossy().into_owned(), kind))
    });
    entries.collect()
}

/// As in a local file system.
fn readable(lab: &'static Lab) -> Result {
    let nas = nas(lab)?;
    let host = Host::mount(nas, "readable", "")?;
    let dir = host.join("dir");
    fs::create_dir(&dir)?;
    for name in ["a", "b"] {
        fs::write(dir.join(name), name)?;
    }
    fs::set_permissions(&dir, PermissionsExt::from_mode(0o744))?;
    let bound = tempfile::tempdir()?;
    fs::set_permissions(bound.path(), PermissionsExt::from_mode(0o755))?;
    let text = bound.path().display().to_string();
    run(&["mount", "--bind", &host.display().to_string(), &text])?.ok()?;
    let other = |command: &str| {
        run(&[
            "setpriv",
            "--reuid=1000",
            "--regid=1000",
            "--clear-groups",
            "sh",
            "-c",
            &format!("cd {text} && {command}"),
        ])
    };
    let listed = other("LC_ALL=C ls dir");
    let read = other("cat dir/a");
    run(&["umount", &text])?.ok()?;
    ensure!(listed?.ok()? == "a\nb");
    ensure!(read?.fails()?.contains("Permission denied"));
    Ok(())
}
