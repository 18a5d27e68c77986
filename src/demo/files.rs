//! One file out of a restore point: mounted without mounting anything, listed, taken out, compared.

use std::io::{self, Read};
use std::time::{Duration, Instant};

use serde_json::json;
use sha2::{Digest, Sha256};

use super::api::Api;
use super::disk::Disk;
use crate::model::hex;

/// The file that is taken out: the incremental brought it.
const FILE: &str = "new.bin";

/// What was found in a restore point, and the file that was taken out of it.
#[derive(Debug, Clone)]
pub struct Taken {
    /// What the volume is and how far it can be trusted, in words.
    pub volume: String,
    /// Names and sizes of the files in it.
    pub listing: Vec<(String, u64)>,
    /// Path of the file that was taken out.
    pub path: String,
    /// Its SHA-256.
    pub sha256: String,
    /// Whether it is what lies on the disk.
    pub same: bool,
    /// From the request to the first byte of the listing.
    pub ready: Duration,
}

/// Takes a file out of the restore point `backup`.
pub(super) fn take(api: &Api, backup: &str, disk: &Disk) -> io::Result<Taken> {
    let started = Instant::now();
    let mount = api.post("restore/mount", &json!({"backup_id": backup}))?;
    let ready = started.elapsed();
    let word = |value: &serde_json::Value| value.as_str().unwrap_or_default().to_owned();
    let (id, volume) = (word(&mount["mount_id"]), &mount["volumes"][0]);
    let root = format!("/{}", word(&volume["name"]));
    let about =
        format!("{root}: {}, {}", word(&volume["filesystem_type"]), word(&volume["status"]));
    let files = api.get(&format!("restore/{id}/files?path={root}"))?;
    let files = files["files"].as_array().into_iter().flatten();
    let listing =
        files.map(|f| (word(&f["name"]), f["size"].as_u64().unwrap_or_default())).collect();
    let path = format!("{root}/{FILE}");
    let address = format!("restore/{id}/download?path={path}");
    let sha256 = hash(&mut api.read(&address)?)?;
    let same = disk.read_file(FILE, |file| hash(file))? == sha256;
    api.delete(&format!("restore/{id}"))?;
    Ok(Taken { volume: about, listing, path, sha256, same, ready })
}

fn hash(content: &mut dyn Read) -> io::Result<String> {
    let mut hasher = Sha256::new();
    let mut buf = vec![0; 64 << 10];
    loop {
        match content.read(&mut buf)? {
            0 => return Ok(hex(&hasher.finalize())),
            n => hasher.update(&buf[..n]),
        }
    }
}
