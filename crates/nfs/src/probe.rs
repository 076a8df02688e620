//! Reaching a share: resolve, connect, NULL call, MOUNT and FSINFO, before anything is mounted.
//!
//! Each step has its own short deadline and its own error ([`ReachError`]), because mount(2)
//! knows but one: it hangs. All addresses of the server are tried, a little apart, and the first
//! that answers is taken. The server's name is resolved anew each time.
//!
//! Ports: NFS is expected on 2049 unless the portmapper names another port; MOUNT (NFSv3 only)
//! is where the portmapper says. Ports that are given are not asked for. When the portmapper is
//! silent, NFSv4 is what remains.

mod breaker;
mod error;
mod portmap;

use std::io::Read;
use std::net::{IpAddr, SocketAddr};
use std::pin::pin;
use std::time::Duration;

use nfs3_client::RpcError;
use nfs3_types::mount::{self, MOUNT_PROGRAM, dirpath, exports, fhandle3, mountstat3};
use nfs3_types::nfs3::{
    self, FSINFO3args, FSINFO3res, FSINFO3resok, NFS_PROGRAM, NFS3_FHSIZE, Nfs3Result, nfs_fh3,
    nfsstat3,
};
use nfs3_types::rpc::opaque_auth;
use nfs3_types::xdr_codec::{Opaque, Pack, Unpack, Void};
use tokio::task::JoinSet;
use tokio::time::{Instant, sleep, timeout_at};

pub use self::breaker::Breaker;
pub use self::error::{Cause, ReachError, Step};
use self::portmap::Named;
use super::address::{Server, Share};
use super::connect::{Meter, Wire, credential, resolve};
use crate::mutant::{self, Mutant};

/// The port of NFS when nobody names another (RFC 7530 section 3.1).
pub const NFS_PORT: u16 = 2049;

/// The longest time of each step. A server on a local network needs milliseconds; a busy one is
/// given a few seconds, except where a silent firewall is the likely reason.
const RESOLVE: Duration = Duration::from_secs(2);
const CONNECT: Duration = Duration::from_secs(2);
/// A connection request that was lost is sent again after 1 s (RFC 6298 section 2.1).
const PORTMAP: Duration = Duration::from_secs(2);
const NULL: Duration = Duration::from_secs(2);
/// rpc.mountd may look up this host's name, on a slow name server.
const MOUNT: Duration = Duration::from_secs(4);
const FSINFO: Duration = Duration::from_secs(2);
/// Between the attempts on a server's addresses (RFC 8305 section 5, Connection Attempt Delay).
const NEXT_ADDRESS: Duration = Duration::from_millis(250);

/// Ports that are known beforehand; the others are asked for.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    pub nfs: Option<u16>,
    pub mount: Option<u16>,
}

/// Limits of the server's file system (FSINFO, RFC 1813 section 3.3.19), in bytes.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub struct FsLimits {
    /// The most that one READ returns, and what the server likes best.
    pub rtmax: u32,
    pub rtpref: u32,
    /// The most that one WRITE takes, and what the server likes best.
    pub wtmax: u32,
    pub wtpref: u32,
    pub maxfilesize: u64,
}

/// What was learned from a share that answers.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Reached {
    pub addr: IpAddr,
    pub nfs_port: u16,
    pub mount_port: Option<u16>,
    /// The export can be used over NFSv3: MOUNT and FSINFO succeeded.
    pub v3: bool,
    /// The server speaks NFSv4 of some minor version. Whether it has the export, only a mount
    /// can tell.
    pub v4: bool,
    /// Why [`v3`](Self::v3) is false although the server speaks it. When a mount over NFSv4
    /// fails as well, this is what the user should read.
    pub v3_error: Option<ReachError>,
    /// The time that one NULL call took.
    pub rtt: Duration,
    pub fsinfo: Option<FsLimits>,
}

