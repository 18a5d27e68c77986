//! `sendense-hub status`

use std::io::Read;
use std::os::unix::net::UnixStream;
use std::path::PathBuf;
use std::process::ExitCode;

use clap::Args;
use serde_json::Value;

use super::output;

/// Longest status that is read, in bytes.
const MAX_STATUS: u64 = 64 << 20;

#[derive(Debug, Args)]
pub(super) struct StatusArguments {
    /// The --control socket of the server
    control: PathBuf,
    /// Print JSON
    #[arg(long)]
    json: bool,
}

pub(super) fn run(arguments: &StatusArguments) -> Result<ExitCode, String> {
    let path = arguments.control.display();
    let mut text = String::new();
    UnixStream::connect(&arguments.control)
        .and_then(|stream| stream.take(MAX_STATUS).read_to_string(&mut text))
        .map_err(|e| format!("cannot ask the server at '{path}': {e}; is it running?"))?;
    let status: Value =
        serde_json::from_str(&text).map_err(|e| format!("'{path}' is no status socket: {e}"))?;
    if arguments.json {
        output::json(&status)?;
        return Ok(ExitCode::SUCCESS);
    }
    let number = |value: &Value, key: &str| value[key].as_u64().unwrap_or(0);
    output::line(&format!(
        "{:<24} {:>10} {:>5} {:>10} {:>10} {:>9} {:>7} {:>9}",
        "EXPORT", "SIZE", "CONNS", "READ", "WRITTEN", "REQUESTS", "ERRORS", "P99"
    ))?;
    for export in status["exports"].as_array().into_iter().flatten() {
        let requests: u64 =
            ["reads", "writes", "flushes", "trims", "zeroes", "block_status", "caches"]
                .iter()
                .map(|key| number(export, key))
                .sum();
        output::line(&format!(
            "{:<24} {:>10} {:>5} {:>10} {:>10} {:>9} {:>7} {:>6} us",
            export["name"].as_str().unwrap_or(""),
            output::size(number(export, "size")),
            number(export, "connections"),
            output::size(number(export, "bytes_read")),
            output::size(number(export, "bytes_written")),
            requests,
            number(export, "errors"),
            number(export, "latency_p99_us"),
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}
