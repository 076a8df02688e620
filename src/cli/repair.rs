//! `nfsvol repair`.

use std::io::{BufRead, IsTerminal, Write};
use std::path::PathBuf;

use anyhow::bail;

use super::output;
use crate::api::daemon::RepairOutcome;
use crate::api::{Client, Repair, Repaired};
use crate::daemon::settings::DEFAULT_SOCKET;

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
    async fn ask(&self, dry_run: bool) -> anyhow::Result<Vec<Repaired>> {
        let name = self.name.clone();
        let mut daemon = Client::connect(&self.socket).await?;
        Ok(daemon.ask(&Repair { name, dry_run }).await?)
    }

    fn show(&self, lines: &[Repaired]) -> anyhow::Result<()> {
        let text = match self.json {
            true => output::json(&lines)?,
            false => table(lines),
        };
        super::print(text.as_bytes())
    }
}

pub(super) async fn repair(args: RepairArgs) -> anyhow::Result<()> {
    let mut lines = args.ask(true).await?;
    if count(&lines, RepairOutcome::Possible) > 0 && !args.dry_run {
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
    match lines.len() - count(&lines, RepairOutcome::Done) {
        0 => Ok(()),
        1 => bail!("one thing on the share is torn still"),
        several => bail!("{several} things on the share are torn still"),
    }
}

fn count(lines: &[Repaired], outcome: RepairOutcome) -> usize {
    lines.iter().filter(|line| line.outcome == outcome).count()
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

fn table(lines: &[Repaired]) -> String {
    if lines.is_empty() {
        return "nothing is torn\n".to_owned();
    }
    let row = |line: &Repaired| {
        let shown = match (line.outcome, line.reason.as_deref()) {
            (_, Some(reason)) => reason,
            (RepairOutcome::Possible, _) => "torn; would be put back",
            _ => "put back",
        };
        [line.what.clone(), shown.to_owned()]
    };
    output::table(["WHAT", "RESULT"], lines.iter().map(row))
}
