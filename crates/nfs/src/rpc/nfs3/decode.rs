//! The results of the procedures (RFC 1813 section 3.3), read from the place behind the status.
//!
//! Every function takes what any server may send: it ends in a value or in a [`DecodeError`],
//! and allocates in proportion to the bytes that are there.

use bytes::Bytes;
use nfs3_types::nfs3::nfstime3;

use super::types::{
    AccessOk, Attr, CommitOk, CreateOk, DirEntry, DirEntryPlus, FileHandle, FsInfo, FsStat, LinkOk,
    LookupOk, PathConf, ReadOk, ReaddirOk, ReaddirPlusOk, ReadlinkOk, RenameOk, Stable, Wcc,
    WriteOk,
};
use crate::rpc::xdr::{DecodeError, Decoder};

/// The longest target of a symlink, in bytes: PATH_MAX of Linux.
const MAX_PATH: usize = 4096;

type Result<T> = std::result::Result<T, DecodeError>;

pub fn getattr(d: &mut Decoder) -> Result<Attr> {
    Attr::decode(d)
}

pub fn wcc(d: &mut Decoder) -> Result<Wcc> {
    Wcc::decode(d)
}

pub fn lookup(d: &mut Decoder) -> Result<LookupOk> {
    Ok(LookupOk {
        handle: FileHandle::decode(d)?,
        attr: Attr::optional(d)?,
        dir_attr: Attr::optional(d)?,
    })
}

pub fn access(d: &mut Decoder) -> Result<AccessOk> {
    let attr = Attr::optional(d)?;
    Ok(AccessOk {
        granted: d.u32()?,
        attr,
    })
}

pub fn readlink(d: &mut Decoder) -> Result<ReadlinkOk> {
    let attr = Attr::optional(d)?;
    Ok(ReadlinkOk {
        target: d.opaque("the target of a symlink", MAX_PATH)?,
        attr,
    })
}

/// More data than the `asked` bytes is an error: it would end up in a buffer of that size.
pub fn read(d: &mut Decoder, asked: u32) -> Result<ReadOk> {
    let attr = Attr::optional(d)?;
    let count = d.u32()?;
    let eof = d.bool()?;
    let data = d.opaque("the data of a READ", asked as usize)?;
    if data.len() != count as usize {
        return Err(DecodeError::Content(
            "a READ announces another count than it brings",
        ));
    }
    if data.is_empty() && asked > 0 && !eof {
        // Taken at its word, this would be read again for ever.
        return Err(DecodeError::Content(
            "a READ brings nothing, and not the end of the file either",
        ));
    }
    Ok(ReadOk { data, eof, attr })
}

/// A count above the `sent` bytes is an error, and so is none at all: it would be sent for ever.
pub fn write(d: &mut Decoder, sent: u32) -> Result<WriteOk> {
    let wcc = Wcc::decode(d)?;
    let count = d.u32()?;
    if count > sent || (count == 0 && sent > 0) {
        return Err(DecodeError::Content(
            "a WRITE reports a count that cannot be",
        ));
    }
    Ok(WriteOk {
        count,
        committed: Stable::decode(d)?,
        verf: d.verifier()?,
        wcc,
    })
}

/// CREATE, MKDIR, SYMLINK and MKNOD.
pub fn create(d: &mut Decoder) -> Result<CreateOk> {
    Ok(CreateOk {
        handle: d.option(FileHandle::decode)?,
        attr: Attr::optional(d)?,
        dir: Wcc::decode(d)?,
    })
}

pub fn rename(d: &mut Decoder) -> Result<RenameOk> {
    Ok(RenameOk {
        from: Wcc::decode(d)?,
        to: Wcc::decode(d)?,
    })
}

pub fn link(d: &mut Decoder) -> Result<LinkOk> {
    Ok(LinkOk {
        attr: Attr::optional(d)?,
        dir: Wcc::decode(d)?,
    })
}

/// A name as the server has it, which may be longer than Linux takes, or none: whoever shows it has to
/// look.
fn name(d: &mut Decoder) -> Result<Bytes> {
    d.opaque("a name", usize::MAX)
}

pub fn readdir(d: &mut Decoder) -> Result<ReaddirOk> {
    let dir_attr = Attr::optional(d)?;
    let verf = d.verifier()?;
    let mut entries = Vec::new();
    while d.bool()? {
        let fileid = d.u64()?;
        let name = name(d)?;
        entries.push(DirEntry {
            fileid,
            name,
            cookie: d.u64()?,
        });
    }
    Ok(ReaddirOk {
        entries,
        verf,
        eof: d.bool()?,
        dir_attr,
    })
}

pub fn readdirplus(d: &mut Decoder) -> Result<ReaddirPlusOk> {
    let dir_attr = Attr::optional(d)?;
    let verf = d.verifier()?;
    let mut entries = Vec::new();
    while d.bool()? {
        let fileid = d.u64()?;
        let name = name(d)?;
        entries.push(DirEntryPlus {
            fileid,
            name,
            cookie: d.u64()?,
            attr: Attr::optional(d)?,
            handle: d.option(FileHandle::decode)?,
        });
    }
    Ok(ReaddirPlusOk {
        entries,
        verf,
        eof: d.bool()?,
        dir_attr,
    })
}

pub fn fsstat(d: &mut Decoder) -> Result<FsStat> {
    let attr = Attr::optional(d)?;
    Ok(FsStat {
        total_bytes: d.u64()?,
        free_bytes: d.u64()?,
        available_bytes: d.u64()?,
        total_files: d.u64()?,
        free_files: d.u64()?,
        available_files: d.u64()?,
        invariant_secs: d.u32()?,
        attr,
    })
}

pub fn fsinfo(d: &mut Decoder) -> Result<FsInfo> {
    let attr = Attr::optional(d)?;
    Ok(FsInfo {
        rtmax: d.u32()?,
        rtpref: d.u32()?,
        rtmult: d.u32()?,
        wtmax: d.u32()?,
        wtpref: d.u32()?,
        wtmult: d.u32()?,
        dtpref: d.u32()?,
        max_file_size: d.u64()?,
        time_delta: d.fixed::<nfstime3>()?.into(),
        properties: d.u32()?,
        attr,
    })
}

pub fn pathconf(d: &mut Decoder) -> Result<PathConf> {
    let attr = Attr::optional(d)?;
    Ok(PathConf {
        link_max: d.u32()?,
        name_max: d.u32()?,
        no_trunc: d.bool()?,
        chown_restricted: d.bool()?,
        case_insensitive: d.bool()?,
        case_preserving: d.bool()?,
        attr,
    })
}

pub fn commit(d: &mut Decoder) -> Result<CommitOk> {
    let wcc = Wcc::decode(d)?;
    Ok(CommitOk {
        verf: d.verifier()?,
        wcc,
    })
}
