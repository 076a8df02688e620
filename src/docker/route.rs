//! From a request to a [`Call`]: the one table of paths, and what each body must hold. No I/O.
//!
//! Beside Docker's nine there are nfsvol's own routes, for the command line.

use std::collections::BTreeMap;

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::wire::{self, MAX_BODY};
use super::{Adoption, Ask, Purge};

/// How much of a body that is not JSON is quoted, in characters.
const QUOTE: usize = 120;

/// A place that a request can go to.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Route {
    Activate,
    Capabilities,
    Create,
    Remove,
    Mount,
    Unmount,
    Path,
    Get,
    List,
    Ls,
    Inspect,
    Status,
    TrashLs,
    Restore,
    TrashPurge,
    Abort,
    Metrics,
    Adopt,
    Repair,
}

/// A request that has been understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Call {
    Activate,
    Capabilities,
    Create {
        name: String,
        opts: BTreeMap<String, String>,
    },
    Remove {
        name: String,
    },
    Mount {
        name: String,
        id: String,
    },
    Unmount {
        name: String,
        id: String,
    },
    Path {
        name: String,
    },
    Get {
        name: String,
    },
    List,
    Metrics,
    Ask(Ask),
}

/// Why a request was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub enum Refusal {
    #[error(
        "nfsvol has no {0}: it serves Plugin.Activate, the VolumeDriver calls and its own commands"
    )]
    Path(String),
    #[error("{path} is called with {wanted}, not {method}")]
    Method {
        method: Method,
        path: String,
        wanted: Method,
    },
    #[error(
        "the {0} call came without its body, so nfsvol cannot know which volume is meant. dockerd \
         sends it like this when it repeats a call after the connection was lost, as in a restart \
         of nfsvol: try again"
    )]
    NoBody(Route),
    #[error("the body of the {route} call is not what it should be: {error}; it begins: {quote}")]
    Malformed {
        route: Route,
        error: String,
        quote: String,
    },
    #[error("the body of the {0} call is larger than {MAX_BODY} bytes")]
    TooLarge(Route),
    #[error("the body of the {0} call did not arrive in time")]
    Slow(Route),
}

impl Refusal {
    /// The HTTP status of the answer.
    #[must_use]
    pub fn status(&self) -> StatusCode {
        match self {
            Self::Path(_) => StatusCode::NOT_FOUND,
            Self::Method { .. } => StatusCode::METHOD_NOT_ALLOWED,
            Self::NoBody(_) | Self::Malformed { .. } => StatusCode::BAD_REQUEST,
            Self::TooLarge(_) => StatusCode::PAYLOAD_TOO_LARGE,
            Self::Slow(_) => StatusCode::REQUEST_TIMEOUT,
        }
    }
}

impl Route {
    /// The table of paths.
    ///
    /// # Errors
    /// [`Refusal::Path`] for a path that is not in it, [`Refusal::Method`] for anything but POST,
    /// and for /metrics anything but GET.
    pub fn find(method: &Method, path: &str) -> Result<Self, Refusal> {
        let route = match path {
            "/Plugin.Activate" => Self::Activate,
            "/VolumeDriver.Capabilities" => Self::Capabilities,
            "/VolumeDriver.Create" => Self::Create,
            "/VolumeDriver.Remove" => Self::Remove,
            "/VolumeDriver.Mount" => Self::Mount,
            "/VolumeDriver.Unmount" => Self::Unmount,
            "/VolumeDriver.Path" => Self::Path,
            "/VolumeDriver.Get" => Self::Get,
            "/VolumeDriver.List" => Self::List,
            "/Nfsvol.Ls" => Self::Ls,
            "/Nfsvol.Inspect" => Self::Inspect,
            "/Nfsvol.Status" => Self::Status,
            "/Nfsvol.TrashLs" => Self::TrashLs,
            "/Nfsvol.Restore" => Self::Restore,
            "/Nfsvol.TrashPurge" => Self::TrashPurge,
            "/Nfsvol.Abort" => Self::Abort,
            "/metrics" => Self::Metrics,
            "/Nfsvol.Adopt" => Self::Adopt,
            "/Nfsvol.Repair" => Self::Repair,
            _ => return Err(Refusal::Path(path.chars().take(QUOTE).collect())),
        };
        let wanted = match route {
            Self::Metrics => Method::GET,
            _ => Method::POST,
        };
        if *method == wanted {
            Ok(route)
        } else {
            Err(Refusal::Method {
                method: method.clone(),
                path: path.to_owned(),
                wanted,
            })
        }
    }

