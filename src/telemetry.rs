//! The log: on standard error as text or JSON, or in systemd's journal.

mod story;

use std::fmt;
use std::fs::File;
use std::io::{self, IsTerminal, Read, Seek, SeekFrom, Write};
use std::str::FromStr;

use rustix::fd::AsFd;
use rustix::fs::OFlags;

use tracing_subscriber::EnvFilter;
use tracing_subscriber::filter::Directive;
use tracing_subscriber::layer::SubscriberExt;
use tracing_subscriber::util::{SubscriberInitExt, TryInitError};

use self::story::Story;

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
        "{0:?} is not a log filter: write a level (off, error, warn, info, debug, trace), or levels by \
         module such as \"info,nfsvol::docker=debug\""
    )]
    Filter(String),
    #[error(
        "the log has no module {0:?}: write \"nfsvol\", or \"nfsvol::\" and one of {rooms}", rooms = rooms()
    )]
    Module(String),
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
/// [`EnvFilter`]: `info`, `warn,nfsvol::docker=debug`.
///
/// # Errors
/// [`TelemetryError`]; the process has no log then.
pub(crate) fn init(format: Format, filter: &str) -> Result<(), TelemetryError> {
    let filter = parse(filter)?;
    let lines = tracing_subscriber::registry().with(filter).with(Story);
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

/// What the names of this program's modules go on with behind `nfsvol::`.
const ROOMS: [&str; 21] = [
    "api",
    "attendant",
    "cli",
    "cluster",
    "daemon",
    "docker",
    "doctor",
    "driver",
    "fence",
    "fuse",
    "home",
    "host",
    "kernel",
    "layout",
    "local_server",
    "migrate",
    "monitor",
    "mutant",
    "sys",
    "telemetry",
    "volume",
];

/// Crates that write to the log of the program they are part of: `nfsvol::embedded` stands for
/// `embedded`.
const CRATES: [&str; 3] = ["chance", "embedded", "nfs"];

fn rooms() -> String {
    [&ROOMS[..], &CRATES].concat().join(", ")
}

/// Where modules are now that had another name or place: filters that name them still mean the same. Of
/// two rows that fit, the first one holds.
const FORMER: &[(&str, &[&str])] = &[
    ("catalog::layout", &["layout"]),
    ("catalog", &["home"]),
    ("cli::announce", &["daemon::announce"]),
    ("cli::managed", &["daemon::managed"]),
    ("cluster::layout", &["layout"]),
    ("config", &["daemon::settings"]),
    ("driver::attachments", &["host::attachments"]),
    ("driver::cluster", &["driver::membership"]),
    ("driver::locks", &["host::locks"]),
    ("driver::paths", &["host::paths"]),
    ("driver::reconcile", &["host::reconcile"]),
    // What a host has of its volumes was part of it.
    ("driver", &["driver", "host"]),
    ("embedded::process", &["local_server"]),
    ("engine", &["docker::engine"]),
    ("files", &["sys::files"]),
    ("guard::fence", &["fence::end"]),
    ("guard", &["fence"]),
    (
        "mount::holders",
        &["sys::holders", "sys::users", "sys::containers"],
    ),
    ("mount::kernel", &["kernel::path"]),
    ("mount::mountinfo", &["sys::mountinfo"]),
    ("mount::options", &["volume::mount_options"]),
    ("mount", &["kernel"]),
    ("plugin::client", &["api::client"]),
    ("plugin", &["docker"]),
    ("proc", &["sys::proc"]),
    ("serve", &["daemon::serve"]),
    ("watch", &["monitor"]),
];

/// Refuses what would silence the log by a slip of the pen: nothing at all, a misspelt level, which is
/// taken for a module's name, and a module that is none. Other crates log nothing here, and spans are
/// not filtered by their fields. Limit: of a module's name only the part behind `nfsvol::` is looked at.
fn parse(filter: &str) -> Result<EnvFilter, TelemetryError> {
    let known = known(filter)?.join(",");
    EnvFilter::builder()
        .parse(known)
        .map_err(|_| TelemetryError::Filter(filter.to_owned()))
}

/// The parts of a filter, by the names that modules and crates have.
fn known(filter: &str) -> Result<Vec<String>, TelemetryError> {
    let wrong = |_| TelemetryError::Filter(filter.to_owned());
    let parts = filter.split(',').map(str::trim);
    let parts: Vec<&str> = parts.filter(|part| !part.is_empty()).collect();
    if parts.is_empty() || filter.contains('[') {
        return Err(TelemetryError::Filter(filter.to_owned()));
    }
    // What is said of the whole program holds for its crates; what is said of one of them, more.
    let whole = parts.iter().filter_map(|part| part.strip_prefix(NAME));
    let whole = whole.filter(|rest| rest.is_empty() || rest.starts_with('='));
    let whole = whole.flat_map(|rest| CRATES.map(|name| format!("{name}::{rest}")));
    let mut known: Vec<String> = whole.collect();
    for part in parts {
        if part.contains(['=', ':']) || part == NAME {
            known.extend(by_module(part)?);
        } else {
            // As the level that it has to be.
            let _: Directive = format!("{NAME}={part}").parse().map_err(wrong)?;
            known.push(part.to_owned());
        }
    }
    Ok(known)
}

/// A part of a filter that names a module, by the names which that module has now.
fn by_module(part: &str) -> Result<Vec<String>, TelemetryError> {
    let (target, level) = match part.split_once('=') {
        Some((target, level)) => (target, format!("={level}")),
        None => (part, String::new()),
    };
    let unknown = || TelemetryError::Module(target.to_owned());
    if target == NAME {
        return Ok(vec![part.to_owned()]);
    }
    // A crate also by itself, as it stands in the log.
    let is_it = |name: &&str| {
        let rest = target.strip_prefix(*name);
        rest.is_some_and(|rest| rest.is_empty() || rest.starts_with("::"))
    };
    let within = target
        .strip_prefix(NAME)
        .and_then(|path| path.strip_prefix("::"));
    let path = match within {
        Some(path) => path,
        None if CRATES.iter().any(is_it) => target,
        None => return Err(unknown()),
    };
    let behind = |former: &str| {
        let rest = path.strip_prefix(former)?;
        (rest.is_empty() || rest.starts_with("::")).then(|| rest.to_owned())
    };
    let moved = FORMER
        .iter()
        .find_map(|(former, now)| Some((*now, behind(former)?)));
    let paths = match moved {
        Some((now, rest)) => now.iter().map(|now| format!("{now}{rest}")).collect(),
        None => vec![path.to_owned()],
    };
    let full = |path: String| {
        let room = path.split("::").next().unwrap_or_default();
        if CRATES.contains(&room) {
            // Targets are compared by how they begin, and so does this program's name by `nfs`.
            let end = if path == room { "::" } else { "" };
            return Some(format!("{path}{end}{level}"));
        }
        ROOMS
            .contains(&room)
            .then(|| format!("{NAME}::{path}{level}"))
    };
    let known: Option<Vec<String>> = paths.into_iter().map(full).collect();
    known.ok_or_else(unknown)
}

const NAME: &str = env!("CARGO_PKG_NAME");

/// Starts the log of a process that outlives the daemon: text on standard error, which is a file that
/// nobody rotates. Only its newest lines are kept.
///
/// # Errors
/// [`TelemetryError::Twice`].
pub(crate) fn init_bounded() -> Result<(), TelemetryError> {
    let text = tracing_subscriber::fmt::layer().with_ansi(false);
    tracing_subscriber::registry()
        .with(EnvFilter::new("info"))
        .with(text.with_writer(|| Bounded))
        .try_init()?;
    Ok(())
}

/// The most that such a log takes, in bytes.
const MOST: u64 = 1 << 20;

/// Standard error; of a file its newest part.
struct Bounded;

impl Write for Bounded {
    fn write(&mut self, line: &[u8]) -> io::Result<usize> {
        let mut stderr = io::stderr().lock();
        // If it cannot be cut, a long log is better than none.
        let _ = cut(&stderr, MOST, || File::open("/proc/self/fd/2"));
        stderr.write(line)
    }

    fn flush(&mut self) -> io::Result<()> {
        io::stderr().flush()
    }
}

/// Keeps the newer half of a file that is written by appending and has more than `most` bytes.
fn cut(file: impl AsFd, most: u64, read: impl FnOnce() -> io::Result<File>) -> io::Result<()> {
    let stat = rustix::fs::fstat(&file)?;
    let is_file = rustix::fs::FileType::from_raw_mode(stat.st_mode).is_file();
    let appends = || Ok::<_, io::Error>(rustix::fs::fcntl_getfl(&file)?.contains(OFlags::APPEND));
    if !is_file || u64::try_from(stat.st_size).is_ok_and(|size| size <= most) || !appends()? {
        return Ok(());
    }
    let mut old = read()?;
    old.seek(SeekFrom::End(-i64::try_from(most / 2).unwrap_or(0)))?;
    let mut newest = Vec::new();
    old.read_to_end(&mut newest)?;
    let line = newest.iter().position(|&byte| byte == b'\n');
    rustix::fs::ftruncate(&file, 0)?;
    let mut rest = newest
        .get(line.map_or(0, |end| end + 1)..)
        .unwrap_or_default();
    while !rest.is_empty() {
        let written = rustix::io::write(&file, rest)?;
        rest = rest.get(written..).unwrap_or_default();
    }
    Ok(())
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn what_would_silence_the_log_by_mistake_is_refused() {
        for good in [
            "info",
            "WARN",
            "off",
            "3",
            "warn,nfsvol::docker=debug",
            "nfsvol",
            "info,",
            "nfsvol::fuse::worker=trace,nfsvol::fence=off",
        ] {
            assert!(parse(good).is_ok(), "{good}");
        }
        for bad in ["loud", "info,debgu", "nfsvol=loud", "", ",", "[span]=debug"] {
            let error = parse(bad).unwrap_err();
            assert!(matches!(error, TelemetryError::Filter(_)), "{bad}");
        }
        for bad in [
            "nfsvol::plugni=debug",
            "info,nfsvl=debug",
            "hyper=warn",
            "nfsvol:fuse",
        ] {
            let error = parse(bad).unwrap_err();
            assert!(matches!(error, TelemetryError::Module(_)), "{bad}");
        }
    }

    #[test]
    fn former_names_of_modules_mean_what_they_meant() {
        for (filter, now) in [
            ("nfsvol::plugin=debug", "nfsvol::docker=debug"),
            ("nfsvol::mount::lane", "nfsvol::kernel::lane"),
            ("nfsvol::engine=off", "nfsvol::docker::engine=off"),
            (
                "nfsvol::driver=trace",
                "nfsvol::driver=trace,nfsvol::host=trace",
            ),
            ("nfsvol::driver::paths", "nfsvol::host::paths"),
            ("nfsvol::embedded::process", "nfsvol::local_server"),
            ("nfsvol::nfs=off", "nfs::=off"),
            ("nfs=off", "nfs::=off"),
            ("embedded::server", "embedded::server"),
            ("nfsvol::guard::fence", "nfsvol::fence::end"),
            ("nfsvol::fuse::worker=trace", "nfsvol::fuse::worker=trace"),
        ] {
            assert_eq!(by_module(filter).unwrap().join(","), now);
        }
    }

    #[test]
    fn crates_are_part_of_the_program() {
        let filter = "info,nfsvol::embedded::server=trace,nfsvol=warn";
        let expected =
            "chance::=warn,embedded::=warn,nfs::=warn,info,embedded::server=trace,nfsvol=warn";
        assert_eq!(known(filter).unwrap().join(","), expected);
        assert!(parse(filter).is_ok());
    }

    #[test]
    fn what_is_said_of_a_is_itholds_for_it_alone() {
        let told = |filter: &str| {
            let dir = tempfile::tempdir().unwrap();
            let file = File::create_new(dir.path().join("log")).unwrap();
            let log = tracing_subscriber::fmt()
                .with_env_filter(parse(filter).unwrap())
                .with_writer(std::sync::Mutex::new(file))
                .finish();
            tracing::subscriber::with_default(log, || {
                tracing::error!(target: "nfsvol::docker::call", "ours");
                tracing::debug!(target: "nfsvol::docker::call", "quiet");
                tracing::debug!(target: "nfs::rpc::table", "wire");
            });
            let log = std::fs::read_to_string(dir.path().join("log")).unwrap();
            ["ours", "quiet", "wire"].map(|word| log.contains(word))
        };
        assert_eq!(told("info,nfsvol::nfs=off"), [true, false, false]);
        assert_eq!(told("warn,nfsvol::nfs=debug"), [true, false, true]);
        assert_eq!(told("warn,nfsvol=debug"), [true, true, true]);
    }

    #[test]
    fn the_modules_of_the_log_are_those_of_the_program() {
        let lib = include_str!("lib.rs").lines();
        let names = lines_of_modules(lib);
        assert_eq!(names, ROOMS);
    }

    /// Without what a release has not.
    fn lines_of_modules<'a>(lines: impl Iterator<Item = &'a str>) -> Vec<&'a str> {
        let modules = lines.filter_map(|line| {
            let line = line.strip_prefix("pub ").unwrap_or(line);
            line.strip_prefix("mod ")?.strip_suffix(';')
        });
        modules.filter(|name| *name != "failpoint").collect()
    }

    #[test]
    fn of_a_long_log_the_newest_lines_stay() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("log");
        let mut log = File::options()
            .create(true)
            .append(true)
            .open(&path)
            .unwrap();
        for line in 0..1000 {
            cut(&log, 1000, || File::open(&path)).unwrap();
            writeln!(log, "line {line}").unwrap();
            assert!(log.metadata().unwrap().len() <= 1000 + 10);
        }
        let text = std::fs::read_to_string(&path).unwrap();
        let kept: Vec<_> = text.lines().collect();
        let newest: Vec<_> = (1000 - kept.len()..1000)
            .map(|line| format!("line {line}"))
            .collect();
        assert!(kept.len() > 40, "{text}");
        assert_eq!(kept, newest);
    }

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
