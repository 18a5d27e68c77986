//! Printing for people and for programs.

use std::io::{self, Write};

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

/// Bytes for people: three digits and a binary unit.
#[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
pub(super) fn size(bytes: u64) -> String {
    let units = ["B", "KiB", "MiB", "GiB", "TiB", "PiB", "EiB"];
    let mut value = bytes as f64;
    let mut unit = 0;
    while value >= 1024.0 && unit + 1 < units.len() {
        value /= 1024.0;
        unit += 1;
    }
    if unit == 0 { format!("{bytes} B") } else { format!("{value:.1} {}", units[unit]) }
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
