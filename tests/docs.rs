//! docs/TROUBLESHOOTING.md has every error text that the program can print, docs/ARCHITECTURE.md
//! names files, functions and types that are there, and docs/examples use options that exist.

use std::collections::BTreeSet;
use std::path::{Path, PathBuf};

const ROOT: &str = env!("CARGO_MANIFEST_DIR");
const TROUBLESHOOTING: &str = include_str!("../docs/TROUBLESHOOTING.md");
const ARCHITECTURE: &str = include_str!("../docs/ARCHITECTURE.md");
/// Other documents for those who change the code.
const FOR_DEVELOPERS: [&str; 2] = [
    include_str!("../CONTRIBUTING.md"),
    include_str!("../docs/DESIGN.md"),
];
/// What the paths that documents name begin with.
const DIRECTORIES: [&str; 6] = [
    "src/",
    "crates/",
    "tests/",
    "docs/",
    "benches/",
    "packaging/",
];
/// What an error's text follows in the source; the others in an error's Display only.
const MARKS: [&str; 4] = ["#[error(", "bail!(", "anyhow!(", "context("];
/// What may stand between `context(` and the text.
const BETWEEN: [&str; 4] = ["||", "{", "format!(", "f,"];
const DISPLAY: [&str; 2] = ["f.write_str(", "write!("];
/// A text with fewer fixed letters says nothing by itself: it frames another one.
const LETTERS: usize = 6;

fn sources(directory: &Path, found: &mut Vec<PathBuf>) -> std::io::Result<()> {
    for entry in std::fs::read_dir(directory)? {
        let path = entry?.path();
        if path.is_dir() {
            sources(&path, found)?;
        } else if path.extension().is_some_and(|extension| extension == "rs") {
            found.push(path);
        }
    }
    Ok(())
}

/// The sources of the program and of the crates that it is made of; the lab is none of them.
fn sources_of_the_program(found: &mut Vec<PathBuf>) {
    let root = Path::new(ROOT);
    let crates = std::fs::read_dir(root.join("crates")).expect("crates");
    let crates = crates.map(|entry| entry.expect("a crate").path());
    let crates = crates.filter(|package| !package.ends_with("lab"));
    for package in crates.chain([root.to_owned()]) {
        sources(&package.join("src"), found).expect("sources");
    }
}

/// The string literal that `source` begins with.
fn literal(source: &str) -> Option<String> {
    let mut chars = source.trim_start().strip_prefix('"')?.chars().peekable();
    let mut text = String::new();
    loop {
        match chars.next()? {
            '"' => return Some(text),
            '\\' => match chars.next()? {
                '\n' => while chars.next_if(|c| c.is_whitespace()).is_some() {},
                'n' => text.push(' '),
                escaped => text.push(escaped),
            },
            other => text.push(other),
        }
    }
}

/// The text with `…` for what is put in, up to what to do next.
fn shown(literal: &str) -> String {
    let mut text = String::new();
    let mut depth = 0;
    for char in literal.chars() {
        match char {
            '{' => {
                depth += 1;
                text.push('…');
            }
            '}' => depth -= 1,
            other if depth == 0 => text.push(other),
            _ => {}
        }
    }
    let end = ["; ", ". ", "? "]
        .iter()
        .filter_map(|stop| text.find(stop))
        .min();
    text.truncate(end.unwrap_or(text.len()));
    text.replace("……", "…")
        .trim_matches([' ', ';', '(', ')', ','])
        .to_owned()
}

/// With one space where the text is broken into lines.
fn plain(text: &str) -> String {
    text.split_whitespace().collect::<Vec<_>>().join(" ")
}

/// The error texts in a source file, as they are shown.
fn texts(source: &str, has_display: bool) -> Vec<String> {
    let source = source
        .split("#[cfg(test)]\nmod tests {")
        .next()
        .unwrap_or(source);
    let display: &[&str] = if has_display { &DISPLAY } else { &[] };
    let mut found = Vec::new();
    for mark in MARKS.iter().chain(display) {
        for (at, _) in source.match_indices(mark) {
            let mut rest = source[at + mark.len()..].trim_start();
            for between in BETWEEN {
                rest = rest.strip_prefix(between).unwrap_or(rest).trim_start();
            }
            let Some(text) = literal(rest) else { continue };
            let text = plain(&shown(&text));
            if text.chars().filter(|c| c.is_alphabetic()).count() >= LETTERS {
                found.push(text);
            }
        }
    }
    found
}

fn is_in(known: &str, text: &str) -> bool {
    known.contains(text.trim_end_matches(['…', ':', '?', ' ']))
}

