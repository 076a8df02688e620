//! Each mended fault of a crate is put back by a test of that crate. And each one of the home share, the
//! cluster, the driver, the fence and the kernel data path that can be put back is named by a test as one
//! to be put back: `Mutant::Name`, or "Name" or NFSVOL_MUTANT=Name for a process.
//!
//! Known limit: that the test then finds the fault is the test's to say.

use std::fs;
use std::path::Path;

const ROOT: &str = env!("CARGO_MANIFEST_DIR");

/// The names in the list of a package.
fn mutants(package: &Path) -> Vec<String> {
    let text = fs::read_to_string(package.join("src/mutant.rs")).expect("src/mutant.rs");
    let list = text.split("\nmutants::list! {").nth(1).expect("the list");
    let list = list.split("\n}").next().unwrap_or_default();
    let lines = list.lines().map(str::trim);
    let names = lines.filter(|line| !line.starts_with("//") && line.ends_with(','));
    names
        .map(|name| name.trim_end_matches(',').to_owned())
        .collect()
}

/// All sources but the list itself, without comments and spaces.
fn sources(dir: &Path, found: &mut String) {
    for entry in fs::read_dir(dir).expect("a directory of sources") {
        let path = entry.expect("an entry").path();
        if path.is_dir() {
            sources(&path, found);
        } else if !path.ends_with("src/mutant.rs") && !path.ends_with("tests/mutants.rs") {
            let text = fs::read_to_string(&path).unwrap_or_default();
            let code = text
                .lines()
                .filter(|line| !line.trim_start().starts_with("//"));
            found.extend(code.flat_map(|line| line.split_whitespace()));
        }
    }
}

fn sources_of(package: &Path, dirs: &[&str]) -> String {
    let mut found = String::new();
    for dir in dirs {
        sources(&package.join(dir), &mut found);
    }
    found
}

/// Whether a text has this, and not as the beginning of a longer name.
fn names(text: &str, name: &str) -> bool {
    let mut ends = text
        .match_indices(name)
        .map(|(at, _)| text[at + name.len()..].chars().next());
    ends.any(|next| next.is_none_or(|next| !next.is_alphanumeric()))
}

#[test]
fn each_mended_fault_is_put_back_by_a_test() {
    let rooms = ["home", "cluster", "driver", "fence", "kernel", "sys"];
    let root = Path::new(ROOT);
    let switches = sources_of(
        root,
        &rooms
            .map(|room| format!("src/{room}"))
            .each_ref()
            .map(String::as_str),
    );
    // The program itself names a fault in its switch only.
    let tests = sources_of(root, &["src", "tests"]).replace("is_on(Mutant::", "");
    let for_processes = sources_of(root, &["tests"]);
    let mut mutants = mutants(root);
    mutants.retain(|name| switches.contains(&format!("is_on(Mutant::{name})")));
    assert!(mutants.len() > 10, "{mutants:?}");
    for name in mutants {
        let is_found = names(&tests, &format!("Mutant::{name}"))
            || for_processes.contains(&format!("\"{name}\""))
            || names(&for_processes, &format!("NFSVOL_MUTANT={name}"));
        assert!(is_found, "{name} is put back by no test");
    }
}

#[test]
fn each_mended_fault_of_a_crate_is_put_back_by_a_test_of_it() {
    let crates = fs::read_dir(Path::new(ROOT).join("crates")).expect("crates");
    let crates = crates.map(|entry| entry.expect("a crate").path());
    let mut seen = 0;
    for package in crates.filter(|package| package.join("src/mutant.rs").exists()) {
        let text = sources_of(&package, &["src"]);
        let tests = text.replace("is_on(Mutant::", "");
        for name in mutants(&package) {
            let has_switch = names(&text, &format!("is_on(Mutant::{name}"));
            let is_found = names(&tests, &format!("Mutant::{name}"));
            assert!(has_switch, "{name} has no switch");
            assert!(is_found, "{name} is put back by no test");
            seen += 1;
        }
    }
    assert!(seen > 4, "{seen}");
}
