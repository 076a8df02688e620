//! An export with root_squash: root is nobody to the server, everybody else is himself.

use std::fs;
use std::os::unix::fs::{PermissionsExt, chown};

use lab::{Export, Ganesha, Lab, Result};
use libtest_mimic::Trial;

use crate::{EXPORT, Host, fuse_trial};

/// nfs-ganesha's `Anonymous_Uid`, -2.
const NOBODY: u32 = 0xffff_fffe;
/// A group that may enter the team's directory.
const TEAM: u32 = 4711;

pub(crate) fn trials() -> Vec<Trial> {
    vec![fuse_trial("where_root_is_squashed_mode_bits_count", root)]
}

fn root(lab: &'static Lab) -> Result {
    let exports = [Export::new(EXPORT).squash("root_squash")];
    let nas = Ganesha::start(lab, "rootsquashnas", &exports)?;
    // What root makes here, the administrator of the server has made.
    let dir = nas.local(EXPORT).join("squashed");
    let make = |name: &str, mode: u32, group: u32| -> Result {
        fs::create_dir_all(dir.join(name))?;
        chown(dir.join(name), Some(0), Some(group))?;
        Ok(fs::set_permissions(
            dir.join(name),
            PermissionsExt::from_mode(mode),
        )?)
    };
    make("", 0o755, 0)?;
    make("open", 0o777, 0)?;
    make("team", 0o770, TEAM)?;
    let host = Host::mount(&nas, "squashed", "")?;
    host.script(&format!(
        "as() {{ ids=$1; shift; setpriv --reuid=$ids --regid=$ids --groups=$G sh -c \"$*\"; }}
G={TEAM}; as 1000 'echo hi >team/file; echo own >open/own; chmod 600 open/own; cat open/own'
[ $(stat -c %u open/own) = 1000 ]
G=9; as 1001 'cat open/own' 2>/dev/null && exit 1
as 1001 'ls team' 2>/dev/null && exit 2
as 1001 'cat team/file' 2>/dev/null && exit 3
G={TEAM}; as 1001 'cat team/file'
cat open/own 2>/dev/null && exit 4
touch root 2>/dev/null && exit 5
echo text >open/root; (umask 0377; echo once >open/once); cat open/root
[ $(stat -c %u open/root) = {NOBODY} ]
chown 1000 open/root 2>/dev/null && exit 6
rm open/root"
    ))
}
