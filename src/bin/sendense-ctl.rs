//! The `sendense-ctl` command.

use std::process::ExitCode;

fn main() -> ExitCode {
    sendense_hub::ctl::main()
}
