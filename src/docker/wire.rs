//! The JSON that clients send and get. Types only: no I/O, no decisions.
//!
//! Keys are Go's (moby volume/drivers/proxy.go): Name, Opts, ID, Mountpoint, CreatedAt, Err.
//! Keys that are not known are ignored, as Go ignores them.

use std::collections::BTreeMap;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Scope, Volume};

/// The largest body of a request, in bytes: a name and options take a few hundred.
pub const MAX_BODY: usize = 1 << 20;

/// The media type of every answer. dockerd and Podman do not look at it.
pub const MEDIA_TYPE: &str = "application/json";

/// The media type of metrics (openmetrics.io, "Protocol Negotiation").
pub const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// `/VolumeDriver.Create`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Create {
    pub name: String,
    /// dockerd sends `null` when the user gave none; go-plugins-helpers leaves it out.
    #[serde(default)]
    pub opts: Option<BTreeMap<String, String>>,
}

/// Calls about one volume.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Named {
    pub name: String,
}

/// Mount and Unmount.
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Holder {
    pub name: String,
    #[serde(rename = "ID")]
    pub id: String,
}

/// `/Nfsvol.Restore`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Restore {
    pub name: String,
    #[serde(default, rename = "As")]
    pub rename: Option<String>,
}

/// `/Nfsvol.Repair`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Repair {
    #[serde(default)]
    pub name: Option<String>,
    pub dry_run: bool,
}

/// `/Nfsvol.TrashPurge`: exactly one of the two, so that nothing left out can mean "all".
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct TrashPurge {
    #[serde(default)]
    pub name: Option<String>,
    #[serde(default)]
    pub all: bool,
}

/// `/Nfsvol.Adopt`
#[derive(Debug, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Adopt {
    pub name: String,
    #[serde(default)]
    pub opts: BTreeMap<String, String>,
    #[serde(default)]
    pub overlap: bool,
    #[serde(default)]
    pub dry_run: bool,
}

/// An error, with an HTTP status other than 200: Podman does not look for `Err` in a 200.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Failed<'a> {
    pub err: &'a str,
}

/// Success of a call that has nothing to say.
#[derive(Debug, Serialize)]
pub struct Done {}

/// Plugin.Activate
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Activated {
    implements: [&'static str; 1],
}

impl Activated {
    pub const VOLUME_DRIVER: Self = Self {
        implements: ["VolumeDriver"],
    };
}

/// Capabilities
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Capabilities {
    capabilities: Scoped,
}

#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
struct Scoped {
    scope: &'static str,
}

impl From<Scope> for Capabilities {
    fn from(scope: Scope) -> Self {
        let scope = match scope {
            Scope::Global => "global",
            Scope::Local => "local",
        };
        Self {
            capabilities: Scoped { scope },
        }
    }
}

/// Mount and Path; empty for a volume that is not mounted.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Mountpoint<'a> {
    pub mountpoint: &'a Path,
}

/// Get
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Found<'a> {
    pub volume: Shown<'a>,
}

/// List
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Listed<'a> {
    pub volumes: Vec<Shown<'a>>,
}

/// One volume in an answer.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub struct Shown<'a> {
    name: &'a str,
    mountpoint: &'a Path,
    #[serde(skip_serializing_if = "Option::is_none")]
    created_at: Option<&'a str>,
    #[serde(skip_serializing_if = "Map::is_empty")]
    status: &'a Map<String, Value>,
}

impl<'a> From<&'a Volume> for Shown<'a> {
    fn from(volume: &'a Volume) -> Self {
        Self {
            name: &volume.name,
            mountpoint: volume
                .mountpoint
                .as_deref()
                .unwrap_or_else(|| Path::new("")),
            created_at: volume.created_at.as_deref(),
            status: &volume.status,
        }
    }
}
