//! What the hub's API tells about the hub.

use std::time::Duration;

use serde_json::{Value, json};

use super::Finding;
use crate::ctl::error::{CtlError, Kind};
use crate::ctl::http::{Api, LONG};
use crate::ctl::output::{each, number, size, word};
use crate::model::Timestamp;

/// The check without which no other of this kind makes sense.
pub(super) const REACHED: &str = "api";
/// Largest difference of two clocks that nobody minds.
const CLOCK: Duration = Duration::from_secs(5);
/// Time for which failed backups are news.
const NEWS: Duration = Duration::from_secs(24 * 3600);
/// Room below which a repository is nearly full, in bytes, and in parts of a hundred.
const LITTLE: (u64, u64) = (10 << 30, 5);
/// Failed backups that are named.
const NAMED: usize = 3;
/// Findings of the catalog that are told.
const TOLD: usize = 5;

fn failed(what: &'static str, error: &CtlError) -> Finding {
    match error.kind {
        // The token is looked at by itself.
        Kind::Unauthorized => Finding::skipped(what, error.cause.clone()),
        _ => Finding::bad(what, error.cause.clone(), error.next.clone()),
    }
}

/// Whether the hub answers, is healthy, and has the same time.
pub(super) fn health(api: &Api) -> Vec<Finding> {
    let asked = Timestamp::now();
    let health = match api.get("/health") {
        Ok(health) => health,
        Err(error) => return vec![Finding::bad(REACHED, error.cause, error.next)],
    };
    let answered = Timestamp::now();
    if health["service"] != "sendense-hub" {
        let text = format!("{} is no Sendense hub", api.base());
        return vec![Finding::bad(REACHED, text, "check --url (SENDENSE_URL)")];
    }
    let version = word(&health, "version");
    let reached = match health["status"].as_str() {
        Some("healthy") => {
            Finding::good(REACHED, format!("{} answers, version {version}", api.base()))
        }
        _ => Finding::bad(
            "health",
            format!("the hub is {}: {}", word(&health, "status"), word(&health, "database")),
            "look at the hub's log, and at its data directory",
        ),
    };
    vec![reached, clock(&word(&health, "timestamp"), asked, answered)]
}

/// Compares the hub's time with the times between which it was asked.
fn clock(told: &str, asked: Timestamp, answered: Timestamp) -> Finding {
    const WHAT: &str = "clock";
    let there = match Timestamp::parse(told) {
        Ok(there) => there,
        Err(error) => return Finding::bad(WHAT, error, "is hub and sendense-ctl of one version?"),
    };
    let apart = asked.since(there).max(there.since(answered));
    if apart <= CLOCK {
        return Finding::good(WHAT, "hub and this machine agree");
    }
    let text = format!("hub and this machine are {} s apart", apart.as_secs());
    Finding::bad(WHAT, text, "set both by NTP: names and ages of backups come from the clock")
}

/// Whether the token is valid, and what it may do.
pub(super) fn token(api: &Api) -> Vec<Finding> {
    const WHAT: &str = "token";
    if let Err(error) = api.get("/vms") {
        return vec![match error.kind {
            Kind::Unauthorized => Finding::bad(WHAT, error.cause, error.next),
            _ => failed(WHAT, &error),
        }];
    }
    let dry = json!({"vm_name": "", "backup_type": "full", "agent": "caller"});
    let may =
        |result: Result<Value, CtlError>| !matches!(result, Err(e) if e.kind == Kind::Unauthorized);
    let role = if may(api.get("/tokens")) {
        "admin"
    } else if may(api.post("/backups?dry_run=true", &dry, LONG)) {
        "operator"
    } else {
        "viewer"
    };
    let mut findings = vec![Finding::good(WHAT, format!("valid, with role {role}"))];
    if role == "viewer" {
        let text = "this token cannot make backups; what only operators see is not looked at";
        findings.push(Finding::skipped("role", text));
    }
    findings
}

/// Whether repositories can be used, and have room.
pub(super) fn repositories(api: &Api) -> Vec<Finding> {
    const WHAT: &str = "repository";
    let list = match api.get("/repositories") {
        Ok(list) => list,
        Err(error) => return vec![failed(WHAT, &error)],
    };
    let findings: Vec<Finding> = each(&list, "repositories").map(repository).collect();
    if findings.is_empty() {
        let next = "add one: sendense-ctl repository add NAME DIRECTORY";
        return vec![Finding::bad(WHAT, "there is none", next)];
    }
    findings
}

