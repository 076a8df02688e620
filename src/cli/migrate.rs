//! `nfsvol migrate`: volumes of Docker's `local` driver become nfsvol's.

mod copy;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::bail;
use serde::Serialize;

use super::output;
use crate::api::Client;
use crate::api::volumes::AdoptOutcome;
use crate::daemon::settings::DEFAULT_SOCKET;
use crate::migrate::{LocalVolume, local_volumes, no_directory, take_over};

#[derive(Debug, clap::Args)]
pub(super) struct MigrateArgs {
    /// Names of the volumes [default: all with type=nfs]
    #[arg(value_name = "VOLUME")]
    volumes: Vec<String>,
    /// Do it; without, only say what would be done
    #[arg(long)]
    yes: bool,
    /// Copy the files of these volumes, which are directories of this host, into new volumes
    #[arg(long, requires = "volumes", conflicts_with = "yes")]
    copy: bool,
    /// Option of the new volumes with --copy, as of `docker volume create`; may be repeated
    #[arg(short = 'o', long = "opt", requires = "copy", value_name = "KEY=VALUE", value_parser = option)]
    opts: Vec<(String, String)>,
    /// Name of the new volume, where one volume is named
    #[arg(long = "as", value_name = "NAME", conflicts_with = "suffix")]
    rename: Option<String>,
    /// What to put behind the name of each volume
    #[arg(
        long,
        default_value = "",
        value_name = "TEXT",
        hide_default_value = true
    )]
    suffix: String,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Socket of the daemon
    #[arg(long, env = "NFSVOL_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
    /// Socket of Docker's engine
    #[arg(long, env = "NFSVOL_DOCKER_SOCKET", default_value = crate::docker::engine::DEFAULT_SOCKET, value_name = "PATH")]
    docker_socket: PathBuf,
}

impl MigrateArgs {
    fn new_name(&self, local: &str) -> String {
        match &self.rename {
            Some(name) => name.clone(),
            None => format!("{local}{}", self.suffix),
        }
    }
}

fn option(text: &str) -> Result<(String, String), String> {
    match text.split_once('=') {
        Some((key, value)) => Ok((key.to_owned(), value.to_owned())),
        None => Err("expected KEY=VALUE".to_owned()),
    }
}

pub(super) async fn migrate(args: MigrateArgs) -> anyhow::Result<()> {
    if args.rename.is_some() && args.volumes.len() != 1 {
        bail!("--as names one new volume; name the one volume that it is for, or use --suffix");
    }
    let found = local_volumes(&args.docker_socket).await?;
    if args.copy {
        return copy::copy(&args, &found).await;
    }
    let chosen = choose(found, &args.volumes)?;
    let mut client = Client::connect(&args.socket).await?;
    let mut lines = Vec::new();
    for volume in &chosen {
        let name = args.new_name(&volume.name);
        let result = take_over(&mut client, volume, &name, !args.yes).await;
        lines.push(Line::new(volume, name, result));
    }
    let text = match args.json {
        true => output::json(&lines)?,
        false => report(&lines, args.yes),
    };
    super::print(text.as_bytes())?;
    match lines.iter().filter(|line| line.is_refused()).count() {
        0 => Ok(()),
        1 => bail!("one volume was refused"),
        several => bail!("{several} volumes were refused"),
    }
}

/// The volumes that are named, or all on NFS servers.
fn choose(found: Vec<LocalVolume>, names: &[String]) -> anyhow::Result<Vec<LocalVolume>> {
    if names.is_empty() {
        return Ok(found.into_iter().filter(LocalVolume::is_nfs).collect());
    }
    let named = names.iter().map(|name| {
        let volume = LocalVolume::named(&found, name)?;
        if volume.is_nfs() {
            return Ok(volume.clone());
        }
        if let Some(mounted) = volume.mounts() {
            bail!("{}", no_directory(name, &mounted));
        }
        bail!(
            "volume {name} is no NFS mount but a directory of this host; it can only be copied \
             (--copy)"
        );
    });
    named.collect()
}

