//! Which restore points have served their time: a pure decision, and carrying it out.

use std::collections::{BTreeMap, BTreeSet};
use std::time::Duration;

use super::error::Failure;
use super::service::Backups;
use crate::catalog::{Backup, BackupFilter, Policy};
use crate::model::{BackupId, BackupState, Timestamp};

/// Seconds of a day.
const DAY: u64 = 86_400;

/// The restore points that their policies do not keep any more, in the order in which they can be
/// deleted. Kept are: those without an enabled policy, those younger than its days, the newest of
/// each VM, and all that a kept one builds on.
pub fn expired(backups: &[Backup], policies: &[Policy], now: Timestamp) -> Vec<BackupId> {
    let days: BTreeMap<&str, u32> = policies
        .iter()
        .filter(|policy| policy.enabled)
        .map(|policy| (policy.id.as_str(), policy.retention_days))
        .collect();
    let mut ordered: Vec<&Backup> =
        backups.iter().filter(|backup| backup.state == BackupState::Completed).collect();
    ordered.sort_by_key(|backup| std::cmp::Reverse(backup.completed_at));
    let mut vms = BTreeSet::new();
    let mut needed: BTreeSet<&str> = BTreeSet::new();
    let mut gone = Vec::new();
    for backup in ordered {
        let newest = vms.insert(&backup.vm_id);
        let kept_for = backup.policy_id.as_deref().and_then(|id| days.get(id));
        let age = now.since(backup.completed_at.unwrap_or(now));
        let old = kept_for.is_some_and(|days| age >= Duration::from_secs(u64::from(*days) * DAY));
        if old && !newest && !needed.contains(backup.id.as_str()) {
            gone.push(backup.id.clone());
        } else {
            needed.extend(backup.disks.iter().filter_map(|disk| disk.parent.as_deref()));
        }
    }
    gone
}

impl Backups {
    /// Deletes what the policies do not keep any more, or tells what would be deleted; asks for the
    /// copies that they want and that are not there.
    ///
    /// # Errors
    /// When the catalog cannot be read. What cannot be deleted is told by an event and stays.
    pub fn apply_policies(&self, dry_run: bool, actor: &str) -> Result<Vec<BackupId>, Failure> {
        let all = self.catalog.backups(&BackupFilter::default())?;
        let gone = expired(&all, &self.catalog.policies()?, Timestamp::now());
        if dry_run {
            return Ok(gone);
        }
        // Copies that a crash or a failure kept from being made.
        let kept =
            |backup: &&Backup| backup.state == BackupState::Completed && !gone.contains(&backup.id);
        all.iter().filter(kept).for_each(|backup| self.copy_by_policy(backup));
        let mut deleted = Vec::new();
        for id in gone {
            match self.delete(&id, actor) {
                Ok(()) => deleted.push(id),
                Err(failure) => {
                    tracing::info!(backup = %id, %failure, "past its time, and kept");
                }
            }
        }
        Ok(deleted)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::catalog::DiskBackup;
    use crate::model::{BackupType, DiskState};

    fn backup(id: &str, vm: &str, parent: Option<&str>, age: u64, policy: Option<&str>) -> Backup {
        // 500 days before the "now" of the test, and what is left of them after the age.
        let start = Timestamp::parse("2025-01-17T00:00:00Z").unwrap();
        let completed = start.after(Duration::from_secs((500 - age) * DAY));
        Backup {
            id: id.into(),
            vm_id: vm.into(),
            vm_name: vm.into(),
            repository_id: "r".into(),
            policy_id: policy.map(str::to_owned),
            kind: if parent.is_some() { BackupType::Incremental } else { BackupType::Full },
            requested: BackupType::Full,
            full_reason: None,
            agent: "caller".into(),
            state: BackupState::Completed,
            error: None,
            tags: BTreeMap::new(),
            bytes_transferred: 0,
            agent_phase: None,
            last_telemetry_at: None,
            created_at: completed,
            started_at: None,
            completed_at: Some(completed),
            disks: vec![DiskBackup {
                disk_id: 0,
                disk_key: 2000,
                capacity: 1,
                state: DiskState::Completed,
                parent: parent.map(str::to_owned),
                previous_change_id: String::new(),
                change_id: None,
                path: String::new(),
                export_name: String::new(),
                export_alias: String::new(),
                port: None,
                bytes_received: 0,
                bytes_unchanged: 0,
                stored_bytes: None,
                file_bytes: None,
                root_hash: None,
                error: None,
                sealed_at: None,
            }],
        }
    }

    #[test]
    fn what_is_past_its_time_goes_newest_first_unless_something_that_is_kept_builds_on_it() {
        let now = Timestamp::parse("2026-06-01T00:00:00Z").unwrap();
        let policy = |id: &str, days, enabled| Policy {
            id: id.into(),
            name: id.into(),
            enabled,
            primary_repository_id: "r".into(),
            retention_days: days,
            copy_rules: Vec::new(),
            created_at: now,
        };
        let policies = [policy("week", 7, true), policy("off", 1, false)];
        let week = Some("week");
        let cases: [(&str, Vec<Backup>, &[&str]); 5] = [
            (
                "nothing without a policy",
                vec![
                    backup("a", "v", None, 100, None),
                    backup("b", "v", None, 50, Some("off")),
                    backup("c", "v", None, 1, None),
                ],
                &[],
            ),
            (
                "a chain of which the newest is young stays whole",
                vec![
                    backup("a", "v", None, 30, week),
                    backup("b", "v", Some("a"), 20, week),
                    backup("c", "v", Some("b"), 3, week),
                ],
                &[],
            ),
            (
                "a chain that a newer full has replaced goes",
                vec![
                    backup("a", "v", None, 30, week),
                    backup("b", "v", Some("a"), 20, week),
                    backup("c", "v", None, 3, week),
                ],
                &["b", "a"],
            ),
            (
                "the newest of a VM stays, however old",
                vec![
                    backup("a", "v", None, 300, week),
                    backup("b", "w", None, 300, week),
                    backup("c", "w", None, 200, week),
                ],
                &["b"],
            ),
            (
                "a branch goes, its trunk stays",
                vec![
                    backup("a", "v", None, 30, week),
                    backup("b", "v", Some("a"), 20, week),
                    backup("c", "v", Some("a"), 2, week),
                ],
                &["b"],
            ),
        ];
        for (what, backups, gone) in cases {
            assert_eq!(expired(&backups, &policies, now), gone, "{what}");
        }
    }
}
