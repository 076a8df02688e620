//! AUTH_UNIX credentials (RFC 5531, appendix A), one for each call.
//!
//! The whole credential is at most 340 bytes and is written straight into the call: keeping
//! encoded copies for each user would cost a look-up that is no cheaper.

use std::sync::Arc;

use bytes::Bytes;
use nfs3_types::rpc::auth_flavor;

use super::xdr::Encoder;

/// The most supplementary groups that AUTH_UNIX carries; the rest is left out, as the kernel's
/// client does (a server with `manage-gids` looks the groups up itself).
pub(crate) const MAX_GROUPS: usize = 16;
/// The longest machine name, in bytes (RFC 5531, appendix A).
const MAX_MACHINE_NAME: usize = 255;

/// On whose behalf a call is made.
#[derive(Clone, Debug, PartialEq, Eq, Hash)]
pub struct Cred {
    pub uid: u32,
    pub gid: u32,
    /// Supplementary groups; the first [`MAX_GROUPS`] are sent.
    pub groups: Arc<[u32]>,
}

impl Cred {
    /// Without supplementary groups.
    #[must_use]
    pub fn new(uid: u32, gid: u32) -> Self {
        Self {
            uid,
            gid,
            groups: Arc::from([]),
        }
    }

    /// Root, which the server may squash.
    #[must_use]
    pub fn root() -> Self {
        Self::new(0, 0)
    }
}

/// What all credentials of a client share.
#[derive(Clone, Debug)]
pub(super) struct Machine {
    name: Bytes,
    stamp: u32,
}

impl Machine {
    /// A name beyond 255 bytes is cut.
    pub(super) fn new(name: &str, stamp: u32) -> Self {
        //= 5531-A-machine: The machine name of a credential has at most 255 bytes.
        let name = &name.as_bytes()[..name.len().min(MAX_MACHINE_NAME)];
        Self {
            name: Bytes::copy_from_slice(name),
            stamp,
        }
    }

    /// Writes the credential and an empty verifier.
    pub(super) fn encode(&self, cred: &Cred, out: &mut Encoder) {
        //= 5531-A-groups: A credential has at most 16 groups.
        let groups = &cred.groups[..cred.groups.len().min(MAX_GROUPS)];
        out.u32(auth_flavor::AUTH_UNIX as u32);
        let length_at = out.buf.len();
        out.u32(0)
            .u32(self.stamp)
            .opaque(&self.name)
            .u32(cred.uid)
            .u32(cred.gid);
        out.u32(u32::try_from(groups.len()).unwrap_or(0));
        for group in groups {
            out.u32(*group);
        }
        let length = u32::try_from(out.buf.len() - length_at - 4).unwrap_or(0);
        out.buf[length_at..length_at + 4].copy_from_slice(&length.to_be_bytes());
        //= 5531-A-none: The verifier beside the credential is AUTH_NONE.
        out.u32(auth_flavor::AUTH_NULL as u32).u32(0);
    }
}

/// An arbitrary number that goes with the machine name.
pub(super) fn stamp() -> u32 {
    std::process::id()
}

#[cfg(test)]
mod tests {
    use bytes::BytesMut;
    use nfs3_types::rpc::{auth_unix, opaque_auth};
    use nfs3_types::xdr_codec::Unpack;
    use proptest::prelude::*;

    use super::*;

    proptest! {
        //= test 5531-A-machine
        //= test 5531-A-groups
        //= test 5531-A-none
        #[test]
        fn what_is_sent_is_what_nfs3_types_reads(
            name in "\\PC{0,300}", stamp: u32, uid: u32, gid: u32,
            groups in proptest::collection::vec(any::<u32>(), 0..40),
        ) {
            let cred = Cred { uid, gid, groups: groups.clone().into() };
            let mut out = Encoder { buf: BytesMut::new() };
            Machine::new(&name, stamp).encode(&cred, &mut out);
            let mut wire = out.buf.as_ref();
            let (auth, _) = opaque_auth::unpack(&mut wire).unwrap();
            let (verifier, _) = opaque_auth::unpack(&mut wire).unwrap();
            prop_assert!(wire.is_empty());
            prop_assert_eq!(auth.flavor, auth_flavor::AUTH_UNIX);
            prop_assert!(auth.body.len() <= 400, "RFC 5531, section 8.2");
            prop_assert!(verifier.body.is_empty());
            let (unix, read) = auth_unix::unpack(&mut auth.body.as_ref()).unwrap();
            prop_assert_eq!(read, auth.body.len());
            prop_assert_eq!((unix.stamp, unix.uid, unix.gid), (stamp, uid, gid));
            prop_assert_eq!(unix.gids, &groups[..groups.len().min(16)]);
            prop_assert_eq!(unix.machinename.as_ref(), &name.as_bytes()[..name.len().min(255)]);
        }
    }
}