    /// Reads the body of a request to this route.
    ///
    /// # Errors
    /// [`Refusal::NoBody`] or [`Refusal::Malformed`], where the call needs one.
    pub fn parse(self, body: &[u8]) -> Result<Call, Refusal> {
        Ok(match self {
            Self::Activate => Call::Activate,
            Self::Capabilities => Call::Capabilities,
            Self::List => Call::List,
            Self::Metrics => Call::Metrics,
            Self::Ls => Call::Ask(Ask::Ls),
            Self::Status => Call::Ask(Ask::Status),
            Self::TrashLs => Call::Ask(Ask::TrashLs),
            Self::Create => {
                let wire::Create { name, opts } = self.json(body)?;
                let opts = opts.unwrap_or_default();
                Call::Create { name, opts }
            }
            Self::Mount => {
                let wire::Holder { name, id } = self.json(body)?;
                Call::Mount { name, id }
            }
            Self::Unmount => {
                let wire::Holder { name, id } = self.json(body)?;
                Call::Unmount { name, id }
            }
            Self::Remove => Call::Remove {
                name: self.name(body)?,
            },
            Self::Path => Call::Path {
                name: self.name(body)?,
            },
            Self::Get => Call::Get {
                name: self.name(body)?,
            },
            Self::Inspect => Call::Ask(Ask::Inspect {
                name: self.name(body)?,
            }),
            Self::Abort => Call::Ask(Ask::Abort {
                name: self.name(body)?,
            }),
            Self::Adopt => {
                let wire::Adopt {
                    name,
                    opts,
                    overlap,
                    dry_run,
                } = self.json(body)?;
                Call::Ask(Ask::Adopt(Adoption {
                    name,
                    opts,
                    overlap,
                    dry_run,
                }))
            }
            Self::Repair => {
                let wire::Repair { name, dry_run } = self.json(body)?;
                Call::Ask(Ask::Repair { name, dry_run })
            }
            Self::Restore => {
                let wire::Restore { name, rename } = self.json(body)?;
                Call::Ask(Ask::Restore { name, rename })
            }
            Self::TrashPurge => {
                let purge = match self.json(body)? {
                    wire::TrashPurge {
                        name: Some(name),
                        all: false,
                    } => Purge::Name(name),
                    wire::TrashPurge {
                        name: None,
                        all: true,
                    } => Purge::All,
                    _ => {
                        let error = "it needs either a Name or \"All\": true".to_owned();
                        return Err(self.malformed(error, body));
                    }
                };
                Call::Ask(Ask::TrashPurge(purge))
            }
        })
    }

    /// Whether an error in answer to this would be taken for "no such volume" (see [`super`]).
    #[must_use]
    pub fn must_not_fail(self) -> bool {
        self == Self::Get
    }

    /// The form of a good answer.
    #[must_use]
    pub fn media_type(self) -> &'static str {
        match self {
            Self::Metrics => wire::METRICS_TYPE,
            _ => wire::MEDIA_TYPE,
        }
    }

    /// Whether this only asks; such calls come often and change nothing.
    #[must_use]
    pub fn is_question(self) -> bool {
        !matches!(
            self,
            Self::Activate
                | Self::Create
                | Self::Remove
                | Self::Mount
                | Self::Unmount
                | Self::Restore
                | Self::TrashPurge
                | Self::Abort
                | Self::Adopt
                | Self::Repair
        )
    }

    fn name(self, body: &[u8]) -> Result<String, Refusal> {
        let wire::Named { name } = self.json(body)?;
        Ok(name)
    }

    fn json<T: DeserializeOwned>(self, body: &[u8]) -> Result<T, Refusal> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Err(Refusal::NoBody(self));
        }
        serde_json::from_slice(body).map_err(|error| self.malformed(error.to_string(), body))
    }

    fn malformed(self, error: String, body: &[u8]) -> Refusal {
        let text = String::from_utf8_lossy(body);
        Refusal::Malformed {
            route: self,
            error,
            quote: text.trim_end().chars().take(QUOTE).collect(),
        }
    }
}

