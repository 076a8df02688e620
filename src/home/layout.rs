//! What lies where in `.nfsvol/`, and the names in it. Values only.
//!
//! ```text
//! .nfsvol/
//!   README  format.json             what this is; format number; id of the share
//!   volumes/<name>/record.json      a volume; beside it `removing/` while it is being removed
//!   hosts/                          see `cluster::layout`
//!   trash/<name>.<time>.<random>/   a removed volume: volume/record.json and data/
//!   tmp/                            what is being made; older than an hour: left over
//! ```

use jiff::Timestamp;
use jiff::fmt::strtime;
use jiff::tz::TimeZone;
use serde::{Deserialize, Serialize};

use crate::chance;
use crate::cluster::layout as cluster;
use crate::nfs::address::SharePath;
use crate::nfs::admin::ServerTime;
use crate::volume::options::OWN_DIR;
use crate::volume::{Record, VolumeName};

/// The format number of `.nfsvol/` that this version writes and reads.
pub(super) const FORMAT: u32 = 1;
pub(super) const RECORD: &str = "record.json";
/// The removed volume's data directory and record directory in its trash entry.
pub(super) const TRASH_DATA: &str = "data";
pub(super) const TRASH_VOLUME: &str = "volume";
/// The directory of a restore in an entry begins so; in it is what that has taken.
pub(super) const RESTORING: &str = "restoring.";
pub(super) const RESTORED_FROM: &str = "from";
/// How a trash entry's time is written: ISO 8601, to the second, UTC.
const TRASH_TIME: &str = "%Y%m%dT%H%M%SZ";

pub(super) const README: &str = "\
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
pub(super) struct Format {
    pub(super) format: u32,
    /// 32 hexadecimal digits, random.
    pub(super) share_id: String,
}

pub(super) fn own() -> SharePath {
    SharePath::root().join(OWN_DIR)
}

/// What is prepared to become `.nfsvol/`, with this id.
pub(super) fn own_aside(id: &str) -> SharePath {
    SharePath::root().join(&format!("{OWN_DIR}.{id}"))
}

/// The path of an entry of the export that is an [`own_aside`], by its name.
pub(super) fn as_own_aside(name: &str) -> Option<SharePath> {
    let id = name.strip_prefix(OWN_DIR)?.strip_prefix('.')?;
    let is_id = id.len() == ID_DIGITS && id.bytes().all(|b| b.is_ascii_hexdigit());
    is_id.then(|| own_aside(id))
}

/// What is made once and what nobody renames or replaces.
pub(crate) fn frame() -> [SharePath; 5] {
    [own(), format_file(), volumes(), trash(), tmp()]
}

pub(super) fn format_file() -> SharePath {
    own().join("format.json")
}

pub(super) fn volumes() -> SharePath {
    own().join("volumes")
}

pub(super) fn volume(name: &VolumeName) -> SharePath {
    volumes().join(name.as_str())
}

pub(super) fn record_file(name: &VolumeName) -> SharePath {
    volume(name).join(RECORD)
}

/// Its presence says that the volume is being removed; its mtime names the trash entry.
pub(super) fn removing(name: &VolumeName) -> SharePath {
    cluster::removing(name)
}

pub(super) fn tmp() -> SharePath {
    own().join("tmp")
}

pub(super) fn trash() -> SharePath {
    own().join("trash")
}

/// How a removal's mark names its remover: with the time by that host's clock, in seconds since
/// 1970, which tells whether the server's clock was right then.
pub(crate) fn remover(host: &str, secs: u64) -> String {
    format!("{secs}.{host}")
}

/// The remover's time, by the name of an entry of the mark: `by.<secs>.<host>`.
pub(super) fn removers_time(entry: &str) -> Option<u64> {
    let (secs, _) = entry.strip_prefix("by.")?.split_once('.')?;
    secs.parse().ok()
}

/// A removed volume's place in the trash: `<name>.<time>.<random>`.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct TrashName {
    pub(super) volume: VolumeName,
    /// Seconds since 1970 by the server's clock.
    pub(super) removed: u64,
    pub(super) random: String,
}

impl TrashName {
    /// The entry of `record` removed at `time`; every host that finishes the removal finds the
    /// same one, since both come from the share.
    pub(super) fn of(record: &Record, time: ServerTime) -> Self {
        Self::at(record, time.secs)
    }

    /// The entry of `record` removed at `secs` since 1970.
    pub(super) fn at(record: &Record, secs: u64) -> Self {
        Self {
            volume: record.name.clone(),
            removed: secs,
            random: record.id.chars().take(8).collect(),
        }
    }

    pub(super) fn parse(entry: &str) -> Option<Self> {
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

    pub(super) fn entry(&self) -> String {
        let time = timestamp(self.removed).to_zoned(TimeZone::UTC);
        format!(
            "{}.{}.{}",
            self.volume,
            time.strftime(TRASH_TIME),
            self.random
        )
    }

    pub(super) fn path(&self) -> SharePath {
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
pub(super) fn secs(rfc3339: &str) -> u64 {
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
pub(super) fn random_id() -> std::io::Result<String> {
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

    proptest! {
        #[test]
        fn every_entry_parses_back(name in "[a-z][a-z0-9.]{0,20}", secs in 0..4_000_000_000_u64) {
            let entry = TrashName::of(&record(&name), ServerTime { secs, nanos: 0 });
            prop_assert_eq!(TrashName::parse(&entry.entry()), Some(entry));
        }
    }
}
