//! Mounting a share: what mount.nfs(8) does in user space, without mount.nfs.
//!
//! The server's address, the transport, the version and the ports are always given explicitly,
//! so the kernel resolves and guesses nothing and needs no port mapper. Versions are tried from
//! the best that the server was seen to have. The mount appears at its place only when it is
//! complete and still wanted.
//!
//! Limit: where the kernel has no fsopen(2), mount(2) is used, and a server that falls silent
//! between the caller's probe and the mount then keeps a thread until it answers.

use std::net::IpAddr;
use std::os::fd::{AsFd, BorrowedFd, OwnedFd};
use std::path::Path;
use std::time::{Duration, Instant};

use rustix::fs::CWD;
use rustix::io::Errno;
use rustix::mount::{
    FsMountFlags, FsOpenFlags, MountAttrFlags, MoveMountFlags, UnmountFlags, fsconfig_set_flag,
    fsconfig_set_string, fsmount, fsopen, move_mount, unmount,
};
use sys_mount::{Mount, MountFlags};

use super::bind::{self, SETTLE_PAUSE, SETTLE_TRIES};
use super::error::{Attempt, MountError, Step};
use super::lane::Ticket;
use super::path::Endpoint;
use super::sys::{Aside, Call};
use super::trap;
use crate::mutant::{self, Mutant};
use crate::volume::{MountOptions, NfsVersion};
use nfs::address::{Server, Share, SharePath};

/// How long the kernel may take to mount a share with one version. A healthy server takes
/// milliseconds; NFSv4 mounts of all other servers may have to wait for this one (see
/// `sys::Call`), so it ends long before a usual deadline.
const CREATE_LIMIT: Duration = Duration::from_secs(20);
/// How long the first use of a fresh mount may take: a listing, which a healthy server answers in
/// milliseconds.
const LOOK_LIMIT: Duration = Duration::from_secs(20);
/// How long before its caller's deadline a mount is given up, so that the caller still hears what
/// was tried.
const MARGIN: Duration = Duration::from_millis(100);
/// A message of the kernel's file system context is at most this long, in bytes.
const LOG_MESSAGE: usize = 1024;
/// More messages than the kernel keeps per context (8).
const LOG_MESSAGES: usize = 16;

/// A share to be mounted.
#[derive(Debug)]
pub(super) struct ShareMount<'a> {
    pub(super) share: &'a Share,
    pub(super) endpoint: Endpoint,
    pub(super) options: &'a MountOptions,
    /// An existing directory.
    pub(super) target: &'a Path,
}

/// What the kernel calls the source of a mount: `nas:/export/db`. A host name stays a name
/// (Kerberos principals depend on it); the address goes along separately.
pub(super) fn source(share: &Share, addr: IpAddr, below: &SharePath) -> String {
    let server = match share.server() {
        Server::Embedded => match addr {
            IpAddr::V4(ip) => ip.to_string(),
            IpAddr::V6(ip) => format!("[{ip}]"),
        },
        named => named.to_string(),
    };
    let export = share.export();
    match (below.is_root(), export) {
        (true, _) => format!("{server}:{export}"),
        (false, "/") => format!("{server}:/{}", below.as_str()),
        (false, _) => format!("{server}:{export}/{}", below.as_str()),
    }
}

/// The words for the kernel.
fn parameters(plan: &ShareMount<'_>, version: NfsVersion) -> Vec<(&'static str, Option<String>)> {
    let ShareMount {
        endpoint, options, ..
    } = plan;
    let six = endpoint.addr.is_ipv6();
    let proto = match (options.is_rdma(), six) {
        (false, false) => "tcp",
        (false, true) => "tcp6",
        (true, false) => "rdma",
        (true, true) => "rdma6",
    };
    let mut words = vec![
        ("vers", Some(version.as_str().to_owned())),
        ("addr", Some(endpoint.addr.to_string())),
        ("proto", Some(proto.to_owned())),
        ("port", Some(endpoint.nfs_port.to_string())),
    ];
    if version == NfsVersion::V3 {
        let mountproto = if six { "tcp6" } else { "tcp" };
        words.push(("mountproto", Some(mountproto.to_owned())));
        words.extend(
            endpoint
                .mount_port
                .map(|port| ("mountport", Some(port.to_string()))),
        );
        words.extend(options.lock_word().map(|word| (word, None)));
    }
    // clientaddr= is not needed for NFSv4.0: the kernel takes the local address of its connection.
    words.extend(
        options
            .superblock()
            .map(|(name, value)| (name, value.map(str::to_owned))),
    );
    words
}

