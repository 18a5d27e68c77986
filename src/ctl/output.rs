//! Printing for people and for programs.

use std::io::{self, Write};

pub(super) use crate::model::format_size as size;

use serde_json::Value;

use super::error::{CtlError, CtlResult};

/// What stands where there is nothing to tell.
const NOTHING: &str = "-";

/// How to print.
#[derive(Debug, Clone, Copy)]
pub(super) struct Output {
    /// The API's JSON rather than words.
    pub(super) json: bool,
    /// Nothing but what was asked for.
    pub(super) quiet: bool,
}

impl Output {
    /// Prints what was asked for: JSON, or its words.
    pub(super) fn show(self, value: &Value, words: impl FnOnce() -> String) -> CtlResult<()> {
        if !self.json {
            return line(&words());
        }
        let text = serde_json::to_string_pretty(value);
        let text = text.map_err(|e| CtlError::failed(e.to_string(), ""))?;
        // Only in strings such characters can be, and there this is what they are.
        line(&escape(&text, "\n", |c, out| {
            let mut units = [0; 2];
            for unit in c.encode_utf16(&mut units) {
                out.push_str(&format!("\\u{unit:04x}"));
            }
        }))
    }

    /// Says that something was done. Quiet people need no words for that.
    pub(super) fn done(self, value: &Value, words: impl FnOnce() -> String) -> CtlResult<()> {
        if self.quiet && !self.json {
            return Ok(());
        }
        self.show(value, words)
    }

    /// Tells on standard error what somebody who waits may want to know.
    pub(super) fn note(self, text: &str) {
        if !self.quiet {
            complain(text);
        }
    }
}

/// A sentence on standard error.
pub(super) fn complain(text: &str) {
    let text = escape(text, "\n", |c, out| out.extend(c.escape_unicode()));
    // Nobody is left to be told where this fails.
    let _ = writeln!(io::stderr(), "sendense-ctl: {text}");
}

/// A line on standard output.
pub(super) fn line(text: &str) -> CtlResult<()> {
    let mut out = io::stdout().lock();
    let written = writeln!(out, "{}", text.trim_end()).and_then(|()| out.flush());
    written.map_err(|e| CtlError::failed(format!("cannot write the output: {e}"), ""))
}

/// Text of strangers for one line of a terminal: what would steer it, or write from right to left, is
/// told as `\u{..}`.
pub(super) fn harmless(text: &str) -> String {
    escape(text, "", |c, out| out.extend(c.escape_unicode()))
}

/// Changes each character that would steer a terminal, but for those in `keep`.
fn escape(text: &str, keep: &str, change: impl Fn(char, &mut String)) -> String {
    let steers = |c: char| {
        c.is_control()
            || matches!(c, '\u{200e}' | '\u{200f}' | '\u{2028}'..='\u{202e}' | '\u{2066}'..='\u{2069}')
    };
    let mut out = String::with_capacity(text.len());
    for c in text.chars() {
        if steers(c) && !keep.contains(c) { change(c, &mut out) } else { out.push(c) }
    }
    out
}

/// The message of an answer that says that something was done.
pub(super) fn message(value: &Value) -> String {
    word(value, "message")
}

/// A member of an object in words, harmless to a terminal.
pub(super) fn word(value: &Value, key: &str) -> String {
    match &value[key] {
        Value::Null => NOTHING.to_owned(),
        Value::String(text) if text.is_empty() => NOTHING.to_owned(),
        Value::String(text) => harmless(text),
        Value::Array(all) => all.len().to_string(),
        other => other.to_string(),
    }
}

/// A member that is a number; 0 where it is none.
pub(super) fn number(value: &Value, key: &str) -> u64 {
    value[key].as_u64().unwrap_or(0)
}

/// A member that is a number of bytes, in words.
pub(super) fn bytes(value: &Value, key: &str) -> String {
    value[key].as_u64().map_or_else(|| NOTHING.to_owned(), size)
}

/// A member that is a time, without fractions.
pub(super) fn time(value: &Value, key: &str) -> String {
    let text = word(value, key);
    text.split_once('.').map_or_else(|| text.clone(), |(seconds, _)| format!("{seconds}Z"))
}

/// The members of an array.
pub(super) fn each<'a>(value: &'a Value, key: &str) -> impl Iterator<Item = &'a Value> {
    value[key].as_array().into_iter().flatten()
}

/// Rows under their titles, in columns as wide as need be.
pub(super) fn table(titles: &[&str], rows: &[Vec<String>]) -> String {
    let width = |column: usize| {
        let cells = rows.iter().filter_map(|row| row.get(column));
        let longest = cells.map(|cell| cell.chars().count()).max().unwrap_or(0);
        longest.max(titles.get(column).map_or(0, |title| title.chars().count()))
    };
    let widths: Vec<usize> = (0..titles.len()).map(width).collect();
    let line = |cells: &mut dyn Iterator<Item = &str>| {
        let cells = cells.zip(&widths).map(|(cell, width)| format!("{cell:width$}"));
        cells.collect::<Vec<_>>().join("  ").trim_end().to_owned()
    };
    let mut lines = vec![line(&mut titles.iter().copied())];
    lines.extend(rows.iter().map(|row| line(&mut row.iter().map(String::as_str))));
    lines.join("\n")
}

/// Names and their values, one below the other.
pub(super) fn fields(rows: &[(&str, String)]) -> String {
    let width = rows.iter().map(|(name, _)| name.len()).max().unwrap_or(0);
    let lines = rows.iter().map(|(name, value)| format!("{name:width$}  {value}"));
    lines.collect::<Vec<_>>().join("\n")
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn columns_are_as_wide_as_their_longest_cell() {
        let rows = [vec!["a".to_owned(), "1".to_owned()], vec!["longer".into(), "22".into()]];
        assert_eq!(table(&["ID", "N"], &rows), "ID      N\na       1\nlonger  22");
        assert_eq!(table(&["ID"], &[]), "ID");
    }

    #[test]
    fn names_do_not_steer_a_terminal() {
        let name = "a\u{1b}[2J\u{9b}31m\n\u{202e}gnp.exe";
        assert_eq!(harmless(name), "a\\u{1b}[2J\\u{9b}31m\\u{a}\\u{202e}gnp.exe");
        assert_eq!(harmless("na\u{ef}ve \\x \u{1f980}"), "na\u{ef}ve \\x \u{1f980}");
    }

    #[test]
    fn members_become_words_and_what_is_missing_a_dash() {
        let value = serde_json::json!({"a": "x", "n": 2048, "t": "2026-11-21T14:05:06.123Z"});
        assert_eq!(word(&value, "a"), "x");
        assert_eq!(word(&value, "b"), "-");
        assert_eq!(bytes(&value, "n"), "2.0 KiB");
        assert_eq!(bytes(&value, "b"), "-");
        assert_eq!(time(&value, "t"), "2026-11-21T14:05:06Z");
    }
}
