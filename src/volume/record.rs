//! A volume's record: the JSON document that every host reads.
//!
//! Invariants: a record is written whole or not at all, and only the host that made a data
//! directory may have written `made`. Fields that this version does not know are kept out of the
//! way: an unknown `format` is refused rather than guessed.

use std::path::Path;

use serde::{Deserialize, Serialize};

use super::{Access, OnRemove, VolumeName, VolumeOptions};
use nfs::address::{Share, SharePath};

/// The format number of records that this version writes and reads.
pub(crate) const FORMAT: u32 = 1;
/// The largest record, in bytes; a larger file on the share is not a record of ours.
pub(crate) const MAX_RECORD: usize = 64 * 1024;

/// What the catalog keeps of a volume.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Record {
    pub format: u32,
    pub name: VolumeName,
    /// 32 hexadecimal digits, random; tells one volume from a later one of the same name, and the
    /// winner of a race that it has won although the server's reply was lost.
    pub id: String,
    /// RFC 3339, by the server's clock.
    pub created: String,
    /// Host name of the creator, for people.
    pub created_by: String,
    pub options: VolumeOptions,
    /// The data directory, below `options.share` or the home share.
    pub data_dir: SharePath,
    pub on_remove: OnRemove,
    /// `fileid` of the data directory when the driver made it; `None` when it was found. Only a
    /// directory that still has this `fileid` is ever moved to the trash or deleted.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub made: Option<u64>,
    /// The server made root somebody else when the directory was made (root_squash), so Docker's
    /// copy of image data into the empty volume will be refused.
    #[serde(default, skip_serializing_if = "std::ops::Not::not")]
    pub squashed: bool,
    /// When the volume was removed that a Create with other options went on with, RFC 3339, by the server's
    /// clock.
    #[serde(default, skip_serializing_if = "Option::is_none")]
    pub recreated: Option<String>,
}

/// Why a document is not a record.
#[derive(Debug, thiserror::Error)]
pub enum RecordError {
    #[error("it is missing")]
    Missing,
    #[error("not a volume record: {0}")]
    Json(#[from] serde_json::Error),
    #[error(
        "record format {0} is newer than this nfsvol understands ({FORMAT}); upgrade this host"
    )]
    Format(u64),
    #[error("the record of {expected} names volume {found}")]
    Name {
        expected: VolumeName,
        found: VolumeName,
    },
    #[error("the record's data directory {0} is not the one that its options name")]
    DataDir(SharePath),
}

impl RecordError {
    /// Whether the document is torn or gone, not one of somebody else's.
    #[must_use]
    pub fn is_damage(&self) -> bool {
        matches!(self, Self::Missing | Self::Json(_))
    }
}

/// A document for the share, one field a line. Never an empty one: that would be taken for damaged
/// by all hosts.
pub(crate) fn json(document: &impl Serialize) -> Vec<u8> {
    serde_json::to_vec_pretty(document)
        .expect("strings, numbers and maps with string keys have a form in JSON")
}

impl Record {
    /// Reads the record of volume `name`.
    ///
    /// # Errors
    /// [`RecordError`] when the document is not a record, is of a newer format, names another
    /// volume (a directory that somebody copied by hand), or a data directory that its options
    /// do not name.
    pub fn from_json(name: &VolumeName, json: &[u8]) -> Result<Self, RecordError> {
        #[derive(Deserialize)]
        struct Format {
            format: u64,
        }
        let Format { format } = serde_json::from_slice(json)?;
        if format != u64::from(FORMAT) {
            return Err(RecordError::Format(format));
        }
        let record: Self = serde_json::from_slice(json)?;
        if record.name != *name {
            return Err(RecordError::Name {
                expected: name.clone(),
                found: record.name,
            });
        }
        // A record that anybody with access to the share may have written must not lead elsewhere.
        if record.options.data_dir(name).ok().as_ref() != Some(&record.data_dir) {
            return Err(RecordError::DataDir(record.data_dir));
        }
        Ok(record)
    }

    /// The document, one field a line, for people who look at the share.
    #[must_use]
    pub fn to_json(&self) -> Vec<u8> {
        let mut json = json(self);
        json.push(b'\n');
        json
    }

