//! Export drop-ins: a directory of `*.conf` files in nbd-server's own format.
//!
//! The format is that of nbd-server(5): `[name]` starts an export, `key = value` lines follow, `#`
//! starts a comment. Keys that cannot be honoured are refused rather than ignored, unless they say
//! what is done anyway.

use std::collections::BTreeMap;
use std::fmt;
use std::path::{Path, PathBuf};

use crate::model::{ExportSpec, Format, Source, validate_export_name};

/// Most bytes of one file that are read: a megabyte of exports is a mistake.
const MAX_FILE: u64 = 1 << 20;

/// What is wrong with a drop-in.
#[derive(Debug, Clone, PartialEq, Eq)]
pub struct DropinError {
    /// The file.
    pub file: PathBuf,
    /// The line, from 1; 0 for the file as a whole.
    pub line: usize,
    /// The reason and what to do.
    pub reason: String,
}

impl fmt::Display for DropinError {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{}:{}: {}", self.file.display(), self.line, self.reason)
    }
}

impl std::error::Error for DropinError {}

/// A section while it is read.
struct Section {
    name: String,
    line: usize,
    values: BTreeMap<String, (usize, String)>,
}

/// Reads every `*.conf` of `directory`, in the order of their names. No directory means no exports.
///
/// # Errors
/// The first mistake: nothing of the directory counts then.
pub fn read_directory(directory: &Path) -> Result<Vec<ExportSpec>, DropinError> {
    let fail = |file: &Path, e: std::io::Error| DropinError {
        file: file.to_owned(),
        line: 0,
        reason: e.to_string(),
    };
    let mut files = Vec::new();
    match std::fs::read_dir(directory) {
        Err(e) if e.kind() == std::io::ErrorKind::NotFound => return Ok(Vec::new()),
        Err(e) => return Err(fail(directory, e)),
        Ok(entries) => {
            for entry in entries {
                let path = entry.map_err(|e| fail(directory, e))?.path();
                if path.extension().is_some_and(|e| e == "conf") {
                    files.push(path);
                }
            }
        }
    }
    files.sort();
    let mut specs: Vec<ExportSpec> = Vec::new();
    for file in files {
        let size = std::fs::metadata(&file).map_err(|e| fail(&file, e))?.len();
        if size > MAX_FILE {
            let reason = format!("the file has {size} bytes; at most {MAX_FILE} are read");
            return Err(DropinError { file, line: 0, reason });
        }
        let text = std::fs::read_to_string(&file).map_err(|e| fail(&file, e))?;
        for (line, spec) in parse(&text).map_err(|(line, reason)| DropinError {
            file: file.clone(),
            line,
            reason,
        })? {
            if specs.iter().any(|s| s.name == spec.name) {
                let reason = format!("export '{}' is defined twice", spec.name);
                return Err(DropinError { file, line, reason });
            }
            specs.push(spec);
        }
    }
    Ok(specs)
}

/// Reads one file's text: the exports with the lines that they start at.
///
/// # Errors
/// Line and reason of the first mistake.
pub fn parse(text: &str) -> Result<Vec<(usize, ExportSpec)>, (usize, String)> {
    let mut sections: Vec<Section> = Vec::new();
    for (number, line) in (1..).zip(text.lines()) {
        let line = line.trim();
        if line.is_empty() || line.starts_with('#') || line.starts_with(';') {
            continue;
        }
        if let Some(name) = line.strip_prefix('[').and_then(|rest| rest.strip_suffix(']')) {
            let name = name.trim().to_owned();
            sections.push(Section { name, line: number, values: BTreeMap::new() });
            continue;
        }
        let Some((key, value)) = line.split_once('=') else {
            return Err((number, format!("'{line}' is neither [name] nor key = value")));
        };
        let Some(section) = sections.last_mut() else {
            return Err((number, "there is a value before the first [name]".into()));
        };
        let key = key.trim().to_ascii_lowercase();
        let value = (number, value.trim().to_owned());
        if section.values.insert(key.clone(), value).is_some() {
            return Err((number, format!("'{key}' is given twice for [{}]", section.name)));
        }
    }
    // What belongs to nbd-server as a whole has no meaning for single exports.
    sections.iter().filter(|s| s.name != "generic").map(resolve).collect()
}

fn boolean(line: usize, key: &str, value: &str) -> Result<bool, (usize, String)> {
    match value.to_ascii_lowercase().as_str() {
        "true" | "1" | "yes" => Ok(true),
        "false" | "0" | "no" => Ok(false),
        _ => Err((line, format!("'{key}' is true or false, not '{value}'"))),
    }
}

