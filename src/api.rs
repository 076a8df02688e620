//! nfsvol's own calls: what the command line asks and the daemon answers, as types. No I/O but the
//! client's.
//!
//! | module | job |
//! |---|---|
//! | [`volumes`] | volumes: one of them, all of them, those of directories that are there |
//! | [`daemon`] | the daemon, the shares it has to do with, what is torn on them |
//! | [`trash`] | removed volumes |
//! | [`client`] | asking, over the daemon's socket |
//! | [`failure`] | an error, with what to do next as a field |
//!
//! A call is a type that implements [`Ask`]: its path and its answer's type. Both ends use it, so the
//! compiler checks that they mean the same; docker/route.rs has the table of the paths.
//!
//! Invariant: names and shapes of fields stay, because scripts read them (`--json`, and Docker's
//! `Status`); driver/tests/answers.rs compares whole answers. New fields may come.

pub(crate) mod client;
pub(crate) mod daemon;
pub(crate) mod failure;
pub(crate) mod trash;
pub(crate) mod volumes;

use serde::Serialize;
use serde::de::DeserializeOwned;

pub use client::{Client, ClientError};
pub(crate) use daemon::{Repair, Repaired, Status};
pub(crate) use failure::Failure;
pub(crate) use trash::{Purged, Restore, Restored, Trash, TrashEntry, TrashPurge};
pub(crate) use volumes::{Abort, Adopt};
pub use volumes::{Inspect, Ls};

/// A call: its own fields are the request's body.
pub trait Ask: Serialize + DeserializeOwned {
    /// The route, such as `/Nfsvol.Ls`.
    const PATH: &'static str;
    type Answer: Serialize + DeserializeOwned;
}

/// Who knows the answer to a call.
pub(crate) trait Answers<A: Ask> {
    type Error;

    fn answer(&self, ask: A) -> impl Future<Output = Result<A::Answer, Self::Error>> + Send;
}

/// Any of the calls.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Question {
    Ls(Ls),
    Inspect(Inspect),
    Status(Status),
    TrashLs(Trash),
    Restore(Restore),
    TrashPurge(TrashPurge),
    Abort(Abort),
    Adopt(Adopt),
    Repair(Repair),
}

impl Question {
    /// The volume that it is about, or "".
    #[must_use]
    pub fn volume(&self) -> &str {
        match self {
            Self::Inspect(Inspect { name })
            | Self::Restore(Restore { name, .. })
            | Self::Abort(Abort { name })
            | Self::Adopt(Adopt { name, .. })
            | Self::TrashPurge(TrashPurge::Name(name)) => name,
            Self::Repair(Repair { name, .. }) => name.as_deref().unwrap_or_default(),
            Self::Ls(_) | Self::Status(_) | Self::TrashLs(_) | Self::TrashPurge(_) => "",
        }
    }
}

/// An answer as it is sent.
#[derive(Debug)]
pub struct Reply(pub serde_json::Result<Vec<u8>>);

impl Reply {
    /// What is not text, such as a path in another encoding, has no form in JSON.
    #[must_use]
    pub fn of(answer: &impl Serialize) -> Self {
        Self(serde_json::to_vec(answer))
    }
}
