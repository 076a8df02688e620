//! What people see of the daemon's answers.

use std::fmt::Write;

use comfy_table::Table;
use serde::Serialize;
use serde_json::Value;

use crate::api::volumes::VolumeLine;
use crate::api::{Purged, Restored, TrashEntry};

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// What scripts read; its fields are sorted.
pub(super) fn json(answer: &impl Serialize) -> anyhow::Result<String> {
    Ok(format!("{:#}\n", serde_json::to_value(answer)?))
}

/// A table with a line for each row.
pub(super) fn table<const N: usize>(
    titles: [&str; N],
    rows: impl IntoIterator<Item = [String; N]>,
) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(titles);
    for row in rows {
        table.add_row(row);
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// What is not known is a dash.
pub(super) fn or_dash(value: Option<impl ToString>) -> String {
    value.map_or_else(|| "-".to_owned(), |value| value.to_string())
}

/// The volumes, and below them what is wrong with their records.
pub(super) fn volumes(lines: &[VolumeLine]) -> String {
    let titles = ["NAME", "SHARE", "DIRECTORY", "ACCESS", "HELD BY", "CREATED"];
    let row = |line: &VolumeLine| {
        let known = line.known();
        let facts = known.map(|known| &known.facts);
        [
            line.name().to_string(),
            or_dash(facts.and_then(|facts| facts.share.as_ref())),
            or_dash(facts.map(|facts| &facts.data_dir)),
            or_dash(facts.map(|facts| facts.access)),
            or_dash(known.map(|known| &known.held_by)),
            or_dash(known.map(|known| &known.created)),
        ]
    };
    let mut all = table(titles, lines.iter().map(row));
    for line in lines {
        if let Some(warning) = line.warning() {
            let _ = writeln!(all, "{}: {warning}", line.name());
        }
    }
    all
}

pub(super) fn trash(entries: &[TrashEntry]) -> String {
    let row = |entry: &TrashEntry| {
        [
            entry.name.to_string(),
            entry.removed.clone(),
            entry.entry.clone(),
        ]
    };
    table(["NAME", "REMOVED", "ENTRY"], entries.iter().map(row))
}

pub(super) fn purged(Purged { purged }: &Purged) -> String {
    if purged.is_empty() {
        return "the trash is empty\n".to_owned();
    }
    purged.iter().fold(String::new(), |mut all, entry| {
        let _ = writeln!(all, "purged {entry}");
        all
    })
}

pub(super) fn restored(Restored { name, removed, .. }: &Restored) -> String {
    format!("restored volume {name} (removed {removed})\n")
}

/// Any object as indented `key: value` lines.
pub(super) fn tree(answer: &impl Serialize) -> String {
    let mut all = String::new();
    // What came as JSON has a form in it.
    let answer = serde_json::to_value(answer).unwrap_or_default();
    branch(&mut all, &answer, 0);
    all
}

fn branch(all: &mut String, value: &Value, depth: usize) {
    let indent = "  ".repeat(depth);
    match value {
        Value::Object(map) => {
            for (key, value) in map {
                if is_leaf(value) {
                    let _ = writeln!(all, "{indent}{key}: {}", text(value));
                } else {
                    let _ = writeln!(all, "{indent}{key}:");
                    branch(all, value, depth + 1);
                }
            }
        }
        Value::Array(values) => {
            for value in values {
                if is_leaf(value) {
                    let _ = writeln!(all, "{indent}- {}", text(value));
                } else {
                    let _ = writeln!(all, "{indent}-");
                    branch(all, value, depth + 1);
                }
            }
        }
        leaf => {
            let _ = writeln!(all, "{indent}{}", text(leaf));
        }
    }
}

fn is_leaf(value: &Value) -> bool {
    match value {
        Value::Object(map) => map.is_empty(),
        Value::Array(values) => values.is_empty(),
        _ => true,
    }
}

#[cfg(test)]
mod tests {
    use serde_json::json;

    use super::*;

    fn lines(answer: Value) -> Vec<VolumeLine> {
        let mut answer = answer;
        for line in answer.as_array_mut().unwrap() {
            let facts = json!({
                "share": "nas:/e", "data_dir": "dir", "access": "shared", "on_remove": "trash",
                "created_by": "one", "mount_options": "hard", "created": "", "held_by": "two (x)",
                "attachments": 2, "mountpoint": null,
            });
            if line["warning"].is_null() {
                line.as_object_mut()
                    .unwrap()
                    .extend(facts.as_object().unwrap().clone());
            }
        }
        serde_json::from_value(answer).unwrap()
    }

    #[test]
    fn a_list_has_a_line_for_each_volume() {
        let text = volumes(&lines(json!([{ "name": "db", "warning": null }])));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        for part in ["db", "nas:/e", "dir", "shared", "two (x)"] {
            assert!(lines[1].contains(part), "{text}");
        }
    }

    #[test]
    fn a_record_that_cannot_be_read_is_told_of_below_the_list() {
        let text = volumes(&lines(json!([
            { "name": "db", "warning": null },
            { "name": "web", "warning": "torn; nfsvol repair web" },
        ])));
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].trim().starts_with("web"), "{text}");
        assert_eq!(lines[3], "web: torn; nfsvol repair web");
    }

    #[test]
    fn a_purge_says_what_it_deleted_or_that_there_was_nothing() {
        let said = |entries: &[&str]| {
            let entries = entries.iter().map(|entry| (*entry).to_owned());
            purged(&Purged {
                purged: entries.collect(),
            })
        };
        assert_eq!(said(&["db.1", "db.2"]), "purged db.1\npurged db.2\n");
        assert_eq!(said(&[]), "the trash is empty\n");
    }

    #[test]
    fn a_tree_shows_every_leaf() {
        let text = tree(&json!({ "a": { "b": [1, { "c": null }] }, "d": [] }));
        assert_eq!(text, "a:\n  b:\n    - 1\n    -\n      c: -\nd: []\n");
    }
}
