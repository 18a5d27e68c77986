//! `sendense-hub export`

use std::net::SocketAddr;
use std::path::PathBuf;
use std::process::ExitCode;
use std::time::Duration;

use clap::Args;
use qcow2::CreateOptions;

use super::image::{CreateArguments, create_options};
use crate::app::{self, AppOptions, Ended};
use crate::model::{ExportSpec, Format, Source, parse_size, validate_export_name};
use crate::nbd::limits::Limits;
use crate::nbd::ports::PortRange;
use crate::telemetry;

/// Where everything is served unless told otherwise.
const DEFAULT_LISTEN: &str = "127.0.0.1:10809";
/// Exit code after a second signal: 128 and the number of SIGINT.
pub(super) const FORCED: u8 = 130;
/// Size of an empty argument to `--pool`.
const DEFAULT_POOL: &str = "10100-10200";

#[derive(Debug, Args)]
pub(super) struct ExportArguments {
    /// NAME=IMAGE: a name for clients, and a qcow2 image, raw file or block device. The format is
    /// told by the ending (.qcow2, .raw, .img) or a prefix (qcow2:, raw:), never guessed
    #[arg(value_name = "NAME=IMAGE")]
    exports: Vec<String>,
    /// TCP address to serve every export on; may be given more than once [default: 127.0.0.1:10809,
    /// unless --unix or systemd sockets are used]
    #[arg(long, value_name = "ADDR")]
    listen: Vec<SocketAddr>,
    /// Unix socket to serve every export on
    #[arg(long, value_name = "PATH")]
    unix: Option<PathBuf>,
    /// Give each export a port of its own too, from this range
    #[arg(long, value_name = "A-B", num_args = 0..=1, default_missing_value = DEFAULT_POOL)]
    pool: Option<PortRange>,
    /// Refuse writes
    #[arg(long)]
    read_only: bool,
    /// Most connections of one export at a time
    #[arg(long, value_name = "N")]
    max_connections: Option<usize>,
    /// Make the image, which must not exist, with a disk of this size (0 with --backing: as large as
    /// the backing file's disk)
    #[arg(long, value_name = "SIZE", value_parser = parse_size)]
    create: Option<u64>,
    #[command(flatten)]
    new_image: CreateArguments,
    /// Directory of export drop-ins (*.conf, as for nbd-server); read again on SIGHUP
    #[arg(long, value_name = "DIR")]
    config_dir: Option<PathBuf>,
    /// Unix socket for `sendense-hub status`
    #[arg(long, value_name = "PATH")]
    control: Option<PathBuf>,
    /// Memory for payloads in all
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "256M")]
    buffers: u64,
    /// Longest payload of a request
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64M")]
    max_payload: u64,
    /// Time for the negotiation of a connection, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 10)]
    handshake_timeout: u64,
    /// Time for the shutdown, in seconds
    #[arg(long, value_name = "SECONDS", default_value_t = 30)]
    shutdown_timeout: u64,
}

pub(super) fn run(arguments: ExportArguments) -> Result<ExitCode, String> {
    telemetry::start();
    let options = resolve(arguments)?;
    raise_file_limit();
    let runtime = tokio::runtime::Builder::new_current_thread()
        .enable_all()
        .build()
        .map_err(|e| format!("cannot start the runtime: {e}"))?;
    let ended = runtime.block_on(app::run(options)).map_err(|e| e.to_string())?;
    // A device that does not come back must not hold up the end.
    runtime.shutdown_background();
    match ended {
        Ended::Clean => Ok(ExitCode::SUCCESS),
        Ended::Unclean => Ok(ExitCode::from(super::FAILURE)),
        Ended::Forced => std::process::exit(i32::from(FORCED)),
    }
}

fn resolve(arguments: ExportArguments) -> Result<AppOptions, String> {
    let systemd = std::env::var_os("LISTEN_FDS").is_some();
    let mut listen = arguments.listen;
    if listen.is_empty() && arguments.unix.is_none() && !systemd {
        listen.extend(DEFAULT_LISTEN.parse::<SocketAddr>().ok());
    }
    if arguments.exports.is_empty() && arguments.config_dir.is_none() {
        return Err("there is nothing to serve: give NAME=IMAGE or --config-dir".into());
    }
    let mut exports = Vec::new();
    for text in &arguments.exports {
        let (name, image) = text
            .split_once('=')
            .ok_or_else(|| format!("'{text}' is not of the form NAME=IMAGE"))?;
        validate_export_name(name)?;
        exports.push(ExportSpec {
            name: name.to_owned(),
            description: String::new(),
            source: Source::parse(image)?,
            read_only: arguments.read_only,
            max_connections: arguments.max_connections,
        });
    }
    if let Some(size) = arguments.create {
        for spec in &exports {
            create(&spec.source, size, &arguments.new_image)?;
        }
    }
    let max_payload = u32::try_from(arguments.max_payload).unwrap_or(u32::MAX);
    let limits = Limits {
        buffered: usize::try_from(arguments.buffers).unwrap_or(usize::MAX),
        max_payload,
        handshake: Duration::from_secs(arguments.handshake_timeout),
        shutdown: Duration::from_secs(arguments.shutdown_timeout),
        ..Limits::default()
    };
    limits.validate()?;
    Ok(AppOptions {
        listen,
        unix: arguments.unix,
        pool: arguments.pool,
        config_dir: arguments.config_dir,
        control: arguments.control,
        exports,
        limits,
    })
}

fn create(source: &Source, size: u64, arguments: &CreateArguments) -> Result<(), String> {
    match source.format {
        Format::Qcow2 => {
            let options: CreateOptions = create_options(&source.path, size, arguments)?;
            qcow2::create(&source.path, &options).map_err(|e| e.to_string())
        }
        Format::Raw if arguments.backing.is_some() => {
            Err("a raw file has no backing file; use a qcow2 image".into())
        }
        Format::Raw => std::fs::File::create_new(&source.path)
            .and_then(|file| file.set_len(size).and_then(|()| file.sync_all()))
            .map_err(|e| format!("cannot create '{}': {e}", source.path.display())),
        Format::Null => Ok(()),
    }
}

/// The system's default of 1024 open files is too few for idle connections of many clients.
pub(super) fn raise_file_limit() {
    use rustix::process::{Resource, Rlimit, getrlimit, setrlimit};
    let limit = getrlimit(Resource::Nofile);
    let raised = Rlimit { current: limit.maximum, maximum: limit.maximum };
    if let Err(error) = setrlimit(Resource::Nofile, raised) {
        tracing::warn!(%error, "cannot raise the number of open files");
    }
}
