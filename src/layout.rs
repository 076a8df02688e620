//! What lies where in `.nfsvol/`, on the home share and on shares of data, and the names in it. Values
//! only.
//!
//! ```text
//! .nfsvol/
//!   README  format.json                    what this is; format number; id of the share
//!   volumes/<name>/record.json             a volume
//!   volumes/<name>/claims.<id>/<epoch>/    the right to an exclusive volume: claim.json
//!   volumes/<name>/claims.<id>/wanted.<host>/  that host waits for the volume
//!   volumes/<name>/removing.<nonce>/       somebody is about to remove the volume
//!   volumes/<name>/removing/               and now it is being removed
//!   volumes/<name>/from/                   left over from a restore
//!   hosts/<host>/alive.<session>.<n>       the host's token, renamed to n+1 at each renewal
//!   hosts/<host>/ended.<session>.<n>       the same, after another host has ended the session
//!   hosts/<host>.<number>.json             what the host holds; the highest number counts
//!   trash/<name>.<time>.<random>/          a removed volume: volume/record.json and data/
//!   trash/<entry>/restoring.<random>/      a restore has begun; in it `from/`, which volume/ was
//!   trash/<entry>/restoring.anew.<random>/ the same, by a Create with other options
//!   tmp/                                   what is being made; older than an hour: left over
//! .nfsvol.<id>/                            what is prepared to become .nfsvol/
//! ```

use crate::volume::options::OWN_DIR;
use crate::volume::{Record, VolumeName};
use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use nfs::address::SharePath;
use nfs::admin::ServerTime;
use serde::{Deserialize, Serialize};

/// The format number of `.nfsvol/` that this version writes and reads.
pub(crate) const FORMAT: u32 = 1;
pub(crate) const RECORD: &str = "record.json";
/// The removed volume's data directory and record directory in its trash entry.
pub(crate) const TRASH_DATA: &str = "data";
pub(crate) const TRASH_VOLUME: &str = "volume";
/// The directory of a restore in an entry begins so; in it is what that has taken.
pub(crate) const RESTORING: &str = "restoring.";
/// That of a Create which brings a volume back with other options; a kind of [`RESTORING`].
pub(crate) const RECREATING: &str = "restoring.anew.";
pub(crate) const RESTORED_FROM: &str = "from";
/// How a trash entry's time is written: ISO 8601, to the second, UTC.
const TRASH_TIME: &str = "%Y%m%dT%H%M%SZ";
/// The binding mark of a removal; intents have a nonce after it.
pub(crate) const REMOVING: &str = "removing";
const CLAIMS: &str = "claims";
const WANTED: &str = "wanted.";
/// The longest host name that is used; Linux has 64.
const HOST_NAME: usize = 64;

pub(crate) const README: &str = "\
This directory belongs to nfsvol, a Docker volume driver.

  volumes/NAME/record.json   what nfsvol knows of the volume NAME (JSON)
  trash/NAME.TIME.RANDOM/    a removed volume: volume/record.json and, if it was moved, data/
  hosts/                     which hosts live, and what they hold
  tmp/                       things being made; safe to delete when older than an hour

The data of a volume is in the directory that its record names, beside this one.
`nfsvol trash ls` lists what can be restored, `nfsvol restore NAME` brings it back.
By hand: move trash/ENTRY/data to the data directory that trash/ENTRY/volume/record.json names,
delete trash/ENTRY/volume/removing, then move trash/ENTRY/volume to volumes/NAME.
Where a restore was broken off there is no trash/ENTRY/volume but trash/ENTRY/restoring.RANDOM.
With a record.json in that: move data, if it is there still, to the directory that this names, delete
from/ in it, then move it to volumes/NAME. Without one: from/ in it is what volume was.
volumes/NAME/from/, beside record.json, is left over from a restore; nothing needs it.
";

/// `format.json`: tells one share from another, also when its address changes.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub(crate) struct Format {
    pub(crate) format: u32,
    /// 32 hexadecimal digits, random.
    pub(crate) share_id: String,
}

pub(crate) fn own() -> SharePath {
    SharePath::root().join(OWN_DIR)
}

/// What is prepared to become `.nfsvol/`, with this id.
pub(crate) fn own_aside(id: &str) -> SharePath {
    SharePath::root().join(&format!("{OWN_DIR}.{id}"))
}

