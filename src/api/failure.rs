//! An error, with what to do next as a field of its own.

use std::fmt;

use super::ClientError;
use nfs::admin::AdminError;
use nfs::probe::ReachError;

/// What happened, and what to do next where something can be said.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(crate) struct Failure {
    pub message: String,
    pub hint: Option<String>,
}

impl Failure {
    /// Nothing can be said of what to do.
    pub(crate) fn plain(message: impl ToString) -> Self {
        Self::new(message, None::<String>)
    }

    pub(crate) fn new(message: impl ToString, hint: Option<impl ToString>) -> Self {
        Self {
            message: message.to_string(),
            hint: hint.map(|hint| hint.to_string()),
        }
    }
}

impl fmt::Display for Failure {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(&self.message)?;
        match &self.hint {
            Some(hint) => write!(f, "; {hint}"),
            None => Ok(()),
        }
    }
}

impl From<&ClientError> for Failure {
    fn from(error: &ClientError) -> Self {
        Self::new(error.message(), error.hint())
    }
}

impl From<&ReachError> for Failure {
    fn from(error: &ReachError) -> Self {
        Self::new(error.message(), error.hint())
    }
}

impl From<&AdminError> for Failure {
    fn from(error: &AdminError) -> Self {
        Self::new(error.message(), error.hint())
    }
}
