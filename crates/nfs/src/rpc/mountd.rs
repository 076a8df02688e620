//! From a server's address to the handle of an export: the port mapper (RFC 1833, version 2) and
//! MOUNT (RFC 1813 appendix I), over the same transport as everything else.

use std::net::SocketAddr;
use std::time::Duration;

use nfs3_types::nfs3::{PROGRAM as NFS_PROGRAM, VERSION as NFS_VERSION};
use nfs3_types::{mount, portmap};

use super::RpcError;
use super::auth::{self, Cred, Machine};
use super::connector::Connector;
use super::message::{Draft, Program};
use super::nfs3::FileHandle;
use super::transport::{Settings, Transport};
use super::xdr::{DecodeError, Decoder, Encoder};

const PORT_MAPPER: Program = Program {
    number: portmap::PROGRAM,
    version: portmap::VERSION,
};
const MOUNT: Program = Program {
    number: mount::PROGRAM,
    version: mount::VERSION,
};
const NFS: Program = Program {
    number: NFS_PROGRAM,
    version: NFS_VERSION,
};

/// Deadline of each call here: these are small look-ups, made once for each mount.
pub const TIMEOUT: Duration = Duration::from_secs(10);
/// The most authentication flavours that are read; servers name a handful.
const MAX_FLAVOURS: u32 = 64;

/// Why an export could not be mounted.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum MountError {
    #[error(transparent)]
    Rpc(#[from] RpcError),
    #[error("the port mapper of {addr} knows no {program}: is it running, and over TCP?")]
    NotRegistered {
        addr: SocketAddr,
        program: &'static str,
    },
    #[error("the server refuses to mount {path}: {reason}", reason = reason(*status))]
    Denied { path: String, status: u32 },
    #[error(
        "the export {path} takes no AUTH_UNIX (only flavours {flavours:?}): it may ask for Kerberos, which the kernel data path supports"
    )]
    Flavours { path: String, flavours: Vec<u32> },
}

fn reason(status: u32) -> String {
    use mount::mountstat3 as s;
    let text = match status {
        n if n == s::MNT3ERR_NOENT as u32 => "no such export or directory",
        n if n == s::MNT3ERR_IO as u32 => "I/O error on the server",
        n if n == s::MNT3ERR_ACCES as u32 || n == s::MNT3ERR_PERM as u32 => {
            "access denied; does the export list name this host, and, for a volume with noresvport, take \
             source ports above 1023 (exports(5), `insecure`)?"
        }
        n if n == s::MNT3ERR_NOTDIR as u32 => "not a directory",
        n if n == s::MNT3ERR_INVAL as u32 => "invalid argument",
        n if n == s::MNT3ERR_NAMETOOLONG as u32 => "the path is too long",
        n if n == s::MNT3ERR_NOTSUPP as u32 => "not supported",
        n if n == s::MNT3ERR_SERVERFAULT as u32 => "the server failed",
        n => return format!("unknown status {n}"),
    };
    text.to_owned()
}

impl MountError {
    /// The errno (a positive `libc` constant) that fits.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self {
            Self::Rpc(e) => e.errno(),
            Self::NotRegistered { .. } => libc::ECONNREFUSED,
            Self::Denied { status: 2, .. } => libc::ENOENT,
            Self::Denied { status: 20, .. } => libc::ENOTDIR,
            Self::Denied { status: 1 | 13, .. } | Self::Flavours { .. } => libc::EACCES,
            Self::Denied { .. } => libc::EIO,
        }
    }
}

/// A mounted export.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Mounted {
    pub root: FileHandle,
    /// The authentication flavours that the server takes, its favourite first; servers that name
    /// none take AUTH_UNIX.
    pub flavours: Vec<u32>,
}

/// The ports of a server; those that are absent are asked of its port mapper.
#[derive(Debug, Clone, Copy, Default, PartialEq, Eq)]
pub struct Ports {
    pub nfs: Option<u16>,
    pub mount: Option<u16>,
    /// 111 unless set.
    pub mapper: Option<u16>,
}

/// A short-lived client of the services around NFS. `settings.addr` gives the host; its port is
/// not used.
#[derive(Debug)]
pub struct Mountd<F> {
    settings: Settings,
    /// Makes a connector for each service.
    connectors: F,
}