/// Reaches a share, within `deadline` in all.
///
/// # Errors
/// The failed step, and why; of several addresses, the one that came furthest. An export that
/// NFSv3 refuses is an error only when the server does not speak NFSv4: paths differ between
/// the two (the NFSv4 pseudo file system), so only a mount can tell (see [`Reached::v3_error`]).
#[tracing::instrument(level = "debug", skip_all)]
pub async fn probe(share: &Share, ports: Ports, deadline: Duration) -> Result<Reached, ReachError> {
    Ok(reach(share, ports, deadline, &Meter::default())
        .await?
        .reached)
}

/// A share that answers, ready for use over NFSv3 when it has a root.
#[derive(Debug)]
pub(crate) struct Contact {
    pub(crate) reached: Reached,
    pub(crate) root: Option<nfs_fh3>,
    /// The connection to the NFS service.
    pub(crate) wire: Wire,
}

pub(crate) async fn reach(
    share: &Share,
    ports: Ports,
    deadline: Duration,
    meter: &Meter,
) -> Result<Contact, ReachError> {
    let until = Instant::now() + deadline;
    let ports = match share.server() {
        // The embedded server answers MOUNT on its NFS port.
        Server::Embedded => Ports {
            mount: ports.mount.or(ports.nfs),
            ..ports
        },
        _ => ports,
    };
    let fail = |cause| ReachError {
        share: share.to_string(),
        step: Step::Resolve,
        addr: None,
        cause,
        resting: None,
    };
    let within = RESOLVE.min(deadline);
    let addresses = resolve(share.server(), within).await.map_err(|error| {
        fail(match error.kind() {
            std::io::ErrorKind::TimedOut => Cause::TimedOut(within),
            _ => Cause::Name(error.to_string()),
        })
    })?;
    if addresses.is_empty() {
        return Err(fail(Cause::Name("it has no address".to_owned())));
    }
    reach_any(share, ports, addresses, until, meter).await
}

/// The first of a server's addresses that answers.
async fn reach_any(
    share: &Share,
    ports: Ports,
    addresses: Vec<IpAddr>,
    until: Instant,
    meter: &Meter,
) -> Result<Contact, ReachError> {
    let mut failed: Option<ReachError> = None;
    let mut attempts = JoinSet::new();
    for (n, addr) in (0u32..).zip(addresses) {
        let attempt = Attempt {
            share: share.clone(),
            addr,
            until,
            credential: credential(),
            meter: meter.clone(),
        };
        attempts.spawn(async move {
            sleep(NEXT_ADDRESS * n).await;
            attempt.run(ports).await
        });
    }
    while let Some(attempt) = attempts.join_next().await {
        match attempt {
            Ok(Ok(contact)) => return Ok(contact),
            Ok(Err(error)) if failed.as_ref().is_none_or(|f| error.step >= f.step) => {
                failed = Some(error);
            }
            // Less telling than what is known; or a task that was ended with its runtime.
            Ok(Err(_)) | Err(_) => {}
        }
    }
    Err(failed.unwrap_or_else(|| ReachError {
        share: share.to_string(),
        step: Step::Connect,
        addr: None,
        cause: Cause::Io("the attempt was given up".to_owned()),
        resting: None,
    }))
}

/// The steps on one address.
struct Attempt {
    share: Share,
    addr: IpAddr,
    until: Instant,
    credential: opaque_auth<'static>,
    meter: Meter,
}

/// A server that answered a NULL call.
struct Greeted {
    wire: Wire,
    port: u16,
    v3: bool,
    v4: bool,
    /// What came in place of an answer for version 3.
    v3_error: Option<ReachError>,
    rtt: Duration,
}

