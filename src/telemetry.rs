//! The log: on standard error as text or JSON, or in systemd's journal.

use std::fmt;
use std::io::{self, IsTerminal};
use std::str::FromStr;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

/// What a line of the log looks like, and where it goes.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Default)]
pub enum Format {
    /// For people, on standard error.
    #[default]
    Text,
    /// One JSON object per line, on standard error.
    Json,
    /// Fields and all to systemd's journal.
    Journald,
}

/// Why there is no log.
#[derive(Debug, thiserror::Error)]
pub enum TelemetryError {
    #[error("the log format is text, json or journald, not {0:?}")]
    Format(String),
    #[error(
        "{filter:?} is not a log filter: write a level (error, warn, info, debug, trace), or \
         levels by module such as \"info,nfsvol::plugin=debug\""
    )]
    Filter {
        filter: String,
        source: tracing_subscriber::filter::ParseError,
    },
    #[error("systemd's journal cannot be reached: use the log format text or json")]
    Journald(#[source] io::Error),
    #[error("the log has been set up before")]
    Twice(#[from] TryInitError),
}

impl FromStr for Format {
    type Err = TelemetryError;

    fn from_str(text: &str) -> Result<Self, Self::Err> {
        match text {
            "text" => Ok(Self::Text),
            "json" => Ok(Self::Json),
            "journald" => Ok(Self::Journald),
            other => Err(TelemetryError::Format(other.to_owned())),
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Text => "text",
            Self::Json => "json",
            Self::Journald => "journald",
        })
    }
}

/// Starts the log of this process. `filter` is a level, or levels by module, as in
/// [`EnvFilter`]: `info`, `warn,nfsvol::plugin=debug`.
///
/// # Errors
/// [`TelemetryError`]; the process has no log then.
pub fn init(format: Format, filter: &str) -> Result<(), TelemetryError> {
    let filter = EnvFilter::builder()
        .parse(filter)
        .map_err(|source| TelemetryError::Filter {
            filter: filter.to_owned(),
            source,
        })?;
    let lines = tracing_subscriber::registry().with(filter);
    let text = tracing_subscriber::fmt::layer().with_writer(io::stderr);
    match format {
        Format::Text => lines
            .with(text.with_ansi(io::stderr().is_terminal()))
            .try_init(),
        Format::Json => lines.with(text.json().flatten_event(true)).try_init(),
        Format::Journald => {
            let journal = tracing_journald::layer().map_err(TelemetryError::Journald)?;
            lines.with(journal).try_init()
        }
    }?;
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_format_is_read_as_it_is_written() {
        for format in [Format::Text, Format::Json, Format::Journald] {
            assert_eq!(format.to_string().parse::<Format>().unwrap(), format);
        }
        assert!("xml".parse::<Format>().is_err());
    }

    #[test]
    fn a_bad_filter_is_refused_with_what_would_be_right() {
        let error = init(Format::Text, "nfsvol=loud").unwrap_err();
        assert!(error.to_string().contains("\"nfsvol=loud\""), "{error}");
        assert!(error.to_string().contains("debug"), "{error}");
    }
}
