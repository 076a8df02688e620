//! Where the cluster's things lie in `.nfsvol/`, and their names. Values only.
//!
//! ```text
//! hosts/<host>/alive.<session>.<n>     the host's token, renamed to n+1 at each renewal
//! hosts/<host>/ended.<session>.<n>     the same, after another host has ended the session
//! hosts/<host>.<number>.json           what the host holds; the highest number counts
//! volumes/<name>/claims.<id>/<epoch>/  the right to an exclusive volume: claim.json
//! volumes/<name>/claims.<id>/wanted.<host>/  that host waits for the volume
//! volumes/<name>/removing.<nonce>/     somebody is about to remove the volume
//! volumes/<name>/removing/             and now it is being removed
//! ```

use crate::nfs::address::SharePath;
use crate::volume::VolumeName;
use crate::volume::options::OWN_DIR;

/// The binding mark of a removal; intents have a nonce after it.
pub const REMOVING: &str = "removing";
const CLAIMS: &str = "claims";
const WANTED: &str = "wanted.";
/// The longest host name that is used; Linux has 64.
const HOST_NAME: usize = 64;

fn own() -> SharePath {
    SharePath::root().join(OWN_DIR)
}

#[must_use]
pub fn hosts() -> SharePath {
    own().join("hosts")
}

/// What tells this share from every other.
#[must_use]
pub fn format_file() -> SharePath {
    own().join("format.json")
}

#[must_use]
pub fn host_dir(host: &str) -> SharePath {
    hosts().join(host)
}

#[must_use]
pub fn document(host: &str, number: u64) -> SharePath {
    hosts().join(&format!("{host}.{number}.json"))
}

/// Takes `<host>.<number>.json` apart.
#[must_use]
pub fn parse_document(name: &str) -> Option<(&str, u64)> {
    let (host, number) = name.strip_suffix(".json")?.rsplit_once('.')?;
    Some((host, number.parse().ok()?))
}

#[must_use]
pub fn volume(name: &VolumeName) -> SharePath {
    own().join("volumes").join(name.as_str())
}

#[must_use]
pub fn removing(name: &VolumeName) -> SharePath {
    volume(name).join(REMOVING)
}

/// Whether an entry of a volume's directory is somebody's intent to remove it.
#[must_use]
pub fn is_intent(name: &str) -> bool {
    name.strip_prefix(REMOVING)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// The claims to the volume whose record has this id. What arrives late from a host that knew an
/// earlier volume of the same name finds nothing there: epochs begin anew with each.
#[must_use]
pub fn claims(name: &VolumeName, id: &str) -> SharePath {
    // A record that anybody may have written must not lead elsewhere.
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
    volume(name).join(&format!("{CLAIMS}.{id}"))
}

/// The id of the record whose claims are in an entry of a volume's directory.
#[must_use]
pub fn claims_of(name: &str) -> Option<&str> {
    name.strip_prefix(CLAIMS)?.strip_prefix('.')
}

/// A host's mark that it waits for the volume; beside the epochs, which are numbers.
#[must_use]
pub fn wanted(name: &VolumeName, id: &str, host: &str) -> SharePath {
    claims(name, id).join(&format!("{WANTED}{host}"))
}

#[must_use]
pub fn is_wanted(name: &str) -> bool {
    name.starts_with(WANTED)
}

#[must_use]
pub fn claim_file(dir: &SharePath) -> SharePath {
    dir.join("claim.json")
}

#[must_use]
pub fn aside(nonce: &str) -> SharePath {
    own().join("tmp").join(nonce)
}

/// A host's name as a part of file names.
#[must_use]
pub fn host_name(host: &str) -> String {
    let plain = |ch: char| {
        if ch.is_ascii_alphanumeric() || ch == '-' {
            ch
        } else {
            '_'
        }
    };
    let name: String = host
        .chars()
        .map(|ch| if ch == '.' { '.' } else { plain(ch) })
        .take(HOST_NAME)
        .collect();
    match name.trim_matches('.') {
        "" => "_".to_owned(),
        name => name.to_owned(),
    }
}

/// A host's token.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Token {
    pub session: String,
    pub number: u64,
    /// Whether the session lives.
    pub alive: bool,
}

impl Token {
    #[must_use]
    pub fn alive(session: &str, number: u64) -> Self {
        Self {
            session: session.to_owned(),
            number,
            alive: true,
        }
    }

    #[must_use]
    pub fn name(&self) -> String {
        let state = if self.alive { "alive" } else { "ended" };
        format!("{state}.{}.{}", self.session, self.number)
    }

    #[must_use]
    pub fn parse(name: &str) -> Option<Self> {
        let mut parts = name.split('.');
        let alive = match parts.next()? {
            "alive" => true,
            "ended" => false,
            _ => return None,
        };
        let session = parts.next()?.to_owned();
        let number = parts.next()?.parse().ok()?;
        parts.next().is_none().then_some(Self {
            session,
            number,
            alive,
        })
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn names_parse_back() {
        let token = Token::alive("0123", 17);
        assert_eq!(token.name(), "alive.0123.17");
        assert_eq!(Token::parse(&token.name()), Some(token));
        assert_eq!(Token::parse("alive.x"), None);
        assert_eq!(Token::parse("other.x.1"), None);
        assert_eq!(document("a.example", 7).name(), "a.example.7.json");
        assert_eq!(parse_document("a.example.7.json"), Some(("a.example", 7)));
        assert_eq!(parse_document("a.json"), None);
        assert!(is_intent("removing.ab") && !is_intent("removing"));
        assert_eq!(host_name("node-1.lan"), "node-1.lan");
        assert_eq!(host_name("../x y"), "_x_y");
    }
}
