//! What the process says of itself: the log.

pub mod metrics;

use std::io::IsTerminal;

use tracing_subscriber::EnvFilter;

/// Environment variable with the log filter, such as `debug` or `sendense_hub::nbd=trace`.
pub const LOG_VARIABLE: &str = "SENDENSE_LOG";

/// Starts logging to standard error, at `info` unless [`LOG_VARIABLE`] says otherwise. Call once.
pub fn start() {
    let filter = EnvFilter::try_from_env(LOG_VARIABLE).unwrap_or_else(|_| EnvFilter::new("info"));
    // Fails only where a log is there already; then that one stays.
    let _ = tracing_subscriber::fmt()
        .with_env_filter(filter)
        .with_writer(std::io::stderr)
        .with_ansi(std::io::stderr().is_terminal())
        .with_target(false)
        .try_init();
}