/// The path of an entry of the export that is an [`own_aside`], by its name.
pub(crate) fn as_own_aside(name: &str) -> Option<SharePath> {
    let id = name.strip_prefix(OWN_DIR)?.strip_prefix('.')?;
    let is_id = id.len() == ID_DIGITS && id.bytes().all(|b| b.is_ascii_hexdigit());
    is_id.then(|| own_aside(id))
}

/// What is made once and what nobody renames or replaces.
pub(crate) fn frame() -> [SharePath; 5] {
    [own(), format_file(), volumes(), trash(), tmp()]
}

/// What tells this share from every other.
pub(crate) fn format_file() -> SharePath {
    own().join("format.json")
}

pub(crate) fn volumes() -> SharePath {
    own().join("volumes")
}

pub fn volume(name: &VolumeName) -> SharePath {
    volumes().join(name.as_str())
}

pub(crate) fn record_file(name: &VolumeName) -> SharePath {
    volume(name).join(RECORD)
}

pub(crate) fn tmp() -> SharePath {
    own().join("tmp")
}

pub(crate) fn trash() -> SharePath {
    own().join("trash")
}

pub(crate) fn hosts() -> SharePath {
    own().join("hosts")
}

pub(crate) fn host_dir(host: &str) -> SharePath {
    hosts().join(host)
}

pub(crate) fn document(host: &str, number: u64) -> SharePath {
    hosts().join(&format!("{host}.{number}.json"))
}

/// Takes `<host>.<number>.json` apart.
pub(crate) fn parse_document(name: &str) -> Option<(&str, u64)> {
    let (host, number) = name.strip_suffix(".json")?.rsplit_once('.')?;
    Some((host, number.parse().ok()?))
}

/// Its presence says that the volume is being removed; its mtime names the trash entry.
pub fn removing(name: &VolumeName) -> SharePath {
    volume(name).join(REMOVING)
}

/// Whether an entry of a volume's directory is somebody's intent to remove it.
pub(crate) fn is_intent(name: &str) -> bool {
    name.strip_prefix(REMOVING)
        .is_some_and(|rest| rest.starts_with('.'))
}

/// The claims to the volume whose record has this id. What arrives late from a host that knew an
/// earlier volume of the same name finds nothing there: epochs begin anew with each.
pub(crate) fn claims(name: &VolumeName, id: &str) -> SharePath {
    // A record that anybody may have written must not lead elsewhere.
    let id: String = id.chars().filter(char::is_ascii_alphanumeric).collect();
    volume(name).join(&format!("{CLAIMS}.{id}"))
}

/// The id of the record whose claims are in an entry of a volume's directory.
pub(crate) fn claims_of(name: &str) -> Option<&str> {
    name.strip_prefix(CLAIMS)?.strip_prefix('.')
}

/// A host's mark that it waits for the volume; beside the epochs, which are numbers.
pub(crate) fn wanted(name: &VolumeName, id: &str, host: &str) -> SharePath {
    claims(name, id).join(&format!("{WANTED}{host}"))
}

pub(crate) fn is_wanted(name: &str) -> bool {
    name.starts_with(WANTED)
}

pub(crate) fn claim_file(dir: &SharePath) -> SharePath {
    dir.join("claim.json")
}

/// What is being made, or put away, under a name that is never used again.
pub fn aside(nonce: &str) -> SharePath {
    tmp().join(nonce)
}

