//! Names of shares and of places below them.
//!
//! Invariants: a [`Share`] always prints to a string that parses back to itself, and a
//! [`SharePath`] never holds `..`, an empty component, or anything that could leave the share.
//!
//! ```
//! use nfs::address::{Share, SharePath};
//!
//! let share: Share = "[fd00::5]:/export/".parse()?;
//! assert_eq!((share.to_string().as_str(), share.export()), ("[fd00::5]:/export", "/export"));
//! assert_eq!(SharePath::parse("a//b/")?, SharePath::root().join("a").join("b"));
//! assert!(SharePath::parse("a/../../etc").is_err());
//! # Ok::<(), nfs::address::AddressError>(())
//! ```

use std::fmt;
use std::net::{IpAddr, Ipv6Addr};
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name of a directory entry that NFS servers take, in bytes (NAME_MAX).
const MAX_COMPONENT: usize = 255;
/// The longest export or path, in bytes (MNTPATHLEN, RFC 1813 appendix I).
//= 1813-I-path: A path that is mounted has at most 1024 bytes.
const MAX_PATH: usize = 1024;

/// Why a share or a path below it was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum AddressError {
    #[error(
        "{0:?} is not a share: expected SERVER:/EXPORT, for example nas:/export, [fd00::5]:/export, or embedded:/DIRECTORY of this host"
    )]
    Form(String),
    #[error("{0:?} is not a host name or an IP address (an IPv6 address goes in brackets)")]
    Host(String),
    #[error("path {path:?}: {reason}")]
    Path { path: String, reason: &'static str },
}

/// The server part of a share.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub enum Server {
    /// A host name, resolved anew each time the share is reached.
    Name(String),
    /// A numeric address.
    Ip(IpAddr),
    /// The embedded server: the export is a directory of this host.
    Embedded,
}

impl fmt::Display for Server {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        match self {
            Self::Name(name) => f.write_str(name),
            Self::Ip(IpAddr::V6(ip)) => write!(f, "[{ip}]"),
            Self::Ip(ip) => write!(f, "{ip}"),
            Self::Embedded => f.write_str("embedded"),
        }
    }
}

/// An NFS server and an exported directory: `nas:/export`, `[fd00::5]:/export`, `embedded:/dir`.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct Share {
    server: Server,
    export: String,
}

impl Share {
    /// Joins a server and an absolute export path.
    ///
    /// # Errors
    /// [`AddressError::Path`] when the path is not absolute, holds `..` or control characters,
    /// or is longer than 1,024 bytes.
    pub fn new(server: Server, export: &str) -> Result<Self, AddressError> {
        let refuse = |reason| AddressError::Path {
            path: export.to_owned(),
            reason,
        };
        if !export.starts_with('/') {
            return Err(refuse("an export begins with /"));
        }
        if export.len() > MAX_PATH {
            return Err(refuse("longer than 1,024 bytes"));
        }
        if export.chars().any(char::is_control) {
            return Err(refuse("holds a control character"));
        }
        if export.split('/').any(|part| part == "..") {
            return Err(refuse("holds `..`"));
        }
        let parts: Vec<&str> = export
            .split('/')
            .filter(|p| !p.is_empty() && *p != ".")
            .collect();
        if server == Server::Embedded && parts.is_empty() {
            return Err(refuse(
                "the embedded server serves a directory of this host, not all of it: name one, as in \
                 embedded:/srv/volumes",
            ));
        }
        Ok(Self {
            server,
            export: format!("/{}", parts.join("/")),
        })
    }

    #[must_use]
    pub fn server(&self) -> &Server {
        &self.server
    }

    /// The exported directory: absolute, without `..`, without a slash at the end.
    #[must_use]
    pub fn export(&self) -> &str {
        &self.export
    }
}

impl fmt::Display for Share {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.server, self.export)
    }
}

impl FromStr for Share {
    type Err = AddressError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let form = || AddressError::Form(text.to_owned());
        if let Some(rest) = text.strip_prefix('[') {
            let (ip, export) = rest.split_once("]:").ok_or_else(form)?;
            let ip: Ipv6Addr = ip.parse().map_err(|_| AddressError::Host(ip.to_owned()))?;
            return Self::new(Server::Ip(ip.into()), export);
        }
        let (host, export) = text.split_once(":/").ok_or_else(form)?;
        Self::new(server(host)?, &format!("/{export}"))
    }
}

fn server(host: &str) -> Result<Server, AddressError> {
    if host == "embedded" {
        return Ok(Server::Embedded);
    }
    if let Ok(ip) = host.parse::<std::net::Ipv4Addr>() {
        return Ok(Server::Ip(ip.into()));
    }
    let label = |l: &str| {
        (1..=63).contains(&l.len())
            && l.bytes()
                .all(|b| b.is_ascii_alphanumeric() || b == b'-' || b == b'_')
            && !l.starts_with('-')
    };
    let name = host.strip_suffix('.').unwrap_or(host);
    if name.len() <= 253 && name.split('.').all(label) {
        Ok(Server::Name(host.to_owned()))
    } else {
        Err(AddressError::Host(host.to_owned()))
    }
}

impl TryFrom<String> for Share {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<Share> for String {
    fn from(share: Share) -> Self {
        share.to_string()
    }
}

/// A place below a share's export: zero or more plain components, never `.` or `..`.
/// The empty path is the export itself.
#[derive(Debug, Clone, Default, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct SharePath(String);

impl SharePath {
    /// The export itself.
    #[must_use]
    pub fn root() -> Self {
        Self::default()
    }

