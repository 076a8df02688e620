//! Mended faults that a test can put back ("mutants").
//!
//! A simulation or a judge that has never failed proves nothing. So whoever mends a fault leaves a
//! switch beside the mend, and a test shows that the fault, put back, is found again:
//!
//! ```
//! mod mutant {
//!     mutants::list! {
//!         /// A fraction is rounded up.
//!         RoundsUp,
//!     }
//! }
//! use mutant::{Mutant, is_on};
//!
//! fn halved(n: u32) -> u32 {
//!     if is_on(Mutant::RoundsUp) { n.div_ceil(2) } else { n / 2 }
//! }
//!
//! assert_eq!(halved(3), 1);
//! # #[cfg(feature = "failpoints")]
//! {
//!     let _back = mutant::put_back(Mutant::RoundsUp);
//!     assert_eq!(halved(3), 2);
//! }
//! assert_eq!(halved(3), 1);
//! ```
//!
//! Each crate has a list of its own, made by [`list!`] in a module of its own. A mutant is put back
//! for one thread (`put_back`: simulations run on one), or for a whole process by
//! `NFSVOL_MUTANT=Name` in its environment, where a name counts in every list that has it.
//!
//! Invariant: without the feature `failpoints` of the crate that has the list, which no release has,
//! nothing can be put back and the switches compile to nothing.
//!
//! Known limit: one mutant at a time, on one thread.

use std::fmt::Debug;

/// The variable that names the mutant of a whole process.
pub const VARIABLE: &str = "NFSVOL_MUTANT";

/// The one of `all` that [`VARIABLE`] names.
#[must_use]
pub fn named<M: Copy + Debug>(all: &[M]) -> Option<M> {
    let name = std::env::var(VARIABLE).ok()?;
    all.iter().find(|it| format!("{it:?}") == name).copied()
}

/// Mends a fault again when it is dropped.
#[derive(Debug)]
pub struct PutBack(fn());

impl PutBack {
    /// `mend` is what mends it.
    #[must_use]
    pub const fn until_dropped(mend: fn()) -> Self {
        Self(mend)
    }
}

impl Drop for PutBack {
    fn drop(&mut self) {
        (self.0)();
    }
}

/// Declares `Mutant`, the list of a crate, each with a doc that says which fault it is; `is_on`, and
/// for tests `put_back`.
///
/// The crate has a feature `failpoints`, and this one among its dependencies.
#[macro_export]
macro_rules! list {
    ($($(#[$doc:meta])* $name:ident,)*) => {
        #[derive(Debug, Clone, Copy, PartialEq, Eq)]
        pub enum Mutant {
            $($(#[$doc])* $name,)*
        }

        impl Mutant {
            /// Every mutant there is, so that a test can ask for each of them.
            pub const ALL: &[Self] = &[$(Self::$name,)*];
        }

        #[cfg(any(test, feature = "failpoints"))]
        mod switch {
            use std::cell::Cell;
            use std::sync::OnceLock;

            use super::Mutant;

            thread_local! {
                static HERE: Cell<Option<Mutant>> = const { Cell::new(None) };
            }
            /// The one that the environment names.
            static EVERYWHERE: OnceLock<Option<Mutant>> = OnceLock::new();

            /// Whether this fault is put back.
            #[must_use]
            pub fn is_on(mutant: Mutant) -> bool {
                HERE.get() == Some(mutant)
                    || *EVERYWHERE.get_or_init(|| $crate::named(Mutant::ALL)) == Some(mutant)
            }

            /// Puts a fault back on this thread until the guard is dropped.
            #[must_use]
            pub fn put_back(mutant: Mutant) -> $crate::PutBack {
                HERE.set(Some(mutant));
                $crate::PutBack::until_dropped(|| HERE.set(None))
            }
        }

        #[cfg(any(test, feature = "failpoints"))]
        pub use switch::{is_on, put_back};

        /// Whether this fault is put back: never, in a release.
        #[cfg(not(any(test, feature = "failpoints")))]
        #[must_use]
        pub const fn is_on(_: Mutant) -> bool {
            false
        }
    };
}

#[cfg(test)]
#[expect(unreachable_pub, reason = "a list is public in the crate that has one")]
mod tests {
    list! {
        /// The one that is put back.
        One,
        /// The one that is not.
        Another,
    }

    #[test]
    fn a_fault_is_back_on_one_thread_for_a_while() {
        let all_off = || Mutant::ALL.iter().all(|mutant| !is_on(*mutant));
        assert!(all_off());
        let back = put_back(Mutant::One);
        assert!(is_on(Mutant::One) && !is_on(Mutant::Another));
        assert!(std::thread::spawn(all_off).join().unwrap());
        drop(back);
        assert!(all_off());
    }
}
