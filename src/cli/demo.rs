//! `sendense-hub demo`

use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;

use super::output;
use crate::demo;

#[derive(Debug, Args)]
pub(super) struct DemoArguments {
    /// Where to make the temporary files (about 2 GiB) [default: the system's directory for them]
    #[arg(long, value_name = "DIR")]
    directory: Option<PathBuf>,
}

#[allow(clippy::cast_precision_loss, reason = "rates are shown with three digits")]
pub(super) fn run(arguments: &DemoArguments) -> Result<ExitCode, String> {
    let directory = arguments.directory.clone().unwrap_or_else(demo::default_directory);
    output::line(&format!(
        "Starting a hub on its defaults in {}, making a disk with a FAT file system, backing it \
         up ...",
        directory.display()
    ))?;
    let outcome = demo::run(&directory).map_err(|e| format!("the demonstration failed: {e}"))?;
    output::line(&format!("\ndisk: {}\n", output::size(outcome.disk)))?;
    output::line(&format!(
        "{:<20} {:>12} {:>12} {:>10} {:>14}",
        "STEP", "OVER NBD", "FILE", "TIME", "RATE"
    ))?;
    for step in &outcome.steps {
        let seconds = step.took.as_secs_f64();
        #[allow(clippy::cast_possible_truncation, clippy::cast_sign_loss, reason = "a rate")]
        let rate = (step.bytes as f64 / seconds.max(1e-9)) as u64;
        output::line(&format!(
            "{:<20} {:>12} {:>12} {:>8.3} s {:>12}/s",
            step.name,
            output::size(step.bytes),
            step.file.map_or_else(|| "-".to_owned(), output::size),
            seconds,
            output::size(rate),
        ))?;
    }
    output::line("\nCHAIN")?;
    for (depth, (id, kind)) in outcome.chain.iter().enumerate() {
        output::line(&format!("{}{kind} {id}", "  ".repeat(depth)))?;
    }
    show(&outcome.taken)?;
    for finding in &outcome.findings {
        output::line(&format!("check: {finding}"))?;
    }
    match outcome.difference {
        _ if !outcome.taken.same => {
            Err(format!("{} is not what was backed up", outcome.taken.path))
        }
        Some(at) => Err(format!("the chain differs from the disk at byte {at}")),
        None if !outcome.findings.is_empty() => Err("the check of the images is not clean".into()),
        None => {
            output::line(
                "\nThe chain reads back equal to the disk, the file is what lies on it, and images and \
                 catalog are clean.",
            )?;
            Ok(ExitCode::SUCCESS)
        }
    }
}

/// What lies in the newest restore point, and the file that was taken out of it.
fn show(taken: &demo::Taken) -> Result<(), String> {
    let ready = taken.ready.as_secs_f64() * 1000.0;
    output::line(&format!("\nFILES of the newest restore point, ready in {ready:.0} ms"))?;
    output::line(&taken.volume)?;
    const SHOWN: usize = 4;
    for (name, size) in taken.listing.iter().rev().take(SHOWN) {
        output::line(&format!("  {:>10}  {name}", output::size(*size)))?;
    }
    let rest = taken.listing.len().saturating_sub(SHOWN);
    output::line(&format!("  and {rest} more\ntaken out: {}", taken.path))?;
    output::line(&format!("  SHA-256 {}", taken.sha256))
}
