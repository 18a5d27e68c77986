//! Names of things: unique, safe in paths, URLs and shells, and never ambiguous.

use sha2::{Digest, Sha256};

use super::{BackupType, Timestamp};

/// Id of a backup and of the job that makes it: `backup-<vm>-<time>-<random>`.
pub type BackupId = String;
/// Id of a VM: `ctx-<name>-<hash>`; also the name of its directory in a repository.
pub type VmId = String;

/// Longest part of a backup id that comes from the VM's name, in bytes.
const SLUG_IN_BACKUP: usize = 32;
/// Longest part of a VM id that comes from its name: an export's alias has 64 characters in all.
const SLUG_IN_VM: usize = 12;
/// Random bytes in an id.
const RANDOM: usize = 4;
/// Bytes of a hash that stands for what a name lost.
const HASH: usize = 4;

/// Bytes as hexadecimal digits.
pub fn hex(bytes: &[u8]) -> String {
    bytes.iter().map(|byte| format!("{byte:02x}")).collect()
}

/// `bytes` random bytes as hexadecimal digits.
pub fn random_hex(bytes: usize) -> String {
    let mut random = vec![0; bytes];
    if getrandom::fill(&mut random).is_err() {
        // A system without randomness: the clock and the process keep ids apart.
        let text = format!("{:?}{}", std::time::SystemTime::now(), std::process::id());
        random = Sha256::digest(text).to_vec();
        random.truncate(bytes);
    }
    hex(&random)
}

/// A new id with a prefix, such as `repo-1f2e3d4c`.
pub fn new_id(prefix: &str) -> String {
    format!("{prefix}-{}", random_hex(RANDOM))
}

/// `name` in at most `most` bytes of `[A-Za-z0-9._-]`, not starting with a dot or dash. Where
/// something is lost a hash of the whole name ends it, so that different names stay different.
pub fn slug(name: &str, most: usize) -> String {
    let safe = |c: char| if c.is_ascii_alphanumeric() || "._-".contains(c) { c } else { '-' };
    let clean: String = name.chars().map(safe).collect();
    let trimmed = clean.trim_start_matches(['.', '-']);
    if trimmed == name && !name.is_empty() && name.len() <= most {
        return name.to_owned();
    }
    let digest = hex(&Sha256::digest(name)[..HASH]);
    let keep = most.saturating_sub(digest.len() + 1).min(trimmed.len());
    match &trimmed[..keep] {
        "" => digest,
        start => format!("{start}-{digest}"),
    }
}

/// The id of a VM of that name.
pub fn vm_id(name: &str) -> VmId {
    let digest = hex(&Sha256::digest(name)[..HASH]);
    let mut start = slug(name, name.len() + 1 + 2 * HASH);
    start.truncate(SLUG_IN_VM);
    format!("ctx-{}-{digest}", start.trim_end_matches(['.', '-']))
}

/// A new id for a backup of the VM `name`.
pub fn backup_id(name: &str, time: Timestamp) -> BackupId {
    format!("backup-{}-{}-{}", slug(name, SLUG_IN_BACKUP), time.compact(), random_hex(RANDOM))
}

/// The name under which a disk of a backup is exported: the backup's id without its prefix, ending
/// in `disk<N>`, from which the capture agent reads the number.
pub fn export_name(backup: &str, disk: u32) -> String {
    format!("{}-disk{disk}", backup.strip_prefix("backup-").unwrap_or(backup))
}

/// The catalogued name of that export:
/// `backup-{vm id}-disk{N}-{full|incr}-{YYYYMMDDTHHMMSS}`, at most 64 characters.
pub fn export_alias(vm: &str, disk: u32, kind: BackupType, time: Timestamp) -> String {
    let kind = match kind {
        BackupType::Full => "full",
        BackupType::Incremental => "incr",
    };
    format!("backup-{vm}-disk{disk}-{kind}-{}", time.compact())
}

#[cfg(test)]
mod tests {
    use super::*;
    use std::collections::HashSet;

    #[test]
    fn ids_of_one_second_differ() {
        let now = Timestamp::now();
        let ids: HashSet<_> = (0..1000).map(|_| backup_id("web", now)).collect();
        assert_eq!(ids.len(), 1000);
    }

    #[test]
    fn names_that_look_alike_after_cleaning_stay_apart() {
        let names = ["a b", "a-b", "a/b", "a\u{e9}b", "../a", "", ".", "-rf", "a,b", "a:b"];
        let slugs: HashSet<_> = names.iter().map(|name| slug(name, 32)).collect();
        assert_eq!(slugs.len(), names.len(), "{slugs:?}");
        for slug in &slugs {
            assert!(
                !slug.starts_with(['.', '-']) && !slug.is_empty() && slug.len() <= 32,
                "{slug}"
            );
            assert!(slug.bytes().all(|b| b.is_ascii_alphanumeric() || b"._-".contains(&b)));
        }
        let long = "x".repeat(300);
        assert_ne!(slug(&format!("{long}a"), 32), slug(&format!("{long}b"), 32));
        assert_eq!(slug("web-disk0", 32), "web-disk0");
    }

    #[test]
    fn an_alias_has_64_characters_at_most_and_vm_ids_stay_apart() {
        let long = vm_id(&"database server ".repeat(20));
        let time = Timestamp::now();
        assert!(export_alias(&long, 999, BackupType::Full, time).len() <= 64);
        assert_ne!(vm_id("a b"), vm_id("a-b"));
        assert_ne!(vm_id("production-db-1"), vm_id("production-db-2"));
    }

    #[test]
    fn the_agent_finds_the_disk_number_at_the_end_of_an_export_name() {
        let id = backup_id("odd name, with: everything/-disk7", Timestamp::now());
        let name = export_name(&id, 3);
        assert!(name.ends_with("-disk3"), "{name}");
        super::super::validate_export_name(&name).unwrap();
        assert!(!name.contains([',', ':', '/']));
    }
}
