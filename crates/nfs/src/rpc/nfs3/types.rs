//! The values of NFSv3 in plain Rust.

use std::fmt;

use bytes::Bytes;
use nfs3_types::nfs3::{
    self as wire, NFS3_FHSIZE, Nfs3Option, fattr3, ftype3, nfstime3, sattr3, set_atime, set_mtime,
    specdata3, stable_how, wcc_attr,
};

use crate::rpc::xdr::{DecodeError, Decoder};

/// A file handle: at most 64 bytes that mean something to the server only.
#[derive(Clone, Copy)]
pub struct FileHandle {
    length: u8,
    /// Zero beyond the length, so that comparing all of it compares the handle.
    bytes: [u8; NFS3_FHSIZE],
}

impl FileHandle {
    /// `None` for more than 64 bytes.
    #[must_use]
    pub fn new(bytes: &[u8]) -> Option<Self> {
        let mut handle = Self {
            length: u8::try_from(bytes.len()).ok()?,
            bytes: [0; NFS3_FHSIZE],
        };
        handle.bytes.get_mut(..bytes.len())?.copy_from_slice(bytes);
        Some(handle)
    }

    #[must_use]
    pub fn as_bytes(&self) -> &[u8] {
        &self.bytes[..usize::from(self.length)]
    }

    pub(in crate::rpc) fn decode(decoder: &mut Decoder) -> Result<Self, DecodeError> {
        //= 1813-2.6-handle: A handle is opaque, of at most 64 bytes; two that are equal, byte by
        //= byte, are of one file.
        let bytes = decoder.opaque("a file handle", NFS3_FHSIZE)?;
        Self::new(&bytes).ok_or(DecodeError::Content("a file handle is too long"))
    }
}

impl PartialEq for FileHandle {
    fn eq(&self, other: &Self) -> bool {
        //= 1813-2.6-handle: A handle is opaque, of at most 64 bytes; two that are equal, byte by
        //= byte, are of one file.
        self.as_bytes() == other.as_bytes()
    }
}
impl Eq for FileHandle {}

impl std::hash::Hash for FileHandle {
    fn hash<H: std::hash::Hasher>(&self, state: &mut H) {
        self.as_bytes().hash(state);
    }
}

impl fmt::Debug for FileHandle {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str("FileHandle(")?;
        for byte in self.as_bytes() {
            write!(f, "{byte:02x}")?;
        }
        f.write_str(")")
    }
}

/// Kinds of files (`ftype3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum FileKind {
    Regular,
    Directory,
    BlockDevice,
    CharDevice,
    Symlink,
    Socket,
    Fifo,
}

/// A time of the server: seconds and nanoseconds since 1970.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub struct Time {
    pub secs: u32,
    pub nanos: u32,
}

impl From<nfstime3> for Time {
    fn from(time: nfstime3) -> Self {
        Self {
            secs: time.seconds,
            nanos: time.nseconds,
        }
    }
}

impl From<Time> for nfstime3 {
    fn from(time: Time) -> Self {
        Self {
            seconds: time.secs,
            nseconds: time.nanos,
        }
    }
}

/// The longest file that Linux has, in bytes. A server that tells of a longer one is believed this
/// much, as by the kernel's client.
pub const MAX_FILE: u64 = (1 << 63) - 1;

/// Attributes of a file (`fattr3`, RFC 1813 section 2.6).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Attr {
    pub kind: FileKind,
    /// Permission bits, with set-uid, set-gid and sticky; no file type.
    pub mode: u32,
    pub nlink: u32,
    pub uid: u32,
    pub gid: u32,
    /// Bytes.
    pub size: u64,
    /// Bytes on disk.
    pub used: u64,
    /// Major and minor number of a device.
    pub rdev: (u32, u32),
    pub fsid: u64,
    pub fileid: u64,
    pub atime: Time,
    pub mtime: Time,
    pub ctime: Time,
}

impl From<fattr3> for Attr {
    fn from(attr: fattr3) -> Self {
        Self {
            kind: match attr.type_ {
                ftype3::NF3REG => FileKind::Regular,
                ftype3::NF3DIR => FileKind::Directory,
                ftype3::NF3BLK => FileKind::BlockDevice,
                ftype3::NF3CHR => FileKind::CharDevice,
                ftype3::NF3LNK => FileKind::Symlink,
                ftype3::NF3SOCK => FileKind::Socket,
                ftype3::NF3FIFO => FileKind::Fifo,
            },
            mode: attr.mode & 0o7777,
            nlink: attr.nlink,
            uid: attr.uid,
            gid: attr.gid,
            size: attr.size.min(MAX_FILE),
            used: attr.used,
            rdev: (attr.rdev.specdata1, attr.rdev.specdata2),
            fsid: attr.fsid,
            fileid: attr.fileid,
            atime: attr.atime.into(),
            mtime: attr.mtime.into(),
            ctime: attr.ctime.into(),
        }
    }
}

impl Attr {
    pub(super) fn decode(decoder: &mut Decoder) -> Result<Self, DecodeError> {
        decoder.fixed::<fattr3>().map(Self::from)
    }

