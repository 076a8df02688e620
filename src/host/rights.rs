//! Who on this host may look into what is ours: root, and one daemon at a time.

use std::fs::{self, File, Permissions};
use std::io;
use std::os::unix::fs::{OpenOptionsExt, PermissionsExt};
use std::path::Path;

use rustix::fs::{FlockOperation, flock};
use rustix::io::Errno;

use super::{HostError, Settings};

/// What is locked as long as a daemon has the state directory. Who can open it can lock it.
const LOCK: &str = "daemon.lock";
/// What the state directory holds.
const STATE: [&str; 5] = ["catalog", "volumes", "attachments", "fuse", "guard"];
/// Nobody but root sees it.
const CLOSED: u32 = 0o700;
/// Who knows a name in it may pass: the root of a user namespace, where dockerd maps users.
const PASSABLE: u32 = 0o711;
/// dockerd's settings, which say whether it maps users (dockerd(8), `--userns-remap`).
const DOCKERD: &str = "/etc/docker/daemon.json";

/// Takes the state directory for this daemon, until the file is closed.
///
/// # Errors
/// [`HostError::Running`] when another daemon has it.
pub(super) fn lock(settings: &Settings) -> Result<Option<File>, HostError> {
    // Who only asks a share changes nothing there.
    if !settings.is_daemon {
        return Ok(None);
    }
    let state = |error| HostError::state("locking the state directory")(error);
    fs::create_dir_all(&settings.state_dir).map_err(state)?;
    let file = File::options()
        .create(true)
        .append(true)
        .mode(0o600)
        .open(settings.state_dir.join(LOCK))
        .map_err(state)?;
    match flock(&file, FlockOperation::NonBlockingLockExclusive) {
        Ok(()) => Ok(Some(file)),
        Err(Errno::WOULDBLOCK) => Err(HostError::Running(settings.state_dir.clone())),
        Err(error) => Err(state(error.into())),
    }
}

/// Closes what lies below the state directory and the mount root to all but root. The two
/// themselves may be anybody's.
pub(super) fn close(settings: &Settings) -> Result<(), HostError> {
    let remapped = fs::read_to_string(DOCKERD).is_ok_and(|text| text.contains("userns-remap"));
    let volumes = if remapped { PASSABLE } else { CLOSED };
    let closed = || {
        for name in STATE {
            restrict(&settings.state_dir.join(name), CLOSED)?;
        }
        restrict(&settings.mount_root.join("shares"), CLOSED)?;
        restrict(&settings.mount_root.join("volumes"), volumes)
    };
    closed().map_err(HostError::state("closing it to other users"))
}

fn restrict(dir: &Path, mode: u32) -> io::Result<()> {
    fs::create_dir_all(dir)?;
    fs::set_permissions(dir, Permissions::from_mode(mode))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn nobody_but_root_looks_in_and_one_daemon_at_a_time() {
        let dir = tempfile::tempdir().unwrap();
        let state = dir.path().join("state");
        let mut settings = Settings::aside(&state);
        settings.is_daemon = true;
        let lock_held = lock(&settings).unwrap();
        let second = lock(&settings).unwrap_err().to_string();
        assert!(second.contains("another nfsvol"), "{second}");
        drop(lock_held);
        drop(lock(&settings).unwrap());
        // As an earlier version left them.
        fs::create_dir_all(state.join("mnt/volumes/db")).unwrap();
        close(&settings).unwrap();
        let mode =
            |path: &str| fs::metadata(state.join(path)).unwrap().permissions().mode() & 0o777;
        assert_eq!(mode("daemon.lock"), 0o600);
        for path in [
            "mnt/shares",
            "mnt/volumes",
            "catalog",
            "attachments",
            "guard",
            "fuse",
        ] {
            assert_eq!(mode(path) & 0o066, 0, "{path}");
        }
    }
}