#[test]
fn every_form_of_an_error_text_is_seen() {
    let source = r#"
        #[error("first text {0}; do this")] Variant(u8),
        #[error(
            "second \
             text"
        )]
        bail!("third text");
        bail!(
            "fourth text: {}", x
        );
        .context("fifth text")?;
        .with_context(|| format!("sixth text {}", y))?;
        .with_context(|| {
            format!("seventh text {y}")
        })?;
        .ok_or_else(|| anyhow!("eighth text"))?;
        write!(f, "ninth text");
        f.write_str("tenth text");
    "#;
    let found = texts(source, true).join("\n");
    for number in [
        "first", "second", "third", "fourth", "fifth", "sixth", "seventh", "eighth", "ninth",
        "tenth",
    ] {
        assert!(
            found.contains(&format!("{number} text")),
            "{number}: {found}"
        );
        assert!(!is_in(&plain(TROUBLESHOOTING), &format!("{number} text")));
    }
}

#[test]
fn every_error_text_is_in_troubleshooting() {
    let mut files = Vec::new();
    sources_of_the_program(&mut files);
    let known = plain(TROUBLESHOOTING);
    let (mut missing, mut seen) = (Vec::new(), 0);
    for file in files {
        let name = file.to_string_lossy();
        if name.ends_with("tests.rs") || name.ends_with("cli/demo.rs") {
            continue;
        }
        let source = std::fs::read_to_string(&file).unwrap();
        let has_display = name.ends_with("error.rs") && source.contains("fmt::Display for");
        for text in texts(&source, has_display) {
            seen += 1;
            if !is_in(&known, &text) {
                missing.push(format!("{name}: {text}"));
            }
        }
    }
    assert!(seen > 150, "only {seen} texts were found in the source");
    assert!(
        missing.is_empty(),
        "not in docs/TROUBLESHOOTING.md:\n{}",
        missing.join("\n")
    );
}

/// Words between back quotes, outside of blocks of code.
fn quoted(text: &str) -> impl Iterator<Item = &str> {
    let prose = text.split("```").step_by(2);
    prose.flat_map(|prose| prose.split('`').skip(1).step_by(2))
}

/// A path in the repository, without placeholders.
fn is_path(word: &str) -> bool {
    DIRECTORIES.iter().any(|first| word.starts_with(first)) && !word.contains(['<', '*', ' '])
}

/// A type or a constant, as opposed to a word of a protocol or of a shell.
fn is_name(word: &str) -> bool {
    word.starts_with(|c: char| c.is_uppercase())
        && word.chars().all(|c| c.is_alphanumeric() || c == '_')
}

#[test]
fn the_map_names_what_is_there() {
    let mut files = Vec::new();
    sources_of_the_program(&mut files);
    let texts: Vec<String> = files
        .iter()
        .map(|file| std::fs::read_to_string(file).unwrap())
        .collect();
    let names: BTreeSet<&str> = texts
        .iter()
        .flat_map(|text| text.split(|c: char| !c.is_alphanumeric() && c != '_'))
        .collect();

    let (mut missing, mut functions) = (Vec::new(), 0);
    // A function is in the file that was named last.
    let (mut file, mut text) = ("", String::new());
    for word in quoted(ARCHITECTURE) {
        let is_there = if is_path(word) && word.ends_with(".rs") {
            let read = std::fs::read_to_string(Path::new(ROOT).join(word));
            let is_there = read.is_ok();
            (file, text) = (word, read.unwrap_or_default());
            is_there
        } else if is_path(word) {
            Path::new(ROOT).join(word).exists()
        } else if let Some(function) = word.strip_suffix("()").filter(|name| !name.is_empty()) {
            functions += 1;
            ["(", "<"]
                .iter()
                .any(|next| text.contains(&format!("fn {function}{next}")))
        } else {
            !is_name(word) || names.contains(word)
        };
        if !is_there {
            missing.push(format!("{word}, after {file}"));
        }
    }
    assert!(functions > 100, "only {functions} functions were found");
    for word in FOR_DEVELOPERS.iter().flat_map(|text| quoted(text)) {
        if is_path(word) && !Path::new(ROOT).join(word).exists() {
            missing.push(word.to_owned());
        }
    }
    assert!(
        missing.is_empty(),
        "named and not there:\n{}",
        missing.join("\n")
    );
}

#[test]
fn examples_use_options_that_exist() {
    let examples = Path::new(ROOT).join("docs/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.expect("an example").path();
        let text = std::fs::read_to_string(&path).unwrap();
        let mut within = false;
        let mut options = std::collections::BTreeMap::new();
        for line in text.lines() {
            let line = line.split(" #").next().unwrap_or(line).trim();
            if within
                && !line.starts_with('#')
                && let Some((key, value)) = line.split_once(": ")
            {
                options.insert(key.to_owned(), value.trim_matches('"').to_owned());
            }
            within |= line == "driver_opts:";
        }
        if within {
            seen += 1;
            let parsed = nfsvol::doors::volume::VolumeOptions::parse(&options);
            assert!(parsed.is_ok(), "{}: {parsed:?}", path.display());
        }
    }
    assert!(seen > 2);
}