impl Attempt {
    async fn run(&self, ports: Ports) -> Result<Contact, ReachError> {
        let (greeted, mount_port) = self.greet(ports).await?;
        let mut contact = Contact {
            reached: Reached {
                addr: self.addr,
                nfs_port: greeted.port,
                mount_port,
                v3: false,
                v4: greeted.v4,
                v3_error: greeted.v3_error,
                rtt: greeted.rtt,
                fsinfo: None,
            },
            root: None,
            wire: greeted.wire,
        };
        if !greeted.v3 {
            return Ok(contact);
        }
        match self
            .look_up_export(&mut contact.wire, greeted.port, mount_port)
            .await
        {
            Ok((root, limits)) => {
                contact.root = Some(root);
                contact.reached.v3 = true;
                contact.reached.fsinfo = Some(limits);
            }
            Err(error) if greeted.v4 => contact.reached.v3_error = Some(error),
            Err(error) => return Err(error),
        }
        Ok(contact)
    }

    /// Finds the NFS service and the port of MOUNT. The portmapper is asked while port 2049 is
    /// tried, and not waited for when it cannot matter.
    async fn greet(&self, ports: Ports) -> Result<(Greeted, Option<u16>), ReachError> {
        let hello = |port| self.hello(port);
        if let (Some(nfs), Some(mount)) = (ports.nfs, ports.mount) {
            return Ok((hello(nfs).await?, Some(mount)));
        }
        let mut direct = pin!(hello(ports.nfs.unwrap_or(NFS_PORT)));
        let mut portmap = pin!(self.ask_portmapper());
        let (direct, named) = tokio::select! {
            direct = &mut direct => match direct {
                Ok(greeted) if !greeted.v3 => return Ok((greeted, ports.mount)),
                direct => (direct, portmap.await),
            },
            named = &mut portmap => (direct.await, named),
        };
        let mount = ports.mount.or(named.mount);
        match named.nfs {
            Some(port) if ports.nfs.is_none() && port != NFS_PORT => {
                Ok((hello(port).await?, mount))
            }
            _ => Ok((direct?, mount)),
        }
    }

    /// Connects to the NFS service and asks which versions it speaks.
    async fn hello(&self, port: u16) -> Result<Greeted, ReachError> {
        let mut wire = self.dial(Step::Connect, port).await?;
        let mut begun = Instant::now();
        let v3 = match self.speaks(&mut wire, port, nfs3::VERSION).await {
            Err(error) if !mutant::is_on(Mutant::SilenceIsForAll) => {
                // It may know version 4 alone, and drop who asks for another.
                wire = match self.dial(Step::Connect, port).await {
                    Ok(wire) => wire,
                    Err(_) => return Err(error),
                };
                begun = Instant::now();
                return match self.speaks(&mut wire, port, 4).await {
                    Ok(Ok(())) => Ok(Greeted {
                        wire,
                        port,
                        v3: false,
                        v4: true,
                        v3_error: Some(error),
                        rtt: begun.elapsed(),
                    }),
                    _ => Err(error),
                };
            }
            v3 => v3?,
        };
        let rtt = begun.elapsed();
        let v4 = match self.speaks(&mut wire, port, 4).await {
            Ok(v4) => v4,
            Err(error) if v3.is_err() => return Err(error),
            // It answers for version 3, and drops who asks for another.
            Err(_) => {
                wire = self.dial(Step::Connect, port).await?;
                Err((3, 3))
            }
        };
        match (v3, v4) {
            (Err((low, high)), Err(_)) => {
                Err(self.error(Step::Null, port, Cause::Version { low, high }))
            }
            _ => Ok(Greeted {
                wire,
                port,
                v3: v3.is_ok(),
                v4: v4.is_ok(),
                v3_error: None,
                rtt,
            }),
        }
    }

    /// A NULL call; the inner result has the versions offered when it is not this one.
    async fn speaks(
        &self,
        wire: &mut Wire,
        port: u16,
        version: u32,
    ) -> Result<Result<(), (u32, u32)>, ReachError> {
        let null = (nfs3::PROGRAM, version, NFS_PROGRAM::NFSPROC3_NULL as u32);
        let within = self.within(NULL);
        match timeout_at(
            Instant::now() + within,
            wire.call(null, &self.credential, &Void),
        )
        .await
        {
            Err(_) => Err(self.error(Step::Null, port, Cause::TimedOut(within))),
            Ok(Ok(Void)) => Ok(Ok(())),
            Ok(Err(RpcError::ProgMismatch { low, high })) => Ok(Err((low, high))),
            Ok(Err(error)) => Err(self.error(Step::Null, port, rpc_cause(&error, within))),
        }
    }

