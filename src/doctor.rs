//! `nfsvol doctor`: each step from a share's name to bytes in a file, and what this host needs for
//! it, with what was found and what to do.
//!
//! Every check ends within its own deadline, whatever it meets, and the two groups run side by
//! side: about 10 s at the most. A check that needs an earlier one that failed is said to be
//! skipped. Nothing is changed but for a directory on the share, which is removed again.
//!
//! Limit: over NFSv4 alone a share is not written to; only a mount could do that.

mod engine;
mod host;
mod records;
mod share;

use std::fmt::Write;
use std::path::PathBuf;
use std::time::Duration;

use serde::Serialize;
use tokio::time::{Instant, timeout};

use crate::api::volumes::VolumeLine;
use crate::api::{Client, Failure, Ls, Status};
use nfs::address::Share;

/// The daemon answers about itself from memory.
const DAEMON: Duration = Duration::from_secs(2);

/// How a check ended.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize)]
#[serde(rename_all = "lowercase")]
pub(crate) enum Outcome {
    Ok,
    /// Volumes work, with a limit that should be known.
    Warning,
    /// Volumes do not work.
    Failed,
    /// Not tried, as an earlier check failed or there is nothing to check.
    Skipped,
}

/// One check.
#[derive(Debug, Clone, PartialEq, Eq, Serialize)]
pub(crate) struct Finding {
    check: &'static str,
    outcome: Outcome,
    found: String,
    #[serde(skip_serializing_if = "Option::is_none")]
    advice: Option<String>,
}

impl Finding {
    fn ok(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Outcome::Ok, found, None)
    }

    fn skipped(check: &'static str, found: impl Into<String>) -> Self {
        Self::new(check, Outcome::Skipped, found, None)
    }

    fn warning(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, Outcome::Warning, found, Some(advice))
    }

    fn failed(check: &'static str, found: impl Into<String>, advice: &str) -> Self {
        Self::new(check, Outcome::Failed, found, Some(advice))
    }

    fn error(check: &'static str, error: impl Into<Failure>) -> Self {
        let Failure { message, hint } = error.into();
        Self::new(check, Outcome::Failed, message, hint.as_deref())
    }

    fn new(
        check: &'static str,
        outcome: Outcome,
        found: impl Into<String>,
        advice: Option<&str>,
    ) -> Self {
        Self {
            check,
            outcome,
            found: found.into(),
            advice: advice.map(str::to_owned),
        }
    }
}

/// What to look at.
#[derive(Debug)]
pub(crate) struct Questions {
    /// The share; the daemon's home share unless named.
    pub(crate) share: Option<Share>,
    pub(crate) socket: PathBuf,
    pub(crate) docker: PathBuf,
    /// Where volumes are mounted, when no daemon tells.
    pub(crate) mount_root: PathBuf,
}

/// All findings.
#[derive(Debug, Serialize)]
pub(crate) struct Report {
    share: Option<Share>,
    ok: bool,
    seconds: f64,
    findings: Vec<Finding>,
}

/// Looks at everything.
pub(crate) async fn examine(questions: Questions) -> Report {
    let begun = Instant::now();
    let asked = timeout(DAEMON, async {
        let mut client = Client::connect(&questions.socket).await?;
        Ok((client.ask(&Status {}).await?, client.ask(&Ls {}).await?))
    })
    .await;
    let (daemon, told) = host::daemon(asked);
    let (status, ours) = told.unzip();
    let home = status.as_ref().and_then(|status| status.home_share.clone());
    let share = questions.share.or_else(|| home.clone());
    let mount_root = status.map_or(questions.mount_root, |status| status.mount_root);
    let ours: Option<&[VolumeLine]> = ours.as_deref();
    let (on_share, on_records, on_engine, on_mounts) = tokio::join!(
        async {
            match &share {
                Some(share) => share::examine(share).await,
                None => vec![Finding::skipped(
                    "share",
                    "none was named: nfsvol doctor SERVER:/EXPORT",
                )],
            }
        },
        async {
            match home.is_some() && home == share {
                true => records::examine(&questions.socket).await,
                false => Vec::new(),
            }
        },
        engine::examine(&questions.docker, &questions.socket, ours),
        host::mounts(&mount_root),
    );
    let mut findings = on_share;
    findings.extend(on_records);
    findings.extend(host::data_paths());
    findings.extend(host::helpers(ours));
    findings.push(daemon);
    findings.extend(on_engine);
    findings.extend(on_mounts);
    Report {
        share,
        ok: findings.iter().all(|f| f.outcome != Outcome::Failed),
        seconds: begun.elapsed().as_secs_f64(),
        findings,
    }
}

impl Report {
    pub(crate) fn failed(&self) -> usize {
        let failed = |f: &&Finding| f.outcome == Outcome::Failed;
        self.findings.iter().filter(failed).count()
    }

    /// For people.
    pub(crate) fn table(&self) -> String {
        let wide = self.findings.iter().map(|f| f.check.len()).max();
        let wide = wide.unwrap_or_default();
        let mut all = String::new();
        for finding in &self.findings {
            let mark = match finding.outcome {
                Outcome::Ok => "ok",
                Outcome::Warning => "WARN",
                Outcome::Failed => "FAIL",
                Outcome::Skipped => "-",
            };
            let (check, found) = (finding.check, &finding.found);
            let _ = writeln!(all, "{mark:<5} {check:<wide$}  {found}");
            if let Some(advice) = &finding.advice {
                let _ = writeln!(all, "{:<5} {:<wide$}  -> {advice}", "", "");
            }
        }
        all
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use nfs::probe::{Cause, ReachError, Step};

    #[test]
    fn an_error_falls_apart_into_what_was_found_and_what_to_do() {
        let exports = vec!["/a".to_owned()];
        let finding = Finding::error("export", &refused(Cause::NoExport(exports)));
        assert_eq!(
            finding.found,
            "share nas:/b: mount: the server has no such export; the server exports: /a"
        );
        let advice = Some("check the path after the colon in the share");
        assert_eq!(finding.advice.as_deref(), advice);
        // Two parts of advice are not taken for one.
        let late = Cause::TimedOut(Duration::from_secs(1));
        let finding = Finding::error("versions", &refused(late));
        assert!(finding.found.ends_with("within 1000 ms"), "{finding:?}");
    }

    fn refused(cause: Cause) -> ReachError {
        ReachError {
            share: "nas:/b".to_owned(),
            step: Step::Mount,
            addr: None,
            cause,
            resting: None,
        }
    }
}
