//! What an archive does not have, and why: a line each, in the archive itself.

use super::super::names;

/// Most bytes of lines.
const BYTES: usize = 1 << 20;

/// What came of an archive.
#[derive(Debug, Default, Clone)]
pub struct Report {
    /// Entries that are in it, without the report.
    pub entries: u64,
    /// Bytes of files that are in it.
    pub bytes: u64,
    /// What is missing or changed, one line each; the first ones.
    pub lines: Vec<String>,
    /// Lines that there was no room for.
    pub more: u64,
    size: usize,
}

impl Report {
    /// `WORD: path: why`.
    pub(super) fn add(&mut self, word: &str, path: &[u8], why: &str) {
        let line = format!("{word}: {}: {}", names::line(path), names::line(why.as_bytes()));
        if self.size + line.len() >= BYTES {
            self.more += 1;
            return;
        }
        self.size += line.len() + 1;
        self.lines.push(line);
    }

    /// Whether the archive is all there is, unchanged.
    pub fn is_clean(&self) -> bool {
        self.lines.is_empty() && self.more == 0
    }

    pub(super) fn text(&self) -> String {
        let mut text = String::from(
            "This archive is not all there is, or some of it was changed. DAMAGED: the file is in the\n\
             archive, but not as it was. RENAMED: under another name. The rest is missing.\n\n",
        );
        for line in &self.lines {
            text.push_str(line);
            text.push('\n');
        }
        if self.more > 0 {
            text.push_str(&format!("and {} more\n", self.more));
        }
        text
    }
}