impl std::fmt::Display for Route {
    fn fmt(&self, f: &mut std::fmt::Formatter<'_>) -> std::fmt::Result {
        // The variants are named as the calls are.
        write!(f, "{self:?}")
    }
}

impl Call {
    /// The volume that the call is about, or "".
    #[must_use]
    pub fn volume(&self) -> &str {
        match self {
            Self::Create { name, .. }
            | Self::Remove { name }
            | Self::Mount { name, .. }
            | Self::Unmount { name, .. }
            | Self::Path { name }
            | Self::Get { name }
            | Self::Ask(
                Ask::Inspect { name }
                | Ask::Restore { name, .. }
                | Ask::Abort { name }
                | Ask::Adopt(Adoption { name, .. })
                | Ask::TrashPurge(Purge::Name(name)),
            ) => name,
            Self::Activate | Self::Capabilities | Self::List | Self::Metrics | Self::Ask(_) => "",
        }
    }

    /// The holder's ID of Mount and Unmount, or "".
    #[must_use]
    pub fn id(&self) -> &str {
        match self {
            Self::Mount { id, .. } | Self::Unmount { id, .. } => id,
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    const WITH_BODY: [(&str, Route); 11] = [
        ("/VolumeDriver.Create", Route::Create),
        ("/VolumeDriver.Remove", Route::Remove),
        ("/VolumeDriver.Mount", Route::Mount),
        ("/VolumeDriver.Unmount", Route::Unmount),
        ("/VolumeDriver.Path", Route::Path),
        ("/VolumeDriver.Get", Route::Get),
        ("/Nfsvol.Inspect", Route::Inspect),
        ("/Nfsvol.Restore", Route::Restore),
        ("/Nfsvol.TrashPurge", Route::TrashPurge),
        ("/Nfsvol.Abort", Route::Abort),
        ("/Nfsvol.Adopt", Route::Adopt),
    ];

    #[test]
    fn a_call_that_needs_a_body_is_not_guessed_without_it() {
        for (path, route) in WITH_BODY {
            assert_eq!(Route::find(&Method::POST, path), Ok(route));
            for body in ["", "\n"] {
                let refusal = route.parse(body.as_bytes()).unwrap_err();
                assert_eq!(refusal, Refusal::NoBody(route));
            }
            assert!(route.parse(b"{}").is_err(), "{route}");
        }
    }

    proptest! {
        #[test]
        fn names_ids_and_options_arrive_as_they_were_sent(
            name in any::<String>(),
            id in any::<String>(),
            opts in prop::collection::btree_map(any::<String>(), any::<String>(), 0..5),
        ) {
            // Docker itself checks no names, so everything must reach the driver's check.
            let body = json!({ "Name": name, "ID": id }).to_string() + "\n";
            let call = Route::Mount.parse(body.as_bytes());
            prop_assert_eq!(call, Ok(Call::Mount { name: name.clone(), id }));
            let body = json!({ "Name": name, "Opts": opts }).to_string() + "\n";
            let call = Route::Create.parse(body.as_bytes());
            prop_assert_eq!(call, Ok(Call::Create { name, opts }));
        }

        #[test]
        fn bytes_that_are_not_a_request_are_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            for (_, route) in WITH_BODY {
                // No byte string this short and random is an object with a Name.
                let refusal = route.parse(&body);
                prop_assert!(
                    matches!(refusal, Err(Refusal::NoBody(_) | Refusal::Malformed { .. })),
                    "{:?}", refusal
                );
            }
        }
    }
}
