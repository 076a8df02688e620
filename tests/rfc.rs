//! What RFC 1813, 5531 and 4506 ask of the client is cited in its code and in its tests
//! (docs/RFC.md), or the table says why not.
//!
//! A requirement counts as obeyed where it is cited in the program, not in a test of it, and as tested
//! where a test cites it.
//!
//! Known limit: that the line below a citation obeys it, a reader has to see.

use std::collections::{BTreeMap, BTreeSet};
use std::fs;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TABLE: &str = include_str!("../docs/RFC.md");
/// What begins a citation, and each line that goes on with it.
const MARK: &str = "//= ";
const TEST: &str = "test ";
/// What begins the tests in a file of the program.
const TESTS: &str = "#[cfg(test)]\nmod tests {";

/// A row of the table.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Requirement {
    words: String,
    /// What the last column says.
    except: String,
}

/// What a source file cites: requirements with their words above code, and names above tests.
#[derive(Debug, Default, PartialEq, Eq)]
struct Cited {
    code: Vec<(String, String)>,
    tests: BTreeSet<String>,
    /// Names that a test cites as code does.
    misplaced: Vec<String>,
}

fn requirements(table: &str) -> BTreeMap<String, Requirement> {
    let rows = table.lines().filter_map(|line| line.strip_prefix("| `"));
    let requirement = |row: &str| {
        let mut columns = row.split(" |");
        let name = columns.next()?.strip_suffix('`')?.to_owned();
        let mut text = || Some(columns.next()?.trim().to_owned());
        let requirement = Requirement {
            words: text()?,
            except: text()?,
        };
        Some((name, requirement))
    };
    let all: Vec<_> = rows
        .map(|row| requirement(row).unwrap_or_else(|| panic!("no row: {row}")))
        .collect();
    let count = all.len();
    let named: BTreeMap<_, _> = all.into_iter().collect();
    assert_eq!(named.len(), count, "a name stands in two rows");
    named
}

impl Cited {
    /// A file of the program, whose end may be tests, or of tests alone.
    fn read_file(&mut self, source: &str, is_program: bool) {
        let code = if is_program { source } else { "" };
        let code = code.split(TESTS).next().unwrap_or_default();
        self.read(code);
        let before = self.code.len();
        self.read(&source[code.len()..]);
        let misplaced = self.code.drain(before..).map(|(name, _)| name);
        self.misplaced.extend(misplaced);
    }

    fn read(&mut self, source: &str) {
        let mut open = false;
        for line in source.lines() {
            let Some(text) = line.trim_start().strip_prefix(MARK) else {
                open = false;
                continue;
            };
            if let Some(name) = text.strip_prefix(TEST) {
                self.tests.insert(name.to_owned());
                open = false;
            } else if let Some((name, words)) = begins(text) {
                self.code.push((name.to_owned(), words.to_owned()));
                open = true;
            } else {
                assert!(open, "this goes on with no citation: {line}");
                if let Some((_, words)) = self.code.last_mut() {
                    words.push(' ');
                    words.push_str(text);
                }
            }
        }
    }
}

/// A citation's first line: a name that begins with the number of an RFC, and words.
fn begins(text: &str) -> Option<(&str, &str)> {
    let (name, words) = text.split_once(": ")?;
    let (rfc, _) = name.split_once('-')?;
    let is_name = rfc.parse::<u32>().is_ok() && !name.contains(' ');
    is_name.then_some((name, words))
}

