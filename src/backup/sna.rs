//! The capture appliance's API (SNA), as the hub uses it.

use std::time::Duration;

use serde::Serialize;

use super::error::{Failure, FailureKind};

/// Longest answer that is read, in bytes.
const LONGEST: u64 = 64 << 10;
/// Time for a connection.
const CONNECT: Duration = Duration::from_secs(5);
/// Calls of `start` where nobody listens: the tunnel may just be coming up.
const ATTEMPTS: u32 = 3;
/// Time between them.
const PAUSE: Duration = Duration::from_millis(500);

/// What starts an agent. Every key is required, and a string.
#[derive(Serialize)]
pub(super) struct Start<'a> {
    pub(super) vm_name: &'a str,
    pub(super) vcenter_host: &'a str,
    pub(super) vcenter_user: &'a str,
    pub(super) vcenter_password: &'a str,
    pub(super) vm_path: &'a str,
    pub(super) nbd_host: &'a str,
    pub(super) nbd_targets: &'a str,
    pub(super) job_id: &'a str,
    pub(super) backup_type: &'a str,
    pub(super) previous_change_id: &'a str,
}

/// Whether an agent lives.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
pub(super) enum Life {
    /// The appliance knows the job and says that it runs.
    Alive,
    /// The appliance says that it does not.
    Gone,
    /// The appliance does not answer, or says nothing about it.
    Unknown,
}

/// The appliance.
pub(super) struct Sna {
    base: String,
    agent: ureq::Agent,
}

impl Sna {
    pub(super) fn new(base: &str, timeout: Duration) -> Self {
        let config = ureq::Agent::config_builder()
            .timeout_connect(Some(CONNECT.min(timeout)))
            .timeout_global(Some(timeout))
            .http_status_as_error(false)
            .build();
        Self { base: base.trim_end_matches('/').to_owned(), agent: config.into() }
    }

    fn post(&self, path: &str, body: &impl Serialize) -> Result<(u16, String), ureq::Error> {
        let mut answer = self.agent.post(format!("{}{path}", self.base)).send_json(body)?;
        let text = answer.body_mut().with_config().limit(LONGEST).read_to_string()?;
        Ok((answer.status().as_u16(), text))
    }

    /// Starts the agent of a backup. A call that may have reached the appliance is not repeated.
    pub(super) fn start(&self, start: &Start<'_>) -> Result<(), Failure> {
        let failed =
            |message: String, next: &str| Err(Failure::new(FailureKind::Agent, message, next));
        let mut attempt = 1;
        loop {
            match self.post("/api/v1/backup/start", start) {
                Ok((200..=299, _)) => return Ok(()),
                Ok((status, text)) => {
                    let text = text.trim();
                    return failed(
                        format!("the capture appliance refused the backup ({status}): {text}"),
                        "its log says more",
                    );
                }
                Err(ureq::Error::Io(e))
                    if e.kind() == std::io::ErrorKind::ConnectionRefused && attempt < ATTEMPTS =>
                {
                    attempt += 1;
                    std::thread::sleep(PAUSE);
                }
                Err(error) => {
                    return failed(
                        format!("the capture appliance at {} does not answer: {error}", self.base),
                        "check the tunnel and the appliance, then start the backup again",
                    );
                }
            }
        }
    }

    /// Asks whether the agent of a job lives.
    pub(super) fn life(&self, job: &str) -> Life {
        let answer = self.agent.get(format!("{}/api/v1/status/{job}", self.base)).call();
        let Ok(mut answer) = answer else { return Life::Unknown };
        let Ok(text) = answer.body_mut().with_config().limit(LONGEST).read_to_string() else {
            return Life::Unknown;
        };
        match answer.status().as_u16() {
            404 | 410 => Life::Gone,
            200 => {
                let told = serde_json::from_str::<serde_json::Value>(&text).unwrap_or_default();
                match told.get("status").and_then(|status| status.as_str()) {
                    Some("failed" | "error" | "exited" | "stopped" | "cancelled" | "not_found") => {
                        Life::Gone
                    }
                    Some("started" | "starting" | "running" | "in_progress") => Life::Alive,
                    _ => Life::Unknown,
                }
            }
            _ => Life::Unknown,
        }
    }

    /// Asks the appliance to take away what a job left: snapshot and process.
    pub(super) fn clean_up(&self, job: &str) {
        let body = serde_json::json!({"job_id": job, "action": "cleanup_all"});
        match self.post("/api/v1/cleanup", &body) {
            Ok((200..=299, _)) => tracing::info!(%job, "the agent has cleaned up"),
            Ok((status, text)) => {
                tracing::warn!(%job, status, text = text.trim(), "the agent did not clean up");
            }
            Err(error) => tracing::warn!(%job, %error, "the agent could not be told to clean up"),
        }
    }
}
