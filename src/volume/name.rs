//! Volume names.
//!
//! dockerd does not check the names that it passes to a plugin (moby: `ValidateVolumeName` is a
//! no-op for plugins), so this is the only check. The rule is the one Docker has for its own
//! `local` driver; a valid name is one plain directory entry on any server.

use std::fmt;
use std::str::FromStr;

use serde::{Deserialize, Serialize};

/// The longest name, in bytes: a trash entry adds a time and a random part and must stay within
/// the 255 bytes of a directory entry.
pub(crate) const MAX_NAME: usize = 200;

/// A volume name: `[a-zA-Z0-9][a-zA-Z0-9_.-]*`, 1 to 200 bytes.
#[derive(Debug, Clone, PartialEq, Eq, Hash, PartialOrd, Ord, Serialize, Deserialize)]
#[serde(try_from = "String", into = "String")]
pub struct VolumeName(String);

/// Why a name was refused.
#[derive(Debug, Clone, PartialEq, Eq, thiserror::Error)]
pub enum NameError {
    #[error("the volume name is empty")]
    Empty,
    #[error("volume name {0:?} is longer than 200 bytes")]
    Long(String),
    #[error("volume name {0:?}: only [a-zA-Z0-9][a-zA-Z0-9_.-]* are allowed")]
    Characters(String),
}

impl VolumeName {
    #[must_use]
    pub fn as_str(&self) -> &str {
        &self.0
    }

    /// Whether Docker made this name up for an anonymous volume (64 hexadecimal digits).
    #[must_use]
    pub fn is_anonymous(&self) -> bool {
        self.0.len() == 64
            && self
                .0
                .bytes()
                .all(|b| matches!(b, b'0'..=b'9' | b'a'..=b'f'))
    }
}

impl FromStr for VolumeName {
    type Err = NameError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        let first = text.bytes().next().ok_or(NameError::Empty)?;
        if text.len() > MAX_NAME {
            return Err(NameError::Long(text.to_owned()));
        }
        let rest = |b: u8| b.is_ascii_alphanumeric() || matches!(b, b'_' | b'.' | b'-');
        if first.is_ascii_alphanumeric() && text.bytes().all(rest) {
            Ok(Self(text.to_owned()))
        } else {
            Err(NameError::Characters(text.to_owned()))
        }
    }
}

impl fmt::Display for VolumeName {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.0)
    }
}

impl TryFrom<String> for VolumeName {
    type Error = NameError;

    fn try_from(text: String) -> Result<Self, Self::Error> {
        text.parse()
    }
}

impl From<VolumeName> for String {
    fn from(name: VolumeName) -> Self {
        name.0
    }
}

#[cfg(test)]
mod tests {
    use proptest::prelude::*;

    use super::*;

    #[test]
    fn names_that_could_leave_a_directory_are_refused() {
        for bad in [
            "", ".", "..", ".hidden", "a/b", "../a", "a\0", "ä", "a b", "-a", "#",
        ] {
            assert!(bad.parse::<VolumeName>().is_err(), "{bad:?}");
        }
        assert!("x".repeat(201).parse::<VolumeName>().is_err());
        assert!("x".repeat(200).parse::<VolumeName>().is_ok());
    }

    #[test]
    fn docker_names_of_anonymous_volumes_are_known() {
        assert!(
            "0a".repeat(32)
                .parse::<VolumeName>()
                .unwrap()
                .is_anonymous()
        );
        assert!(!"db".parse::<VolumeName>().unwrap().is_anonymous());
    }

    proptest! {
        #[test]
        fn a_valid_name_is_one_plain_entry(text in "\\PC{0,220}") {
            if let Ok(name) = text.parse::<VolumeName>() {
                prop_assert!(!name.as_str().contains('/') && !name.as_str().starts_with('.'));
            }
        }
    }
}
