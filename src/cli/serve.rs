//! `sendense-hub serve`

use std::io::{self, Write};
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::export::{FORCED, raise_file_limit};
use crate::app::{self, Ended, Reachable};
use crate::config::HubConfig;
use crate::telemetry;

/// Where the hub keeps its data unless told otherwise.
const DATA_DIR: &str = "/var/lib/sendense";
/// Threads for the API and for negotiations.
const THREADS: usize = 2;

#[derive(Debug, Args)]
pub(super) struct ServeArguments {
    /// Configuration, TOML; everything has a default
    #[arg(long, value_name = "FILE")]
    config: Option<PathBuf>,
    /// Where the hub keeps its catalog, its key and, unless there is another, its repository
    /// [default: data_dir of the configuration, or /var/lib/sendense]
    #[arg(long, value_name = "DIR")]
    data_dir: Option<PathBuf>,
    /// Check the configuration and end
    #[arg(long)]
    check: bool,
}

pub(super) fn run(arguments: &ServeArguments) -> Result<ExitCode, String> {
    let config = match &arguments.config {
        Some(path) => HubConfig::read(path)?,
        None => HubConfig::default(),
    };
    app::check(&config)?;
    if arguments.check {
        return Ok(ExitCode::SUCCESS);
    }
    telemetry::start();
    raise_file_limit();
    let directory = arguments
        .data_dir
        .clone()
        .or_else(|| config.data_dir.clone())
        .unwrap_or_else(|| DATA_DIR.into());
    let runtime = tokio::runtime::Builder::new_multi_thread()
        .worker_threads(THREADS)
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))?;
    let served = runtime.block_on(app::serve(config, directory, announce));
    let ended = served.map_err(|e| e.to_string())?;
    // A device that does not come back must not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ended::Clean => Ok(ExitCode::SUCCESS),
        Ended::Unclean => Ok(ExitCode::from(super::FAILURE)),
        Ended::Forced => std::process::exit(i32::from(FORCED)),
    }
}

/// Tells where the hub can be reached, and its first token.
fn announce(reachable: &Reachable) -> io::Result<()> {
    let mut out = io::stdout().lock();
    for address in &reachable.nbd {
        writeln!(out, "nbd: nbd://{address}/")?;
    }
    writeln!(out, "agent api: http://{}/api/v1", reachable.agent)?;
    if let Some(address) = reachable.admin {
        writeln!(out, "admin api: {address}")?;
    }
    if let Some(token) = &reachable.first_token {
        writeln!(out, "admin token, told this once: {token}")?;
    }
    writeln!(out, "ready")?;
    out.flush()
}
