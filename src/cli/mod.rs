//! The commands of `sendense-hub`.

mod demo;
mod export;
mod guest_worker;
mod image;
mod output;
mod serve;
mod status;

use std::process::ExitCode;

use clap::{Parser, Subcommand};

/// Exit code of a command that failed.
const FAILURE: u8 = 1;

/// An in-process NBD server and backup hub that writes QCOW2 chains.
#[derive(Debug, Parser)]
#[command(name = "sendense-hub", version, max_term_width = 100)]
struct Cli {
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Back up a made-up disk over NBD on loopback, read it back, and show the figures
    Demo(demo::DemoArguments),
    /// Serve images over NBD until a signal ends it
    Export(Box<export::ExportArguments>),
    /// Read guests' disks for the hub, which starts it
    #[command(hide = true)]
    GuestWorker(guest_worker::WorkerArguments),
    /// Work on image files: create, info, check, map, compare
    #[command(subcommand)]
    Image(image::ImageCommand),
    /// Run the hub: backups, catalog, API, until a signal ends it
    Serve(serve::ServeArguments),
    /// Show what a running server does
    Status(status::StatusArguments),
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let cli = Cli::parse();
    let result = match cli.command {
        Command::Demo(arguments) => demo::run(&arguments),
        Command::Export(arguments) => export::run(*arguments),
        Command::GuestWorker(arguments) => guest_worker::run(&arguments),
        Command::Image(command) => image::run(command),
        Command::Serve(arguments) => serve::run(&arguments),
        Command::Status(arguments) => status::run(&arguments),
    };
    result.unwrap_or_else(|message| {
        output::error(&message);
        ExitCode::from(FAILURE)
    })
}
