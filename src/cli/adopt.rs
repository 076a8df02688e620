//! `nfsvol adopt`.

use std::str::FromStr;

use anyhow::{Context, bail};
use serde::Serialize;

use super::{Common, output};
use crate::api::Adopt;
use crate::api::volumes::AdoptOutcome;
use crate::volume::VolumeName;
use nfs::address::SharePath;

#[derive(Debug, clap::Args)]
pub(super) struct AdoptArgs {
    /// Directories, as seen from the home share's export (not from this host); each with the volume's
    /// name before it if that is not to be the last part of the directory
    #[arg(required = true, value_name = "[NAME=]DIR")]
    directories: Vec<Directory>,
    /// Only look what would be done
    #[arg(long)]
    dry_run: bool,
    #[command(flatten)]
    common: Common,
}

/// `DIR` or `NAME=DIR`.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Directory {
    name: VolumeName,
    path: SharePath,
}

impl FromStr for Directory {
    type Err = anyhow::Error;

    fn from_str(text: &str) -> anyhow::Result<Self> {
        let (name, path) = match text.split_once('=') {
            Some((name, path)) => (Some(name), path),
            None => (None, text),
        };
        let path = SharePath::parse(path.trim_end_matches('/'))?;
        if path.is_root() {
            bail!("the export itself is no volume; name a directory below it");
        }
        let name = name.unwrap_or_else(|| path.name());
        let name = name.parse().context("name the volume with NAME=DIR")?;
        Ok(Self { name, path })
    }
}

/// What became of a directory.
#[derive(Debug, Serialize)]
struct Line {
    name: VolumeName,
    directory: SharePath,
    outcome: AdoptOutcome,
    reason: Option<String>,
}

pub(super) async fn adopt(args: AdoptArgs) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    let mut seen: Vec<&Directory> = Vec::new();
    for directory in &args.directories {
        let result = adopt_one(&args, directory, &seen).await;
        if result.is_ok() {
            seen.push(directory);
        }
        lines.push(Line {
            name: directory.name.clone(),
            directory: directory.path.clone(),
            outcome: *result.as_ref().unwrap_or(&AdoptOutcome::Refused),
            reason: result.err().map(|error| format!("{error:#}")),
        });
    }
    let text = match args.common.json {
        true => output::json(&lines)?,
        false => table(&lines),
    };
    super::print(text.as_bytes())?;
    match lines.iter().filter(|line| line.reason.is_some()).count() {
        0 => Ok(()),
        1 => bail!("one directory was refused"),
        several => bail!("{several} directories were refused"),
    }
}

async fn adopt_one(
    args: &AdoptArgs,
    Directory { name, path }: &Directory,
    seen: &[&Directory],
) -> anyhow::Result<AdoptOutcome> {
    let twice = seen
        .iter()
        .find(|other| path.starts_with(&other.path) || other.path.starts_with(path));
    if let Some(other) = twice {
        bail!("it overlaps with {}, which is named too", other.path);
    }
    // As `docker volume create NAME` names it, where that is the same.
    let subdir = (path.as_str() != name.as_str()).then(|| path.to_string());
    let ask = Adopt {
        name: name.to_string(),
        opts: subdir
            .map(|dir| ("subdir".to_owned(), dir))
            .into_iter()
            .collect(),
        overlap: false,
        dry_run: args.dry_run,
    };
    Ok(args.common.ask(ask).await?.outcome)
}

fn table(lines: &[Line]) -> String {
    let row = |line: &Line| {
        let shown = match (line.outcome, &line.reason) {
            (_, Some(reason)) => format!("refused: {reason}"),
            (AdoptOutcome::Possible, _) => "would become a volume".to_owned(),
            (AdoptOutcome::Exists, _) => "is that volume already".to_owned(),
            _ => "is a volume now".to_owned(),
        };
        [line.name.to_string(), line.directory.to_string(), shown]
    };
    output::table(["NAME", "DIRECTORY", "RESULT"], lines.iter().map(row))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_volume_is_named_after_its_directory_unless_it_is_named() {
        let parsed = |text: &str| text.parse::<Directory>();
        let plain = parsed("apps/shop/db/").unwrap();
        assert_eq!(
            (plain.name.as_str(), plain.path.as_str()),
            ("db", "apps/shop/db")
        );
        let named = parsed("shop-db=apps/shop/db").unwrap();
        assert_eq!(named.name.as_str(), "shop-db");
        assert_eq!(named.path, plain.path);
        for bad in ["", "/", ".", "a/..", "x/.hidden", "=a", "my dir"] {
            assert!(parsed(bad).is_err(), "{bad}");
        }
        let error = format!("{:#}", parsed("x/.hidden").unwrap_err());
        assert!(error.contains("NAME=DIR"), "{error}");
    }
}
