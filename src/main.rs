//! The `sendense-hub` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    sendense_hub::cli::main()
}
