//! Watching a backup until it has ended.

use std::io::BufReader;
use std::time::Instant;

use serde_json::Value;

use super::Context;
use super::error::{CtlError, CtlResult, FAILED, OK};
use super::http::{Api, HUB_RESTART, encode};
use super::output::{line, number, size, word};
use super::progress::Display;
use super::sse;

/// Shows the progress of a backup until it has ended; the exit code tells whether it completed.
pub(super) fn watch(context: &Context, id: &str) -> CtlResult<u8> {
    let display = Display::new(context.out);
    let mut last = Value::Null;
    let mut printed = Ok(());
    let followed = follow(&context.api, id, |backup| {
        if context.out.json {
            // As they come, one per line.
            if printed.is_ok() {
                printed = line(&backup.to_string());
            }
        } else {
            show(&display, backup);
        }
        last = backup.clone();
    });
    display.end();
    followed?;
    printed?;
    if !context.out.json && !context.out.quiet {
        line(&ending(&last))?;
    }
    Ok(if last["status"] == "completed" { OK } else { FAILED })
}

fn show(display: &Display, backup: &Value) {
    let phase = word(backup, "current_phase");
    let (done, total) = match backup["progress_percent"].as_f64() {
        Some(percent) if backup["backup_type"] == "full" => {
            (percent.clamp(0.0, 100.0), number(backup, "total_bytes"))
        }
        // Nobody knows before how much has changed.
        _ => {
            let sent = number(backup, "bytes_transferred");
            return display.at(&format!("{phase}, sent so far"), sent, sent);
        }
    };
    #[allow(
        clippy::cast_possible_truncation,
        clippy::cast_sign_loss,
        clippy::cast_precision_loss,
        reason = "a bar has a few dozen characters"
    )]
    let done = (total as f64 * done / 100.0) as u64;
    display.at(&phase, done, total);
}

/// How a backup ended, in a sentence.
pub(super) fn ending(backup: &Value) -> String {
    let id = word(backup, "backup_id");
    let vm = word(backup, "vm_name");
    match backup["status"].as_str() {
        Some("completed") => format!(
            "{id}: {} backup of '{vm}' is complete: {} came in, {} stored",
            word(backup, "backup_type"),
            size(number(backup, "bytes_transferred")),
            size(number(backup, "stored_bytes")),
        ),
        status => format!(
            "{id}: the backup of '{vm}' {}: {}",
            if status == Some("cancelled") { "was cancelled" } else { "failed" },
            word(backup, "error_message")
        ),
    }
}

/// Whether a backup with this status goes on.
pub(super) fn is_running(backup: &Value) -> bool {
    matches!(backup["status"].as_str(), Some("pending" | "running"))
}

/// Calls `seen` whenever the backup has changed, until it has ended. A hub that is started again
/// meanwhile is waited for.
fn follow(api: &Api, id: &str, mut seen: impl FnMut(&Value)) -> CtlResult<()> {
    let path = format!("/backups/{}/events", encode(id));
    let mut heard: Option<Instant> = None;
    loop {
        let opened = match heard {
            // The first failure is told at once: nobody waits for a wrong address.
            None => api.stream(&path),
            Some(since) => api.patiently(
                HUB_RESTART,
                |api| api.stream(&path),
                |time, error| {
                    if since.elapsed() > HUB_RESTART {
                        return Err(error.clone());
                    }
                    std::thread::sleep(time);
                    Ok(())
                },
            ),
        };
        let (_, stream) = opened?;
        let mut ended = false;
        let mut broken = None;
        let read = sse::read(&mut BufReader::new(stream), |data| {
            match serde_json::from_str::<Value>(data) {
                Ok(backup) => {
                    seen(&backup);
                    ended = !is_running(&backup);
                }
                Err(error) => broken = Some(error),
            }
            heard = Some(Instant::now());
            !ended && broken.is_none()
        });
        if ended {
            return Ok(());
        }
        if let Some(error) = broken {
            let next = "check that hub and sendense-ctl are of the same version";
            return Err(CtlError::failed(
                format!("the hub's progress makes no sense: {error}"),
                next,
            ));
        }
        // The hub ends, or the connection was cut: it is asked again.
        match (read, heard) {
            (_, Some(since)) if since.elapsed() <= HUB_RESTART => {
                std::thread::sleep(std::time::Duration::from_millis(200));
            }
            (Ok(()), _) => {
                let next = format!("see how it is: sendense-ctl backup show {id}");
                return Err(CtlError::failed("the hub tells no more of the backup", next));
            }
            (Err(error), _) => {
                let next = format!("see how it is: sendense-ctl backup show {id}");
                return Err(CtlError::failed(
                    format!("the hub's progress broke off: {error}"),
                    next,
                ));
            }
        }
    }
}