    pub(super) fn optional(decoder: &mut Decoder) -> Result<Option<Self>, DecodeError> {
        decoder.option(Self::decode)
    }
}

/// What tells whether somebody else changed a file (`wcc_attr`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WccAttr {
    pub size: u64,
    pub mtime: Time,
    pub ctime: Time,
}

/// Attributes before and after an operation, as far as the server gives them (`wcc_data`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Wcc {
    pub before: Option<WccAttr>,
    pub after: Option<Attr>,
}

impl Wcc {
    pub(super) fn decode(decoder: &mut Decoder) -> Result<Self, DecodeError> {
        Ok(Self {
            before: decoder.option(|decoder| {
                let attr: wcc_attr = decoder.fixed()?;
                Ok(WccAttr {
                    size: attr.size.min(MAX_FILE),
                    mtime: attr.mtime.into(),
                    ctime: attr.ctime.into(),
                })
            })?,
            after: Attr::optional(decoder)?,
        })
    }
}

/// How to set a time.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub enum SetTime {
    #[default]
    Keep,
    /// To the server's clock.
    Server,
    To(Time),
}

/// Attributes to set; what is absent stays (`sattr3`).
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct SetAttr {
    pub mode: Option<u32>,
    pub uid: Option<u32>,
    pub gid: Option<u32>,
    pub size: Option<u64>,
    pub atime: SetTime,
    pub mtime: SetTime,
}

impl From<&SetAttr> for sattr3 {
    fn from(set: &SetAttr) -> Self {
        Self {
            mode: wire_option(set.mode),
            uid: wire_option(set.uid),
            gid: wire_option(set.gid),
            size: wire_option(set.size),
            atime: match set.atime {
                SetTime::Keep => set_atime::DONT_CHANGE,
                SetTime::Server => set_atime::SET_TO_SERVER_TIME,
                SetTime::To(time) => set_atime::SET_TO_CLIENT_TIME(time.into()),
            },
            mtime: match set.mtime {
                SetTime::Keep => set_mtime::DONT_CHANGE,
                SetTime::Server => set_mtime::SET_TO_SERVER_TIME,
                SetTime::To(time) => set_mtime::SET_TO_CLIENT_TIME(time.into()),
            },
        }
    }
}

pub(super) fn wire_option<T>(value: Option<T>) -> Nfs3Option<T>
where
    T: nfs3_types::xdr_codec::Pack + nfs3_types::xdr_codec::Unpack,
{
    value.map_or(Nfs3Option::None, Nfs3Option::Some)
}

/// How durable a WRITE is when it is answered (`stable_how`).
#[derive(Clone, Copy, Debug, PartialEq, Eq, PartialOrd, Ord)]
pub enum Stable {
    /// Until the server restarts, unless a COMMIT follows.
    Unstable,
    /// The data is on disk.
    DataSync,
    /// The data and all attributes are on disk.
    FileSync,
}

impl Stable {
    pub(super) fn wire(self) -> u32 {
        match self {
            Self::Unstable => stable_how::UNSTABLE as u32,
            Self::DataSync => stable_how::DATA_SYNC as u32,
            Self::FileSync => stable_how::FILE_SYNC as u32,
        }
    }

    pub(super) fn decode(decoder: &mut Decoder) -> Result<Self, DecodeError> {
        match decoder.u32()? {
            0 => Ok(Self::Unstable),
            1 => Ok(Self::DataSync),
            2 => Ok(Self::FileSync),
            //= 4506-4.3-enum: “It is an error to encode as an enum any integer other than those
            //= that have been given assignments in the enum declaration.”
            value => Err(DecodeError::Value {
                what: "stable_how",
                value,
            }),
        }
    }
}

/// How CREATE treats a name that is taken (`createhow3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum How {
    /// The file there is taken, and the attributes are set on it.
    Unchecked(SetAttr),
    /// EXIST.
    Guarded(SetAttr),
    /// EXIST, unless a CREATE with the same verifier made it: safe to repeat. The file's
    /// attributes are undefined until a SETATTR follows (RFC 1813 section 3.3.8).
    Exclusive([u8; 8]),
}

/// What MKNOD makes (`mknoddata3`).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Node {
    Fifo,
    Socket,
    /// Major and minor number.
    CharDevice(u32, u32),
    BlockDevice(u32, u32),
}

impl Node {
    pub(super) fn wire(self, set: &SetAttr) -> wire::mknoddata3 {
        let device = |specdata1, specdata2| wire::devicedata3 {
            dev_attributes: set.into(),
            spec: specdata3 {
                specdata1,
                specdata2,
            },
        };
        match self {
            Self::Fifo => wire::mknoddata3::NF3FIFO(set.into()),
            Self::Socket => wire::mknoddata3::NF3SOCK(set.into()),
            Self::CharDevice(major, minor) => wire::mknoddata3::NF3CHR(device(major, minor)),
            Self::BlockDevice(major, minor) => wire::mknoddata3::NF3BLK(device(major, minor)),
        }
    }
}