    /// MOUNT, then FSINFO on what it gave.
    async fn look_up_export(
        &self,
        nfs: &mut Wire,
        nfs_port: u16,
        mount_port: Option<u16>,
    ) -> Result<(nfs_fh3, FsLimits), ReachError> {
        let Some(port) = mount_port else {
            return Err(self.error(Step::Mount, portmap::PORT, Cause::NoMountService));
        };
        let mut wire = self.dial(Step::Mount, port).await?;
        let path = || dirpath(Opaque::borrowed(self.share.export().as_bytes()));
        let denied = |cause| self.error(Step::Mount, port, cause);
        let mut mount = async |procedure| {
            self.call(
                Step::Mount,
                port,
                &mut wire,
                mount_call(procedure),
                &path(),
                MOUNT,
            )
            .await
        };
        let root = match mount(MOUNT_PROGRAM::MOUNTPROC3_MNT).await? {
            Mounted::Ok(root) => root,
            Mounted::Err(
                status @ (mountstat3::MNT3ERR_ACCES
                | mountstat3::MNT3ERR_PERM
                | mountstat3::MNT3ERR_NOENT
                | mountstat3::MNT3ERR_NOTDIR),
            ) => return Err(denied(self.refusal(&mut wire, port, status).await)),
            Mounted::Err(status) => return Err(denied(Cause::Protocol(status.to_string()))),
        };
        let args = FSINFO3args::from(root.clone());
        let fsinfo = (
            nfs3::PROGRAM,
            nfs3::VERSION,
            NFS_PROGRAM::NFSPROC3_FSINFO as u32,
        );
        let limits: FSINFO3res = self
            .call(Step::Fsinfo, nfs_port, nfs, fsinfo, &args, FSINFO)
            .await?;
        // We keep no entry in the server's list of mounts: it is never read, only grows.
        let unmount = mount_call(MOUNT_PROGRAM::MOUNTPROC3_UMNT);
        let _: Result<Void, _> = self
            .call(Step::Mount, port, &mut wire, unmount, &path(), FSINFO)
            .await;
        match limits {
            Nfs3Result::Ok(limits) => Ok((root, limits.into())),
            Nfs3Result::Err((nfsstat3::NFS3ERR_ACCES | nfsstat3::NFS3ERR_PERM, _)) => {
                Err(self.error(Step::Fsinfo, nfs_port, Cause::Denied))
            }
            Nfs3Result::Err((status, _)) => {
                let cause = Cause::Protocol(status.to_string());
                Err(self.error(Step::Fsinfo, nfs_port, cause))
            }
        }
    }

    /// Why MOUNT refuses. Servers also say "access" of what they do not export at all, so their
    /// list of exports decides, if they tell it.
    async fn refusal(&self, wire: &mut Wire, port: u16, status: mountstat3) -> Cause {
        let call = mount_call(MOUNT_PROGRAM::MOUNTPROC3_EXPORT);
        let list: Result<exports<'_, '_>, _> = self
            .call(Step::Mount, port, wire, call, &Void, FSINFO)
            .await;
        let exports: Vec<String> = list.map_or_else(
            |_| Vec::new(),
            |list| {
                let name = |bytes: &[u8]| String::from_utf8_lossy(bytes).escape_debug().to_string();
                list.into_inner()
                    .iter()
                    .map(|export| name(&export.ex_dir.0))
                    .collect()
            },
        );
        let wanted = self.share.export();
        let holds = |export: &String| {
            let rest = wanted.strip_prefix(export.trim_end_matches('/'));
            rest.is_some_and(|rest| rest.is_empty() || rest.starts_with('/'))
        };
        match status {
            mountstat3::MNT3ERR_ACCES | mountstat3::MNT3ERR_PERM
                if exports.is_empty() || exports.iter().any(holds) =>
            {
                Cause::Denied
            }
            _ => Cause::NoExport(exports),
        }
    }

