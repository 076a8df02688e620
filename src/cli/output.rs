//! What people see of the daemon's answers.

use std::fmt::Write;

use comfy_table::Table;
use serde_json::Value;

fn text(value: &Value) -> String {
    match value {
        Value::Null => "-".to_owned(),
        Value::String(text) => text.clone(),
        other => other.to_string(),
    }
}

/// A table with a column for each (title, field).
pub(super) fn table(rows: &Value, columns: &[(&str, &str)]) -> String {
    let mut table = Table::new();
    table.load_style(comfy_table::presets::NOTHING);
    table.set_header(columns.iter().map(|(title, _)| *title));
    for row in rows.as_array().into_iter().flatten() {
        table.add_row(columns.iter().map(|(_, field)| text(&row[*field])));
    }
    let mut text = table.trim_fmt();
    text.push('\n');
    text
}

/// The volumes, and below them what is wrong with their records.
pub(super) fn volumes(answer: &Value) -> String {
    let mut all = table(
        answer,
        &[
            ("NAME", "name"),
            ("SHARE", "share"),
            ("DIRECTORY", "data_dir"),
            ("ACCESS", "access"),
            ("HELD BY", "held_by"),
            ("CREATED", "created"),
        ],
    );
    for line in answer.as_array().into_iter().flatten() {
        if let Some(warning) = line["warning"].as_str() {
            let _ = writeln!(all, "{}: {warning}", text(&line["name"]));
        }
    }
    all
}

pub(super) fn trash(answer: &Value) -> String {
    table(
        answer,
        &[("NAME", "name"), ("REMOVED", "removed"), ("ENTRY", "entry")],
    )
}

pub(super) fn purged(answer: &Value) -> String {
    let entries = answer["purged"]
        .as_array()
        .map(Vec::as_slice)
        .unwrap_or_default();
    if entries.is_empty() {
        return "the trash is empty\n".to_owned();
    }
    entries.iter().fold(String::new(), |mut all, entry| {
        let _ = writeln!(all, "purged {}", text(entry));
        all
    })
}

pub(super) fn restored(answer: &Value) -> String {
    format!(
        "restored volume {} (removed {})\n",
        text(&answer["name"]),
        text(&answer["removed"])
    )
}

/// Any object as indented `key: value` lines.
pub(super) fn tree(answer: &Value) -> String {
    let mut all = String::new();
    branch(&mut all, answer, 0);
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

    #[test]
    fn a_list_has_a_line_for_each_volume() {
        let answer = json!([{ "name": "db", "share": "nas:/e", "attachments": 2 }]);
        let text = volumes(&answer);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 2);
        assert!(lines[1].contains("db") && lines[1].contains("nas:/e"));
    }

    #[test]
    fn a_record_that_cannot_be_read_is_told_of_below_the_list() {
        let answer = json!([
            { "name": "db", "share": "nas:/e", "warning": null },
            { "name": "web", "warning": "torn; nfsvol repair web" },
        ]);
        let text = volumes(&answer);
        let lines: Vec<&str> = text.lines().collect();
        assert_eq!(lines.len(), 4);
        assert!(lines[2].trim().starts_with("web"), "{text}");
        assert_eq!(lines[3], "web: torn; nfsvol repair web");
    }

    #[test]
    fn a_purge_says_what_it_deleted_or_that_there_was_nothing() {
        let said = |entries: Value| purged(&json!({ "purged": entries }));
        assert_eq!(said(json!(["db.1", "db.2"])), "purged db.1\npurged db.2\n");
        assert_eq!(said(json!([])), "the trash is empty\n");
    }

    #[test]
    fn a_tree_shows_every_leaf() {
        let text = tree(&json!({ "a": { "b": [1, { "c": null }] }, "d": [] }));
        assert_eq!(text, "a:\n  b:\n    - 1\n    -\n      c: -\nd: []\n");
    }
}
