//! docs/TROUBLESHOOTING.md has every error text that the program can print.

use std::path::{Path, PathBuf};

const TROUBLESHOOTING: &str = include_str!("../docs/TROUBLESHOOTING.md");
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
    sources(
        &Path::new(env!("CARGO_MANIFEST_DIR")).join("src"),
        &mut files,
    )
    .unwrap();
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

#[test]
fn examples_use_options_that_exist() {
    let examples = Path::new(env!("CARGO_MANIFEST_DIR")).join("docs/examples");
    let mut seen = 0;
    for entry in std::fs::read_dir(examples).unwrap() {
        let path = entry.unwrap().path();
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
            let parsed = nfsvol::volume::VolumeOptions::parse(&options);
            assert!(parsed.is_ok(), "{}: {parsed:?}", path.display());
        }
    }
    assert!(seen > 2);
}
