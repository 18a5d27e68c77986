//! The manifest of an image: everything that the catalog knows of it, beside it.

use std::fs;
use std::path::Path;

use serde::{Deserialize, Serialize};
use serde_json::value::RawValue;
use sha2::{Digest, Sha256};

use super::layout::write_durably;
use super::{Result, failed, invalid};
use crate::model::{BackupId, BackupType, Timestamp, VmId, hex};

/// What the file calls itself.
const FORMAT: &str = "sendense-manifest";
/// Version of the manifest that this program reads and writes.
const VERSION: u32 = 1;
/// Longest manifest that is read, in bytes.
const LONGEST: u64 = 1 << 20;

/// The manifest of one disk of a backup.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct Manifest {
    /// The backup.
    pub backup_id: BackupId,
    /// What it holds.
    pub backup_type: BackupType,
    /// Number of disks that the backup has in all: it is whole when all of their manifests are
    /// there.
    pub disks: u32,
    /// The VM.
    pub vm: VmOf,
    /// The disk.
    pub disk: DiskOf,
    /// The backup on whose image this one builds.
    pub parent: Option<ParentOf>,
    /// The change id of the source at the time of the backup; may be empty.
    pub change_id: String,
    /// The change id from which on changes were asked for.
    pub previous_change_id: String,
    /// The image.
    pub image: ImageOf,
    /// Bytes that came in over the wire.
    pub bytes_received: u64,
    /// The operator's words about the backup.
    #[serde(default)]
    pub tags: std::collections::BTreeMap<String, String>,
    /// When the backup was asked for.
    pub created_at: Timestamp,
    /// When this disk was sealed.
    pub sealed_at: Timestamp,
    /// The program that wrote it.
    pub written_by: String,
}

/// The VM of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct VmOf {
    /// Its id.
    pub id: VmId,
    /// Its name.
    pub name: String,
    /// Its inventory path.
    pub path: String,
}

/// The disk of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct DiskOf {
    /// Its number.
    pub id: u32,
    /// VMware's device key.
    pub key: u32,
    /// Its place on the controller.
    pub unit_number: u32,
    /// Its name.
    pub label: String,
    /// Its size in bytes.
    pub capacity_bytes: u64,
}

/// The parent of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ParentOf {
    /// The backup.
    pub backup_id: BackupId,
    /// The hash over the checksums of its image: which file was meant.
    pub root_hash: String,
}

/// The image of a manifest.
#[derive(Debug, Clone, PartialEq, Eq, Serialize, Deserialize)]
pub struct ImageOf {
    /// Length of the file.
    pub file_bytes: u64,
    /// Bytes of data in it, in whole clusters.
    pub stored_bytes: u64,
    /// Bytes of a cluster.
    pub cluster_size: u32,
    /// SHA-256 over the numbers and checksums of all stored clusters.
    pub root_hash: String,
}

#[derive(Serialize, Deserialize)]
struct Envelope<'a> {
    format: String,
    version: u32,
    /// SHA-256 of the bytes of `body`.
    sha256: String,
    #[serde(borrow)]
    body: &'a RawValue,
}

/// SHA-256 as hexadecimal digits.
pub(super) fn sha256(bytes: &[u8]) -> String {
    hex(&Sha256::digest(bytes))
}

impl Manifest {
    /// Writes the manifest to `path`; durable on return.
    ///
    /// # Errors
    /// `Io`.
    pub fn write(&self, path: &Path) -> Result<()> {
        let encode = || -> serde_json::Result<Vec<u8>> {
            let body = serde_json::value::to_raw_value(self)?;
            let sha256 = sha256(body.get().as_bytes());
            let envelope =
                Envelope { format: FORMAT.into(), version: VERSION, sha256, body: &body };
            let mut text = serde_json::to_vec_pretty(&envelope)?;
            text.push(b'\n');
            Ok(text)
        };
        let text = encode().map_err(|e| invalid(path, format!("cannot be encoded: {e}")))?;
        write_durably(path, &text)
    }

    /// Reads the manifest at `path`.
    ///
    /// # Errors
    /// `Io`; `Invalid` where it is damaged or of another version.
    pub fn read(path: &Path) -> Result<Self> {
        let read = || {
            if fs::metadata(path)?.len() > LONGEST {
                return Err(std::io::Error::other("the file is too long for a manifest"));
            }
            fs::read_to_string(path)
        };
        let text = read().map_err(failed("cannot read the manifest", path))?;
        let broken = |e: serde_json::Error| invalid(path, format!("is no manifest: {e}"));
        let envelope: Envelope<'_> = serde_json::from_str(&text).map_err(broken)?;
        if envelope.format != FORMAT || envelope.version != VERSION {
            let Envelope { format, version, .. } = envelope;
            let text =
                format!("is {format} version {version}; this program knows {FORMAT} {VERSION}");
            return Err(invalid(path, text));
        }
        if sha256(envelope.body.get().as_bytes()) != envelope.sha256 {
            return Err(invalid(path, "is damaged: its checksum does not fit"));
        }
        serde_json::from_str(envelope.body.get()).map_err(broken)
    }
}

#[cfg(test)]
pub(super) mod tests {
    use super::*;

    pub(in crate::repository) fn sample(backup: &str, disk: u32, disks: u32) -> Manifest {
        Manifest {
            backup_id: backup.into(),
            backup_type: BackupType::Full,
            disks,
            vm: VmOf { id: "ctx-web-1".into(), name: "web".into(), path: "/dc/vm/web".into() },
            disk: DiskOf {
                id: disk,
                key: 2000 + disk,
                unit_number: disk,
                label: "Hard disk 1".into(),
                capacity_bytes: (1 << 30) + 512,
            },
            parent: None,
            change_id: "52 3c ec 11 9e 2c 4c 3d-87 4a c3 4e 85 f2 ea 95/446".into(),
            previous_change_id: String::new(),
            image: ImageOf {
                file_bytes: 1 << 20,
                stored_bytes: 65536,
                cluster_size: 65536,
                root_hash: "00".into(),
            },
            bytes_received: 65536,
            tags: std::collections::BTreeMap::new(),
            created_at: Timestamp::now(),
            sealed_at: Timestamp::now(),
            written_by: "test".into(),
        }
    }

    #[test]
    fn a_manifest_survives_its_file_and_a_changed_byte_is_noticed() {
        let dir = tempfile::tempdir().unwrap();
        let path = dir.path().join("m.json");
        let manifest = sample("backup-web-1", 0, 1);
        manifest.write(&path).unwrap();
        assert_eq!(Manifest::read(&path).unwrap(), manifest);
        let text = fs::read_to_string(&path).unwrap();
        fs::write(&path, text.replace("/446", "/447")).unwrap();
        assert!(Manifest::read(&path).unwrap_err().to_string().contains("damaged"));
        fs::write(&path, &text[..text.len() / 2]).unwrap();
        assert!(Manifest::read(&path).is_err());
    }
}