    async fn ask_portmapper(&self) -> Named {
        let until = Instant::now() + self.within(PORTMAP);
        let asked = portmap::ask(self.addr, self.within(PORTMAP), &self.meter);
        timeout_at(until, asked).await.unwrap_or_default()
    }

    async fn dial(&self, step: Step, port: u16) -> Result<Wire, ReachError> {
        let within = self.within(CONNECT);
        Wire::dial(SocketAddr::new(self.addr, port), true, within, &self.meter)
            .await
            .map_err(|error| self.error(step, port, ReachError::cause_of(&error, within)))
    }

    async fn call<C: Pack + Send + Sync, R: Unpack>(
        &self,
        step: Step,
        port: u16,
        wire: &mut Wire,
        call: (u32, u32, u32),
        args: &C,
        most: Duration,
    ) -> Result<R, ReachError> {
        let within = self.within(most);
        timeout_at(
            Instant::now() + within,
            wire.call(call, &self.credential, args),
        )
        .await
        .map_err(|_| self.error(step, port, Cause::TimedOut(within)))?
        .map_err(|error| self.error(step, port, rpc_cause(&error, within)))
    }

    /// A step's time, cut to what is left of the whole.
    fn within(&self, step: Duration) -> Duration {
        step.min(self.until.saturating_duration_since(Instant::now()))
    }

    fn error(&self, step: Step, port: u16, cause: Cause) -> ReachError {
        ReachError {
            share: self.share.to_string(),
            step,
            addr: Some(SocketAddr::new(self.addr, port)),
            cause,
            resting: None,
        }
    }
}

fn mount_call(procedure: MOUNT_PROGRAM) -> (u32, u32, u32) {
    (mount::PROGRAM, mount::VERSION, procedure as u32)
}

fn rpc_cause(error: &RpcError, waited: Duration) -> Cause {
    match error {
        RpcError::Io(error) => ReachError::cause_of(error, waited),
        RpcError::Auth(status) => Cause::Credentials(status.to_string()),
        RpcError::ProgMismatch { low, high } => Cause::Version {
            low: *low,
            high: *high,
        },
        other => Cause::Protocol(other.to_string()),
    }
}

/// The reply to MNT. The list of flavors behind the handle is left unread on purpose:
/// nfs3_types would reserve memory for as many as the server claims.
enum Mounted {
    Ok(nfs_fh3),
    Err(mountstat3),
}

impl Unpack for Mounted {
    fn unpack(input: &mut impl Read) -> nfs3_types::xdr_codec::Result<(Self, usize)> {
        let (status, mut read) = mountstat3::unpack(input)?;
        if !matches!(status, mountstat3::MNT3_OK) {
            return Ok((Self::Err(status), read));
        }
        let (fhandle3(handle), length) = fhandle3::unpack(input)?;
        read += length;
        if handle.is_empty() || handle.len() > NFS3_FHSIZE {
            return Err(nfs3_types::xdr_codec::Error::InvalidLength(handle.len()));
        }
        let mut flavors = Vec::new();
        read += input.take(MAX_FLAVORS).read_to_end(&mut flavors)?;
        Ok((Self::Ok(nfs_fh3 { data: handle }), read))
    }
}

/// The longest list of flavors that is skipped, in bytes; servers know about ten.
const MAX_FLAVORS: u64 = 4096;

impl From<FSINFO3resok> for FsLimits {
    fn from(info: FSINFO3resok) -> Self {
        Self {
            rtmax: info.rtmax,
            rtpref: info.rtpref,
            wtmax: info.wtmax,
            wtpref: info.wtpref,
            maxfilesize: info.maxfilesize,
        }
    }
}

#[cfg(test)]
mod tests;
