//! Arguments of calls, read from a record (RFC 4506).
//!
//! Invariant: nothing is allocated by a length that came over the wire; every variable field is
//! a slice of the record, and has a cap.

use nfs3_types::nfs3::{
    devicedata3, mknoddata3, nfstime3, sattr3, sattrguard3, set_atime, set_gid3, set_mode3,
    set_mtime, set_size3, set_uid3, specdata3,
};

/// The longest handle (RFC 1813, NFS3_FHSIZE).
const MAX_HANDLE: usize = 64;
/// The longest name or path taken; longer ones than the kernel's PATH_MAX cannot exist.
const MAX_NAME: usize = 4096;
/// The longest credential (RFC 5531 section 8.2).
const MAX_AUTH: usize = 400;
/// The most supplementary groups in AUTH_UNIX (RFC 5531 appendix A).
const MAX_GROUPS: u32 = 16;

/// The arguments do not follow the protocol: the call is answered with GARBAGE_ARGS.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) struct Garbage;

/// Who calls, by AUTH_UNIX; a call without it comes from nobody.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Caller {
    pub(super) uid: u32,
    pub(super) gid: u32,
    pub(super) groups: Vec<u32>,
}

impl Caller {
    /// The user and group that own nothing, by convention.
    pub(super) const NOBODY: Self = Self {
        uid: 65534,
        gid: 65534,
        groups: Vec::new(),
    };
}

/// What is left to read of a record.
#[derive(Debug)]
pub(super) struct Args<'a>(pub(super) &'a [u8]);

impl<'a> Args<'a> {
    fn take(&mut self, len: usize) -> Result<&'a [u8], Garbage> {
        let (taken, rest) = self.0.split_at_checked(len).ok_or(Garbage)?;
        self.0 = rest;
        Ok(taken)
    }

    pub(super) fn u32(&mut self) -> Result<u32, Garbage> {
        let bytes = self.take(4)?.first_chunk().ok_or(Garbage)?;
        Ok(u32::from_be_bytes(*bytes))
    }

    pub(super) fn u64(&mut self) -> Result<u64, Garbage> {
        let bytes = self.take(8)?.first_chunk().ok_or(Garbage)?;
        Ok(u64::from_be_bytes(*bytes))
    }

    pub(super) fn verifier(&mut self) -> Result<[u8; 8], Garbage> {
        self.u64().map(u64::to_be_bytes)
    }

    fn bool(&mut self) -> Result<bool, Garbage> {
        match self.u32()? {
            0 => Ok(false),
            1 => Ok(true),
            _ => Err(Garbage),
        }
    }

    pub(super) fn opaque(&mut self, max: usize) -> Result<&'a [u8], Garbage> {
        let len = usize::try_from(self.u32()?).map_err(|_| Garbage)?;
        if len > max {
            return Err(Garbage);
        }
        let bytes = self.take(len)?;
        self.take(len.wrapping_neg() & 3)?;
        Ok(bytes)
    }

    pub(super) fn handle(&mut self) -> Result<&'a [u8], Garbage> {
        self.opaque(MAX_HANDLE)
    }

    pub(super) fn name(&mut self) -> Result<&'a [u8], Garbage> {
        self.opaque(MAX_NAME)
    }

    /// Flavor and body of a credential or verifier.
    pub(super) fn auth(&mut self) -> Result<(u32, &'a [u8]), Garbage> {
        Ok((self.u32()?, self.opaque(MAX_AUTH)?))
    }

    /// The body of an AUTH_UNIX credential.
    pub(super) fn caller(&mut self) -> Result<Caller, Garbage> {
        let _stamp = self.u32()?;
        let _machine = self.opaque(255)?;
        let (uid, gid, count) = (self.u32()?, self.u32()?, self.u32()?);
        if count > MAX_GROUPS {
            return Err(Garbage);
        }
        let groups = (0..count).map(|_| self.u32()).collect::<Result<_, _>>()?;
        self.end()?;
        Ok(Caller { uid, gid, groups })
    }

    fn time(&mut self) -> Result<nfstime3, Garbage> {
        Ok(nfstime3 {
            seconds: self.u32()?,
            nseconds: self.u32()?,
        })
    }

    pub(super) fn sattr(&mut self) -> Result<sattr3, Garbage> {
        Ok(sattr3 {
            mode: match self.bool()? {
                true => set_mode3::Some(self.u32()?),
                false => set_mode3::None,
            },
            uid: match self.bool()? {
                true => set_uid3::Some(self.u32()?),
                false => set_uid3::None,
            },
            gid: match self.bool()? {
                true => set_gid3::Some(self.u32()?),
                false => set_gid3::None,
            },
            size: match self.bool()? {
                true => set_size3::Some(self.u64()?),
                false => set_size3::None,
            },
            atime: match self.u32()? {
                0 => set_atime::DONT_CHANGE,
                1 => set_atime::SET_TO_SERVER_TIME,
                2 => set_atime::SET_TO_CLIENT_TIME(self.time()?),
                _ => return Err(Garbage),
            },
            mtime: match self.u32()? {
                0 => set_mtime::DONT_CHANGE,
                1 => set_mtime::SET_TO_SERVER_TIME,
                2 => set_mtime::SET_TO_CLIENT_TIME(self.time()?),
                _ => return Err(Garbage),
            },
        })
    }

    pub(super) fn guard(&mut self) -> Result<sattrguard3, Garbage> {
        Ok(match self.bool()? {
            true => sattrguard3::Some(self.time()?),
            false => sattrguard3::None,
        })
    }

    pub(super) fn mknod(&mut self) -> Result<mknoddata3, Garbage> {
        let kind = self.u32()?;
        Ok(match kind {
            3 | 4 => {
                let device = devicedata3 {
                    dev_attributes: self.sattr()?,
                    spec: specdata3 {
                        specdata1: self.u32()?,
                        specdata2: self.u32()?,
                    },
                };
                if kind == 3 {
                    mknoddata3::NF3BLK(device)
                } else {
                    mknoddata3::NF3CHR(device)
                }
            }
            6 => mknoddata3::NF3SOCK(self.sattr()?),
            7 => mknoddata3::NF3FIFO(self.sattr()?),
            _ => mknoddata3::default,
        })
    }

    /// That nothing is left.
    pub(super) fn end(&self) -> Result<(), Garbage> {
        if self.0.is_empty() {
            Ok(())
        } else {
            Err(Garbage)
        }
    }
}

