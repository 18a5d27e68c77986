//! Whether nothing came between a backup and the one that builds on it.
//!
//! A bitmap is cleared when a backup has completed. It tells what changed since the last one, and
//! only that: where the hub builds on an earlier one, because the last one was deleted, is damaged, or
//! lies in another repository, what changed between the two is in no bitmap any more.

use serde_json::Value;

use crate::ctl::error::CtlResult;
use crate::ctl::http::{Api, query};
use crate::ctl::output::each;
use crate::model::Timestamp;

/// Events that are looked at: as many as the hub tells.
const EVENTS: usize = 1000;
/// The event of a backup that has become a restore point.
const COMPLETED: &str = "backup.completed";

/// Whether `parent` is the last backup of the VM that has completed; `own` is the one that runs.
pub(super) fn is_last(api: &Api, vm: &str, parent: &Value, own: &str) -> CtlResult<bool> {
    let backups = api.get(&format!("/backups{}", query(&[("vm_name", Some(vm))])))?;
    let limit = EVENTS.to_string();
    let events = api.get(&format!("/events{}", query(&[("limit", Some(limit.as_str()))])))?;
    Ok(judge(parent, own, &backups, &events))
}

/// What backup ids of one VM have in common: all but the time and what is random.
fn family(id: &str) -> Option<&str> {
    id.rsplitn(3, '-').nth(2)
}

fn at(value: &Value, key: &str) -> Option<Timestamp> {
    Timestamp::parse(value[key].as_str()?).ok()
}

/// The same; `false` also where it cannot be told.
fn judge(parent: &Value, own: &str, backups: &Value, events: &Value) -> bool {
    let (Some(id), Some(ended)) = (parent["backup_id"].as_str(), at(parent, "completed_at")) else {
        return false;
    };
    let other = |name: &Value| name != id && name != own;
    let later = each(backups, "backups").any(|backup| {
        other(&backup["backup_id"])
            && at(backup, "completed_at").is_some_and(|at| at > ended)
            && !matches!(backup["status"].as_str(), Some("failed" | "cancelled"))
    });
    // Backups that are there no more have left their events.
    let gone = each(events, "events").any(|event| {
        let subject = &event["subject"];
        event["action"] == COMPLETED
            && other(subject)
            && subject.as_str().and_then(family) == family(own)
            && at(event, "at").is_none_or(|at| at > ended)
    });
    let oldest = each(events, "events").last().and_then(|event| at(event, "at"));
    let reaches_back =
        each(events, "events").count() < EVENTS || oldest.is_some_and(|at| at <= ended);
    !later && !gone && reaches_back
}

#[cfg(test)]
mod tests {
    use super::*;
    use serde_json::json;

    const OWN: &str = "backup-web-20261121T150000-00000003";

    fn parent() -> Value {
        json!({"backup_id": "backup-web-20261121T130000-00000001", "status": "completed",
            "completed_at": "2026-11-21T13:00:05.000Z"})
    }

    fn event(subject: &str, time: &str) -> Value {
        json!({"action": COMPLETED, "subject": subject, "at": time})
    }

    fn judged(backups: &[Value], events: &[Value]) -> bool {
        judge(&parent(), OWN, &json!({"backups": backups}), &json!({"events": events}))
    }

    #[test]
    fn a_backup_in_between_is_found_whether_it_is_still_there_or_not() {
        let between = "backup-web-20261121T140000-00000002";
        let time = "2026-11-21T14:00:05.000Z";
        let own = event("backup-web-20261121T130000-00000001", "2026-11-21T13:00:06.000Z");
        let earlier = event("backup-web-20261121T120000-00000000", "2026-11-21T12:00:00.000Z");
        let of_others = event("backup-web-1-20261121T140000-00000009", time);
        assert!(judged(&[parent()], &[of_others, own, earlier]));
        assert!(!judged(&[parent()], &[event(between, time)]), "deleted since");
        let there =
            |status: &str| json!({"backup_id": between, "status": status, "completed_at": time});
        assert!(!judged(&[there("completed"), parent()], &[]), "in another repository");
        assert!(judged(&[there("failed"), parent()], &[]));
    }

    #[test]
    fn events_that_do_not_reach_back_tell_nothing() {
        let late = vec![event("backup-db-20261121T140000-0a", "2026-11-21T14:00:05.000Z"); EVENTS];
        assert!(!judged(&[parent()], &late));
        let mut back = late;
        back[EVENTS - 1]["at"] = "2026-11-21T12:00:00.000Z".into();
        assert!(judged(&[parent()], &back));
        assert!(!judge(&json!({}), OWN, &json!({}), &json!({})));
    }
}
