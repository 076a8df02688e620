//! `nfsvol migrate`: volumes of Docker's `local` driver become nfsvol's.

mod copy;

use std::fmt::Write;
use std::path::PathBuf;

use anyhow::{Context, bail};
use serde_json::{Value, json};

use super::output;
use crate::daemon::settings::DEFAULT_SOCKET;
use crate::docker::client::Client;
use crate::migrate::{LocalVolume, local_volumes};
use crate::volume::VolumeName;

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
    let mut refused = 0;
    for volume in &chosen {
        let name = args.new_name(&volume.name);
        let result = take_over(&mut client, volume, &name, args.yes).await;
        refused += usize::from(result.is_err());
        lines.push(line(volume, &name, result));
    }
    let text = match args.json {
        true => format!("{:#}\n", Value::from(lines)),
        false => report(&lines, args.yes),
    };
    super::print(text.as_bytes())?;
    match refused {
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
        let volume = find(&found, name)?;
        if !volume.is_nfs() {
            bail!(
                "volume {name} is no NFS mount but a directory of this host; it can only be \
                 copied (--copy)"
            );
        }
        Ok(volume.clone())
    });
    named.collect()
}

fn find<'a>(found: &'a [LocalVolume], name: &str) -> anyhow::Result<&'a LocalVolume> {
    let volume = found.iter().find(|volume| volume.name == name);
    volume.with_context(|| {
        format!("Docker's local driver has no volume {name}; `docker volume ls` lists them")
    })
}

/// Makes the record, or finds out whether it could be made.
async fn take_over(
    client: &mut Client,
    volume: &LocalVolume,
    name: &str,
    yes: bool,
) -> anyhow::Result<Value> {
    name.parse::<VolumeName>()?;
    let body = json!({
        "Name": name,
        "Opts": volume.options,
        "Overlap": true,
        "DryRun": !yes,
    });
    let answer = client.call("/Nfsvol.Adopt", &body).await?;
    match answer["differences"].as_array().map(Vec::as_slice) {
        None | Some([]) => Ok(answer),
        Some(differences) => {
            let differences: Vec<&str> = differences.iter().filter_map(Value::as_str).collect();
            bail!(
                "volume {name} of that directory exists with other options ({}); use it as it is, \
                 or choose another name (--as)",
                differences.join("; ")
            )
        }
    }
}

fn line(volume: &LocalVolume, name: &str, result: anyhow::Result<Value>) -> Value {
    let users: Vec<&str> = volume.users.iter().map(|u| u.container.as_str()).collect();
    let next = match &result {
        Ok(_) => next(volume, name),
        Err(_) => Vec::new(),
    };
    let (outcome, reason) = match &result {
        Ok(answer) => (answer["outcome"].clone(), Value::Null),
        Err(error) => (json!("refused"), json!(format!("{error:#}"))),
    };
    json!({
        "local": volume.name,
        "name": name,
        "device": volume.options.get("device"),
        "o": volume.options.get("o"),
        "used_by": users,
        "outcome": outcome,
        "reason": reason,
        "next": next,
    })
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

fn report(lines: &[Value], yes: bool) -> String {
    if lines.is_empty() {
        return "Docker's local driver has no volume with type=nfs on this host.\n".to_owned();
    }
    let shown: Vec<Value> = lines
        .iter()
        .map(|line| {
            let result = match (line["outcome"].as_str(), line["reason"].as_str()) {
                (_, Some(reason)) => format!("refused: {reason}"),
                (Some("possible"), _) => "would get a record".to_owned(),
                (Some("exists"), _) => "has one already".to_owned(),
                _ => "has a record now; not a byte was copied".to_owned(),
            };
            let mut line = line.clone();
            line["result"] = result.into();
            line
        })
        .collect();
    let mut text = output::table(
        &Value::from(shown),
        &[
            ("LOCAL VOLUME", "local"),
            ("NEW VOLUME", "name"),
            ("DEVICE", "device"),
            ("O", "o"),
            ("RESULT", "result"),
        ],
    );
    let next: Vec<&Value> = lines
        .iter()
        .filter(|line| line["outcome"] != "refused")
        .collect();
    if next.is_empty() {
        return text;
    }
    if !yes {
        text.push_str("\nNothing was changed; --yes does it. Then, for each volume:\n\n");
    } else {
        text.push_str(
            "\nDocker knows a name in one driver only, so until the local volume is removed that one \
             is used.\nIts data stays on the NFS server. On this host, and on each other that has \
             it:\n\n",
        );
    }
    for line in next {
        for command in line["next"].as_array().into_iter().flatten() {
            let _ = writeln!(text, "  {}", command.as_str().unwrap_or_default());
        }
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
