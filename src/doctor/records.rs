//! Whether the records on the home share can be read: the daemon looks, which has a copy of them.

use std::path::Path;
use std::time::Duration;

use serde_json::{Value, json};
use tokio::time::timeout;

use super::Finding;
use crate::docker::client::Client;

const CHECK: &str = "records";
/// Some thousand records of a server that is well; the daemon reads several at once.
const READING: Duration = Duration::from_secs(3);

/// One finding for all records that can be read, and one for each that cannot.
pub(super) async fn examine(socket: &Path) -> Vec<Finding> {
    let asked = timeout(READING, async {
        let mut client = Client::connect(socket).await?;
        let only_look = json!({ "Name": null, "DryRun": true });
        client.call("/Nfsvol.Repair", &only_look).await
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
fn findings(torn: &Value) -> Vec<Finding> {
    let torn = torn.as_array().map_or(&[][..], Vec::as_slice);
    if torn.is_empty() {
        return vec![Finding::ok(CHECK, "those on the home share can be read")];
    }
    let finding = |line: &Value| {
        let what = line["what"].as_str().unwrap_or_default();
        match line["reason"].as_str() {
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
        }
    };
    torn.iter().map(finding).collect()
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::doctor::Outcome;

    #[test]
    fn what_is_torn_is_told_with_what_to_do() {
        let said = |torn: Value| findings(&torn);
        assert_eq!(said(json!([]))[0].outcome, Outcome::Ok);
        let torn = said(json!([
            { "what": "volume db", "outcome": "possible", "reason": null },
            { "what": "volume web", "outcome": "refused", "reason": "not put back: no copy" },
        ]));
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
