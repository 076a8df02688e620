//! The rooms of `src` import each other, and the crates of the workspace, as the tables in src/lib.rs
//! say, and downwards only; and docs/ARCHITECTURE.md lists the same. A crate imports what its
//! Cargo.toml says, which is what its row says.
//!
//! Known limit: what a room's or a crate's tests import is not looked at.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const SRC: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/src");
const CRATES: &str = concat!(env!("CARGO_MANIFEST_DIR"), "/crates");
const ARCHITECTURE: &str = include_str!("../docs/ARCHITECTURE.md");
/// Files and directories that hold tests only.
const TESTS: [&str; 6] = [
    "tests",
    "simulation",
    "simulated",
    "scenarios",
    "search",
    "tests.rs",
];
/// The house itself, and its front door.
const NO_ROOM: [&str; 2] = ["lib", "main"];

/// A row of the table.
#[derive(Debug, PartialEq, Eq)]
struct Row {
    room: String,
    job: String,
    imports: BTreeSet<String>,
}

/// Words between back quotes.
fn quoted(text: &str) -> impl Iterator<Item = String> {
    text.split('`').skip(1).step_by(2).map(str::to_owned)
}

/// The rows of the table of rooms, or of crates, from above to below.
fn table(of: &str) -> Vec<Row> {
    let lib = fs::read_to_string(format!("{SRC}/lib.rs")).expect("src/lib.rs");
    let begins = |line: &&str| line.starts_with(&format!("//! | {of} |"));
    let lines = lib.lines().skip_while(|line| !begins(line));
    let rows = lines.map_while(|line| {
        line.strip_prefix("//! | ")
            .or_else(|| line.strip_prefix("//! |-"))
    });
    rows.filter_map(|row| {
        let mut columns = row.split('|');
        Some(Row {
            room: quoted(columns.next()?).next()?,
            job: columns.next()?.trim().to_owned(),
            imports: quoted(columns.next()?).collect(),
        })
    })
    .collect()
}

/// The same rows as the document has them: "- `room`: job. Imports `one` `other`."
fn list(of: &str) -> Vec<Row> {
    let mut parts = ARCHITECTURE.split("\n## ");
    let part = parts.find_map(|part| part.strip_prefix(&format!("The {of}s\n")));
    let entries = part.expect("a part about them").split("\n- ").skip(1);
    let row = |entry: &str| {
        let entry = entry.split("\n\n").next()?;
        let entry = entry.split_whitespace().collect::<Vec<_>>().join(" ");
        let (room, rest) = entry.split_once(": ")?;
        let (job, imports) = rest.rsplit_once(". Imports ")?;
        Some(Row {
            room: quoted(room).next()?,
            job: job.to_owned(),
            imports: quoted(imports).collect(),
        })
    };
    entries
        .map(|entry| row(entry).unwrap_or_else(|| panic!("not an entry of the list: {entry}")))
        .collect()
}

/// Every source file below `dir` that is not one of tests.
fn sources(dir: &Path) -> Vec<PathBuf> {
    let entries = fs::read_dir(dir).expect("a directory of src");
    let mut found = Vec::new();
    for path in entries.map(|entry| entry.expect("an entry of src").path()) {
        let name = path.file_stem().unwrap_or_default().to_string_lossy();
        if TESTS.contains(&&*name) {
            continue;
        }
        if path.is_dir() {
            found.extend(sources(&path));
        } else {
            found.push(path);
        }
    }
    found
}

/// The code of a file, without comments and without its tests.
fn code(path: &Path) -> String {
    let text = fs::read_to_string(path).expect("a source file");
    let code = text
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or_default();
    let lines = code
        .lines()
        .map(|line| line.split("//").next().unwrap_or_default());
    lines.collect::<Vec<_>>().join("\n")
}

/// What stands behind each `crate::`, also in a group.
fn imports(code: &str) -> BTreeSet<String> {
    let word = |text: &str| -> String {
        let letters = text.trim_start().chars();
        letters
            .take_while(|c| c.is_alphanumeric() || *c == '_')
            .collect()
    };
    let mut found = BTreeSet::new();
    for rest in code.split("crate::").skip(1) {
        match rest
            .strip_prefix('{')
            .and_then(|group| group.split_once("};"))
        {
            // One level of grouping is all that rustfmt's style here has.
            Some((group, _)) => found.extend(group.split(',').map(word)),
            None => {
                found.insert(word(rest));
            }
        }
    }
    found.remove("");
    found
}

