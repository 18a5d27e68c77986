//! What is exported, and by which name.

use std::fmt;
use std::os::unix::fs::FileTypeExt;
use std::path::{Path, PathBuf};

/// Format of what an export serves. Never found out by looking at the content.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub enum Format {
    /// A QCOW2 image with its backing chain.
    Qcow2,
    /// Plain bytes: a regular file or a block device.
    Raw,
    /// Nothing: reads as zeroes, forgets what is written. For measuring everything else.
    Null,
}

impl Format {
    /// The format of that name.
    pub fn from_name(name: &str) -> Option<Self> {
        match name {
            "qcow2" => Some(Self::Qcow2),
            "raw" => Some(Self::Raw),
            "null" => Some(Self::Null),
            _ => None,
        }
    }
}

impl fmt::Display for Format {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        f.write_str(match self {
            Self::Qcow2 => "qcow2",
            Self::Raw => "raw",
            Self::Null => "null",
        })
    }
}

/// Where an export's bytes are.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct Source {
    /// How they are stored.
    pub format: Format,
    /// The file or device; for `null` the size.
    pub path: PathBuf,
}

impl Source {
    /// Reads `qcow2:PATH`, `raw:PATH`, `null:SIZE`, or a path whose ending or kind tells the format.
    ///
    /// # Errors
    /// A sentence where the format is not told.
    pub fn parse(text: &str) -> Result<Self, String> {
        if let Some((prefix, rest)) = text.split_once(':')
            && let Some(format) = Format::from_name(prefix)
        {
            return Ok(Self { format, path: rest.into() });
        }
        let path = Path::new(text);
        let format = match path.extension().and_then(|e| e.to_str()) {
            Some("qcow2") => Format::Qcow2,
            Some("raw" | "img") => Format::Raw,
            _ if std::fs::metadata(path).is_ok_and(|m| m.file_type().is_block_device()) => {
                Format::Raw
            }
            _ => {
                return Err(format!(
                    "the format of '{text}' is not told by its name, and it is never guessed; \
                     write qcow2:{text} or raw:{text}"
                ));
            }
        };
        Ok(Self { format, path: path.into() })
    }
}

impl fmt::Display for Source {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}", self.format, self.path.display())
    }
}

/// What an export is to be.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct ExportSpec {
    /// Its name.
    pub name: String,
    /// For human eyes; may be empty.
    pub description: String,
    /// What it serves.
    pub source: Source,
    /// Writes are refused.
    pub read_only: bool,
    /// Most connections at a time; the server's bound where not given.
    pub max_connections: Option<usize>,
}

/// Longest export name in bytes: the longest string of the NBD protocol.
const MAX_EXPORT_NAME: usize = 4096;

/// A name that an export may have: letters, digits, and `._-+:@/` inside, so that it needs no
/// quoting in a URI's path, a log or a shell.
///
/// # Errors
/// A sentence that names the rule.
pub fn validate_export_name(name: &str) -> Result<(), String> {
    let allowed = |c: char| c.is_ascii_alphanumeric() || "._-+:@/".contains(c);
    if name.is_empty() || name.len() > MAX_EXPORT_NAME {
        return Err(format!("an export name has 1 to {MAX_EXPORT_NAME} bytes"));
    }
    match name.chars().find(|c| !allowed(*c)) {
        None => Ok(()),
        Some(c) => Err(format!(
            "export name '{name}' has {c:?}; letters, digits and . _ - + : @ / are possible"
        )),
    }
}

/// Reads a size in bytes with an optional suffix K, M, G, T, P or E (powers of 1024).
///
/// # Errors
/// A sentence where it is none.
pub fn parse_size(text: &str) -> Result<u64, String> {
    let digits = text.trim_end_matches(|c: char| !c.is_ascii_digit());
    let shift = match text[digits.len()..]
        .trim_end_matches(['B', 'b', 'i'])
        .to_ascii_uppercase()
        .as_str()
    {
        "" => 0,
        "K" => 10,
        "M" => 20,
        "G" => 30,
        "T" => 40,
        "P" => 50,
        "E" => 60,
        _ => return Err(format!("'{text}' is no size such as 512M or 10G")),
    };
    digits
        .parse::<u64>()
        .ok()
        .and_then(|n| n.checked_mul(1 << shift))
        .ok_or_else(|| format!("'{text}' is no size such as 512M or 10G"))
}

/// Bytes for people: three digits and a binary unit.
#[allow(clippy::cast_precision_loss, reason = "three digits are shown")]
pub fn format_size(bytes: u64) -> String {
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
    use super::*;

    #[test]
    fn sizes_have_binary_suffixes() {
        for (text, size) in
            [("0", 0), ("512", 512), ("4k", 4096), ("10G", 10 << 30), ("2MiB", 2 << 20)]
        {
            assert_eq!(parse_size(text), Ok(size), "{text}");
        }
        for text in ["", "G", "1.5G", "-1", "1X", "99999999E"] {
            assert!(parse_size(text).is_err(), "{text}");
        }
    }

    #[test]
    fn sizes_are_told_with_three_digits_or_so() {
        for (size, text) in
            [(0, "0 B"), (1023, "1023 B"), (1536, "1.5 KiB"), (10 << 30, "10.0 GiB")]
        {
            assert_eq!(format_size(size), text);
        }
    }

    #[test]
    fn names_that_would_need_quoting_are_refused_with_the_reason() {
        for name in ["vm-1.disk_0", "ctx/2000", "a:b@c+d"] {
            validate_export_name(name).unwrap();
        }
        for name in ["", "with space", "tab\t", "\u{fc}mlaut", "a\"b"] {
            assert!(validate_export_name(name).is_err(), "{name:?}");
        }
        assert!(validate_export_name(&"x".repeat(5000)).is_err());
    }

    #[test]
    fn a_format_is_told_and_never_guessed() {
        let format = |text| Source::parse(text).map(|s| s.format).ok();
        assert_eq!(format("a/b.qcow2"), Some(Format::Qcow2));
        assert_eq!(format("b.img"), Some(Format::Raw));
        assert_eq!(format("raw:b.qcow2"), Some(Format::Raw));
        assert_eq!(format("qcow2:b"), Some(Format::Qcow2));
        assert_eq!(format("b.vmdk"), None);
        assert_eq!(format("b"), None);
    }
}