/// The bits of ACCESS (RFC 1813 section 3.3.4).
pub mod access {
    pub use nfs3_types::nfs3::{
        ACCESS3_DELETE as DELETE, ACCESS3_EXECUTE as EXECUTE, ACCESS3_EXTEND as EXTEND,
        ACCESS3_LOOKUP as LOOKUP, ACCESS3_MODIFY as MODIFY, ACCESS3_READ as READ,
    };
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LookupOk {
    pub handle: FileHandle,
    pub attr: Option<Attr>,
    pub dir_attr: Option<Attr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AccessOk {
    /// Bits of [`access`], a part of those asked for.
    pub granted: u32,
    pub attr: Option<Attr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadlinkOk {
    pub target: Bytes,
    pub attr: Option<Attr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReadOk {
    /// At most as much as was asked for; a slice of the received record.
    pub data: Bytes,
    pub eof: bool,
    pub attr: Option<Attr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WriteOk {
    /// At most as much as was sent.
    pub count: u32,
    pub committed: Stable,
    /// Changes when the server may have lost what was not committed.
    pub verf: [u8; 8],
    pub wcc: Wcc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CreateOk {
    pub handle: Option<FileHandle>,
    pub attr: Option<Attr>,
    pub dir: Wcc,
}

#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct RenameOk {
    pub from: Wcc,
    pub to: Wcc,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct LinkOk {
    pub attr: Option<Attr>,
    pub dir: Wcc,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntry {
    pub fileid: u64,
    pub name: Bytes,
    /// Where the next READDIR begins to go on behind this entry.
    pub cookie: u64,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReaddirOk {
    pub entries: Vec<DirEntry>,
    /// Goes with the cookies.
    pub verf: [u8; 8],
    pub eof: bool,
    pub dir_attr: Option<Attr>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct DirEntryPlus {
    pub fileid: u64,
    pub name: Bytes,
    /// Where the next READDIRPLUS begins to go on behind this entry.
    pub cookie: u64,
    pub attr: Option<Attr>,
    pub handle: Option<FileHandle>,
}

#[derive(Clone, Debug, PartialEq, Eq)]
pub struct ReaddirPlusOk {
    pub entries: Vec<DirEntryPlus>,
    /// Goes with the cookies.
    pub verf: [u8; 8],
    pub eof: bool,
    pub dir_attr: Option<Attr>,
}

/// Names alone, as READDIR tells them.
impl From<ReaddirOk> for ReaddirPlusOk {
    fn from(names: ReaddirOk) -> Self {
        let entry = |entry: DirEntry| DirEntryPlus {
            fileid: entry.fileid,
            name: entry.name,
            cookie: entry.cookie,
            attr: None,
            handle: None,
        };
        Self {
            entries: names.entries.into_iter().map(entry).collect(),
            verf: names.verf,
            eof: names.eof,
            dir_attr: names.dir_attr,
        }
    }
}

/// Space, in bytes, and files, in number (FSSTAT).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsStat {
    pub total_bytes: u64,
    pub free_bytes: u64,
    /// Free for this user.
    pub available_bytes: u64,
    pub total_files: u64,
    pub free_files: u64,
    /// Free for this user.
    pub available_files: u64,
    /// Seconds for which the above will not change.
    pub invariant_secs: u32,
    pub attr: Option<Attr>,
}

/// What the server prefers and can do (FSINFO); sizes in bytes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct FsInfo {
    pub rtmax: u32,
    pub rtpref: u32,
    pub rtmult: u32,
    pub wtmax: u32,
    pub wtpref: u32,
    pub wtmult: u32,
    pub dtpref: u32,
    pub max_file_size: u64,
    /// Resolution of times.
    pub time_delta: Time,
    /// Bits `FSF3_*`.
    pub properties: u32,
    pub attr: Option<Attr>,
}

/// Limits of names (PATHCONF).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PathConf {
    pub link_max: u32,
    /// Bytes.
    pub name_max: u32,
    pub no_trunc: bool,
    pub chown_restricted: bool,
    pub case_insensitive: bool,
    pub case_preserving: bool,
    pub attr: Option<Attr>,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CommitOk {
    /// If it differs from that of the WRITEs, they have to be sent again.
    pub verf: [u8; 8],
    pub wcc: Wcc,
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn no_file_is_longer_than_linux_has_them() {
        for (told, taken) in [(7, 7), (MAX_FILE, MAX_FILE), (u64::MAX, MAX_FILE)] {
            let time = nfstime3 {
                seconds: 1,
                nseconds: 0,
            };
            let attr = fattr3 {
                type_: ftype3::NF3REG,
                mode: 0o644,
                nlink: 1,
                uid: 0,
                gid: 0,
                size: told,
                used: 0,
                rdev: specdata3 {
                    specdata1: 0,
                    specdata2: 0,
                },
                fsid: 1,
                fileid: 2,
                atime: time,
                mtime: time,
                ctime: time,
            };
            assert_eq!(Attr::from(attr).size, taken);
        }
    }
}
