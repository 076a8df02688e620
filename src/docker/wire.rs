//! The JSON that clients send and get. Types only: no I/O, no decisions.
//!
//! Keys are Go's (moby volume/drivers/proxy.go): Name, Opts, ID, Mountpoint, CreatedAt, Err.
//! Keys that are not known are ignored, as Go ignores them.

use std::collections::BTreeMap;
use std::path::PathBuf;

use serde::{Deserialize, Serialize};
use serde_json::{Map, Value};

use super::{Scope, Volume};
use crate::api::Ask;

/// The largest body of a request, in bytes: a name and options take a few hundred.
pub(crate) const MAX_BODY: usize = 1 << 20;

/// The media type of every answer. dockerd and Podman do not look at it.
pub(crate) const MEDIA_TYPE: &str = "application/json";

/// The media type of metrics (openmetrics.io, "Protocol Negotiation").
pub(crate) const METRICS_TYPE: &str = "application/openmetrics-text; version=1.0.0; charset=utf-8";

/// Makes a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Create {
    pub name: String,
    /// dockerd sends `null` when the user gave none; go-plugins-helpers leaves it out.
    #[serde(default)]
    pub opts: Option<BTreeMap<String, String>>,
}

impl Ask for Create {
    const PATH: &'static str = "/VolumeDriver.Create";
    type Answer = Done;
}

/// A call about one volume.
macro_rules! named {
    ($($(#[$doc:meta])* $call:ident -> $answer:ty = $path:literal;)+) => {$(
        $(#[$doc])*
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        pub(crate) struct $call {
            pub name: String,
        }

        impl Ask for $call {
            const PATH: &'static str = $path;
            type Answer = $answer;
        }
    )+};
}

named! {
    Remove -> Done = "/VolumeDriver.Remove";
    Get -> Found = "/VolumeDriver.Get";
    /// Where it is mounted.
    Path -> Mountpoint = "/VolumeDriver.Path";
}

/// Calls about one volume and who holds it.
macro_rules! holder {
    ($($call:ident -> $answer:ty = $path:literal;)+) => {$(
        #[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
        #[serde(rename_all = "PascalCase")]
        pub(crate) struct $call {
            pub name: String,
            #[serde(rename = "ID")]
            pub id: String,
        }

        impl Ask for $call {
            const PATH: &'static str = $path;
            type Answer = $answer;
        }
    )+};
}

holder! {
    Mount -> Mountpoint = "/VolumeDriver.Mount";
    Unmount -> Done = "/VolumeDriver.Unmount";
}

/// An error, with an HTTP status other than 200: Podman does not look for `Err` in a 200.
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Failed<'a> {
    pub err: &'a str,
}

/// Success of a call that has nothing to say.
#[derive(Debug, Serialize, Deserialize)]
pub(crate) struct Done {}

/// Plugin.Activate
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Activated {
    implements: [&'static str; 1],
}

impl Activated {
    pub(crate) const VOLUME_DRIVER: Self = Self {
        implements: ["VolumeDriver"],
    };
}

/// Capabilities
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Capabilities {
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
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Mountpoint {
    pub mountpoint: PathBuf,
}

/// Get
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Found {
    pub volume: Shown,
}

/// List
#[derive(Debug, Serialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Listed {
    pub volumes: Vec<Shown>,
}

/// One volume in an answer.
#[derive(Debug, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub(crate) struct Shown {
    name: String,
    mountpoint: PathBuf,
    #[serde(default, skip_serializing_if = "Option::is_none")]
    created_at: Option<String>,
    #[serde(default, skip_serializing_if = "Map::is_empty")]
    status: Map<String, Value>,
}

impl From<Volume> for Shown {
    fn from(volume: Volume) -> Self {
        Self {
            name: volume.name,
            mountpoint: volume.mountpoint.unwrap_or_default(),
            created_at: volume.created_at,
            status: volume.status,
        }
    }
}
