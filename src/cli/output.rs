//! Printing for people and for programs.

use std::io::{self, Write};

pub(super) use crate::model::format_size as size;

use serde::Serialize;

/// A sentence on standard error.
pub(super) fn error(message: &str) {
    // Nobody is left to be told where this fails.
    let _ = writeln!(io::stderr(), "sendense-hub: {message}");
}

/// A line on standard output.
///
/// # Errors
/// When nobody reads it any more.
pub(super) fn line(text: &str) -> Result<(), String> {
    writeln!(io::stdout(), "{text}").map_err(|e| format!("cannot write the output: {e}"))
}

/// A value as indented JSON on standard output.
///
/// # Errors
/// When nobody reads it any more.
pub(super) fn json(value: &impl Serialize) -> Result<(), String> {
    let text = serde_json::to_string_pretty(value).map_err(|e| e.to_string())?;
    line(&text)
}

#[cfg(test)]
mod tests {
    use super::size;

    #[test]
    fn sizes_are_short() {
        assert_eq!(size(512), "512 B");
        assert_eq!(size(1536), "1.5 KiB");
        assert_eq!(size(10 << 30), "10.0 GiB");
        assert_eq!(size(u64::MAX), "16.0 EiB");
    }
}
