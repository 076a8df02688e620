//! What a host tells the others: its document.

use std::collections::BTreeMap;
use std::time::Duration;

use serde::{Deserialize, Serialize};

pub(super) use crate::volume::json;
use crate::volume::{Access, VolumeName};

/// The format of [`HostDoc`] and of claims.
pub(crate) const FORMAT: u32 = 1;

/// `hosts/<host>.<number>.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct HostDoc {
    pub format: u32,
    pub host: String,
    /// Of the host's state directory: tells two hosts of one name apart.
    pub id: String,
    /// The kernel's id of the boot.
    pub boot: String,
    /// The session in which the holds are good.
    pub session: String,
    /// The host's session time: the others wait by it for the end of the session.
    pub session_ms: u64,
    pub holds: BTreeMap<VolumeName, Hold>,
}

impl HostDoc {
    /// Stands for a document that cannot be read.
    pub(super) fn unread(host: &str, session: &str, session_time: Duration) -> Self {
        Self {
            format: FORMAT,
            host: host.to_owned(),
            id: String::new(),
            boot: String::new(),
            session: session.to_owned(),
            session_ms: u64::try_from(session_time.as_millis()).unwrap_or(u64::MAX),
            holds: BTreeMap::new(),
        }
    }
}

/// A volume that a host has mounted, or is about to mount.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Hold {
    /// Never used again; the claim of an exclusive volume bears it too.
    pub nonce: String,
    pub access: Access,
    /// The server's clock, seconds since 1970.
    pub since: u64,
    /// What holds it there: containers by id, other processes by pid and name.
    #[serde(default)]
    pub holders: Vec<String>,
}

/// `claims/<epoch>/claim.json`.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Claim {
    pub format: u32,
    pub host: String,
    pub session: String,
    pub nonce: String,
    /// The server's clock, seconds since 1970.
    pub since: u64,
}