/// What is wrong between the table and what is cited.
fn faults(requirements: &BTreeMap<String, Requirement>, cited: &Cited) -> Vec<String> {
    let misplaced = cited.misplaced.iter();
    let misplaced =
        misplaced.map(|name| format!("{name} is cited in a test without the word `test`"));
    let mut faults: Vec<String> = misplaced.collect();
    for (name, words) in &cited.code {
        match requirements.get(name) {
            None => faults.push(format!("{name} is cited above code and has no row")),
            Some(row) if row.words != *words => {
                faults.push(format!(
                    "{name} is cited as {words:?}, its row has {:?}",
                    row.words
                ));
            }
            Some(_) => {}
        }
    }
    for name in &cited.tests {
        if !requirements.contains_key(name) {
            faults.push(format!("{name} is cited above a test and has no row"));
        }
    }
    for (name, row) in requirements {
        let in_code = cited.code.iter().any(|(cited, _)| cited == name);
        let in_test = cited.tests.contains(name);
        let is_told = match row.except.split_once(": ") {
            Some(("not obeyed", _)) => !in_code && !in_test,
            Some(("no test", _)) => in_code && !in_test,
            _ => in_code && in_test && row.except.is_empty(),
        };
        if !is_told {
            faults.push(format!(
                "{name}: code cites it: {in_code}, a test: {in_test}, the table says {:?}",
                row.except
            ));
        }
    }
    faults
}

fn sources(directory: &Path, found: &mut Vec<PathBuf>) {
    for entry in fs::read_dir(directory).expect("a directory of the sources") {
        let path = entry.expect("an entry of the sources").path();
        if path.is_dir() {
            sources(&path, found);
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
}

#[test]
fn what_binds_the_client_is_cited_in_code_and_in_tests() {
    let mut files = Vec::new();
    for directory in ["src", "tests", "crates"] {
        sources(&Path::new(ROOT).join(directory), &mut files);
    }
    let mut cited = Cited::default();
    for file in files.iter().filter(|file| !file.ends_with("tests/rfc.rs")) {
        let mut within = file.strip_prefix(ROOT).expect("below the root").iter();
        let is_program = within.any(|part| part == "src") && !file.ends_with("tests.rs");
        cited.read_file(
            &fs::read_to_string(file).expect("a source file"),
            is_program,
        );
    }
    let requirements = requirements(TABLE);
    for (name, row) in &requirements {
        if !row.except.is_empty() {
            println!("{name}, {} ({})", row.except, row.words);
        }
    }
    assert!(requirements.len() > 40, "only {} rows", requirements.len());
    let faults = faults(&requirements, &cited);
    assert!(faults.is_empty(), "{}", faults.join("\n"));
}

#[test]
fn what_is_missing_or_too_much_is_seen() {
    let table = "| `1-2-a` | One. |  |\n| `1-2-b` | “Two: more.” | no test: why |\n\
                 | `1-2-c` | Three. | not obeyed: why |\n";
    let code = "    //= 1-2-a: One.\n    //= 1-2-b: “Two:\n    //= more.”\n    obey();\n";
    let check = |table: &str, source: &str| {
        let mut cited = Cited::default();
        cited.read(source);
        faults(&requirements(table), &cited).join("\n")
    };
    let whole = format!("{code}//= test 1-2-a\n#[test]\n");
    assert_eq!(check(table, &whole), "");
    for (table, source, fault) in [
        (table, code, "1-2-a: code cites it: true, a test: false"),
        (table, "//= test 1-2-a\n", "1-2-a: code cites it: false"),
        (table, "", "1-2-b: code cites it: false"),
        ("", "//= 1-2-a: One.\n", "above code and has no row"),
        ("", "//= test 1-2-a\n", "above a test and has no row"),
        (table, "//= 1-2-a: Won.\n", "1-2-a is cited as \"Won.\""),
        (table, "//= 1-2-c: Three.\n", "1-2-c: code cites it: true"),
    ] {
        let found = check(table, source);
        assert!(found.contains(fault), "{fault}: {found}");
    }
    let tested = format!("{whole}//= test 1-2-b\n");
    assert!(check(table, &tested).contains("1-2-b: code cites it: true, a test: true"));

    // The tests of a file are none of its code.
    let mut cited = Cited::default();
    let file = format!("{code}{TESTS}\n//= test 1-2-a\n//= 1-2-a: One.\n");
    cited.read_file(&file, true);
    assert_eq!(
        (cited.code.len(), cited.misplaced.len()),
        (2, 1),
        "{cited:?}"
    );
    assert!(faults(&requirements(table), &cited)[0].contains("1-2-a is cited in a test"));
}