impl<C: Connector, F: Fn() -> C> Mountd<F> {
    #[must_use]
    pub fn new(settings: &Settings, connectors: F) -> Self {
        let mut settings = settings.clone();
        settings.nconnect = 1;
        settings.io_timeout = Some(settings.io_timeout.map_or(TIMEOUT, |t| t.min(TIMEOUT)));
        Self {
            settings,
            connectors,
        }
    }

    /// The TCP port of the server's NFSv3.
    ///
    /// # Errors
    /// [`MountError`].
    pub async fn nfs_port(&self, ports: Ports) -> Result<u16, MountError> {
        match ports.nfs {
            Some(port) => Ok(port),
            None => self.port(ports, NFS, "NFSv3").await,
        }
    }

    /// The handle of an export, or of a directory below one where the server allows that.
    ///
    /// # Errors
    /// [`MountError`].
    pub async fn mount(&self, ports: Ports, path: &str) -> Result<Mounted, MountError> {
        const AUTH_UNIX: u32 = 1;
        let (transport, mut results) = self
            .mount_call(ports, mount::MOUNT_PROGRAM::MOUNTPROC3_MNT, path)
            .await?;
        let mounted = mounted(&mut results).map_err(|e| transport.malformed(e))?;
        match mounted {
            Err(status) => Err(MountError::Denied {
                path: path.to_owned(),
                status,
            }),
            //= 1813-I-flavours: The client uses a flavour that the server names.
            Ok(m) if !m.flavours.is_empty() && !m.flavours.contains(&AUTH_UNIX) => {
                Err(MountError::Flavours {
                    path: path.to_owned(),
                    flavours: m.flavours,
                })
            }
            Ok(mounted) => Ok(mounted),
        }
    }

    /// Tells the server that the export is no longer used; it only keeps a list for people.
    ///
    /// # Errors
    /// [`MountError`].
    pub async fn unmount(&self, ports: Ports, path: &str) -> Result<(), MountError> {
        self.mount_call(ports, mount::MOUNT_PROGRAM::MOUNTPROC3_UMNT, path)
            .await?;
        Ok(())
    }

    async fn mount_call(
        &self,
        ports: Ports,
        procedure: mount::MOUNT_PROGRAM,
        path: &str,
    ) -> Result<(Transport, Decoder), MountError> {
        let port = match ports.mount {
            Some(port) => port,
            None => self.port(ports, MOUNT, "MOUNT service").await?,
        };
        let path = |out: &mut Encoder| {
            out.opaque(path.as_bytes());
        };
        Ok(self.call(port, MOUNT, procedure as u32, path).await?)
    }

    async fn port(
        &self,
        ports: Ports,
        program: Program,
        name: &'static str,
    ) -> Result<u16, MountError> {
        let wanted = portmap::mapping {
            prog: program.number,
            vers: program.version,
            prot: portmap::IPPROTO_TCP,
            port: 0,
        };
        let mapper = ports.mapper.unwrap_or(portmap::PMAP_PORT);
        let getport = portmap::PMAP_PROG::PMAPPROC_GETPORT as u32;
        let arguments = |out: &mut Encoder| {
            out.pack(&wanted);
        };
        let (transport, mut results) = self.call(mapper, PORT_MAPPER, getport, arguments).await?;
        let port = results.u32().map_err(|e| transport.malformed(e))?;
        match u16::try_from(port) {
            Ok(0) => Err(MountError::NotRegistered {
                addr: transport.addr(),
                program: name,
            }),
            Ok(port) => Ok(port),
            Err(_) => Err(transport
                .malformed(DecodeError::Value {
                    what: "port",
                    value: port,
                })
                .into()),
        }
    }

    async fn call(
        &self,
        port: u16,
        program: Program,
        procedure: u32,
        arguments: impl FnOnce(&mut Encoder),
    ) -> Result<(Transport, Decoder), RpcError> {
        let mut settings = self.settings.clone();
        settings.addr.set_port(port);
        let transport = Transport::new(&settings, program, (self.connectors)())?;
        let machine = Machine::new(&settings.machine_name, auth::stamp());
        let auth = Some((&machine, &Cred::root()));
        let draft = Draft::new(program, procedure, auth, arguments);
        let reply = transport.call(draft, transport.deadline()).await?;
        Ok((transport, reply.results))
    }
}

