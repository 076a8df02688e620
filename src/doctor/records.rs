//! Whether the records on the home share can be read: the daemon looks, which has a copy of them.

use std::path::Path;
use std::time::Duration;

use tokio::time::timeout;

use super::Finding;
use crate::api::{Client, Repair, Repaired};

const CHECK: &str = "records";
/// Some thousand records of a server that is well; the daemon reads several at once.
const READING: Duration = Duration::from_secs(3);

/// One finding for all records that can be read, and one for each that cannot.
pub(super) async fn examine(socket: &Path) -> Vec<Finding> {
    let asked = timeout(READING, async {
        let mut client = Client::connect(socket).await?;
        let only_look = Repair {
            name: None,
            dry_run: true,
        };
        client.ask(&only_look).await
    });
    match asked.await {
        Ok(Ok(torn)) => findings(&torn),
        // What is wrong with the share or the daemon is for the other checks.
        Ok(Err(error)) => vec![Finding::skipped(CHECK, format!("not read: {error}"))],
        Err(_) => vec![Finding::skipped(
            CHECK,
            format!("not all read within {READING:?}: `nfsvol repair --dry-run` waits for them"),
        )],
    }
}

/// Of what the daemon finds torn.
fn findings(torn: &[Repaired]) -> Vec<Finding> {
    if torn.is_empty() {
        return vec![Finding::ok(CHECK, "those on the home share can be read")];
    }
    let finding = |Repaired { what, reason, .. }: &Repaired| match reason {
        None => Finding::failed(
            CHECK,
            format!("{what}: torn on the home share; this host has a copy"),
            "nfsvol repair",
        ),
        Some(reason) => Finding::failed(
            CHECK,
            format!("{what}: torn on the home share; {reason}"),
            "nfsvol repair on another host",
        ),
    };
    torn.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::api::daemon::RepairOutcome;
    use crate::doctor::Outcome;

    #[test]
    fn what_is_torn_is_told_with_what_to_do() {
        assert_eq!(findings(&[])[0].outcome, Outcome::Ok);
        let line = |what: &str, outcome, reason: Option<&str>| Repaired {
            what: what.to_owned(),
            outcome,
            reason: reason.map(str::to_owned),
        };
        let no_copy = Some("not put back: no copy");
        let torn = findings(&[
            line("volume db", RepairOutcome::Possible, None),
            line("volume web", RepairOutcome::Refused, no_copy),
        ]);
        for (finding, what, advice) in [
            (&torn[0], "volume db", "nfsvol repair"),
            (
                &torn[1],
                "volume web: torn on the home share; not put back",
                "another host",
            ),
        ] {
            assert_eq!(finding.outcome, Outcome::Failed);
            assert!(finding.found.contains(what), "{finding:?}");
            let told = finding.advice.as_deref().unwrap_or_default();
            assert!(told.contains(advice), "{finding:?}");
        }
    }
}
