//! The daemon, the shares that it has to do with, and what is torn on the home share.

use std::path::PathBuf;

use serde::{Deserialize, Serialize};

use super::Ask;
use crate::volume::DataPath;
use nfs::address::Share;

/// `nfsvol status`.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Status {}

impl Ask for Status {
    const PATH: &'static str = "/Nfsvol.Status";
    type Answer = DaemonStatus;
}

/// A daemon, from its memory.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct DaemonStatus {
    pub version: String,
    pub host: String,
    pub home_share: Option<Share>,
    pub state_dir: PathBuf,
    pub mount_root: PathBuf,
    /// What carries volumes that do not say.
    pub data_path: Chosen,
    /// Volumes that this host knows.
    pub volumes: usize,
    /// Mounts that Docker holds on this host.
    pub attachments: usize,
    /// The other hosts that live, by name.
    pub hosts: Vec<String>,
    pub shares: Vec<ShareStatus>,
}

/// The data path, and why that one; or why there is none.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(untagged)]
pub enum Chosen {
    Path { path: DataPath, reason: String },
    None { error: String },
}

/// A share, and how it was when it was last looked at.
#[derive(Debug, Clone, PartialEq, Serialize, Deserialize)]
pub struct ShareStatus {
    pub share: Share,
    /// Whether it is the home share.
    pub home: bool,
    pub health: Health,
}

/// How a share was when it was last looked at.
#[derive(Debug, Clone, Default, PartialEq, Serialize, Deserialize)]
pub struct Health {
    /// `None` before the first answer.
    pub healthy: Option<bool>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub error: Option<String>,
    /// Seconds since 1970 by this host's clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub last_answer: Option<u64>,
    /// Of one call, in milliseconds.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub rtt_ms: Option<f64>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub address: Option<String>,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_total: Option<u64>,
    /// What can still be written.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub bytes_available: Option<u64>,
}

/// `nfsvol repair`: puts back what is torn on the home share, of one volume or of all, or says what
/// would be.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Repair {
    #[serde(default)]
    pub name: Option<String>,
    /// Only look. Never left out, so that an older or newer command line changes nothing by it.
    pub dry_run: bool,
}

impl Ask for Repair {
    const PATH: &'static str = "/Nfsvol.Repair";
    type Answer = Vec<Repaired>;
}

/// One thing that is torn.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Repaired {
    /// `format.json`, or `volume NAME`.
    pub what: String,
    pub outcome: RepairOutcome,
    /// Why it was refused.
    pub reason: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "lowercase")]
pub enum RepairOutcome {
    Done,
    /// Only looked at: it would be done.
    Possible,
    Refused,
}