/// How one version ended.
type Outcome = Result<(), Attempt>;

impl ShareMount<'_> {
    /// Mounts the share with the best version that works. Answers with what users should know of
    /// better ones.
    ///
    /// # Errors
    /// [`MountError::Refused`] with what was tried, [`MountError::Timeout`], and the others of
    /// this step.
    pub(super) fn mount(&self, ticket: &Ticket) -> Result<Option<String>, MountError> {
        let Endpoint { addr, v3, v4, .. } = self.endpoint;
        let seen = |version: &&NfsVersion| if version.is_v4() { v4 } else { v3 };
        let mut candidates = self
            .options
            .versions()
            .iter()
            .filter(seen)
            .copied()
            .peekable();
        if candidates.peek().is_none() {
            return Err(MountError::NoCommonVersion {
                share: self.share.clone(),
                addr,
                asked: self.options.nfsvers().unwrap_or("any version").to_owned(),
            });
        }
        let mut attempts: Vec<Attempt> = Vec::new();
        for version in candidates {
            // These say something about the export, not about the minor version: of NFSv4 they
            // are heard once, and NFSv3 may see the export under another path.
            let settled = |attempt: &Attempt| {
                attempt.version.is_v4()
                    && matches!(attempt.errno, Errno::NOENT | Errno::PERM | Errno::ACCESS)
            };
            if version.is_v4() && attempts.last().is_some_and(settled) {
                continue;
            }
            // Locks of NFSv3 stay on this host: nobody gets it in place of a version that has them
            // without having asked for it.
            if !version.is_v4() && trap::way_out(&attempts).is_some() {
                break;
            }
            let attempt = match self.attempt_settled(version, ticket)? {
                Ok(()) => return Ok(trap::warning(&attempts)),
                Err(attempt) => attempt,
            };
            tracing::debug!(share = %self.share, %attempt, "mount attempt");
            let unreachable = matches!(
                attempt.errno,
                Errno::TIMEDOUT
                    | Errno::CONNREFUSED
                    | Errno::CONNRESET
                    | Errno::HOSTUNREACH
                    | Errno::NETUNREACH
            );
            attempts.push(attempt);
            if unreachable {
                break;
            }
        }
        Err(MountError::Refused {
            share: self.share.clone(),
            addr,
            attempts,
        })
    }

    /// One version, repeated while the answer is one that passes (see `bind::settled`).
    fn attempt_settled(&self, version: NfsVersion, ticket: &Ticket) -> Result<Outcome, MountError> {
        for _ in 0..SETTLE_TRIES {
            let outcome = self.attempt(version, ticket)?;
            let passes = matches!(&outcome, Err(attempt) if attempt.errno == Errno::IO);
            if !passes || Instant::now() + SETTLE_PAUSE >= ticket.deadline() {
                return Ok(outcome);
            }
            std::thread::sleep(SETTLE_PAUSE);
        }
        self.attempt(version, ticket)
    }

    fn attempt(&self, version: NfsVersion, ticket: &Ticket) -> Result<Outcome, MountError> {
        let words = parameters(self, version);
        let context = match fsopen("nfs", FsOpenFlags::FSOPEN_CLOEXEC) {
            Ok(context) => context,
            Err(Errno::NODEV) => return Err(no_nfs()),
            Err(Errno::NOSYS | Errno::PERM) => return self.attempt_mount2(version, &words, ticket),
            Err(errno) => return Err(self.local("fsopen", errno)),
        };
        let failed = |errno, context: &OwnedFd| {
            Ok(Err(Attempt {
                version,
                errno,
                detail: log(context),
            }))
        };
        let source = source(self.share, self.endpoint.addr, &SharePath::root());
        fsconfig_set_string(&context, "source", &source).map_err(|e| self.local("source", e))?;
        for (name, value) in &words {
            let set = match value {
                Some(value) => fsconfig_set_string(&context, *name, value),
                None => fsconfig_set_flag(&context, *name),
            };
            match set {
                Ok(()) => {}
                Err(errno) if *name == "vers" => return failed(errno, &context),
                Err(errno) => {
                    return Err(self.option(name, value.as_deref(), errno, &log(&context)));
                }
            }
        }
        let deadline = deadline_of(ticket, CREATE_LIMIT);
        let aside = |call, fd: BorrowedFd<'_>| {
            Aside::start(call, fd).map_err(|source| MountError::Local {
                step: Step::MountShare,
                what: "starting a process for the mount".to_owned(),
                source,
            })
        };
        let creation = aside(Call::Create, context.as_fd())?;
        fail::fail_point!("mount.creating", |_| crate::failpoint::die());
        let created = creation.wait(Some(deadline));
        if let Err(errno) = created {
            return failed(errno, &context);
        }
        let attributes = MountAttrFlags::MOUNT_ATTR_NOSUID
            | MountAttrFlags::MOUNT_ATTR_NODEV
            | MountAttrFlags::MOUNT_ATTR_NOEXEC;
        let mount = fsmount(&context, FsMountFlags::FSMOUNT_CLOEXEC, attributes)
            .map_err(|errno| self.local("fsmount", errno))?;
        // With time of its own: what was not looked at may not be used.
        let look_deadline = deadline_of(ticket, LOOK_LIMIT);
        match aside(Call::Look, mount.as_fd())?.wait(Some(look_deadline)) {
            Err(_) if mutant::is_on(Mutant::TrapsAreMounted) => {}
            Err(errno @ Errno::TIMEDOUT) => return failed(errno, &context),
            Err(errno) => {
                if let Some(why) = trap::why(errno) {
                    let detail = why.to_owned();
                    return Ok(Err(Attempt {
                        version,
                        errno,
                        detail,
                    }));
                }
            }
            Ok(()) => {}
        }
        ticket
            .commit()
            .map_err(|errno| self.local("given up", errno))?;
        self.make_target()?;
        move_mount(
            &mount,
            "",
            CWD,
            self.target,
            MoveMountFlags::MOVE_MOUNT_F_EMPTY_PATH,
        )
        .map_err(|errno| self.local("move_mount", errno))?;
        Ok(Ok(()))
    }

    /// The same by mount(2), for kernels and sandboxes without fsopen(2).
    fn attempt_mount2(
        &self,
        version: NfsVersion,
        words: &[(&'static str, Option<String>)],
        ticket: &Ticket,
    ) -> Result<Outcome, MountError> {
        self.make_target()?;
        let mut flags = MountFlags::NOSUID | MountFlags::NODEV | MountFlags::NOEXEC;
        let mut data = Vec::new();
        for (name, value) in words {
            match (*name, value) {
                ("sync", None) => flags |= MountFlags::SYNCHRONOUS,
                ("dirsync", None) => flags |= MountFlags::DIRSYNC,
                ("async" | "lazytime" | "nolazytime", None) => {}
                (name, None) => data.push(name.to_owned()),
                // SELinux takes the quotes away.
                (name, Some(value)) if value.contains(',') => {
                    data.push(format!("{name}=\"{value}\""));
                }
                (name, Some(value)) => data.push(format!("{name}={value}")),
            }
        }
        let mounted = Mount::builder()
            .fstype("nfs")
            .flags(flags)
            .data(&data.join(","))
            .mount(
                source(self.share, self.endpoint.addr, &SharePath::root()),
                self.target,
            );
        match mounted {
            Ok(_) => {
                if let Err(errno) = ticket.commit() {
                    let _ = unmount(self.target, UnmountFlags::DETACH | UnmountFlags::NOFOLLOW);
                    return Err(self.local("given up", errno));
                }
                Ok(Ok(()))
            }
            Err(error) => {
                let errno = Errno::from_io_error(&error).unwrap_or(Errno::IO);
                match errno {
                    Errno::NODEV if version == NfsVersion::V3 => Err(no_nfs()),
                    Errno::PERM => Err(no_permission()),
                    _ => Ok(Err(Attempt {
                        version,
                        errno,
                        detail: String::new(),
                    })),
                }
            }
        }
    }

    /// Made right before it is needed: who unmounts idle shares removes empty directories.
    fn make_target(&self) -> Result<(), MountError> {
        bind::make_directory(self.target)
            .map_err(|errno| self.local("making the mount point", errno))
    }

    fn option(&self, name: &str, value: Option<&str>, errno: Errno, log: &str) -> MountError {
        let option = value.map_or_else(|| name.to_owned(), |value| format!("{name}={value}"));
        let detail = if log.is_empty() {
            std::io::Error::from(errno).to_string()
        } else {
            log.to_owned()
        };
        MountError::Option {
            share: self.share.clone(),
            option,
            detail,
        }
    }

    fn local(&self, what: &str, errno: Errno) -> MountError {
        MountError::Local {
            step: Step::MountShare,
            what: format!("{}: {what}", self.share),
            source: errno.into(),
        }
    }
}

/// The end of a step of a mount that may take this long.
fn deadline_of(ticket: &Ticket, limit: Duration) -> Instant {
    let now = Instant::now();
    let before = ticket.deadline().checked_sub(MARGIN);
    before.unwrap_or(now).min(now + limit)
}

pub(super) fn no_nfs() -> MountError {
    MountError::NoKernelNfs {
        reason: "this kernel has no NFS client".to_owned(),
        hint: "load its modules (modprobe nfs; modprobe nfsv3; modprobe nfsv4), or use data_path=fuse",
    }
}

pub(super) fn no_permission() -> MountError {
    MountError::NoKernelNfs {
        reason: "this process may not mount file systems (EPERM)".to_owned(),
        hint: "run nfsvol as root with CAP_SYS_ADMIN, outside of unprivileged containers, or give it /dev/fuse \
               (data_path=fuse)",
    }
}

/// What the kernel had to say about a context: lines such as `e NFS: Bad value for 'vers'`.
fn log(context: &OwnedFd) -> String {
    let mut lines = Vec::new();
    let mut buffer = [0; LOG_MESSAGE];
    for _ in 0..LOG_MESSAGES {
        let Ok(length @ 1..) = rustix::io::read(context, &mut buffer) else {
            break;
        };
        let line = String::from_utf8_lossy(buffer.get(..length).unwrap_or_default()).into_owned();
        let line = line.trim_end();
        // The first letter is the level: e, w or i.
        let line = line.split_once(' ').map_or(line, |(_, text)| text);
        lines.push(line.to_owned());
    }
    lines.join("; ")
}

#[cfg(test)]
mod tests {
    use super::*;

    fn words(options: &str, addr: &str, version: NfsVersion) -> String {
        let share = "nas:/export".parse().unwrap();
        let plan = ShareMount {
            share: &share,
            endpoint: Endpoint {
                addr: addr.parse().unwrap(),
                nfs_port: 2049,
                mount_port: Some(20048),
                v3: true,
                v4: true,
            },
            options: &options.parse().unwrap(),
            target: Path::new("/nowhere"),
        };
        let word = |(name, value): (&str, Option<String>)| match value {
            Some(value) => format!("{name}={value}"),
            None => name.to_owned(),
        };
        parameters(&plan, version)
            .into_iter()
            .map(word)
            .collect::<Vec<_>>()
            .join(",")
    }

    #[test]
    fn the_kernel_is_told_all_that_it_would_guess() {
        assert_eq!(
            words("", "10.0.0.1", NfsVersion::V3),
            "vers=3,addr=10.0.0.1,proto=tcp,port=2049,mountproto=tcp,mountport=20048,nolock,hard"
        );
        assert_eq!(
            words("lock,ro,soft,timeo=9", "fd00::5", NfsVersion::V3),
            "vers=3,addr=fd00::5,proto=tcp6,port=2049,mountproto=tcp6,mountport=20048,lock,soft,timeo=9"
        );
        assert_eq!(
            words("rdma,mountport=1", "10.0.0.1", NfsVersion::V4_2),
            "vers=4.2,addr=10.0.0.1,proto=rdma,port=2049,hard"
        );
    }

    #[test]
    fn sources_are_written_as_the_kernel_prints_them() {
        let addr: IpAddr = "fd00::5".parse().unwrap();
        let db = SharePath::parse("a/db").unwrap();
        let text = |share: &str, below: &SharePath| source(&share.parse().unwrap(), addr, below);
        assert_eq!(text("nas:/export", &db), "nas:/export/a/db");
        assert_eq!(text("nas:/", &db), "nas:/a/db");
        assert_eq!(text("nas:/", &SharePath::root()), "nas:/");
        assert_eq!(text("[fd00::5]:/e", &SharePath::root()), "[fd00::5]:/e");
        assert_eq!(text("embedded:/srv", &db), "[fd00::5]:/srv/a/db");
    }
}
