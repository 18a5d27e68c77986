//! `sendense-ctl doctor`: everything that keeps backups from working, and what to do about it.

mod api;
mod host;
mod nbd;

use clap::Args;
use serde_json::{Value, json};

use super::Context;
use super::error::{CtlResult, FAILED, OK};

#[derive(Debug, Args)]
pub(super) struct DoctorArguments {
    /// Where the hub's NBD port is reached from here [default: what the last backup was told, or
    /// port 10809 of the hub]
    #[arg(long, value_name = "HOST:PORT")]
    pub(super) nbd: Option<String>,
    /// The hub's data directory, where this is its machine: its permissions are looked at
    #[arg(long, value_name = "DIR")]
    pub(super) data_dir: Option<std::path::PathBuf>,
    /// The user as whom capture appliances come through SSH
    #[arg(long, value_name = "USER", default_value = "vma_tunnel")]
    pub(super) tunnel_user: String,
}

/// What came out of a check.
#[derive(Debug, Clone, Copy, PartialEq, Eq)]
enum State {
    /// As it should be.
    Good,
    /// Something is to be done.
    Bad,
    /// It could not be looked at.
    Skipped,
}

impl State {
    fn word(self) -> &'static str {
        match self {
            Self::Good => "ok",
            Self::Bad => "BAD",
            Self::Skipped => "skipped",
        }
    }
}

/// One thing that was looked at.
#[derive(Debug, Clone, PartialEq, Eq)]
struct Finding {
    what: &'static str,
    state: State,
    text: String,
    /// What to do.
    next: String,
}

impl Finding {
    fn good(what: &'static str, text: impl Into<String>) -> Self {
        Self { what, state: State::Good, text: text.into(), next: String::new() }
    }

    fn bad(what: &'static str, text: impl Into<String>, next: impl Into<String>) -> Self {
        Self { what, state: State::Bad, text: text.into(), next: next.into() }
    }

    fn skipped(what: &'static str, text: impl Into<String>) -> Self {
        Self { what, state: State::Skipped, text: text.into(), next: String::new() }
    }

    fn to_json(&self) -> Value {
        json!({
            "check": self.what,
            "state": self.state.word().to_lowercase(),
            "text": self.text,
            "next": self.next,
        })
    }

    fn words(&self) -> String {
        let line = format!("{:<8}{:<13}{}", self.state.word(), self.what, self.text);
        match self.next.as_str() {
            "" => line,
            next => format!("{line}\n{:21}-> {next}", ""),
        }
    }
}

pub(super) fn run(context: &Context, arguments: &DoctorArguments) -> CtlResult<u8> {
    let api = &context.api;
    let mut findings = api::health(api);
    if findings.iter().all(|finding| finding.state != State::Bad || finding.what != api::REACHED) {
        findings.extend(api::token(api));
        findings.extend(api::repositories(api));
        findings.push(api::ports(api));
        findings.push(api::failures(api));
        findings.push(api::catalog(api));
    }
    findings.push(nbd::port(api, arguments.nbd.as_deref()));
    findings.extend(host::tunnel(&arguments.tunnel_user));
    match &arguments.data_dir {
        Some(directory) => findings.extend(host::data_directory(directory)),
        None => findings.push(Finding::skipped("data", "its permissions; name it with --data-dir")),
    }
    let bad = findings.iter().filter(|finding| finding.state == State::Bad).count();
    let checks: Vec<Value> = findings.iter().map(Finding::to_json).collect();
    let result = json!({"findings": bad, "checks": checks});
    context.out.done(&result, || {
        let mut lines: Vec<String> = findings.iter().map(Finding::words).collect();
        lines.push(match bad {
            0 => "all is well".to_owned(),
            1 => "one finding".to_owned(),
            many => format!("{many} findings"),
        });
        lines.join("\n")
    })?;
    Ok(if bad == 0 { OK } else { FAILED })
}
