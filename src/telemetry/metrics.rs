//! Every metric: name, unit, kind and meaning, in one place.

use std::fmt::{Display, Write};

/// A metric's definition.
#[derive(Debug, Clone, Copy)]
pub struct Metric {
    /// Its name, ending in its unit.
    pub name: &'static str,
    /// `counter`, `gauge` or `histogram`.
    pub kind: &'static str,
    /// What it tells.
    pub help: &'static str,
}

macro_rules! metrics {
    ($($constant:ident = $name:literal $kind:literal $help:literal;)*) => {
        $(#[doc = $help] pub const $constant: Metric =
            Metric { name: $name, kind: $kind, help: $help };)*
        /// All of them.
        pub const ALL: &[Metric] = &[$($constant),*];
    };
}

metrics! {
    BACKUPS = "sendense_backups" "gauge" "Backups in the catalog, by state.";
    QUEUE = "sendense_backups_queued" "gauge" "Backups that wait for their turn.";
    RECEIVED = "sendense_backup_received_bytes" "gauge" "Bytes that came in of a running backup.";
    RATE = "sendense_backup_rate_bytes_per_second" "gauge" "Rate of a running backup over the last seconds.";
    LAST = "sendense_vm_last_backup_timestamp_seconds" "gauge" "When the last completed backup of a VM ended.";
    FREE = "sendense_repository_free_bytes" "gauge" "Room that is left in a repository.";
    TOTAL = "sendense_repository_size_bytes" "gauge" "Size of a repository's file system.";
    VERIFIED = "sendense_backup_verified_timestamp_seconds" "gauge" "When a backup was verified last.";
    CONNECTIONS = "sendense_nbd_connections" "gauge" "Connections of an export.";
    EXPORT_BYTES = "sendense_nbd_bytes_total" "counter" "Bytes of an export's requests, by direction.";
    EXPORT_ERRORS = "sendense_nbd_errors_total" "counter" "Requests of an export that were answered with an error.";
    LATENCY = "sendense_nbd_request_duration_seconds" "histogram" "Time from request to reply of an export.";
    PORTS = "sendense_nbd_ports_in_use" "gauge" "Ports of the pool that exports listen on.";
}

/// Metrics as text, in the format of Prometheus 0.0.4.
#[derive(Debug, Default)]
pub struct Text {
    out: String,
    last: &'static str,
}

impl Text {
    /// Adds a value. Values of one metric come one after the other.
    pub fn add(&mut self, metric: Metric, labels: &[(&str, &str)], value: impl Display) {
        self.head(metric);
        self.line(metric.name, "", labels, value);
    }

    fn head(&mut self, metric: Metric) {
        if self.last != metric.name {
            let Metric { name, kind, help } = metric;
            // Writing to a string does not fail.
            let _ = writeln!(self.out, "# HELP {name} {help}\n# TYPE {name} {kind}");
            self.last = name;
        }
    }

    /// Adds a histogram, from (upper bound in seconds, requests up to it).
    pub fn histogram(
        &mut self,
        metric: Metric,
        labels: &[(&str, &str)],
        buckets: &[(f64, u64)],
        sum: f64,
    ) {
        self.head(metric);
        let count = buckets.last().map_or(0, |(_, count)| *count);
        for (bound, count) in buckets {
            let bound = bound.to_string();
            let labels = [labels, &[("le", bound.as_str())]].concat();
            self.line(metric.name, "_bucket", &labels, count);
        }
        let all = [labels, &[("le", "+Inf")]].concat();
        self.line(metric.name, "_bucket", &all, count);
        self.line(metric.name, "_sum", labels, sum);
        self.line(metric.name, "_count", labels, count);
    }

    fn line(&mut self, name: &str, ending: &str, labels: &[(&str, &str)], value: impl Display) {
        let labels: Vec<String> = labels
            .iter()
            .map(|(key, value)| {
                let value = value.replace('\\', "\\\\").replace('"', "\\\"").replace('\n', "\\n");
                format!("{key}=\"{value}\"")
            })
            .collect();
        let _ = match labels.is_empty() {
            true => writeln!(self.out, "{name}{ending} {value}"),
            false => writeln!(self.out, "{name}{ending}{{{}}} {value}", labels.join(",")),
        };
    }

    /// The text.
    pub fn finish(self) -> String {
        self.out
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn metrics_are_told_in_the_format_of_prometheus() {
        let mut text = Text::default();
        text.add(BACKUPS, &[("state", "completed")], 3);
        text.add(BACKUPS, &[("state", "a\"b")], 1);
        text.histogram(LATENCY, &[("export", "e")], &[(0.001, 2), (0.002, 5)], 0.5);
        let text = text.finish();
        assert_eq!(text.matches("# TYPE sendense_backups gauge").count(), 1);
        assert!(text.contains("sendense_backups{state=\"completed\"} 3\n"));
        assert!(text.contains("state=\"a\\\"b\""));
        assert!(text.contains("_bucket{export=\"e\",le=\"0.001\"} 2\n"));
        assert!(text.contains("_count{export=\"e\"} 5\n"));
    }

    #[test]
    fn names_are_unique_and_tell_their_unit() {
        let names: std::collections::BTreeSet<_> = ALL.iter().map(|metric| metric.name).collect();
        assert_eq!(names.len(), ALL.len());
        assert!(ALL.iter().all(|m| m.kind != "counter" || m.name.ends_with("_total")));
    }
}
