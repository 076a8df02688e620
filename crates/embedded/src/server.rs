//! Connections: RPC records in (RFC 5531), one task per call, replies out.
//!
//! Portmap, MOUNT and NFS are answered on one port. Invariants: memory per connection is bounded
//! (calls under way times record size), a client that does not read its replies stops being
//! read, and a call that has begun is finished and answered also while the server stops.

use std::io;
use std::net::SocketAddr;
use std::sync::Arc;

use nfs3_types::mount::{
    self, MOUNT_PROGRAM, dirpath, export_node, exports, fhandle3, mountlist, mountres3,
    mountres3_ok, mountstat3,
};
use nfs3_types::nfs3::nfsstat3;
use nfs3_types::portmap::{self, PMAP_PROG, mapping, pmaplist};
use nfs3_types::rpc::{
    RPC_VERSION_2, accept_stat_data, accepted_reply, auth_flavor, auth_stat, fragment_header,
    msg_body, opaque_auth, rejected_reply, reply_body, rpc_msg,
};
use nfs3_types::xdr_codec::{List, Opaque};
use nfs3_types::{nfs3, nfs3 as nfs};
use tokio::io::{AsyncRead, AsyncReadExt, AsyncWrite, AsyncWriteExt};
use tokio::sync::{Semaphore, mpsc};
use tokio_util::sync::CancellationToken;

use super::export::Export;
use super::nfs::{MAX_DATA, Refusal, call, put};
use super::replay::Replies;
use super::xdr::{Args, Caller, Garbage};

/// The largest record taken: the largest WRITE and its frame.
const MAX_RECORD: usize = MAX_DATA as usize + 8 * 1024;
/// Calls under way per connection; a client that sends more waits.
const MAX_CALLS: usize = 64;
/// Ports below this can only be bound by root (or CAP_NET_BIND_SERVICE) of the host.
const PRIVILEGED: u16 = 1024;

/// What a connection needs to know.
#[derive(Debug)]
pub(super) struct Service {
    pub(super) export: Export,
    pub(super) replies: Replies,
    /// The paths that MOUNT knows the directory by, without a slash at the end.
    pub(super) paths: Vec<Vec<u8>>,
    pub(super) port: u16,
    /// Serve only clients that could bind a port below 1024.
    pub(super) privileged_only: bool,
}

/// Why a connection ended, other than by its end.
fn broken(reason: &str) -> io::Error {
    io::Error::new(io::ErrorKind::InvalidData, reason)
}

/// Serves one connection until the client closes it or `stop` is called.
pub(super) async fn connection(
    service: Arc<Service>,
    stream: impl AsyncRead + AsyncWrite + Send + 'static,
    peer: SocketAddr,
    stop: CancellationToken,
) {
    let (mut reader, mut writer) = tokio::io::split(stream);
    let (replies, mut queue) = mpsc::channel::<Vec<u8>>(MAX_CALLS);
    let calls = Arc::new(Semaphore::new(MAX_CALLS));
    let trusted = !service.privileged_only || peer.port() < PRIVILEGED;
    let reading = async move {
        // `replies` is dropped with this block: once the calls under way have answered, the
        // queue ends and the writer with it.
        loop {
            let record = tokio::select! {
                record = record(&mut reader) => record?,
                () = stop.cancelled() => return Ok(()),
            };
            let Some(record) = record else { return Ok(()) };
            let Ok(permit) = Arc::clone(&calls).acquire_owned().await else {
                return Ok(());
            };
            let (service, replies) = (Arc::clone(&service), replies.clone());
            tokio::spawn(async move {
                if let Some(reply) = reply(service, record, peer, trusted).await {
                    // Fails when the connection is gone: then nobody waits for it.
                    let _ = replies.send(reply).await;
                }
                drop(permit);
            });
        }
    };
    let writing = async {
        while let Some(reply) = queue.recv().await {
            writer.write_all(&reply).await?;
        }
        writer.shutdown().await
    };
    let (read, written): (io::Result<()>, io::Result<()>) = tokio::join!(reading, writing);
    if let Err(error) = read.and(written) {
        tracing::debug!(%peer, %error, "embedded server: connection ended");
    }
}

/// The reply to a record: made now, or remembered.
async fn reply(
    service: Arc<Service>,
    record: Vec<u8>,
    peer: SocketAddr,
    trusted: bool,
) -> Option<Vec<u8>> {
    let remembered = trusted
        .then(|| service.replies.of(peer.ip(), &record))
        .flatten();
    let make = || async {
        tokio::task::spawn_blocking(move || answer(&service, &record, trusted))
            .await
            .ok()
            .flatten()
    };
    match remembered {
        Some(reply) => reply.get_or_init(make).await.clone(),
        None => make().await,
    }
}