/// A host's name as a part of file names.
pub(crate) fn host_name(host: &str) -> String {
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
pub(crate) struct Token {
    pub(crate) session: String,
    pub(crate) number: u64,
    /// Whether the session lives.
    pub(crate) alive: bool,
}

impl Token {
    pub(crate) fn alive(session: &str, number: u64) -> Self {
        Self {
            session: session.to_owned(),
            number,
            alive: true,
        }
    }

    pub(crate) fn name(&self) -> String {
        let state = if self.alive { "alive" } else { "ended" };
        format!("{state}.{}.{}", self.session, self.number)
    }

    pub(crate) fn parse(name: &str) -> Option<Self> {
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

/// How a removal's mark names its remover: with the time by that host's clock, in seconds since
/// 1970, which tells whether the server's clock was right then.
pub(crate) fn remover(host: &str, secs: u64) -> String {
    format!("{secs}.{host}")
}

/// The remover's time, by the name of an entry of the mark: `by.<secs>.<host>`.
pub(crate) fn removers_time(entry: &str) -> Option<u64> {
    let (secs, _) = entry.strip_prefix("by.")?.split_once('.')?;
    secs.parse().ok()
}

/// A removed volume's place in the trash: `<name>.<time>.<random>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct TrashName {
    pub(crate) volume: VolumeName,
    /// Seconds since 1970 by the server's clock.
    pub(crate) removed: u64,
    pub(crate) random: String,
}

impl TrashName {
    /// The entry of `record` removed at `time`; every host that finishes the removal finds the
    /// same one, since both come from the share.
    pub(crate) fn of(record: &Record, time: ServerTime) -> Self {
        Self::at(record, time.secs)
    }

    /// The entry of `record` removed at `secs` since 1970.
    pub(crate) fn at(record: &Record, secs: u64) -> Self {
        Self {
            volume: record.name.clone(),
            removed: secs,
            random: record.id.chars().take(8).collect(),
        }
    }

    pub(crate) fn parse(entry: &str) -> Option<Self> {
        let mut parts = entry.rsplitn(3, '.');
        let random = parts.next().filter(|r| r.len() == 8)?.to_owned();
        let time = strtime::parse(TRASH_TIME, parts.next()?)
            .ok()?
            .to_datetime()
            .ok()?;
        let volume = parts.next()?.parse().ok()?;
        let removed = time.to_zoned(TimeZone::UTC).ok()?.timestamp().as_second();
        Some(Self {
            volume,
            removed: u64::try_from(removed).ok()?,
            random,
        })
    }

    pub(crate) fn entry(&self) -> String {
        let time = timestamp(self.removed).to_zoned(TimeZone::UTC);
        format!(
            "{}.{}.{}",
            self.volume,
            time.strftime(TRASH_TIME),
            self.random
        )
    }

    pub(crate) fn path(&self) -> SharePath {
        trash().join(&self.entry())
    }
}

fn timestamp(secs: u64) -> Timestamp {
    i64::try_from(secs)
        .ok()
        .and_then(|s| Timestamp::from_second(s).ok())
        .unwrap_or_default()
}

/// Seconds since 1970 of an RFC 3339 time; 0 if it is none.
pub(crate) fn secs(rfc3339: &str) -> u64 {
    let parsed = rfc3339.parse::<Timestamp>().ok();
    parsed.map_or(0, |time| u64::try_from(time.as_second()).unwrap_or(0))
}

/// Seconds since 1970 as RFC 3339.
pub(crate) fn rfc3339(secs: u64) -> String {
    timestamp(secs).to_string()
}

/// Hexadecimal digits of an id.
const ID_DIGITS: usize = 32;

/// 128 random bits as [`ID_DIGITS`] hexadecimal digits.
///
/// # Errors
/// When the kernel gives no random bytes (getrandom(2)).
pub(crate) fn random_id() -> std::io::Result<String> {
    let bits = || chance::bits().map_err(std::io::Error::other);
    Ok(format!("{:016x}{:016x}", bits()?, bits()?))
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;
    use crate::volume::record::tests::record;

    #[test]
    fn a_trash_entry_tells_volume_and_time() {
        let time = ServerTime {
            secs: 1_795_000_000,
            nanos: 5,
        };
        let entry = TrashName::of(&record("my.db"), time);
        assert_eq!(entry.entry(), "my.db.20261118T110640Z.01234567");
        assert_eq!(rfc3339(time.secs), "2026-11-18T11:06:40Z");
        assert_eq!(TrashName::parse(&entry.entry()), Some(entry));
        assert_eq!(TrashName::parse("my.db"), None);
        assert_eq!(TrashName::parse("x.notatime.01234567"), None);
    }

    #[test]
    fn only_what_was_prepared_is_taken_for_it() {
        let id = random_id().unwrap();
        let name = format!(".nfsvol.{id}");
        assert_eq!(as_own_aside(&name), Some(own_aside(&id)));
        for other in [
            ".nfsvol",
            ".nfsvol.old",
            &format!("nfsvol.{id}"),
            &format!("{name}0"),
        ] {
            assert_eq!(as_own_aside(other), None, "{other}");
        }
    }

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

    proptest! {
        #[test]
        fn every_entry_parses_back(name in "[a-z][a-z0-9.]{0,20}", secs in 0..4_000_000_000_u64) {
            let entry = TrashName::of(&record(&name), ServerTime { secs, nanos: 0 });
            prop_assert_eq!(TrashName::parse(&entry.entry()), Some(entry));
        }
    }
}