/// What became of a volume.
#[derive(Debug, Serialize)]
struct Line {
    local: String,
    name: String,
    device: Option<String>,
    o: Option<String>,
    used_by: Vec<String>,
    outcome: AdoptOutcome,
    reason: Option<String>,
    /// Commands for a shell.
    next: Vec<String>,
}

impl Line {
    fn new(volume: &LocalVolume, name: String, result: anyhow::Result<AdoptOutcome>) -> Self {
        let users = volume.users.iter().map(|user| user.container.clone());
        Self {
            local: volume.name.clone(),
            device: volume.options.get("device").cloned(),
            o: volume.options.get("o").cloned(),
            used_by: users.collect(),
            outcome: *result.as_ref().unwrap_or(&AdoptOutcome::Refused),
            next: match &result {
                Ok(_) => next(volume, &name),
                Err(_) => Vec::new(),
            },
            reason: result.err().map(|error| format!("{error:#}")),
            name,
        }
    }

    fn is_refused(&self) -> bool {
        self.outcome == AdoptOutcome::Refused
    }

    fn row(&self) -> [String; 5] {
        let result = match (self.outcome, &self.reason) {
            (_, Some(reason)) => format!("refused: {reason}"),
            (AdoptOutcome::Possible, _) => "would get a record".to_owned(),
            (AdoptOutcome::Exists, _) => "has one already".to_owned(),
            _ => "has a record now; not a byte was copied".to_owned(),
        };
        [
            self.local.clone(),
            self.name.clone(),
            output::or_dash(self.device.as_ref()),
            output::or_dash(self.o.as_ref()),
            result,
        ]
    }
}

/// The commands after which Docker has the new volume under its name.
fn next(volume: &LocalVolume, name: &str) -> Vec<String> {
    let users: Vec<&str> = volume.users.iter().map(|u| u.container.as_str()).collect();
    let mut next = Vec::new();
    if !users.is_empty() {
        next.push(format!("docker rm -f {}", users.join(" ")));
    }
    next.push(format!("docker volume rm {}", volume.name));
    // Docker shows the options of a volume only where they were typed, and docker-compose 1
    // refuses one that it does not show them of.
    let options = volume.options.iter();
    let options: String = options
        .map(|(key, value)| format!("-o {} ", quoted(&format!("{key}={value}"))))
        .collect();
    next.push(format!("docker volume create -d nfsvol {options}{name}"));
    next
}

/// As a shell takes it for one word.
fn quoted(word: &str) -> String {
    let plain = |b: u8| b.is_ascii_alphanumeric() || b"_-./:=,@+%".contains(&b);
    match word.bytes().all(plain) {
        true => word.to_owned(),
        false => format!("'{}'", word.replace('\'', r"'\''")),
    }
}

fn report(lines: &[Line], yes: bool) -> String {
    if lines.is_empty() {
        return "Docker's local driver has no volume with type=nfs on this host.\n".to_owned();
    }
    let titles = ["LOCAL VOLUME", "NEW VOLUME", "DEVICE", "O", "RESULT"];
    let mut text = output::table(titles, lines.iter().map(Line::row));
    if lines.iter().all(Line::is_refused) {
        return text;
    }
    text.push_str(match yes {
        false => "\nNothing was changed; --yes does it. Then, for each volume:\n\n",
        true => {
            "\nDocker knows a name in one driver only, so until the local volume is removed that one \
             is used.\nIts data stays on the NFS server. On this host, and on each other that has \
             it:\n\n"
        }
    });
    for command in lines.iter().flat_map(|line| &line.next) {
        let _ = writeln!(text, "  {command}");
    }
    text.push_str(
        "\nCompose and stack files: `driver: nfsvol` in place of `driver: local`; the options stay.\n",
    );
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_command_that_is_shown_can_be_pasted() {
        assert_eq!(quoted("o=addr=10.0.0.5,rw"), "o=addr=10.0.0.5,rw");
        assert_eq!(quoted("device=:/my export's"), r"'device=:/my export'\''s'");
    }
}
