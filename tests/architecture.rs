//! The import table of `docs/architecture.md` is what the sources do.
#![allow(clippy::unwrap_used, missing_docs)]

use std::collections::{BTreeMap, BTreeSet};
use std::path::{Path, PathBuf};

const PARTS: [&str; 3] = ["guest", "nbd_proto", "qcow2"];

fn root() -> PathBuf {
    PathBuf::from(env!("CARGO_MANIFEST_DIR"))
}

/// Every Rust file under `path`, or the file itself.
fn sources(path: &Path) -> Vec<PathBuf> {
    if path.is_file() {
        return vec![path.to_owned()];
    }
    let entries = std::fs::read_dir(path).unwrap().map(|entry| entry.unwrap().path());
    entries
        .filter(|p| p.is_dir() || p.extension().is_some_and(|e| e == "rs"))
        .flat_map(|p| sources(&p))
        .collect()
}

/// Module to what it may import, as the table says.
fn table() -> BTreeMap<String, BTreeSet<String>> {
    let text = std::fs::read_to_string(root().join("docs/architecture.md")).unwrap();
    text.lines()
        .skip_while(|line| *line != "| module | may import |")
        .skip(2)
        .map_while(|line| line.strip_prefix('|'))
        .map(|line| {
            let (module, imports) = line.split_once('|').unwrap();
            let imports = imports.trim_end_matches('|').split(',').map(|i| i.trim().to_owned());
            (module.trim().to_owned(), imports.filter(|i| !i.is_empty()).collect())
        })
        .collect()
}

/// Names after `prefix` in code, comments left out.
fn names_after<'a>(text: &'a str, prefix: &'a str) -> impl Iterator<Item = String> + 'a {
    text.lines()
        .filter(|line| !line.trim_start().starts_with("//"))
        .flat_map(move |line| line.match_indices(prefix).map(move |(at, _)| (line, at)))
        .filter(|(line, at)| {
            !line[..*at].ends_with(|c: char| c.is_alphanumeric() || c == '_' || c == ':')
        })
        .map(move |(line, at)| {
            line[at + prefix.len()..]
                .chars()
                .take_while(|c| c.is_alphanumeric() || *c == '_')
                .collect()
        })
}

#[test]
fn the_hub_imports_only_what_its_table_allows() {
    let table = table();
    let mut modules = BTreeSet::new();
    for file in sources(&root().join("src")) {
        let inside = file.strip_prefix(root().join("src")).unwrap();
        let first = inside.components().next().unwrap().as_os_str().to_str().unwrap();
        let module = first.trim_end_matches(".rs").to_owned();
        if ["lib", "main", "bin"].contains(&module.as_str()) {
            continue;
        }
        let allowed = table.get(&module).unwrap_or_else(|| panic!("{module} is not in the table"));
        let text = std::fs::read_to_string(&file).unwrap();
        let ours = names_after(&text, "crate::");
        let parts = PARTS
            .iter()
            .filter(|part| names_after(&text, &format!("{part}::")).next().is_some())
            .map(|part| (*part).to_owned());
        for import in ours.chain(parts).filter(|import| *import != module) {
            assert!(allowed.contains(&import), "{} imports {import}", inside.display());
        }
        modules.insert(module);
    }
    assert_eq!(modules, table.keys().cloned().collect(), "modules and table differ");
}

#[test]
fn the_table_has_no_circles() {
    let table = table();
    let mut placed: BTreeSet<&str> = PARTS.into();
    while placed.len() < table.len() + PARTS.len() {
        let next = table.iter().find(|(module, imports)| {
            !placed.contains(module.as_str()) && imports.iter().all(|i| placed.contains(i.as_str()))
        });
        placed.insert(next.expect("a circle").0);
    }
}

#[test]
fn the_protocol_crate_does_no_input_or_output() {
    for file in sources(&root().join("nbd-proto/src")) {
        let text = std::fs::read_to_string(&file).unwrap();
        for name in names_after(&text, "std::") {
            let io = ["fs", "io", "net", "os", "process", "thread", "time"];
            assert!(!io.contains(&name.as_str()), "{} uses std::{name}", file.display());
        }
    }
    for (part, other) in [("nbd-proto", "qcow2"), ("qcow2", "nbd-proto")] {
        let manifest = std::fs::read_to_string(root().join(part).join("Cargo.toml")).unwrap();
        for foreign in [other, "sendense-hub"] {
            assert!(!manifest.contains(&format!("{foreign}.workspace")), "{part} uses {foreign}");
        }
    }
}
