//! What the hub tells Prometheus.

use std::collections::BTreeMap;

use crate::backup::{Backups, Failure};
use crate::catalog::BackupFilter;
use crate::model::BackupState;
use crate::repository::Root;
use crate::telemetry::metrics::{self, Text};

pub(super) fn render(backups: &Backups) -> Result<String, Failure> {
    let mut text = Text::default();
    let catalog = backups.catalog();
    let all = catalog.backups(&BackupFilter::default())?;
    let mut states: BTreeMap<&str, u64> = BTreeMap::new();
    let mut last: BTreeMap<&str, i64> = BTreeMap::new();
    for backup in &all {
        *states.entry(backup.state.as_str()).or_default() += 1;
        if let (BackupState::Completed, Some(at)) = (backup.state, backup.completed_at) {
            let latest = last.entry(&backup.vm_name).or_insert(i64::MIN);
            *latest = (*latest).max(at.unix());
        }
    }
    for (state, count) in &states {
        text.add(metrics::BACKUPS, &[("state", state)], count);
    }
    text.add(metrics::QUEUE, &[], states.get("queued").unwrap_or(&0));
    let running: Vec<_> = all.iter().filter(|backup| backup.state.is_running()).collect();
    for backup in &running {
        let labels = [("backup", backup.id.as_str()), ("vm", backup.vm_name.as_str())];
        text.add(metrics::RECEIVED, &labels, backups.progress(backup).bytes_transferred);
    }
    for backup in &running {
        let labels = [("backup", backup.id.as_str()), ("vm", backup.vm_name.as_str())];
        text.add(metrics::RATE, &labels, backups.progress(backup).rate);
    }
    for (vm, at) in &last {
        text.add(metrics::LAST, &[("vm", vm)], at);
    }
    let rooms: Vec<_> = catalog
        .repositories()?
        .into_iter()
        .filter_map(|r| Some((r.name, Root::open(r.path.as_ref()).ok()?.0.space().ok()?)))
        .collect();
    for (name, space) in &rooms {
        text.add(metrics::FREE, &[("repository", name)], space.free);
    }
    for (name, space) in &rooms {
        text.add(metrics::TOTAL, &[("repository", name)], space.total);
    }
    for (backup, at) in catalog.verified()? {
        text.add(metrics::VERIFIED, &[("backup", &backup)], at.unix());
    }
    exports(backups, &mut text);
    let ports = backups.publisher().ports().map_or(0, |(_, used)| used.len());
    text.add(metrics::PORTS, &[], ports);
    Ok(text.finish())
}

fn exports(backups: &Backups, text: &mut Text) {
    let all = backups.publisher().server().exports.all();
    for export in &all {
        text.add(metrics::CONNECTIONS, &[("export", &export.name)], export.connections().0);
    }
    for export in &all {
        let stats = export.stats.snapshot();
        for (direction, bytes) in [("read", stats.bytes_read), ("write", stats.bytes_written)] {
            let labels = [("export", export.name.as_str()), ("direction", direction)];
            text.add(metrics::EXPORT_BYTES, &labels, bytes);
        }
    }
    for export in &all {
        let errors = export.stats.snapshot().errors;
        text.add(metrics::EXPORT_ERRORS, &[("export", &export.name)], errors);
    }
    for export in &all {
        let (buckets, sum) = export.stats.latency_histogram();
        text.histogram(metrics::LATENCY, &[("export", &export.name)], &buckets, sum);
    }
}