/// Reads the results of MNT: the handle and the flavours, or a status.
///
/// # Errors
/// [`DecodeError`].
pub fn mounted(results: &mut Decoder) -> Result<Result<Mounted, u32>, DecodeError> {
    let status = results.u32()?;
    if status != mount::mountstat3::MNT3_OK as u32 {
        return Ok(Err(status));
    }
    let root = FileHandle::decode(results)?;
    let count = results.u32()?;
    if count > MAX_FLAVOURS {
        return Err(DecodeError::TooLong {
            what: "the list of flavours",
            length: count as usize,
            limit: MAX_FLAVOURS as usize,
        });
    }
    let flavours = (0..count)
        .map(|_| results.u32())
        .collect::<Result<_, _>>()?;
    Ok(Ok(Mounted { root, flavours }))
}

#[cfg(test)]
mod tests {
    use std::io;

    use tokio::io::{
        AsyncReadExt, AsyncWriteExt, DuplexStream, ReadHalf, WriteHalf, duplex, split,
    };

    use super::*;

    /// Ports, and the results with which the first call on each is answered.
    type Results = &'static [(u16, &'static [u32])];

    /// Refuses all other ports.
    struct Services(Results);

    impl Connector for Services {
        type Reader = ReadHalf<DuplexStream>;
        type Writer = WriteHalf<DuplexStream>;

        async fn connect(
            &self,
            addr: SocketAddr,
            _: usize,
        ) -> io::Result<(Self::Reader, Self::Writer)> {
            let mut services = self.0.iter();
            let results = services
                .find_map(|(port, results)| (*port == addr.port()).then_some(*results))
                .ok_or(io::ErrorKind::ConnectionRefused)?;
            let (client, mut server) = duplex(4096);
            tokio::spawn(async move {
                let mut call = [0; 4096];
                let read = server.read(&mut call).await.unwrap_or(0);
                let xid = call[..read].get(4..8).unwrap_or(&[0; 4]).to_vec();
                let rest = [1, 0, 0, 0, 0].iter().chain(results);
                let rest: Vec<u8> = rest.flat_map(|word: &u32| word.to_be_bytes()).collect();
                let mark = 0x8000_0000 | u32::try_from(4 + rest.len()).unwrap();
                let wire = [&mark.to_be_bytes()[..], &xid, &rest].concat();
                server.write_all(&wire).await.unwrap();
                let _ = server.read(&mut call).await;
            });
            Ok(split(client))
        }
    }

    async fn mount(services: Results) -> Result<Mounted, MountError> {
        let settings = Settings::new(([192, 0, 2, 1], 0).into());
        let mountd = Mountd::new(&settings, || Services(services));
        mountd.mount(Ports::default(), "/export").await
    }

    //= test 1813-I-flavours
    #[tokio::test(start_paused = true)]
    async fn an_export_is_found_through_the_port_mapper() {
        let mounted = mount(&[(111, &[700]), (700, &[0, 4, 0xabcd_ef01, 2, 1, 0])]).await;
        let mounted = mounted.unwrap();
        assert_eq!(mounted.root.as_bytes(), [0xab, 0xcd, 0xef, 1]);
        assert_eq!(mounted.flavours, [1, 0]);
        let unnamed = mount(&[(111, &[700]), (700, &[0, 4, 7, 0])]).await;
        assert!(
            unnamed.is_ok(),
            "servers that name no flavour take AUTH_UNIX"
        );
    }

    //= test 1813-2.6-handle
    //= test 1813-I-flavours
    #[tokio::test(start_paused = true)]
    async fn what_stands_in_the_way_is_told() {
        let cases: [(Results, i32, &str); 7] = [
            (&[], libc::ETIMEDOUT, "connection refused"),
            (&[(111, &[0])], libc::ECONNREFUSED, "port mapper"),
            (&[(111, &[70_000])], libc::EIO, "70000 is no port"),
            (
                &[(111, &[7]), (7, &[13])],
                libc::EACCES,
                "/export: access denied",
            ),
            (
                &[(111, &[7]), (7, &[4711])],
                libc::EIO,
                "unknown status 4711",
            ),
            (&[(111, &[7]), (7, &[0, 65])], libc::EIO, "65 bytes long"),
            (
                &[(111, &[7]), (7, &[0, 4, 7, 1, 390_003])],
                libc::EACCES,
                "Kerberos",
            ),
        ];
        for (services, errno, text) in cases {
            let error = mount(services).await.unwrap_err();
            assert_eq!(error.errno(), errno, "{error}");
            assert!(error.to_string().contains(text), "{error}");
        }
    }
}
