//! `sendense-hub guest-worker`: what the hub starts to read guests' disks, and nobody else.

use std::process::ExitCode;

use clap::Args;

use crate::worker;

#[derive(Debug, Args)]
pub(super) struct WorkerArguments {
    /// Bytes of memory
    #[arg(long)]
    memory: u64,
    /// Process that started it
    #[arg(long)]
    parent: u32,
}

pub(super) fn run(arguments: &WorkerArguments) -> Result<ExitCode, String> {
    worker::serve(arguments.memory, arguments.parent).map_err(|e| e.to_string())?;
    Ok(ExitCode::SUCCESS)
}