fn resolve(section: &Section) -> Result<(usize, ExportSpec), (usize, String)> {
    validate_export_name(&section.name).map_err(|e| (section.line, e))?;
    let mut path = None;
    let mut format = None;
    let mut spec = ExportSpec {
        name: section.name.clone(),
        description: String::new(),
        source: Source { format: Format::Raw, path: PathBuf::new() },
        read_only: false,
        max_connections: None,
    };
    for (key, (line, value)) in &section.values {
        match key.as_str() {
            "exportname" => path = Some((*line, value.clone())),
            "format" => {
                let known = Format::from_name(value).filter(|f| *f != Format::Null);
                format = Some(known.ok_or_else(|| {
                    (*line, format!("format '{value}' is not known; raw and qcow2 are"))
                })?);
            }
            "readonly" => spec.read_only = boolean(*line, key, value)?,
            "maxconnections" => {
                let number: usize = value
                    .parse()
                    .map_err(|_| (*line, format!("'{value}' is no number of connections")))?;
                // nbd-server's 0 stands for no limit of its own.
                spec.max_connections = (number > 0).then_some(number);
            }
            "description" => spec.description.clone_from(value),
            // Done anyway, so only the wish for the opposite is a mistake.
            "flush" | "fua" | "trim" if boolean(*line, key, value)? => {}
            "multifile" | "copyonwrite" | "autoreadonly" | "temporary" | "sparse_cow" | "sync"
            | "rotational" | "waitfile" | "splice" | "sdp" | "treefiles"
                if !boolean(*line, key, value)? => {}
            _ => {
                return Err((
                    *line,
                    format!("'{key} = {value}' is not possible here; take the line out"),
                ));
            }
        }
    }
    let Some((line, path)) = path else {
        return Err((section.line, format!("[{}] has no exportname (the file)", section.name)));
    };
    spec.source = match format {
        Some(format) => Source { format, path: path.into() },
        None => Source::parse(&path).map_err(|e| (line, e))?,
    };
    Ok((section.line, spec))
}

/// What a reload changes.
#[derive(Debug, Clone, Default, PartialEq, Eq)]
pub struct Plan {
    /// Exports to take away: those that are gone and those that change.
    pub remove: Vec<String>,
    /// Exports to open: those that are new and those that change.
    pub add: Vec<ExportSpec>,
    /// Exports that stay as they are, clients and all.
    pub unchanged: usize,
}

/// Compares what is served with what is wanted.
pub fn plan(now: &[ExportSpec], wanted: &[ExportSpec]) -> Plan {
    let same = |spec: &&ExportSpec| now.contains(spec);
    Plan {
        remove: now.iter().filter(|s| !wanted.contains(s)).map(|s| s.name.clone()).collect(),
        add: wanted.iter().filter(|s| !same(s)).cloned().collect(),
        unchanged: wanted.iter().filter(same).count(),
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    fn one(text: &str) -> ExportSpec {
        parse(text).unwrap().remove(0).1
    }

    #[test]
    fn nbd_servers_own_files_are_understood() {
        let spec =
            one("# a comment\n[generic]\nuser = nbd\n\n[disk1]\n  exportname = /srv/a.img\n\
                        readonly = true\nmaxconnections=3\nflush = true\nfua = 1\n");
        assert_eq!(spec.name, "disk1");
        assert_eq!(spec.source, Source { format: Format::Raw, path: "/srv/a.img".into() });
        assert!(spec.read_only);
        assert_eq!(spec.max_connections, Some(3));
    }

    #[test]
    fn the_format_may_be_said() {
        let spec = one("[a]\nexportname = /srv/a\nformat = qcow2\n");
        assert_eq!(spec.source.format, Format::Qcow2);
    }

    #[test]
    fn mistakes_are_told_with_their_line() {
        for (text, line) in [
            ("key = value\n", 1),
            ("[a]\nnonsense\n", 2),
            ("[a]\nreadonly = true\n", 1),
            ("[a]\nexportname = /srv/a\n", 2),
            ("[a]\nexportname = /a.img\nreadonly = perhaps\n", 3),
            ("[a]\nexportname = /a.img\n\ncopyonwrite = true\n", 4),
            ("[a]\nexportname = /a.img\nexportname = /b.img\n", 3),
            ("[a b]\nexportname = /a.img\n", 1),
        ] {
            assert_eq!(parse(text).unwrap_err().0, line, "{text}");
        }
    }

    #[test]
    fn a_reload_touches_only_what_differs() {
        let a = one("[a]\nexportname = /a.img\n");
        let b = one("[b]\nexportname = /b.img\n");
        let changed = ExportSpec { read_only: true, ..b.clone() };
        let c = one("[c]\nexportname = /c.img\n");
        let plan = plan(&[a.clone(), b], &[a, changed.clone(), c.clone()]);
        assert_eq!(plan, Plan { remove: vec!["b".into()], add: vec![changed, c], unchanged: 1 });
    }
}
