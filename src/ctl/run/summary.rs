//! What a run did, for people and for programs.

use std::time::Duration;

use serde_json::{Value, json};

use super::changes::Mode;
use crate::capture::Summary;
use crate::ctl::output::{size, word};

/// What became of one disk.
pub(super) struct DiskSummary {
    pub(super) disk: u64,
    pub(super) source: String,
    pub(super) mode: Mode,
    pub(super) copied: Summary,
    pub(super) time: Duration,
}

/// What became of all disks.
#[derive(Default)]
pub(super) struct Summaries {
    pub(super) disks: Vec<DiskSummary>,
    pub(super) time: Duration,
}

impl Summaries {
    fn sum(&self, of: impl Fn(&Summary) -> u64) -> u64 {
        self.disks.iter().map(|disk| of(&disk.copied)).sum()
    }

    /// With the backup as the API tells it.
    pub(super) fn to_json(&self, backup: &Value) -> Value {
        let disk = |disk: &DiskSummary| {
            json!({
                "disk_id": disk.disk,
                "source": disk.source,
                "mode": disk.mode.word(),
                "bytes_read": disk.copied.bytes_read,
                "bytes_sent": disk.copied.bytes_sent,
                "bytes_zeroed": disk.copied.bytes_zeroed,
                "bytes_skipped": disk.copied.bytes_skipped,
                "reconnects": disk.copied.reconnects,
                "seconds": disk.time.as_secs_f64(),
            })
        };
        json!({
            "backup": backup,
            "disks": self.disks.iter().map(disk).collect::<Vec<_>>(),
            "bytes_read": self.sum(|copied| copied.bytes_read),
            "bytes_sent": self.sum(|copied| copied.bytes_sent),
            "seconds": self.time.as_secs_f64(),
        })
    }

    /// In a few lines.
    pub(super) fn words(&self, backup: &Value) -> String {
        let mut lines = vec![format!(
            "{}: {} backup of '{}' is complete: {} read, {} sent, in {:.1} s",
            word(backup, "backup_id"),
            word(backup, "backup_type"),
            word(backup, "vm_name"),
            size(self.sum(|copied| copied.bytes_read)),
            size(self.sum(|copied| copied.bytes_sent)),
            self.time.as_secs_f64(),
        )];
        lines.extend(self.disks.iter().map(|disk| {
            format!(
                "  disk {} from {} by {}: {} sent, {} zeroed, {} the same",
                disk.disk,
                disk.source,
                disk.mode.word(),
                size(disk.copied.bytes_sent),
                size(disk.copied.bytes_zeroed),
                size(disk.copied.bytes_skipped),
            )
        }));
        lines.join("\n")
    }
}
