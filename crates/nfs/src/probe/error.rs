//! Why a share could not be reached: the step, the address, the cause, and what to do next.

use std::fmt;
use std::io;
use std::net::SocketAddr;
use std::time::Duration;

use rustix::io::Errno;

/// How many export names a "no such export" error lists, so that it stays readable.
const LISTED_EXPORTS: usize = 12;

/// The steps of reaching a share, in their order.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord)]
pub enum Step {
    /// The server's name to addresses.
    Resolve,
    /// A TCP connection to the NFS service.
    Connect,
    /// Asking the portmapper for the ports of NFS and MOUNT.
    Portmap,
    /// The NFS NULL call, which shows that the server answers and which versions it speaks.
    Null,
    /// The MOUNT service: is the directory exported to this host (NFSv3 only).
    Mount,
    /// The FSINFO call on the export's root (NFSv3 only).
    Fsinfo,
}

impl fmt::Display for Step {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Resolve => "resolve",
            Self::Connect => "connect",
            Self::Portmap => "portmap",
            Self::Null => "NULL call",
            Self::Mount => "mount",
            Self::Fsinfo => "FSINFO call",
        })
    }
}

/// What went wrong at a step.
#[derive(Debug, Clone, PartialEq, Eq)]
pub enum Cause {
    /// The name did not resolve; the text is the resolver's.
    Name(String),
    /// The port refused the connection.
    Refused,
    /// No route, or the network said that the host is unreachable.
    Unreachable(String),
    /// No answer within this time.
    TimedOut(Duration),
    /// The connection broke in the middle of a call.
    Closed,
    /// The server speaks none of the wanted versions of the program.
    Version { low: u32, high: u32 },
    /// The portmapper does not know the program.
    NotRegistered(&'static str),
    /// No MOUNT service is known, so an NFSv3 export cannot be looked up.
    NoMountService,
    /// The export's access list does not include this host.
    Denied,
    /// The directory is not exported; what the server exports, if it told.
    NoExport(Vec<String>),
    /// The server refused the credentials.
    Credentials(String),
    /// The answer made no sense, or was an NFS or RPC error that has no case of its own.
    Protocol(String),
    /// Any other error of the local system.
    Io(String),
}

/// A share that could not be reached.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ReachError {
    /// The share, as the user wrote it.
    pub share: String,
    /// The step that failed.
    pub step: Step,
    /// The address and port tried; none while the name is not resolved.
    pub addr: Option<SocketAddr>,
    pub cause: Cause,
    /// Set when nothing was sent because earlier attempts failed: the time until the next
    /// attempt is let through (see [`Breaker`](super::Breaker)).
    pub resting: Option<Duration>,
}

impl ReachError {
    /// Whether the same attempt may well succeed later without anybody changing a setting.
    ///
    /// A name that does not resolve counts as such: resolvers answer "no such name" while they
    /// start or while their upstream is away, so the two cases cannot be told apart reliably.
    /// A refusal by the access list, a missing export and a version mismatch are permanent.
    #[must_use]
    pub fn is_transient(&self) -> bool {
        match self.cause {
            Cause::Name(_)
            | Cause::Refused
            | Cause::Unreachable(_)
            | Cause::TimedOut(_)
            | Cause::Closed
            | Cause::NotRegistered(_)
            | Cause::Io(_) => true,
            Cause::Version { .. }
            | Cause::NoMountService
            | Cause::Denied
            | Cause::NoExport(_)
            | Cause::Credentials(_)
            | Cause::Protocol(_) => false,
        }
    }

    /// The errno that a system call would have given.
    #[must_use]
    pub fn errno(&self) -> i32 {
        match self.cause {
            Cause::Name(_) | Cause::Unreachable(_) => Errno::HOSTUNREACH,
            Cause::Refused => Errno::CONNREFUSED,
            Cause::TimedOut(_) => Errno::TIMEDOUT,
            Cause::Closed => Errno::CONNRESET,
            Cause::Version { .. } | Cause::NotRegistered(_) | Cause::NoMountService => {
                Errno::PROTONOSUPPORT
            }
            Cause::Denied | Cause::Credentials(_) => Errno::ACCESS,
            Cause::NoExport(_) => Errno::NOENT,
            Cause::Protocol(_) => Errno::PROTO,
            Cause::Io(_) => Errno::IO,
        }
        .raw_os_error()
    }

    /// What happened, without what to do next.
    #[must_use]
    pub fn message(&self) -> String {
        Told(self).to_string()
    }

