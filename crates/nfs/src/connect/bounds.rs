//! Lengths within a reply, looked at before nfs3_types reads them.
//!
//! That crate makes room for as many bytes as a length announces, up to 4 GiB, and an allocation
//! that fails ends the process. So every length in a reply is first compared with the bytes that
//! have arrived. What has no variable length (attributes, statuses) is left to the crate.

use bytes::Bytes;
use nfs3_types::mount::{self, MOUNT_PROGRAM};
use nfs3_types::nfs3::{self, NFS_PROGRAM, fattr3};
use nfs3_types::portmap;

use crate::rpc::message::reply_results;
use crate::rpc::xdr::{DecodeError, Decoder};

/// RPCBPROC_GETADDR of rpcbind, versions 3 and 4 (RFC 1833 section 2.1).
pub(super) const GETADDR: u32 = 3;

type Result<T = ()> = std::result::Result<T, DecodeError>;

/// Checks a whole reply, given what was called.
pub(super) fn check((program, version, procedure): (u32, u32, u32), reply: Bytes) -> Result {
    // A refusal has no lengths behind its header.
    let Ok(mut results) = reply_results(reply)? else {
        return Ok(());
    };
    let d = &mut results;
    match program {
        nfs3::PROGRAM => nfs(procedure, d),
        mount::PROGRAM => exports(procedure, d),
        portmap::PROGRAM if version > portmap::VERSION && procedure == GETADDR => bytes(d),
        _ => Ok(()),
    }
}

fn nfs(procedure: u32, d: &mut Decoder) -> Result {
    use NFS_PROGRAM as P;
    let is = |wanted: P| procedure == wanted as u32;
    // NULL has no status, and failures come with attributes at most.
    if is(P::NFSPROC3_NULL) || d.u32()? != 0 {
        return Ok(());
    }
    if is(P::NFSPROC3_LOOKUP) {
        return bytes(d);
    }
    let makes = [
        P::NFSPROC3_CREATE,
        P::NFSPROC3_MKDIR,
        P::NFSPROC3_SYMLINK,
        P::NFSPROC3_MKNOD,
    ];
    if makes.into_iter().any(is) {
        return d.option(bytes).map(drop);
    }
    if is(P::NFSPROC3_READLINK) {
        attributes(d)?;
        return bytes(d);
    }
    if is(P::NFSPROC3_READ) {
        attributes(d)?;
        d.u32()?;
        d.bool()?;
        return bytes(d);
    }
    let plus = is(P::NFSPROC3_READDIRPLUS);
    if plus || is(P::NFSPROC3_READDIR) {
        attributes(d)?;
        d.u64()?;
        return list(d, |d| {
            d.u64()?;
            bytes(d)?;
            d.u64()?;
            if plus {
                attributes(d)?;
                d.option(bytes)?;
            }
            Ok(())
        });
    }
    Ok(())
}

fn exports(procedure: u32, d: &mut Decoder) -> Result {
    use MOUNT_PROGRAM as P;
    match procedure {
        n if n == P::MOUNTPROC3_MNT as u32 => {
            if d.u32()? != 0 {
                return Ok(());
            }
            // The flavours behind it are read by the probe, which makes room for none of them.
            bytes(d)
        }
        n if n == P::MOUNTPROC3_DUMP as u32 => list(d, |d| {
            bytes(d)?;
            bytes(d)
        }),
        n if n == P::MOUNTPROC3_EXPORT as u32 => list(d, |d| {
            bytes(d)?;
            list(d, bytes)
        }),
        _ => Ok(()),
    }
}

fn bytes(d: &mut Decoder) -> Result {
    d.opaque("a value", usize::MAX).map(drop)
}

fn attributes(d: &mut Decoder) -> Result {
    d.option(|d| d.fixed::<fattr3>()).map(drop)
}