    /// Parses a relative path; repeated slashes and `.` components are dropped.
    ///
    /// # Errors
    /// [`AddressError::Path`] for `..`, control characters, a component over 255 bytes, or more
    /// than 1,024 bytes in all.
    pub fn parse(text: &str) -> Result<Self, AddressError> {
        let refuse = |reason| AddressError::Path {
            path: text.to_owned(),
            reason,
        };
        let mut parts = Vec::new();
        for part in text.split('/') {
            match part {
                "" | "." => {}
                ".." => return Err(refuse("holds `..`")),
                _ if part.len() > MAX_COMPONENT => {
                    return Err(refuse("a component is longer than 255 bytes"));
                }
                _ if part.chars().any(char::is_control) => {
                    return Err(refuse("holds a control character"));
                }
                _ => parts.push(part),
            }
        }
        let path = parts.join("/");
        if path.len() > MAX_PATH {
            return Err(refuse("longer than 1,024 bytes"));
        }
        Ok(Self(path))
    }

    /// This path with one more component.
    ///
    /// # Panics
    /// In debug builds when `name` is not one plain component; callers pass constants, validated
    /// names, or entries that a directory listing returned.
    #[must_use]
    pub fn join(&self, name: &str) -> Self {
        debug_assert!(!name.is_empty() && !name.contains('/') && name != "." && name != "..");
        if self.0.is_empty() {
            Self(name.to_owned())
        } else {
            Self(format!("{}/{name}", self.0))
        }
    }

    /// This path followed by another.
    #[must_use]
    pub fn append(&self, below: &Self) -> Self {
        match (self.0.is_empty(), below.0.is_empty()) {
            (true, _) => below.clone(),
            (_, true) => self.clone(),
            _ => Self(format!("{}/{}", self.0, below.0)),
        }
    }

    pub fn components(&self) -> impl DoubleEndedIterator<Item = &str> {
        self.0.split('/').filter(|part| !part.is_empty())
    }

    #[must_use]
    pub fn is_root(&self) -> bool {
        self.0.is_empty()
    }

    /// The directory that holds this one; the root's parent is the root.
    #[must_use]
    pub fn parent(&self) -> Self {
        Self(
            self.0
                .rsplit_once('/')
                .map_or_else(String::new, |(parent, _)| parent.to_owned()),
        )
    }

    /// The last component; empty for the root.
    #[must_use]
    pub fn name(&self) -> &str {
        self.0.rsplit('/').next().unwrap_or_default()
    }

    /// Whether this is `other` or lies below it.
    #[must_use]
    pub fn starts_with(&self, other: &Self) -> bool {
        other.0.is_empty()
            || self
                .0
                .strip_prefix(&other.0)
                .is_some_and(|r| r.is_empty() || r.starts_with('/'))
    }

    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }
}

impl fmt::Display for SharePath {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(if self.0.is_empty() { "." } else { &self.0 })
    }
}

impl TryFrom<String> for SharePath {
    type Error = AddressError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        Self::parse(&text)
    }
}

impl From<SharePath> for String {
    fn from(path: SharePath) -> Self {
        path.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn shares_print_as_they_parse() {
        for text in [
            "nas:/export",
            "10.0.0.1:/a/b",
            "[fd00::5]:/export",
            "embedded:/srv/v",
            "n:/",
        ] {
            assert_eq!(text.parse::<Share>().unwrap().to_string(), text);
        }
        assert_eq!(
            "nas:/a//b/./c/".parse::<Share>().unwrap().to_string(),
            "nas:/a/b/c"
        );
    }

    //= test 1813-I-path
    #[test]
    fn what_is_no_share_is_refused_with_its_reason() {
        for text in [
            "nas",
            "nas:export",
            "/export",
            "fd00::5:/export",
            "a b:/x",
            "-o:/x",
            ":/x",
            "embedded:/",
            "embedded:///.",
        ] {
            assert!(text.parse::<Share>().is_err(), "{text}");
        }
        let long = format!("nas:/{}", "a".repeat(MAX_PATH));
        assert!(long[..long.len() - 1].parse::<Share>().is_ok());
        assert!(long.parse::<Share>().is_err());
        let error = "nas:/a/../b".parse::<Share>().unwrap_err();
        assert_eq!(error.to_string(), "path \"/a/../b\": holds `..`");
    }

    #[test]
    fn paths_know_what_lies_below_them() {
        let a = SharePath::parse("a").unwrap();
        assert!(SharePath::parse("a/b").unwrap().starts_with(&a));
        assert!(!SharePath::parse("ab").unwrap().starts_with(&a));
        assert!(a.starts_with(&SharePath::root()));
        assert_eq!(SharePath::parse("a/b").unwrap().parent(), a);
        assert_eq!(SharePath::parse("a/b").unwrap().name(), "b");
    }

    proptest! {
        #[test]
        fn no_path_leaves_the_share(text in "[a./\\x00 -]{0,40}") {
            if let Ok(path) = SharePath::parse(&text) {
                prop_assert!(path.components().all(|c| c != ".." && c != "." && !c.contains('\0')));
                prop_assert_eq!(SharePath::parse(path.as_str()).unwrap(), path);
            }
        }

        #[test]
        fn any_text_parses_to_a_stable_share_or_an_error(text in "\\PC{0,60}") {
            if let Ok(share) = text.parse::<Share>() {
                prop_assert_eq!(share.to_string().parse::<Share>().unwrap(), share);
            }
        }
    }
}
