//! The cluster: which hosts live, what each of them holds, and who may mount an exclusive volume.
//!
//! Hosts never speak to each other; all of this lies on the home share ([`crate::layout`]), is made of
//! RENAMEs that exactly one host wins, and is handed its time and its share, so that a simulation
//! runs the same code (`tests/cluster_simulation`).
//!
//! **Session.** A host lives as long as it renames its token, `hosts/<host>/alive.<session>.<n>`,
//! to the next number. Whoever has seen no new number for [`Times::expire`] renames the token to
//! `ended.…`. Both start from the same name, so either the host has renewed or its session is
//! over, and each learns which. No answer of the server is needed for a host to know that its
//! right *may* be gone: it ends by itself [`Times::right`] after the last renewal was *sent*.
//!
//! **Holds.** What a host holds is in `hosts/<host>.<number>.json`; the highest number counts, so
//! a write that arrives late changes nothing. A hold is good while the session named in the
//! document is; each has a nonce that is never used again.
//!
//! **Claim.** The right to an exclusive volume is `volumes/<name>/claims.<id>/<epoch>/`, put there
//! whole by a RENAME; the id is that of the volume's record. It is good while its host's document holds the volume under the claim's nonce.
//! Once it is not, it never is again, and whoever makes the next epoch has it. So nothing has to
//! be released but the hold.
//!
//! **Removal.** An intent, then a look at the holds, then a RENAME that makes the intent binding
//! ([`removal`]). Who mounts publishes its hold first and takes intents away, by a RENAME too: of
//! a Mount and a Remove that meet, one wins.
//!
//! **Clocks.** Nothing is compared between the clocks of two hosts, and the server's clock is only
//! asked which of two of its stamps is older. What is assumed is that no two hosts' clocks differ
//! in *rate* by more than 5 % ([`Times`]).

pub(crate) mod claim;
mod document;
pub(crate) mod elapsed;
pub(crate) mod hold;
pub(crate) mod member;
pub(crate) mod removal;
mod session;
mod share;
mod times;
mod view;

pub(crate) use self::hold::Hold;
pub use self::hold::HostDoc;
pub use self::member::{Beat, Claimed, Host, Member, Renewal};
pub(crate) use self::member::{Holding, MemberError};
pub use self::share::{Entry, Env, Stamp, Store};
pub use self::times::Times;
pub(crate) use self::times::{LONGEST_SESSION, SHORTEST_SESSION};
