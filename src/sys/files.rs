//! Replacing small files of the state directory whole.

use std::fs;
use std::io::{self, Write};
use std::path::{Path, PathBuf};

/// Replaces a file: its new contents are on disk under its name when this returns.
///
/// # Errors
/// Any error of the file system; the old file then still stands and no temporary one is left.
pub(crate) fn write_durably(path: &Path, contents: &[u8]) -> io::Result<()> {
    replace(path, contents, true)
}

/// Replaces a file: a crash of this process leaves the old or the new contents, a crash of the
/// host may leave neither.
///
/// # Errors
/// Any error of the file system; the old file then still stands and no temporary one is left.
pub(crate) fn write_whole(path: &Path, contents: &[u8]) -> io::Result<()> {
    replace(path, contents, false)
}

fn replace(path: &Path, contents: &[u8], durable: bool) -> io::Result<()> {
    let mut temporary = path.as_os_str().to_owned();
    temporary.push(".tmp");
    let temporary = PathBuf::from(temporary);
    let written = write(path, &temporary, contents, durable);
    if written.is_err() {
        // Best effort: the next write truncates it anyway.
        let _ = fs::remove_file(&temporary);
    }
    // Which disk it is that is full or broken is what users need to know.
    written.map_err(|e| io::Error::new(e.kind(), format!("{}: {e}", path.display())))
}

fn write(path: &Path, temporary: &Path, contents: &[u8], durable: bool) -> io::Result<()> {
    let mut file = fs::File::create(temporary)?;
    file.write_all(contents)?;
    if durable {
        file.sync_data()?;
        fail::fail_point!("state.durable", |_| crate::failpoint::die());
    } else {
        fail::fail_point!("state.whole", |_| crate::failpoint::die());
    }
    fs::rename(temporary, path)?;
    match path.parent() {
        Some(dir) if durable => fs::File::open(dir)?.sync_all(),
        _ => Ok(()),
    }
}