/// Whether a crate's name begins a path.
fn uses(code: &str, name: &str) -> bool {
    let path = format!("{name}::");
    let mut before = code.match_indices(&path).map(|(at, _)| &code[..at]);
    before.any(|before| {
        let before = before.strip_suffix("::").unwrap_or(before);
        !before.ends_with(|c: char| {
            c.is_alphanumeric() || c == '_' || c == ':' || c == '>' || c == '"'
        })
    })
}

fn rooms_of(table: &[Row]) -> Vec<&str> {
    table.iter().map(|row| row.room.as_str()).collect()
}

fn all_stand_below(row: &Row, place: usize, rooms: &[&str]) {
    for other in &row.imports {
        let below = rooms.iter().position(|room| room == other);
        assert!(
            below.is_some_and(|below| below > place),
            "{} imports {other}, which does not stand below it",
            row.room
        );
    }
}

/// The crates of the workspace that a crate depends on, also without its tests.
fn dependencies(name: &str) -> BTreeSet<String> {
    let manifest = fs::read_to_string(format!("{CRATES}/{name}/Cargo.toml")).expect("Cargo.toml");
    let mut parts = manifest.split("\n[");
    let part = parts.find_map(|part| part.strip_prefix("dependencies]\n"));
    let lines = part.unwrap_or_default().lines();
    let names = lines.filter_map(|line| line.strip_prefix("nfsvol-")?.split_once(" ="));
    names.map(|(name, _)| name.to_owned()).collect()
}

#[test]
fn rooms_import_what_their_rows_say_and_nothing_above_them() {
    let (table, crates) = (table("room"), table("crate"));
    let crates = rooms_of(&crates);
    let mut used: BTreeMap<String, BTreeSet<String>> = BTreeMap::new();
    for path in sources(Path::new(SRC)) {
        let inside = path.strip_prefix(SRC).expect("below src");
        let first = inside.iter().next().unwrap_or_default();
        let room = Path::new(first).file_stem().unwrap_or_default();
        let room = room.to_string_lossy().into_owned();
        let code = code(&path);
        let mut found = imports(&code);
        let foreign = crates.iter().filter(|name| uses(&code, name));
        found.extend(foreign.map(|&name| name.to_owned()));
        used.entry(room).or_default().extend(found);
    }
    for room in NO_ROOM {
        used.remove(room);
    }
    let mut rooms = rooms_of(&table);
    let standing: BTreeSet<&str> = used.keys().map(String::as_str).collect();
    assert_eq!(
        standing,
        rooms.iter().copied().collect(),
        "the rooms of src, and the rows of the table"
    );
    rooms.extend(crates);

    for (place, row) in table.iter().enumerate() {
        let mut found = used.remove(&row.room).unwrap_or_default();
        found.remove(&row.room);
        assert_eq!(found, row.imports, "what {} imports, and its row", row.room);
        all_stand_below(row, place, &rooms);
    }
}

#[test]
fn crates_import_what_their_rows_say_and_nothing_above_them() {
    let table = table("crate");
    let crates = rooms_of(&table);
    let entries = fs::read_dir(CRATES).expect("crates");
    let names = entries.map(|entry| entry.expect("an entry of crates").file_name());
    let standing: BTreeSet<String> = names.map(|name| name.to_string_lossy().into()).collect();
    assert_eq!(
        standing,
        crates.iter().map(|&name| name.to_owned()).collect(),
        "the crates, and the rows of their table"
    );
    for (place, row) in table.iter().enumerate() {
        assert_eq!(dependencies(&row.room), row.imports, "of {}", row.room);
        all_stand_below(row, place, &crates);
    }
}

#[test]
fn the_document_lists_what_the_tables_have() {
    for of in ["room", "crate"] {
        let table = table(of);
        assert!(!table.is_empty(), "no table of {of}s");
        assert_eq!(list(of), table);
    }
}
