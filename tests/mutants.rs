//! Each mended fault of the catalog, the cluster and the driver that can be put back is put back by a
//! test, which finds it.

use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// Known to be put back by no test.
const BY_NOBODY: [&str; 1] = ["WhoeverIsFirst"];

/// The names in the list of src/mutant.rs.
fn mutants() -> Vec<String> {
    let text = fs::read_to_string(format!("{ROOT}/src/mutant.rs")).expect("src/mutant.rs");
    let list = text.split("\nmutants! {").nth(1).expect("the list");
    let list = list.split("\n}").next().unwrap_or_default();
    let lines = list.lines().map(str::trim);
    let names = lines.filter(|line| !line.starts_with("//") && line.ends_with(','));
    names
        .map(|name| name.trim_end_matches(',').to_owned())
        .collect()
}

/// All sources but the list itself, without the switches.
fn uses(dir: &Path, found: &mut String) {
    for entry in fs::read_dir(dir).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            uses(&path, found);
        } else if !path.ends_with("src/mutant.rs") && !path.ends_with("tests/mutants.rs") {
            let text = fs::read_to_string(&path).unwrap_or_default();
            found.push_str(&text.replace(char::is_whitespace, ""));
        }
    }
}

#[test]
fn each_mended_fault_is_put_back_by_a_test() {
    let mut switches = String::new();
    for dir in ["src/catalog", "src/cluster", "src/driver"] {
        uses(&Path::new(ROOT).join(dir), &mut switches);
    }
    let mut sources = String::new();
    for dir in ["src", "tests"] {
        uses(&Path::new(ROOT).join(dir), &mut sources);
    }
    let sources = sources.replace("is_on(Mutant::", "");
    let is_found = |name: &str| {
        let named = [format!("Mutant::{name}"), format!("NFSVOL_MUTANT={name}")];
        let named = named.iter().flat_map(|named| {
            sources
                .match_indices(named)
                .map(|(at, named)| at + named.len())
        });
        // Not the beginning of a longer name.
        let mut ends = named.map(|at| sources[at..].chars().next());
        ends.any(|next| next.is_none_or(|next| !next.is_alphanumeric()))
    };
    let mut mutants = mutants();
    mutants.retain(|name| switches.contains(&format!("is_on(Mutant::{name})")));
    assert!(mutants.len() > 10, "{mutants:?}");
    for name in mutants {
        let excused = BY_NOBODY.contains(&name.as_str());
        assert!(excused || is_found(&name), "no test puts {name} back");
    }
}
