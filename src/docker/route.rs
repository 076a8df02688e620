//! From a request to a [`Call`]: the one table of routes, and what each body must hold. No I/O.
//!
//! Beside Docker's nine there are nfsvol's own calls ([`crate::api`]), for the command line, and the
//! metrics.

use hyper::{Method, StatusCode};
use serde::de::DeserializeOwned;

use super::wire::{self, MAX_BODY};
use crate::api::{self, Ask, Question};

/// How much of a body that is not JSON is quoted, in characters.
const QUOTE: usize = 120;

/// Every route; a call is added here.
pub(crate) static ROUTES: [Route; 19] = [
    change("Activate", "/Plugin.Activate", |_, _| Ok(Call::Activate)),
    question("Capabilities", "/VolumeDriver.Capabilities", |_, _| {
        Ok(Call::Capabilities)
    }),
    change("Create", wire::Create::PATH, |route, body| {
        route.json(body).map(Call::Create)
    }),
    change("Remove", wire::Remove::PATH, |route, body| {
        route.json(body).map(Call::Remove)
    }),
    change("Mount", wire::Mount::PATH, |route, body| {
        route.json(body).map(Call::Mount)
    }),
    change("Unmount", wire::Unmount::PATH, |route, body| {
        route.json(body).map(Call::Unmount)
    }),
    question("Path", wire::Path::PATH, |route, body| {
        route.json(body).map(Call::Path)
    }),
    route("Get", wire::Get::PATH, Kind::Lookup, |route, body| {
        route.json(body).map(Call::Get)
    }),
    question("List", "/VolumeDriver.List", |_, _| Ok(Call::List)),
    question("Ls", api::Ls::PATH, |_, _| own(Question::Ls, api::Ls {})),
    question("Inspect", api::Inspect::PATH, |route, body| {
        own(Question::Inspect, route.json(body)?)
    }),
    question("Status", api::Status::PATH, |_, _| {
        own(Question::Status, api::Status {})
    }),
    question("TrashLs", api::Trash::PATH, |_, _| {
        own(Question::TrashLs, api::Trash {})
    }),
    change("Restore", api::Restore::PATH, |route, body| {
        own(Question::Restore, route.json(body)?)
    }),
    change("TrashPurge", api::TrashPurge::PATH, |route, body| {
        own(Question::TrashPurge, route.json(body)?)
    }),
    change("Abort", api::Abort::PATH, |route, body| {
        own(Question::Abort, route.json(body)?)
    }),
    change("Adopt", api::Adopt::PATH, |route, body| {
        own(Question::Adopt, route.json(body)?)
    }),
    change("Repair", api::Repair::PATH, |route, body| {
        own(Question::Repair, route.json(body)?)
    }),
    route("Metrics", "/metrics", Kind::Metrics, |_, _| {
        Ok(Call::Metrics)
    }),
];

/// A place that a request can go to.
#[derive(Debug)]
pub(crate) struct Route {
    /// In the log and in metrics.
    pub name: &'static str,
    pub path: &'static str,
    pub kind: Kind,
    /// Reads a request's body; what needs none does not look at it.
    parse: Parse,
}

/// What a call is to the server.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(crate) enum Kind {
    /// It changes something.
    Change,
    /// It only asks: such calls come often.
    Question,
    /// A question to which an error would be taken for "no such volume" (see [`super`]).
    Lookup,
    /// A question whose answer is not JSON, and which is asked with GET.
    Metrics,
}

type Parse = fn(&Route, &[u8]) -> Result<Call, Refusal>;

const fn route(name: &'static str, path: &'static str, kind: Kind, parse: Parse) -> Route {
    Route {
        name,
        path,
        kind,
        parse,
    }
}

const fn change(name: &'static str, path: &'static str, parse: Parse) -> Route {
    route(name, path, Kind::Change, parse)
}

const fn question(name: &'static str, path: &'static str, parse: Parse) -> Route {
    route(name, path, Kind::Question, parse)
}

/// One of nfsvol's own calls.
fn own<A>(question: fn(A) -> Question, ask: A) -> Result<Call, Refusal> {
    Ok(Call::Ask(question(ask)))
}

/// A request that has been understood.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) enum Call {
    Activate,
    Capabilities,
    Create(wire::Create),
    Remove(wire::Remove),
    Mount(wire::Mount),
    Unmount(wire::Unmount),
    Path(wire::Path),
    Get(wire::Get),
    List,
    Metrics,
    Ask(Question),
}

