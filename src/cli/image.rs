//! `sendense-hub image`

use std::path::{Path, PathBuf};
use std::process::ExitCode;
use std::sync::Arc;

use clap::{Args, Subcommand, ValueEnum};
use qcow2::{BackingFormat, CreateOptions, Image, OpenOptions, Repair};
use serde_json::json;

use super::output;
use crate::block::BlockDevice;
use crate::export;
use crate::model::{Format, Source, parse_size};

/// Exit code of a check that found corruption, as of qemu-img.
const CORRUPT: u8 = 2;
/// Exit code of a check that found leaks only, as of qemu-img.
const LEAKS: u8 = 3;
/// Exit code of a comparison that failed, as of qemu-img.
const COMPARE_FAILED: u8 = 2;
/// Bytes compared at once.
const COMPARE_STEP: u64 = 2 << 20;

#[derive(Debug, Args)]
pub(super) struct CreateArguments {
    /// Bytes of a cluster, 4K to 2M
    #[arg(long, value_name = "SIZE", value_parser = parse_size, default_value = "64K")]
    cluster_size: u64,
    /// Backing file; a relative name counts from the image's directory
    #[arg(long, value_name = "FILE")]
    pub(super) backing: Option<String>,
    /// Format of the backing file [default: told by its ending]
    #[arg(long, value_name = "FORMAT", requires = "backing")]
    backing_format: Option<String>,
}

#[derive(Debug, Clone, Copy, PartialEq, Eq, ValueEnum)]
pub(super) enum RepairArgument {
    /// Give back clusters that nothing refers to
    Leaks,
    /// Build refcounts anew as well
    All,
}

