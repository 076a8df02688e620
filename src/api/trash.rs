//! Removed volumes: what is there, bringing one back, deleting for good.

use serde::{Deserialize, Serialize};

use super::Ask;
use crate::volume::{Record, VolumeName};

/// `nfsvol trash ls`: what is in the trash, oldest first.
#[derive(Debug, Clone, Default, PartialEq, Eq, Serialize, Deserialize)]
pub struct Trash {}

impl Ask for Trash {
    const PATH: &'static str = "/Nfsvol.TrashLs";
    type Answer = Vec<TrashEntry>;
}

/// A removed volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct TrashEntry {
    /// The entry's name in the trash, which names exactly this one.
    pub entry: String,
    pub name: VolumeName,
    /// RFC 3339, by the server's clock.
    pub removed: String,
    pub record: Record,
}

/// `nfsvol restore`: brings a removed volume back, under another name if one is given.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
pub struct Restore {
    /// A volume's name, for the one that was removed last, or one entry of the trash.
    pub name: String,
    #[serde(default, rename = "As")]
    pub rename: Option<String>,
}

impl Ask for Restore {
    const PATH: &'static str = "/Nfsvol.Restore";
    type Answer = Restored;
}

/// A volume that is back.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Restored {
    pub name: VolumeName,
    /// The entry of the trash that it was.
    pub entry: String,
    /// RFC 3339, by the server's clock.
    pub removed: String,
}

/// `nfsvol trash purge`: deletes from the trash for good.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
#[serde(try_from = "Fields", into = "Fields")]
pub enum TrashPurge {
    /// One entry, or all entries of a volume's name.
    Name(String),
    All,
}

impl Ask for TrashPurge {
    const PATH: &'static str = "/Nfsvol.TrashPurge";
    type Answer = Purged;
}

/// The entries that were deleted.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Purged {
    pub purged: Vec<String>,
}

/// [`TrashPurge`] as it is sent: exactly one of the two, so that nothing left out can mean "all".
#[derive(Serialize, Deserialize)]
#[serde(rename_all = "PascalCase")]
struct Fields {
    #[serde(default)]
    name: Option<String>,
    #[serde(default)]
    all: bool,
}

impl TryFrom<Fields> for TrashPurge {
    type Error = &'static str;

    fn try_from(fields: Fields) -> Result<Self, Self::Error> {
        match (fields.name, fields.all) {
            (Some(name), false) => Ok(Self::Name(name)),
            (None, true) => Ok(Self::All),
            _ => Err("it needs either a Name or \"All\": true"),
        }
    }
}

impl From<TrashPurge> for Fields {
    fn from(purge: TrashPurge) -> Self {
        match purge {
            TrashPurge::Name(name) => Self {
                name: Some(name),
                all: false,
            },
            TrashPurge::All => Self {
                name: None,
                all: true,
            },
        }
    }
}