#[cfg(test)]
mod tests {
    use nfs3_types::rpc::auth_unix;
    use nfs3_types::xdr_codec::{Opaque, Pack};
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn a_callers_groups_are_read_and_bounded() {
        let packed = |groups: Vec<u32>| {
            let mut body = Vec::new();
            let auth = auth_unix {
                stamp: 9,
                machinename: Opaque::borrowed(b"node1"),
                uid: 1000,
                gid: 100,
                gids: groups,
            };
            auth.pack(&mut body).unwrap();
            body
        };
        let caller = Args(&packed(vec![4, 5])).caller().unwrap();
        assert_eq!(
            caller,
            Caller {
                uid: 1000,
                gid: 100,
                groups: vec![4, 5]
            }
        );
        assert_eq!(Args(&packed(vec![0; 17])).caller(), Err(Garbage));
    }

    #[test]
    fn a_length_beyond_the_record_or_the_cap_is_garbage() {
        assert_eq!(
            Args(&[0xff, 0xff, 0xff, 0xff, 1]).opaque(usize::MAX),
            Err(Garbage)
        );
        assert_eq!(Args(&[0, 0, 0, 65]).handle(), Err(Garbage));
        assert_eq!(Args(&[0, 0, 0, 1, 7, 0, 0]).opaque(4), Err(Garbage));
        assert_eq!(Args(&[0, 0, 0, 1, 7, 0, 0, 0]).opaque(4), Ok(&[7][..]));
    }

    proptest! {
        #[test]
        fn any_bytes_decode_or_are_garbage(bytes in prop::collection::vec(any::<u8>(), 0..128)) {
            let _ = Args(&bytes).sattr();
            let _ = Args(&bytes).mknod();
            let _ = Args(&bytes).caller();
            let _ = Args(&bytes).auth();
        }
    }
}