/// One record, put together from its fragments; `None` at the end of the stream.
async fn record(stream: &mut (impl AsyncRead + Unpin)) -> io::Result<Option<Vec<u8>>> {
    let mut record = Vec::new();
    loop {
        let mut head = [0; 4];
        match stream.read_exact(&mut head).await {
            Ok(_) => {}
            Err(error) if error.kind() == io::ErrorKind::UnexpectedEof && record.is_empty() => {
                return Ok(None);
            }
            Err(error) => return Err(error),
        }
        let head = fragment_header::from(head);
        let len = head.fragment_length() as usize;
        if record.len() + len > MAX_RECORD {
            return Err(broken("a record is longer than any call"));
        }
        // The length was checked, and memory grows only as bytes arrive.
        let got = (&mut *stream)
            .take(len as u64)
            .read_to_end(&mut record)
            .await?;
        if got != len {
            return Err(io::ErrorKind::UnexpectedEof.into());
        }
        if head.eof() {
            return Ok(Some(record));
        }
        if len == 0 {
            return Err(broken("an empty fragment that is not the last"));
        }
    }
}

/// The call's frame.
struct Call<'a> {
    program: u32,
    version: u32,
    procedure: u32,
    caller: Caller,
    args: Args<'a>,
}

/// Answers a record with a record; `None` for what is not a call at all.
fn answer(service: &Service, record: &[u8], trusted: bool) -> Option<Vec<u8>> {
    let mut args = Args(record);
    let xid = args.u32().ok()?;
    if args.u32().ok()? != 0 {
        return None;
    }
    // Room for the record mark, filled in at the end.
    let mut out = vec![0; 4];
    match frame(args) {
        // Asking for a port, or whether anybody is there, is free.
        Ok(call) if !trusted && call.program != portmap::PROGRAM && call.procedure != 0 => put(
            &mut out,
            &denied(xid, rejected_reply::auth_error(auth_stat::AUTH_TOOWEAK)),
        ),
        Ok(call) => {
            put(&mut out, &accepted(xid, accept_stat_data::SUCCESS));
            if let Err(refused) = dispatch(service, call, &mut out) {
                out.truncate(4);
                put(&mut out, &accepted(xid, refused));
            }
        }
        Err(rejected) => put(&mut out, &denied(xid, rejected)),
    }
    // A reply is at most MAX_DATA and its frame.
    let len = u32::try_from(out.len() - 4).ok()?;
    out[..4].copy_from_slice(&fragment_header::new(len, true).into_xdr_buf());
    Some(out)
}

