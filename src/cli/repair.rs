//! `nfsvol repair`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::bail;
use serde_json::{Value, json};

use super::output;
use crate::daemon::settings::DEFAULT_SOCKET;
use crate::docker::client::Client;

#[derive(Debug, clap::Args)]
pub(super) struct RepairArgs {
    /// One volume (a torn `format.json` is put back with it); without a name, whatever is torn
    name: Option<String>,
    /// Do it without asking
    #[arg(long)]
    yes: bool,
    /// Only show what would be done
    #[arg(long, conflicts_with = "yes")]
    dry_run: bool,
    /// Print JSON
    #[arg(long)]
    json: bool,
    /// Socket of the daemon, which has the copy
    #[arg(long, env = "NFSVOL_SOCKET", default_value = DEFAULT_SOCKET, value_name = "PATH")]
    socket: PathBuf,
}

impl RepairArgs {
    async fn ask(&self, dry_run: bool) -> anyhow::Result<Value> {
        let body = json!({ "Name": self.name, "DryRun": dry_run });
        let mut daemon = Client::connect(&self.socket).await?;
        Ok(daemon.call("/Nfsvol.Repair", &body).await?)
    }

    fn show(&self, lines: &Value) -> anyhow::Result<()> {
        let text = match self.json {
            true => format!("{lines:#}\n"),
            false => table(lines),
        };
        super::print(text.as_bytes())
    }
}

pub(super) async fn repair(args: RepairArgs) -> anyhow::Result<()> {
    let mut lines = args.ask(true).await?;
    if count(&lines, "possible") > 0 && !args.dry_run {
        // Who is not asked gets one table, and who reads JSON one document: what was done.
        if !args.json && !args.yes {
            args.show(&lines)?;
        }
        if !args.yes && !agreed()? {
            bail!("nothing was changed; --yes does it");
        }
        lines = args.ask(false).await?;
    }
    args.show(&lines)?;
    match count(&lines, "refused") + count(&lines, "possible") {
        0 => Ok(()),
        1 => bail!("one thing on the share is torn still"),
        several => bail!("{several} things on the share are torn still"),
    }
}

fn count(lines: &Value, outcome: &str) -> usize {
    let lines = lines.as_array().into_iter().flatten();
    lines.filter(|line| line["outcome"] == outcome).count()
}

/// Asks whoever sits at the terminal; nobody there is a no.
fn agreed() -> anyhow::Result<bool> {
    let (input, mut output) = (std::io::stdin(), std::io::stderr());
    if !input.is_terminal() {
        return Ok(false);
    }
    write!(output, "Put back? [y/N] ")?;
    output.flush()?;
    let mut answer = String::new();
    input.lock().read_line(&mut answer)?;
    Ok(matches!(answer.trim(), "y" | "Y" | "yes"))
}

fn table(lines: &Value) -> String {
    let mut lines = lines.clone();
    let rows = lines.as_array_mut().map(Vec::as_mut_slice);
    let rows = rows.unwrap_or_default();
    if rows.is_empty() {
        return "nothing is torn\n".to_owned();
    }
    for line in rows {
        line["shown"] = match (line["outcome"].as_str(), line["reason"].as_str()) {
            (_, Some(reason)) => reason.to_owned().into(),
            (Some("possible"), _) => "torn; would be put back".into(),
            _ => "put back".into(),
        };
    }
    output::table(&lines, &[("WHAT", "what"), ("RESULT", "shown")])
}