#[derive(Debug, Subcommand)]
pub(super) enum ImageCommand {
    /// Make a new qcow2 image
    Create {
        /// The file, which must not exist
        file: PathBuf,
        /// Size of the disk; 0 or left out with --backing: as large as the backing file's disk
        #[arg(value_parser = parse_size)]
        size: Option<u64>,
        #[command(flatten)]
        options: CreateArguments,
    },
    /// Tell what a qcow2 image is
    Info {
        /// The image
        file: PathBuf,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Check a qcow2 image; exit code 0 clean, 2 corrupt, 3 leaks only, 1 not checked
    Check {
        /// The image
        file: PathBuf,
        /// Repair what was found
        #[arg(long, value_name = "WHAT")]
        repair: Option<RepairArgument>,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Show where each range of a disk is stored
    Map {
        /// The image or disk (qcow2:, raw: or by its ending)
        image: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
    /// Compare two disks; exit code 0 equal, 1 different, 2 not compared
    Compare {
        /// The first (qcow2:, raw: or by its ending)
        a: String,
        /// The second
        b: String,
        /// Print JSON
        #[arg(long)]
        json: bool,
    },
}

pub(super) fn run(command: ImageCommand) -> Result<ExitCode, String> {
    match command {
        ImageCommand::Create { file, size, options } => {
            let options = create_options(&file, size.unwrap_or(0), &options)?;
            qcow2::create(&file, &options).map_err(|e| e.to_string())?;
            Ok(ExitCode::SUCCESS)
        }
        ImageCommand::Info { file, json } => info(&file, json),
        ImageCommand::Check { file, repair, json } => check(&file, repair, json),
        ImageCommand::Map { image, json } => map(&image, json),
        ImageCommand::Compare { a, b, json } => compare(&a, &b, json).or_else(|message| {
            output::error(&message);
            Ok(ExitCode::from(COMPARE_FAILED))
        }),
    }
}

/// What a new image at `path` is to be; a size of 0 is that of the backing file's disk.
pub(super) fn create_options(
    path: &Path,
    size: u64,
    arguments: &CreateArguments,
) -> Result<CreateOptions, String> {
    let cluster_size = u32::try_from(arguments.cluster_size).unwrap_or(u32::MAX);
    let mut options = CreateOptions::new(size).cluster_size(cluster_size);
    let Some(name) = &arguments.backing else {
        return match size {
            0 => Err("a disk without a backing file needs a size".into()),
            _ => Ok(options),
        };
    };
    let format = match &arguments.backing_format {
        Some(name) => BackingFormat::from_name(name)
            .ok_or_else(|| format!("backing format '{name}' is not known; raw and qcow2 are"))?,
        None => match Source::parse(name)?.format {
            Format::Qcow2 => BackingFormat::Qcow2,
            _ => BackingFormat::Raw,
        },
    };
    if size == 0 {
        let file = path.parent().unwrap_or(Path::new("")).join(name);
        let format = if format == BackingFormat::Raw { Format::Raw } else { Format::Qcow2 };
        options.size = open(&Source { format, path: file })?.info().size;
    }
    Ok(options.backing(name.clone(), format))
}

fn open(source: &Source) -> Result<Arc<dyn BlockDevice>, String> {
    export::open(source, true).map_err(|e| e.to_string())
}

fn info(file: &Path, as_json: bool) -> Result<ExitCode, String> {
    let options = OpenOptions::new().read_only();
    let image = Image::open(file, &options).map_err(|e| e.to_string())?;
    let info = image.info().map_err(|e| e.to_string())?;
    if as_json {
        output::json(&json!({
            "file": file,
            "format": "qcow2",
            "version": info.version,
            "virtual_size": info.size,
            "file_length": info.file_length,
            "cluster_size": info.cluster_size,
            "refcount_bits": info.refcount_bits,
            "backing_file": info.backing_name,
            "backing_format": info.backing_format,
            "chain": info.chain,
            "compression": format!("{:?}", info.compression).to_lowercase(),
            "extended_l2": info.extended_l2,
            "snapshots": info.snapshots,
            "lazy_refcounts": info.lazy_refcounts,
            "dirty": info.dirty,
            "corrupt": info.corrupt,
        }))?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("file:           {}", file.display()))?;
    output::line(&format!("format:         qcow2, version {}", info.version))?;
    output::line(&format!("virtual size:   {} ({} bytes)", output::size(info.size), info.size))?;
    output::line(&format!("file length:    {}", output::size(info.file_length)))?;
    output::line(&format!("cluster size:   {}", output::size(u64::from(info.cluster_size))))?;
    output::line(&format!("refcount bits:  {}", info.refcount_bits))?;
    if let (Some(name), Some(format)) = (&info.backing_name, &info.backing_format) {
        output::line(&format!("backing file:   {name} ({format})"))?;
    }
    for path in &info.chain {
        output::line(&format!("  chain:        {}", path.display()))?;
    }
    let marks = [
        (info.extended_l2, "extended L2 entries"),
        (info.lazy_refcounts, "lazy refcounts"),
        (info.dirty, "not closed cleanly"),
        (info.corrupt, "marked corrupt"),
        (info.snapshots > 0, "has internal snapshots"),
    ];
    for (_, mark) in marks.iter().filter(|(set, _)| *set) {
        output::line(&format!("note:           {mark}"))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn check(file: &Path, repair: Option<RepairArgument>, as_json: bool) -> Result<ExitCode, String> {
    let repair = match repair {
        None => Repair::None,
        Some(RepairArgument::Leaks) => Repair::Leaks,
        Some(RepairArgument::All) => Repair::All,
    };
    let report = qcow2::check(file, repair).map_err(|e| e.to_string())?;
    if as_json {
        output::json(&json!({
            "file": file,
            "corruptions": report.corruptions,
            "leaks": report.leaks,
            "corruptions_fixed": report.corruptions_fixed,
            "leaks_fixed": report.leaks_fixed,
            "total_clusters": report.total_clusters,
            "allocated_clusters": report.allocated_clusters,
            "compressed_clusters": report.compressed_clusters,
            "image_end_offset": report.image_end_offset,
            "findings": report.findings,
        }))?;
    } else {
        for finding in &report.findings {
            output::line(&format!("found: {finding}"))?;
        }
        if report.corruptions_fixed + report.leaks_fixed > 0 {
            output::line(&format!(
                "repaired: {} corruption(s), {} leak(s)",
                report.corruptions_fixed, report.leaks_fixed
            ))?;
        }
        output::line(&match report.is_clean() {
            true => format!(
                "clean: {} of {} clusters allocated",
                report.allocated_clusters, report.total_clusters
            ),
            false => format!(
                "{} corruption(s), {} leaked cluster(s); {}",
                report.corruptions,
                report.leaks,
                match (repair, report.corruptions) {
                    (Repair::All, _) => "what is left cannot be repaired: restore another copy",
                    (_, 0) => "repair with --repair leaks",
                    (_, _) => "make a copy, then repair with --repair all",
                }
            ),
        })?;
    }
    Ok(match (report.corruptions, report.leaks) {
        (0, 0) => ExitCode::SUCCESS,
        (0, _) => ExitCode::from(LEAKS),
        _ => ExitCode::from(CORRUPT),
    })
}

fn map(image: &str, as_json: bool) -> Result<ExitCode, String> {
    let device = open(&Source::parse(image)?)?;
    let mut extents: Vec<crate::block::Extent> = Vec::new();
    device
        .extents(0, device.info().size, &mut |extent| {
            match extents.last_mut() {
                Some(last)
                    if (last.hole, last.zero, last.depth)
                        == (extent.hole, extent.zero, extent.depth) =>
                {
                    last.length += extent.length;
                }
                _ => extents.push(extent),
            }
            true
        })
        .map_err(|e| e.to_string())?;
    if as_json {
        let list: Vec<_> = extents
            .iter()
            .map(|e| {
                json!({"offset": e.offset, "length": e.length, "hole": e.hole, "zero": e.zero,
                    "depth": e.depth})
            })
            .collect();
        output::json(&list)?;
        return Ok(ExitCode::SUCCESS);
    }
    output::line(&format!("{:>16} {:>16} {:>6}  KIND", "OFFSET", "LENGTH", "DEPTH"))?;
    for extent in extents {
        let kind = match (extent.hole, extent.zero) {
            (false, false) => "data",
            (false, true) => "zero, allocated",
            (true, true) => "zero",
            (true, false) => "hole",
        };
        output::line(&format!(
            "{:>16} {:>16} {:>6}  {kind}",
            extent.offset, extent.length, extent.depth
        ))?;
    }
    Ok(ExitCode::SUCCESS)
}

fn compare(a: &str, b: &str, as_json: bool) -> Result<ExitCode, String> {
    let (a, b) = (open(&Source::parse(a)?)?, open(&Source::parse(b)?)?);
    let (size_a, size_b) = (a.info().size, b.info().size);
    let mut difference = None;
    let mut at = 0;
    while at < size_a.max(size_b) && difference.is_none() {
        let length = COMPARE_STEP.min(size_a.max(size_b) - at);
        difference = first_difference(&*a, &*b, at, length)?;
        at += length;
    }
    if as_json {
        output::json(&json!({
            "equal": difference.is_none(),
            "first_difference": difference,
            "sizes": [size_a, size_b],
        }))?;
    } else {
        let sizes = match size_a == size_b {
            true => String::new(),
            false => format!(" (sizes differ: {size_a} and {size_b} bytes; the rest is zero)"),
        };
        output::line(&match difference {
            None => format!("equal{sizes}"),
            Some(at) => format!("different: first at byte {at}{sizes}"),
        })?;
    }
    Ok(if difference.is_none() { ExitCode::SUCCESS } else { ExitCode::from(1) })
}

/// The first byte at which the disks differ; a disk goes on with zeroes past its end.
fn first_difference(
    a: &dyn BlockDevice,
    b: &dyn BlockDevice,
    at: u64,
    length: u64,
) -> Result<Option<u64>, String> {
    let (a, b) = (part(a, at, length)?, part(b, at, length)?);
    let differs = match (&a, &b) {
        (None, None) => None,
        (Some(a), Some(b)) => a.iter().zip(b).position(|(x, y)| x != y),
        (Some(bytes), None) | (None, Some(bytes)) => bytes.iter().position(|x| *x != 0),
    };
    Ok(differs.map(|index| at + index as u64))
}

/// A part of a disk, padded with zeroes; `None` where its mapping says that it is all zero.
fn part(device: &dyn BlockDevice, at: u64, length: u64) -> Result<Option<Vec<u8>>, String> {
    let inside = length.min(device.info().size.saturating_sub(at));
    let mut zero = true;
    device
        .extents(at.min(device.info().size), inside, &mut |extent| {
            zero = extent.zero;
            zero
        })
        .map_err(|e| e.to_string())?;
    if zero {
        return Ok(None);
    }
    #[allow(clippy::cast_possible_truncation, reason = "bounded by COMPARE_STEP")]
    let mut bytes = vec![0; length as usize];
    #[allow(clippy::cast_possible_truncation, reason = "bounded by COMPARE_STEP")]
    device.read(&mut bytes[..inside as usize], at).map_err(|e| e.to_string())?;
    Ok(Some(bytes))
}
