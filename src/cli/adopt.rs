//! `nfsvol adopt`.

use std::str::FromStr;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::{Common, output};
use crate::nfs::address::SharePath;
use crate::volume::VolumeName;

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

pub(super) async fn adopt(args: AdoptArgs) -> anyhow::Result<()> {
    let mut lines = Vec::new();
    let mut refused = 0;
    let mut seen: Vec<&Directory> = Vec::new();
    for directory in &args.directories {
        let Directory { name, path } = directory;
        let twice = seen
            .iter()
            .find(|other| path.starts_with(&other.path) || other.path.starts_with(path));
        let result = match twice {
            Some(other) => Err(format!(
                "it overlaps with {}, which is named too",
                other.path
            )),
            None => {
                // As `docker volume create NAME` names it, where that is the same.
                let options = match path.as_str() == name.as_str() {
                    true => json!({}),
                    false => json!({ "subdir": path }),
                };
                let body = json!({ "Name": name, "Opts": options, "DryRun": args.dry_run });
                let asked = args.common.ask("/Nfsvol.Adopt", &body).await;
                asked.map_err(|error| format!("{error:#}"))
            }
        };
        match &result {
            Ok(_) => seen.push(directory),
            Err(_) => refused += 1,
        }
        let (outcome, reason) = match &result {
            Ok(answer) => (answer["outcome"].clone(), None),
            Err(reason) => (json!("refused"), Some(reason)),
        };
        lines
            .push(json!({ "name": name, "directory": path, "outcome": outcome, "reason": reason }));
    }
    let text = match args.common.json {
        true => format!("{:#}\n", Value::from(lines)),
        false => table(lines),
    };
    super::print(text.as_bytes())?;
    match refused {
        0 => Ok(()),
        1 => bail!("one directory was refused"),
        several => bail!("{several} directories were refused"),
    }
}

fn table(mut lines: Vec<Value>) -> String {
    for line in &mut lines {
        line["shown"] = match (line["outcome"].as_str(), line["reason"].as_str()) {
            (_, Some(reason)) => format!("refused: {reason}").into(),
            (Some("possible"), _) => "would become a volume".into(),
            (Some("exists"), _) => "is that volume already".into(),
            _ => "is a volume now".into(),
        };
    }
    let columns = [
        ("NAME", "name"),
        ("DIRECTORY", "directory"),
        ("RESULT", "shown"),
    ];
    output::table(&Value::from(lines), &columns)
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