fn list(d: &mut Decoder, mut entry: impl FnMut(&mut Decoder) -> Result) -> Result {
    while d.bool()? {
        entry(d)?;
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    /// A reply whose results are these words.
    fn reply(words: &[u32]) -> Bytes {
        let header = [7, 1, 0, 0, 0, 0];
        let words = header.iter().chain(words);
        words.flat_map(|word| word.to_be_bytes()).collect()
    }

    #[test]
    fn a_length_beyond_the_reply_is_an_error_wherever_it_stands() {
        const HUGE: u32 = 0xffff_fff0;
        /// A call (program, version, procedure), and the words of a sound and of a lying answer.
        type Case<'a> = ((u32, u32, u32), &'a [u32], &'a [u32]);
        let nfs = |procedure: NFS_PROGRAM| (nfs3::PROGRAM, 3, procedure as u32);
        let mnt = |procedure: MOUNT_PROGRAM| (mount::PROGRAM, 3, procedure as u32);
        let (n, m) = (
            NFS_PROGRAM::NFSPROC3_LOOKUP,
            MOUNT_PROGRAM::MOUNTPROC3_EXPORT,
        );
        let cases: &[Case<'_>] = &[
            (nfs(n), &[0, 4, 9, 0, 0], &[0, HUGE, 9]),
            (
                nfs(NFS_PROGRAM::NFSPROC3_MKDIR),
                &[0, 1, 4, 9, 0, 0, 0],
                &[0, 1, HUGE, 9],
            ),
            (
                nfs(NFS_PROGRAM::NFSPROC3_READLINK),
                &[0, 0, 4, 9],
                &[0, 0, HUGE, 9],
            ),
            (
                nfs(NFS_PROGRAM::NFSPROC3_READ),
                &[0, 0, 4, 1, 4, 9],
                &[0, 0, 4, 1, HUGE, 9],
            ),
            (
                nfs(NFS_PROGRAM::NFSPROC3_READDIR),
                &[0, 0, 0, 0, 1, 0, 1, 4, 9, 0, 1, 0, 1],
                &[0, 0, 0, 0, 1, 0, 1, HUGE, 9, 0, 1, 0, 1],
            ),
            (
                nfs(NFS_PROGRAM::NFSPROC3_READDIRPLUS),
                &[0, 0, 0, 0, 1, 0, 1, 4, 9, 0, 1, 0, 1, 4, 9, 0, 1],
                &[0, 0, 0, 0, 1, 0, 1, 4, 9, 0, 1, 0, 1, HUGE, 9, 0, 1],
            ),
            (
                mnt(MOUNT_PROGRAM::MOUNTPROC3_MNT),
                &[0, 4, 9, 1, 1],
                &[0, HUGE, 9, 1, 1],
            ),
            (mnt(m), &[1, 4, 9, 1, 4, 9, 0, 0], &[1, 4, 9, 1, HUGE, 9]),
            ((portmap::PROGRAM, 4, GETADDR), &[4, 9], &[HUGE, 9]),
        ];
        for (call, good, bad) in cases {
            assert_eq!(check(*call, reply(good)), Ok(()), "{call:?}");
            assert!(check(*call, reply(bad)).is_err(), "{call:?}");
        }
        //= test 5531-8.2-verifier
        // The verifier in the header.
        let header = [7, 1, 0, 0, HUGE, 0].map(u32::to_be_bytes).concat();
        assert!(check(nfs(n), header.into()).is_err());
        // Where nothing has a length, what stands there is left alone.
        let getattr = nfs(NFS_PROGRAM::NFSPROC3_GETATTR);
        assert_eq!(check(getattr, reply(&[0, HUGE, HUGE])), Ok(()));
    }

    /// What a LOOKUP comes to whose answer announces a handle that does not come, and then ends.
    async fn lookup_on_a_liar() -> String {
        use tokio::io::{AsyncReadExt, AsyncWriteExt};

        /// Fits into the memory of any host.
        const ANNOUNCED: u32 = 64 << 20;
        let server = tokio::net::TcpListener::bind(("127.0.0.1", 0))
            .await
            .unwrap();
        let address = server.local_addr().unwrap();
        let lies = tokio::spawn(async move {
            let (mut stream, _) = server.accept().await.unwrap();
            let length = stream.read_u32().await.unwrap() & 0x7fff_ffff;
            let mut call = vec![0; length as usize];
            stream.read_exact(&mut call).await.unwrap();
            let xid = u32::from_be_bytes(*call.first_chunk().unwrap());
            let answer = [xid, 1, 0, 0, 0, 0, 0, ANNOUNCED, 9].map(u32::to_be_bytes);
            let answer = answer.concat();
            let mark = 0x8000_0000 | u32::try_from(answer.len()).unwrap();
            stream.write_u32(mark).await.unwrap();
            stream.write_all(&answer).await.unwrap();
        });
        let within = std::time::Duration::from_secs(10);
        let meter = super::super::Meter::default();
        let mut wire = super::super::Wire::dial(address, false, within, &meter)
            .await
            .unwrap();
        let args = nfs3::LOOKUP3args {
            what: nfs3::diropargs3 {
                dir: nfs3::nfs_fh3::default(),
                name: b"name".to_vec().into(),
            },
        };
        let called = (nfs3::PROGRAM, 3, NFS_PROGRAM::NFSPROC3_LOOKUP as u32);
        let none = nfs3_types::rpc::opaque_auth::default();
        let answer = wire.call::<_, nfs3::LOOKUP3res>(called, &none, &args).await;
        lies.await.unwrap();
        answer.err().unwrap().to_string()
    }

    //= test 4506-4.10-length
    #[tokio::test]
    async fn a_length_is_looked_at_before_memory_is_taken_for_it() {
        let told = DecodeError::to_string(
            &check(
                (nfs3::PROGRAM, 3, NFS_PROGRAM::NFSPROC3_LOOKUP as u32),
                reply(&[0, 64 << 20, 9]),
            )
            .unwrap_err(),
        );
        assert!(lookup_on_a_liar().await.contains(&told));
        let _back = crate::mutant::put_back(crate::mutant::Mutant::LengthsTrusted);
        let error = lookup_on_a_liar().await;
        assert!(!error.contains(&told), "as much is waited for: {error}");
    }
}