fn frame(mut args: Args<'_>) -> Result<Call<'_>, rejected_reply> {
    let bad = |Garbage| rejected_reply::auth_error(auth_stat::AUTH_BADCRED);
    if args.u32().map_err(bad)? != RPC_VERSION_2 {
        return Err(rejected_reply::rpc_mismatch(RPC_VERSION_2, RPC_VERSION_2));
    }
    let (program, version, procedure) = (
        args.u32().map_err(bad)?,
        args.u32().map_err(bad)?,
        args.u32().map_err(bad)?,
    );
    let (flavor, body) = args.auth().map_err(bad)?;
    args.auth().map_err(bad)?;
    let caller = match flavor {
        f if f == auth_flavor::AUTH_UNIX as u32 => Args(body).caller().map_err(bad)?,
        f if f == auth_flavor::AUTH_NULL as u32 => Caller::NOBODY,
        _ => return Err(rejected_reply::auth_error(auth_stat::AUTH_REJECTEDCRED)),
    };
    Ok(Call {
        program,
        version,
        procedure,
        caller,
        args,
    })
}

fn accepted(xid: u32, reply_data: accept_stat_data) -> rpc_msg<'static, 'static> {
    rpc_msg {
        xid,
        body: msg_body::REPLY(reply_body::MSG_ACCEPTED(accepted_reply {
            verf: opaque_auth::default(),
            reply_data,
        })),
    }
}

fn denied(xid: u32, reply: rejected_reply) -> rpc_msg<'static, 'static> {
    rpc_msg {
        xid,
        body: msg_body::REPLY(reply_body::MSG_DENIED(reply)),
    }
}

fn dispatch(service: &Service, call: Call<'_>, out: &mut Vec<u8>) -> Result<(), accept_stat_data> {
    let only = |version| match call.version == version {
        true => Ok(()),
        false => Err(accept_stat_data::PROG_MISMATCH {
            low: version,
            high: version,
        }),
    };
    let done = match call.program {
        nfs::PROGRAM => {
            only(nfs::VERSION)?;
            self::call(
                &service.export,
                call.procedure,
                call.args,
                &call.caller,
                out,
            )
        }
        mount::PROGRAM => {
            only(mount::VERSION)?;
            mount_call(service, call.procedure, call.args, out)
        }
        portmap::PROGRAM => {
            only(portmap::VERSION)?;
            portmap_call(service, call.procedure, call.args, out)
        }
        _ => return Err(accept_stat_data::PROG_UNAVAIL),
    };
    done.map_err(|refusal| match refusal {
        Refusal::NoSuchProcedure => accept_stat_data::PROC_UNAVAIL,
        Refusal::Garbage => accept_stat_data::GARBAGE_ARGS,
    })
}

/// MOUNT version 3 (RFC 1813 appendix I). Who has mounted is not kept, as RFC 1813 allows.
fn mount_call(
    service: &Service,
    procedure: u32,
    mut args: Args<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    use MOUNT_PROGRAM as P;
    match P::try_from(procedure).map_err(|_| Refusal::NoSuchProcedure)? {
        P::MOUNTPROC3_NULL | P::MOUNTPROC3_UMNTALL => args.end()?,
        P::MOUNTPROC3_UMNT => {
            args.opaque(mount::MNTPATHLEN)?;
            args.end()?;
        }
        P::MOUNTPROC3_DUMP => {
            args.end()?;
            put(out, &mountlist::<'_, '_>::default());
        }
        P::MOUNTPROC3_EXPORT => {
            args.end()?;
            let exported: exports<'_, '_> = List(
                service
                    .paths
                    .iter()
                    .take(1)
                    .map(|path| export_node {
                        ex_dir: dirpath(Opaque::borrowed(path)),
                        ex_groups: List::default(),
                    })
                    .collect(),
            );
            put(out, &exported);
        }
        P::MOUNTPROC3_MNT => {
            let path = args.opaque(mount::MNTPATHLEN)?;
            args.end()?;
            put(out, &mount_path(service, path));
        }
    }
    Ok(())
}

/// The handle of the directory, or of one below it.
fn mount_path(service: &Service, path: &[u8]) -> mountres3<'static> {
    let below = service
        .paths
        .iter()
        .filter_map(|known| path.strip_prefix(known.as_slice()))
        .find(|rest| rest.is_empty() || rest.starts_with(b"/"));
    let Some(below) = below else {
        return mountres3::Err(mountstat3::MNT3ERR_NOENT);
    };
    match service.export.walk(below) {
        Ok(handle) => mountres3::Ok(mountres3_ok {
            fhandle: fhandle3(handle.data),
            auth_flavors: vec![auth_flavor::AUTH_UNIX as u32],
        }),
        Err(nfsstat3::NFS3ERR_NOENT) => mountres3::Err(mountstat3::MNT3ERR_NOENT),
        Err(nfsstat3::NFS3ERR_NOTDIR) => mountres3::Err(mountstat3::MNT3ERR_NOTDIR),
        Err(nfsstat3::NFS3ERR_NAMETOOLONG) => mountres3::Err(mountstat3::MNT3ERR_NAMETOOLONG),
        Err(nfsstat3::NFS3ERR_IO) => mountres3::Err(mountstat3::MNT3ERR_IO),
        Err(_) => mountres3::Err(mountstat3::MNT3ERR_ACCES),
    }
}

/// The port mapper (RFC 1833 section 3), for clients that ask before they call.
fn portmap_call(
    service: &Service,
    procedure: u32,
    mut args: Args<'_>,
    out: &mut Vec<u8>,
) -> Result<(), Refusal> {
    use PMAP_PROG as P;
    let served = [
        (nfs3::PROGRAM, nfs3::VERSION),
        (mount::PROGRAM, mount::VERSION),
    ];
    let port = u32::from(service.port);
    match P::try_from(procedure).map_err(|_| Refusal::NoSuchProcedure)? {
        P::PMAPPROC_NULL => args.end()?,
        P::PMAPPROC_GETPORT => {
            let (program, version, protocol) = (args.u32()?, args.u32()?, args.u32()?);
            args.u32()?;
            args.end()?;
            let here = protocol == portmap::IPPROTO_TCP && served.contains(&(program, version));
            put(out, &if here { port } else { 0 });
        }
        P::PMAPPROC_DUMP => {
            args.end()?;
            let all: pmaplist = List(
                served
                    .map(|(prog, vers)| mapping {
                        prog,
                        vers,
                        prot: portmap::IPPROTO_TCP,
                        port,
                    })
                    .into(),
            );
            put(out, &all);
        }
        P::PMAPPROC_SET | P::PMAPPROC_UNSET | P::PMAPPROC_CALLIT => {
            return Err(Refusal::NoSuchProcedure);
        }
    }
    Ok(())
}
