//! `sendense-ctl`: what people and scripts ask of a running hub, over its API; and the agent that
//! sends disks of this machine itself (`run`).
//!
//! It shares no code with the hub's server side: what it knows of it is the API.

mod access;
mod backup;
mod doctor;
mod error;
mod http;
mod inventory;
mod output;
mod progress;
mod repository;
mod restore;
mod run;
mod sse;
mod system;
mod tls;
mod watch;

use std::path::PathBuf;
use std::process::ExitCode;

use clap::{Args, Parser, Subcommand};

use error::{CtlError, CtlResult};
use http::Api;
use output::Output;

/// Control a Sendense hub: back up, look, verify, manage, and find out what is wrong.
#[derive(Debug, Parser)]
#[command(name = "sendense-ctl", version, max_term_width = 100, after_help = error::EXIT_CODES)]
struct Cli {
    #[command(flatten)]
    globals: Globals,
    #[command(subcommand)]
    command: Command,
}

#[derive(Debug, Args)]
#[command(next_help_heading = "Hub and output")]
struct Globals {
    /// Address of the hub's API
    #[arg(
        long,
        global = true,
        env = "SENDENSE_URL",
        value_name = "URL",
        default_value = "http://127.0.0.1:8082"
    )]
    url: String,
    /// The token; others on this machine can see it in the list of processes
    #[arg(
        long,
        global = true,
        env = "SENDENSE_TOKEN",
        value_name = "TOKEN",
        hide_env_values = true
    )]
    token: Option<String>,
    /// File that holds the token; --token comes before it
    #[arg(long, global = true, env = "SENDENSE_TOKEN_FILE", value_name = "FILE")]
    token_file: Option<PathBuf>,
    /// Certificates to trust, PEM, where the hub speaks TLS [default: those of this system]
    #[arg(long, global = true, value_name = "FILE")]
    ca: Option<PathBuf>,
    /// Print JSON: what the API answers, or the result of the command
    #[arg(long, global = true)]
    json: bool,
    /// No progress, no notes
    #[arg(long, short, global = true)]
    quiet: bool,
}

#[derive(Debug, Subcommand)]
enum Command {
    /// Make backups, look at them, verify, cancel, delete
    #[command(subcommand)]
    Backup(backup::BackupCommand),
    /// The VMs and their disks
    #[command(subcommand)]
    Vm(inventory::VmCommand),
    /// Images that are served over NBD
    #[command(subcommand)]
    Export(inventory::ExportCommand),
    /// Where backups are kept
    #[command(subcommand)]
    Repository(repository::RepositoryCommand),
    /// Get disks and files back as they were
    #[command(subcommand)]
    Restore(restore::RestoreCommand),
    /// What runs now
    #[command(subcommand)]
    Job(backup::JobCommand),
    /// Who may use the API
    #[command(subcommand)]
    Token(access::TokenCommand),
    /// Logins of vCenters
    #[command(subcommand)]
    Credential(access::CredentialCommand),
    /// Rules for backups
    #[command(subcommand)]
    Policy(system::PolicyCommand),
    /// What was done
    #[command(subcommand)]
    Event(system::EventCommand),
    /// The hub's own account of what it keeps
    #[command(subcommand)]
    Catalog(system::CatalogCommand),
    /// Print a script that completes commands in a shell
    Completions(system::CompletionsArguments),
    /// Look for everything that keeps backups from working, and say what to do
    Doctor(doctor::DoctorArguments),
}

/// What every command has.
struct Context {
    api: Api,
    out: Output,
}

/// Longest token that is read from a file, in bytes.
const TOKEN: usize = 4096;

fn token(globals: &Globals) -> CtlResult<Option<String>> {
    let given = |token: &String| Some(token.trim().to_owned()).filter(|token| !token.is_empty());
    if let Some(token) = globals.token.as_ref().and_then(given) {
        return Ok(Some(token));
    }
    // A variable that is set to nothing is not set.
    let file = globals.token_file.as_ref().filter(|path| !path.as_os_str().is_empty());
    let Some(path) = file else { return Ok(None) };
    let next = "--token-file names a file that holds nothing but the token";
    let text = std::fs::read_to_string(path).map_err(|e| {
        CtlError::usage(format!("cannot read the token in '{}': {e}", path.display()), next)
    })?;
    if text.len() > TOKEN || text.trim().is_empty() || text.trim().contains(char::is_whitespace) {
        return Err(CtlError::usage(format!("'{}' holds no token", path.display()), next));
    }
    Ok(Some(text.trim().to_owned()))
}

fn dispatch(cli: Cli) -> CtlResult<u8> {
    let Cli { globals, command } = cli;
    if let Command::Completions(arguments) = command {
        return system::completions(&arguments);
    }
    let api = Api::new(&globals.url, token(&globals)?, globals.ca.as_deref())?;
    let out = Output { json: globals.json, quiet: globals.quiet };
    let context = Context { api, out };
    match command {
        Command::Backup(command) => backup::run(&context, command),
        Command::Vm(command) => inventory::vm(&context, command),
        Command::Export(command) => inventory::export(&context, command),
        Command::Repository(command) => repository::run(&context, command),
        Command::Restore(command) => restore::run(&context, command),
        Command::Job(command) => backup::job(&context, command),
        Command::Token(command) => access::token(&context, command),
        Command::Credential(command) => access::credential(&context, command),
        Command::Policy(command) => system::policy(&context, &command),
        Command::Event(command) => system::event(&context, command),
        Command::Catalog(command) => system::catalog(&context, &command),
        Command::Completions(arguments) => system::completions(&arguments),
        Command::Doctor(arguments) => doctor::run(&context, &arguments),
    }
}

/// Runs the command line of this process.
pub fn main() -> ExitCode {
    let code = dispatch(Cli::parse()).unwrap_or_else(|error| {
        output::complain(&error.to_string());
        error.kind.exit_code()
    });
    ExitCode::from(code)
}

#[cfg(test)]
mod tests {
    use super::*;
    use clap::CommandFactory;

    #[test]
    fn the_command_line_is_sound() {
        Cli::command().debug_assert();
    }

    #[test]
    fn the_hub_and_the_output_are_named_before_or_after_the_command() {
        for arguments in [
            ["sendense-ctl", "--json", "--url", "http://h", "vm", "list"],
            ["sendense-ctl", "vm", "list", "--json", "--url", "http://h"],
        ] {
            let cli = Cli::try_parse_from(arguments).unwrap();
            assert!(cli.globals.json && cli.globals.url == "http://h");
        }
    }
}