/// Why a request was not understood.
#[derive(Debug, PartialEq, Eq, thiserror::Error)]
pub(crate) enum Refusal {
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
    NoBody(&'static str),
    #[error("the body of the {call} call is not what it should be: {error}; it begins: {quote}")]
    Malformed {
        call: &'static str,
        error: String,
        quote: String,
    },
    #[error("the body of the {0} call is larger than {MAX_BODY} bytes")]
    TooLarge(&'static str),
    #[error("the body of the {0} call did not arrive in time")]
    Slow(&'static str),
}

impl Refusal {
    /// The HTTP status of the answer.
    #[must_use]
    pub(crate) fn status(&self) -> StatusCode {
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
    /// The route of a request.
    ///
    /// # Errors
    /// [`Refusal::Path`] for a path that is not in the table, [`Refusal::Method`] for one that is
    /// called otherwise.
    pub(crate) fn find(method: &Method, path: &str) -> Result<&'static Self, Refusal> {
        let found = ROUTES.iter().find(|route| route.path == path);
        let route = found.ok_or_else(|| Refusal::Path(path.chars().take(QUOTE).collect()))?;
        let wanted = route.method();
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

    fn method(&self) -> Method {
        match self.kind {
            Kind::Metrics => Method::GET,
            _ => Method::POST,
        }
    }

    /// The form of a good answer.
    #[must_use]
    pub(crate) fn media_type(&self) -> &'static str {
        match self.kind {
            Kind::Metrics => wire::METRICS_TYPE,
            _ => wire::MEDIA_TYPE,
        }
    }

    /// Reads the body of a request to this route.
    ///
    /// # Errors
    /// [`Refusal::NoBody`] or [`Refusal::Malformed`], where the call needs one.
    pub(crate) fn parse(&self, body: &[u8]) -> Result<Call, Refusal> {
        (self.parse)(self, body)
    }

    fn json<T: DeserializeOwned>(&self, body: &[u8]) -> Result<T, Refusal> {
        if body.iter().all(u8::is_ascii_whitespace) {
            return Err(Refusal::NoBody(self.name));
        }
        serde_json::from_slice(body).map_err(|error| {
            let text = String::from_utf8_lossy(body);
            Refusal::Malformed {
                call: self.name,
                error: error.to_string(),
                quote: text.trim_end().chars().take(QUOTE).collect(),
            }
        })
    }
}

impl Call {
    /// The volume that the call is about, or "".
    #[must_use]
    pub(crate) fn volume(&self) -> &str {
        match self {
            Self::Create(wire::Create { name, .. })
            | Self::Remove(wire::Remove { name })
            | Self::Mount(wire::Mount { name, .. })
            | Self::Unmount(wire::Unmount { name, .. })
            | Self::Path(wire::Path { name })
            | Self::Get(wire::Get { name }) => name,
            Self::Ask(question) => question.volume(),
            Self::Activate | Self::Capabilities | Self::List | Self::Metrics => "",
        }
    }

    /// The holder's ID of Mount and Unmount, or "".
    #[must_use]
    pub(crate) fn id(&self) -> &str {
        match self {
            Self::Mount(wire::Mount { id, .. }) | Self::Unmount(wire::Unmount { id, .. }) => id,
            _ => "",
        }
    }
}

#[cfg(test)]
mod tests {
    use std::collections::HashSet;

    use proptest::prelude::*;
    use serde_json::json;

    use super::*;

    /// Routes whose calls have to say what they are about.
    fn with_body() -> impl Iterator<Item = &'static Route> {
        ROUTES.iter().filter(|route| route.parse(b"").is_err())
    }

    fn at(path: &str) -> &'static Route {
        Route::find(&Method::POST, path).unwrap()
    }

    #[test]
    fn the_table_names_each_route_once() {
        let paths: HashSet<&str> = ROUTES.iter().map(|route| route.path).collect();
        let names: HashSet<&str> = ROUTES.iter().map(|route| route.name).collect();
        assert_eq!((paths.len(), names.len()), (ROUTES.len(), ROUTES.len()));
        for route in ROUTES.iter().filter(|route| route.path != "/metrics") {
            let (_, last) = route.path.rsplit_once('.').unwrap();
            assert_eq!(route.name, last);
        }
    }

    #[test]
    fn a_call_that_needs_a_body_is_not_guessed_without_it() {
        for route in with_body() {
            for body in ["", "\n"] {
                let refusal = route.parse(body.as_bytes()).unwrap_err();
                assert_eq!(refusal, Refusal::NoBody(route.name));
            }
            assert!(route.parse(b"{}").is_err(), "{}", route.name);
        }
        let names: Vec<&str> = with_body().map(|route| route.name).collect();
        let all = [
            "Create",
            "Remove",
            "Mount",
            "Unmount",
            "Path",
            "Get",
            "Inspect",
            "Restore",
            "TrashPurge",
            "Abort",
            "Adopt",
            "Repair",
        ];
        assert_eq!(names, all);
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
            let call = at("/VolumeDriver.Mount").parse(body.as_bytes());
            prop_assert_eq!(call, Ok(Call::Mount(wire::Mount { name: name.clone(), id })));
            let body = json!({ "Name": name, "Opts": opts }).to_string() + "\n";
            let call = at("/VolumeDriver.Create").parse(body.as_bytes());
            prop_assert_eq!(call, Ok(Call::Create(wire::Create { name, opts: Some(opts) })));
        }

        #[test]
        fn bytes_that_are_not_a_request_are_refused(body in prop::collection::vec(any::<u8>(), 0..200)) {
            for route in with_body() {
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
