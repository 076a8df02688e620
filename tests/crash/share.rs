//! What lies on the share, read from the server's own disk behind everybody's back.

use std::fs;
use std::os::unix::fs::MetadataExt;
use std::path::{Path, PathBuf};

use anyhow::{Context, ensure};
use lab::Result;
use lab::process::run;
use serde_json::Value;

/// A share as a directory of the server.
#[derive(Clone, Debug)]
pub(crate) struct Disk(pub(crate) PathBuf);

impl Disk {
    pub(crate) fn own(&self, below: &str) -> PathBuf {
        self.0.join(".nfsvol").join(below)
    }

    /// The names in a directory of `.nfsvol/`; none where it is absent.
    pub(crate) fn names(&self, below: &str) -> Vec<String> {
        names(&self.own(below))
    }

    /// Every file of this name on the share, in the trash and `tmp/` as well.
    pub(crate) fn find(&self, file: &str) -> Result<Vec<PathBuf>> {
        let root = self.0.to_str().context("the lab's path is not UTF-8")?;
        let found = run(&["find", root, "-name", file])?.ok()?;
        Ok(found.lines().map(PathBuf::from).collect())
    }

    /// The record of a volume.
    pub(crate) fn record(&self, volume: &str) -> Result<Value> {
        read(&self.own(&format!("volumes/{volume}/record.json")))
    }

    /// What holds at any moment: every record is whole, and names its own volume.
    pub(crate) fn check_at_any_time(&self) -> Result {
        for name in self.names("volumes") {
            let record = self.record(&name)?;
            ensure!(record["name"] == name.as_str(), "{name}: {record}");
        }
        Ok(())
    }

    /// What holds once the calls were repeated: each volume has the directory that was made for
    /// it, none is being removed, and each trash entry holds its record.
    pub(crate) fn check_at_rest(&self) -> Result {
        self.check_at_any_time()?;
        for name in self.names("volumes") {
            let files = self.names(&format!("volumes/{name}"));
            ensure!(files == ["record.json"], "{name}: {files:?}");
            let record = self.record(&name)?;
            let dir = record["data_dir"].as_str().context("no data_dir")?;
            let dir = fs::metadata(self.0.join(dir)).with_context(|| format!("{record}"))?;
            ensure!(
                dir.is_dir() && record["made"].as_u64() == Some(dir.ino()),
                "{record}"
            );
        }
        for entry in self.names("trash") {
            let record = read(&self.own(&format!("trash/{entry}/volume/record.json")))?;
            let name = record["name"].as_str().unwrap_or_default();
            ensure!(entry.starts_with(&format!("{name}.")), "{entry}: {record}");
        }
        Ok(())
    }

    /// Makes what crashes have left two hours old, so that it counts as left over.
    pub(crate) fn age_leftovers(&self) -> Result {
        for name in self.names("tmp") {
            age(&self.own("tmp").join(name))?;
        }
        let mut asides = self.asides().into_iter();
        asides.try_for_each(|name| age(&self.0.join(name)))
    }

    /// The same of what a restore has left beside a volume's record.
    pub(crate) fn age_restored(&self, volume: &str) -> Result {
        let volume = self.own("volumes").join(volume);
        if volume.join("from").exists() {
            age(&volume.join("from"))?;
            age(&volume)?;
        }
        Ok(())
    }

    /// What nobody needs and a sweep should have taken.
    pub(crate) fn leftovers(&self) -> Vec<String> {
        let mut found = self.names("tmp");
        found.extend(self.asides());
        found
    }

    /// What was to become `.nfsvol/`.
    fn asides(&self) -> Vec<String> {
        let mut names = names(&self.0);
        names.retain(|name| name.starts_with(".nfsvol."));
        names
    }
}

fn names(dir: &Path) -> Vec<String> {
    let entries = fs::read_dir(dir).into_iter().flatten().flatten();
    let mut names: Vec<_> = entries
        .map(|entry| entry.file_name().to_string_lossy().into_owned())
        .collect();
    names.sort();
    names
}

fn age(path: &Path) -> Result {
    let path = path.to_str().context("the lab's path is not UTF-8")?;
    run(&["touch", "-d", "2 hours ago", path])?.ok()?;
    Ok(())
}

fn read(path: &Path) -> Result<Value> {
    let json = fs::read(path).with_context(|| path.display().to_string())?;
    serde_json::from_slice(&json).with_context(|| path.display().to_string())
}