    /// What to do next, where something can be said.
    #[must_use]
    pub fn hint(&self) -> Option<&'static str> {
        Some(match (&self.cause, self.step) {
            (Cause::Name(_), _) => {
                "check the server's name in the share, /etc/resolv.conf and /etc/hosts"
            }
            (Cause::Refused, Step::Connect | Step::Null) => {
                "is the NFS server running there, and does a firewall let this host through?"
            }
            (Cause::Refused, _) => "is rpc.mountd running there, on the port that is configured?",
            (Cause::Unreachable(_), _) => "check this host's routes and the server's network",
            (Cause::TimedOut(_), Step::Resolve) => "check the name servers in /etc/resolv.conf",
            (Cause::TimedOut(_), Step::Connect) => {
                "the server is down, or a firewall drops the connection without a word"
            }
            (Cause::TimedOut(_), _) => {
                "the host is up but its NFS service does not answer; look at the server's load \
                 and its log"
            }
            (Cause::Closed, _) => {
                "the server closed the connection; it may be restarting, or refuse source ports \
                 above 1023 (export option `insecure`)"
            }
            (Cause::NoMountService, _) => {
                "name the port of the MOUNT service, or let the server's port 111 through"
            }
            (Cause::NotRegistered(_), _) => "is the service running on the server? see rpcinfo -p",
            (Cause::Denied, Step::Fsinfo) => {
                "the export may need a source port below 1024 (run as root, or export with \
                 `insecure`), or another security flavor"
            }
            (Cause::Denied, _) => "add this host to the export (exports(5)) and run exportfs -ra",
            (Cause::NoExport(_), _) => "check the path after the colon in the share",
            (Cause::Credentials(_), _) => "the export must allow sec=sys for the volume plugin",
            (Cause::Version { .. }, _) => "enable NFSv3 or NFSv4 on the server",
            (Cause::Protocol(_) | Cause::Io(_), _) => return None,
        })
    }

    /// Turns an error of the system's network calls into a cause.
    pub(crate) fn cause_of(error: &io::Error, waited: Duration) -> Cause {
        use io::ErrorKind as K;
        match error.kind() {
            K::ConnectionRefused => Cause::Refused,
            K::TimedOut => Cause::TimedOut(waited),
            K::HostUnreachable
            | K::NetworkUnreachable
            | K::NetworkDown
            | K::AddrNotAvailable
            | K::PermissionDenied => Cause::Unreachable(error.to_string()),
            K::UnexpectedEof
            | K::ConnectionReset
            | K::ConnectionAborted
            | K::BrokenPipe
            | K::NotConnected => Cause::Closed,
            K::InvalidData => Cause::Protocol(error.to_string()),
            _ => Cause::Io(error.to_string()),
        }
    }
}

/// Without what to do next.
struct Told<'a>(&'a ReachError);

impl fmt::Display for Told<'_> {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let error = self.0;
        write!(f, "share {}: {}: ", error.share, error.step)?;
        match error.addr {
            Some(addr) => write!(f, "{} port {} ", addr.ip(), addr.port())?,
            None => f.write_str("the server ")?,
        }
        match &error.cause {
            Cause::Name(text) => write!(f, "name does not resolve ({text})")?,
            Cause::Refused => f.write_str("refused the connection")?,
            Cause::Unreachable(text) => write!(f, "cannot be reached ({text})")?,
            Cause::TimedOut(waited) => {
                write!(f, "gave no answer within {} ms", waited.as_millis())?;
            }
            Cause::Closed => f.write_str("closed the connection")?,
            Cause::Version { low, high } => {
                write!(f, "offers NFS versions {low} to {high} only")?;
            }
            Cause::NotRegistered(program) => {
                write!(f, "has no {program} service registered with its portmapper")?;
            }
            Cause::NoMountService => f.write_str(
                "did not tell the port of its MOUNT service (the portmapper does not answer), \
                 which NFSv3 needs",
            )?,
            Cause::Denied => {
                f.write_str("refuses: the export's access list does not include this host")?;
            }
            Cause::NoExport(exports) if exports.is_empty() => {
                f.write_str("has no such export")?;
            }
            Cause::NoExport(exports) => {
                let listed = exports.len().min(LISTED_EXPORTS);
                write!(
                    f,
                    "has no such export; the server exports: {}",
                    exports[..listed].join(", ")
                )?;
                if exports.len() > listed {
                    write!(f, " and {} more", exports.len() - listed)?;
                }
            }
            Cause::Credentials(text) => write!(f, "refused this host's credentials ({text})")?,
            Cause::Protocol(text) => write!(f, "gave an answer that is no NFS: {text}")?,
            Cause::Io(text) => write!(f, "could not be asked: {text}")?,
        }
        Ok(())
    }
}

impl fmt::Display for ReachError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        Told(self).fmt(f)?;
        if let Some(hint) = self.hint() {
            write!(f, "; {hint}")?;
        }
        if let Some(rest) = self.resting {
            write!(
                f,
                " (from an earlier attempt; the next one is made in {} ms)",
                rest.as_millis()
            )?;
        }
        Ok(())
    }
}

impl std::error::Error for ReachError {}