    /// The share that holds the data directory.
    #[must_use]
    pub fn share<'a>(&'a self, home: Option<&'a Share>) -> Option<&'a Share> {
        self.options.share.as_ref().or(home)
    }

    /// Whether `other`'s data directory is this one, or one lies in the other, if both lie on one
    /// server; also by way of different exports of it.
    #[must_use]
    pub fn overlaps(&self, other: &Self, home: Option<&Share>) -> bool {
        let place = |record: &Self| {
            let export = record.share(home).map_or("/", Share::export);
            Path::new(export).join(record.data_dir.as_str())
        };
        let (path, other_path) = (place(self), place(other));
        path.starts_with(&other_path) || other_path.starts_with(&path)
    }

    /// Whether a Remove moves the data directory; otherwise it needs nothing of the data's share.
    #[must_use]
    pub fn moves_data(&self) -> bool {
        self.made.is_some() && self.on_remove != OnRemove::Retain
    }

    /// Whether two volumes must not have data in common: one is exclusive, and the other may write.
    #[must_use]
    pub fn excludes(&self, other: &Self) -> bool {
        let [own, its] = [self, other].map(|record| record.options.access);
        (own == Access::Exclusive || its == Access::Exclusive)
            && own != Access::Readonly
            && its != Access::Readonly
    }

    /// Whether the data directory may lie in another volume's, or hold one.
    #[must_use]
    pub fn may_overlap(&self) -> bool {
        self.made.is_none() || !self.data_dir.parent().is_root()
    }
}

#[cfg(test)]
pub(crate) mod tests {
    use std::collections::BTreeMap;

    use super::*;

    /// A record as `docker volume create NAME` makes it.
    pub(crate) fn record(name: &str) -> Record {
        let options = VolumeOptions::parse(&BTreeMap::new()).unwrap();
        let name: VolumeName = name.parse().unwrap();
        Record {
            format: FORMAT,
            data_dir: options.data_dir(&name).unwrap(),
            name,
            id: "0123456789abcdef0123456789abcdef".to_owned(),
            created: "2026-11-23T10:00:00Z".to_owned(),
            created_by: "node1".to_owned(),
            options,
            on_remove: OnRemove::Trash,
            made: Some(7),
            squashed: false,
            recreated: None,
        }
    }

    #[test]
    fn a_record_survives_the_share() {
        let record = record("db");
        assert_eq!(
            Record::from_json(&record.name, &record.to_json()).unwrap(),
            record
        );
    }

    #[test]
    fn foreign_and_newer_documents_are_refused_with_a_reason() {
        let name: VolumeName = "db".parse().unwrap();
        let read = |json: &str| {
            Record::from_json(&name, json.as_bytes())
                .unwrap_err()
                .to_string()
        };
        assert!(read("{}").contains("not a volume record"));
        assert!(read("{\"format\": 2}").contains("upgrade this host"));
        let mut other = record("web");
        other.options = VolumeOptions::default();
        let json = String::from_utf8(other.to_json()).unwrap();
        assert_eq!(read(&json), "the record of db names volume web");
        let elsewhere = |dir: &str| {
            read(
                &json
                    .replace("\"name\": \"web\"", "\"name\": \"db\"")
                    .replace("\"data_dir\": \"web\"", dir),
            )
        };
        assert!(elsewhere("\"data_dir\": \"../etc\"").contains("holds `..`"));
        assert!(elsewhere("\"data_dir\": \"other\"").contains("not the one that its options name"));
    }

    #[test]
    fn nested_data_directories_overlap() {
        let (a, mut b) = (record("a"), record("b"));
        assert!(!a.overlaps(&b, None));
        b.data_dir = SharePath::parse("a/below").unwrap();
        assert!(a.overlaps(&b, None) && b.overlaps(&a, None));
        // By way of another export of the same server.
        let home: Share = "nas:/export".parse().unwrap();
        let on = |share: &str| {
            let mut record = record("b");
            record.options.share = Some(share.parse().unwrap());
            record.data_dir = SharePath::root();
            record
        };
        assert!(a.overlaps(&on("nas:/export/a/b"), Some(&home)));
        assert!(a.overlaps(&on("nas:/"), Some(&home)));
        assert!(!a.overlaps(&on("nas:/export/ab"), Some(&home)));
    }
}