fn repository(view: &Value) -> Finding {
    const WHAT: &str = "repository";
    let (name, path) = (word(view, "name"), word(view, "path"));
    if let Some(error) = view["error"].as_str() {
        let next = format!("check that {path} is there, mounted, and the hub's to write");
        return Finding::bad(WHAT, format!("'{name}': {error}"), next);
    }
    let (free, total) = (number(view, "available_bytes"), number(view, "total_bytes"));
    let text = format!("'{name}' has {} of {} free", size(free), size(total));
    let (bytes, percent) = LITTLE;
    match free < bytes && free < total / 100 * percent {
        true => Finding::bad(WHAT, text, "delete backups, enlarge it, or add another repository"),
        false => Finding::good(WHAT, text),
    }
}

/// Whether ports are left in the pool.
pub(super) fn ports(api: &Api) -> Finding {
    const WHAT: &str = "ports";
    let status = match api.get("/nbd/ports/status") {
        Ok(status) => status,
        Err(error) => return failed(WHAT, &error),
    };
    let (free, total) = (number(&status, "available"), number(&status, "total_ports"));
    let text = format!("{free} of {total} are free in {}", word(&status, "range"));
    match free {
        0 => Finding::bad(
            WHAT,
            text,
            "release those of jobs that have ended (POST /api/v1/nbd/ports/release), or enlarge \
             nbd.pool",
        ),
        _ => Finding::good(WHAT, text),
    }
}

/// Backups that failed in the last day.
pub(super) fn failures(api: &Api) -> Finding {
    const WHAT: &str = "backups";
    let list = match api.get("/backups?status=failed") {
        Ok(list) => list,
        Err(error) => return failed(WHAT, &error),
    };
    let now = Timestamp::now();
    let is_news = |backup: &&Value| {
        let ended = backup["completed_at"].as_str().or(backup["created_at"].as_str());
        ended.and_then(|t| Timestamp::parse(t).ok()).is_some_and(|at| now.since(at) <= NEWS)
    };
    let news: Vec<&Value> = each(&list, "backups").filter(is_news).collect();
    if news.is_empty() {
        return Finding::good(WHAT, "none failed in the last day");
    }
    let named = news.iter().take(NAMED);
    let named = named.map(|b| format!("{} ({})", word(b, "backup_id"), word(b, "error_message")));
    let text =
        format!("{} failed in the last day: {}", news.len(), named.collect::<Vec<_>>().join("; "));
    Finding::bad(WHAT, text, "see what happened: sendense-ctl event list --subject ID")
}

/// Whether catalog and repositories agree.
pub(super) fn catalog(api: &Api) -> Finding {
    const WHAT: &str = "catalog";
    let checked = match api.post("/catalog/check", &json!({}), LONG) {
        Ok(checked) => checked,
        Err(error) => return failed(WHAT, &error),
    };
    let findings: Vec<&str> = each(&checked, "findings").filter_map(Value::as_str).collect();
    if findings.is_empty() {
        return Finding::good(WHAT, "it agrees with the repositories");
    }
    let told = findings.iter().take(TOLD).copied().collect::<Vec<_>>().join("; ");
    let text = format!("{} disagreements with the repositories: {told}", findings.len());
    Finding::bad(WHAT, text, "see all: sendense-ctl catalog check; import what is not known")
}

#[cfg(test)]
mod tests {
    use super::super::State;
    use super::*;

    #[test]
    fn clocks_may_differ_by_as_much_as_the_way_takes() {
        let now = Timestamp::now();
        let later = now.after(Duration::from_secs(60));
        let state = |told: Timestamp| clock(&told.to_string(), now, later).state;
        assert_eq!(state(now.after(Duration::from_secs(30))), State::Good);
        assert_eq!(state(now.after(Duration::from_secs(64))), State::Good);
        assert_eq!(state(now.after(Duration::from_secs(70))), State::Bad);
        assert_eq!(clock("yesterday", now, later).state, State::Bad);
    }

    #[test]
    fn a_repository_is_bad_with_an_error_or_little_room() {
        let view = |free: u64, total: u64| {
            repository(&json!({"name": "r", "available_bytes": free, "total_bytes": total})).state
        };
        assert_eq!(view(100 << 30, 1 << 40), State::Good);
        assert_eq!(view(1 << 30, 1 << 40), State::Bad);
        assert_eq!(view(1 << 30, 2 << 30), State::Good, "small, but half empty");
        assert_eq!(repository(&json!({"name": "r", "error": "gone"})).state, State::Bad);
    }
}
