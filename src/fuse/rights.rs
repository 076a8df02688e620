//! Who decides what a user may do: the kernel by mode bits, or the server alone.
//!
//! The kernel answers from its caches, for all users alike. So it has to check mode bits itself
//! (`default_permissions`), or one user would search a directory by names that another has looked
//! up. Where the server makes everybody the same user (`all_squash`) mode bits say nothing about
//! the callers here, and nobody is to be kept apart: there the server decides alone, and is asked
//! at each open. It is seen by what it grants to a user whom the mode bits of a directory keep out.
//!
//! A server may also grant by an access control list what mode bits deny, to some and not to
//! others. So that this leaks nothing, a name below a directory that not everybody may search is
//! then never answered from the kernel's cache.
//!
//! Known limit: a squash is not seen where all directories looked at let everybody do everything.

use crate::mutant::{self, Mutant};
use nfs::rpc::Cred;
use nfs::rpc::nfs3::{Attr, FileHandle, Nfs3, access};

/// A user that owns nothing anywhere, and is no number that servers map others to.
const STRANGER: u32 = 3_987_654_321;

/// Whether the server grants a stranger what the mode bits of a directory deny him.
pub(super) async fn beyond_mode_bits(nfs: &Nfs3, dir: &FileHandle) -> bool {
    let Ok(attr) = nfs.getattr(&Cred::root(), dir).await else {
        return false;
    };
    let denied = denied(&attr);
    if denied == 0 || mutant::is_on(Mutant::ModeBitsAlone) {
        return false;
    }
    let answer = nfs
        .access(&Cred::new(STRANGER, STRANGER), dir, denied)
        .await;
    answer.is_ok_and(|answer| answer.granted & denied != 0)
}

/// The rights to a directory that its mode bits deny to everybody but its owner and group.
fn denied(attr: &Attr) -> u32 {
    [
        (0o4, access::READ),
        (0o2, access::MODIFY | access::EXTEND),
        (0o1, access::LOOKUP),
    ]
    .into_iter()
    .filter(|(bit, _)| attr.mode & bit == 0)
    .fold(0, |denied, (_, rights)| denied | rights)
}
