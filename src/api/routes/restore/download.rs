//! Files and directories of a mount as bodies, streamed.
//!
//! The first piece of a file is read before the answer begins: what cannot be read at all is an error
//! with its reason. What cannot be read later breaks the connection off, and who asks for the rest is
//! told why.

use std::io;
use std::path::Path as HostPath;
use std::sync::Arc;

use axum::body::Bytes;
use axum::extract::{Path, State};
use axum::http::{HeaderMap, Method, StatusCode, header};
use axum::response::{IntoResponse, Response};
use guest::{Attributes, FileType};
use serde::Deserialize;
use utoipa::IntoParams;
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::path::{AskedPath, told};
use super::range::{Part, attachment, entity_tag, part};
use super::stream::{Sink, body};
use super::{Found, failure, find, roots};
use crate::api::Api;
use crate::api::auth::Operator;
use crate::api::error::{ApiResult, Query, invalid};
use crate::backup::{Failure, FailureKind};
use crate::restore::Using;
use crate::restore::files::archive::{self, Format};
use crate::restore::files::{FileStream, Piece};

/// What browsers must not guess.
const BINARY: &str = "application/octet-stream";

/// Volumes that are not in an archive, and why.
type Missing = Vec<(String, String)>;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(download)).routes(routes!(download_directory))
}

/// The entity tag of a file's content. It is the same in every mount of the restore point, as long as
/// the volume is read in the same way.
pub(super) fn tag(using: &Using, found: &Found, attributes: &Attributes) -> String {
    let volume = using.volumes().iter().find(|volume| volume.name == found.volume);
    let (uuid, place, status) = volume.map_or(("", "", ""), |volume| {
        (volume.uuid.as_str(), volume.place.as_str(), super::mounts::told(&volume.status).0)
    });
    let modified = attributes.modified.map_or((0, 0), |time| (time.seconds, time.nanoseconds));
    entity_tag(&[
        env!("CARGO_PKG_VERSION").as_bytes(),
        using.info().backup_id.as_bytes(),
        found.volume.as_bytes(),
        uuid.as_bytes(),
        place.as_bytes(),
        status.as_bytes(),
        &found.inside,
        &found.node.0.to_le_bytes(),
        &attributes.size.to_le_bytes(),
        &modified.0.to_le_bytes(),
        &modified.1.to_le_bytes(),
    ])
}

/// A file, its size, and what is to be sent of it.
struct Reading {
    using: Using,
    found: Found,
    tag: String,
    size: u64,
    part: Part,
    first: Option<Piece>,
}

impl Reading {
    /// Offset and length of what is sent.
    fn extent(&self) -> (u64, u64) {
        match self.part {
            Part::Whole => (0, self.size),
            Part::Bytes { offset, length } => (offset, length),
            Part::Outside => (0, 0),
        }
    }

    fn stream(&self) -> FileStream<'_> {
        FileStream::new(&*self.found.tree, self.found.node)
    }

    /// Reads the first piece; what cannot be read at all is known then.
    fn begin(&mut self) -> Result<(), Failure> {
        let (offset, length) = self.extent();
        let first = self.stream().first(offset, offset + length).map_err(|error| {
            let path = told(&self.found.volume, &self.found.inside);
            let message = format!("'{path}': {}", error.message);
            failure(guest::Error { message, ..error })
        })?;
        self.first = Some(first);
        Ok(())
    }

    fn send(mut self, sink: &Sink) -> io::Result<()> {
        let send = |piece: Piece| sink.send(Bytes::from_owner(piece));
        let (mut at, length) = self.extent();
        let end = at + length;
        if let Some(first) = self.first.take() {
            at += first.as_ref().len() as u64;
            send(first)?;
        }
        self.stream().read(at, end, send)
    }
}

/// A file's content. Understands `Range` (one range) with `If-Range`, so that a download can go on
/// where it broke off, from another mount of the same restore point too. Links are followed inside the
/// volume.
#[utoipa::path(get, path = "/restore/{id}/download", tag = "restore",
    params(("id" = String, Path), ("path" = String, Query, description = "the file")),
    responses((status = 200, content_type = "application/octet-stream"),
        (status = 206, content_type = "application/octet-stream"),
        (status = 400, description = "it is no file"),
        (status = 416, description = "the file ends before that range"),
        (status = 422, description = "it cannot be read")))]
async fn download(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    asked: AskedPath,
    method: Method,
    headers: HeaderMap,
) -> ApiResult<Response> {
    let path = asked.needed()?;
    let room = api.streams.enter()?;
    let mounts = Arc::clone(&api.mounts);
    let bodiless = method == Method::HEAD;
    let reading = api.blocking(move |_| {
        let using = mounts.using(&id)?;
        let found = find(&using, &path, true)?.ok_or_else(directory)?;
        let attributes = found.tree.stat(found.node).map_err(failure)?;
        check(&found, &attributes)?;
        let tag = tag(&using, &found, &attributes);
        // A range of a HEAD means nothing.
        let part = if bodiless { Part::Whole } else { part(&headers, &tag, attributes.size) };
        let size = attributes.size;
        let mut reading = Reading { using, found, tag, size, part, first: None };
        if !bodiless && reading.extent().1 > 0 {
            reading.begin()?;
        }
        Ok(reading)
    });
    let reading = reading.await?;
    let (offset, length) = reading.extent();
    let size = reading.size;
    let status = match reading.part {
        Part::Whole => StatusCode::OK,
        Part::Bytes { .. } => StatusCode::PARTIAL_CONTENT,
        Part::Outside => StatusCode::RANGE_NOT_SATISFIABLE,
    };
    let mut answer = (
        status,
        [
            (header::CONTENT_TYPE, BINARY.to_owned()),
            (header::CONTENT_LENGTH, length.to_string()),
            (header::ACCEPT_RANGES, "bytes".to_owned()),
            (header::ETAG, reading.tag.clone()),
            (header::CONTENT_DISPOSITION, attachment(reading.found.name())),
            (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
            (header::CACHE_CONTROL, "private, no-cache".to_owned()),
        ],
    )
        .into_response();
    let range = match reading.part {
        Part::Whole => None,
        Part::Bytes { .. } => Some(format!("bytes {offset}-{}/{size}", offset + length - 1)),
        Part::Outside => Some(format!("bytes */{size}")),
    };
    if let Some(Ok(range)) = range.map(|text| text.parse()) {
        answer.headers_mut().insert(header::CONTENT_RANGE, range);
    }
    if !bodiless && length > 0 {
        let path = told(&reading.found.volume, &reading.found.inside);
        tracing::info!(actor = caller.name, mount = reading.using.info().id, path, "download");
        *answer.body_mut() = body(room, move |sink| reading.send(sink));
    }
    Ok(answer)
}

fn directory() -> Failure {
    Failure::new(FailureKind::Invalid, "that is a directory", "use download-directory")
}

/// Refuses what has no content that can be sent.
fn check(found: &Found, attributes: &Attributes) -> Result<(), Failure> {
    let path = told(&found.volume, &found.inside);
    let what = match attributes.file_type {
        FileType::File => return Ok(()),
        FileType::Directory => return Err(directory()),
        FileType::Opaque => {
            let note = attributes.note.as_deref().unwrap_or("it is nothing that is read here");
            let text = format!("'{path}' cannot be read: {note}");
            return Err(Failure::new(FailureKind::Unprocessable, text, ""));
        }
        FileType::Symlink => "link",
        FileType::CharDevice | FileType::BlockDevice => "device",
        FileType::Fifo => "pipe",
        FileType::Socket => "socket",
    };
    Err(Failure::new(FailureKind::Invalid, format!("'{path}' is a {what}, no file"), ""))
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ArchiveQuery {
    /// `zip`, or `tar.gz`.
    #[serde(default = "zip")]
    format: String,
}

fn zip() -> String {
    "zip".into()
}

/// A directory with all that is below it as an archive, made while it is sent; `/` has all volumes in
/// it. What cannot be read is told in its last entry, `RESTORE-ERRORS.txt`.
#[utoipa::path(get, path = "/restore/{id}/download-directory", tag = "restore",
    params(("id" = String, Path), ArchiveQuery,
        ("path" = String, Query, description = "the directory")),
    responses((status = 200, content_type = "application/octet-stream"),
        (status = 400, description = "it is no directory"),
        (status = 422, description = "it cannot be read")))]
async fn download_directory(
    Operator(caller): Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    asked: AskedPath,
    Query(query): Query<ArchiveQuery>,
    method: Method,
) -> ApiResult<Response> {
    let (format, ending, kind) = match query.format.as_str() {
        "zip" => (Format::Zip, "zip", "application/zip"),
        "tar.gz" | "tgz" => (Format::TarGz, "tar.gz", "application/gzip"),
        other => return Err(invalid(format!("format '{other}' is none of: zip, tar.gz"))),
    };
    let path = asked.needed()?;
    let room = api.streams.enter()?;
    let mounts = Arc::clone(&api.mounts);
    let found = api.blocking(move |_| {
        let using = mounts.using(&id)?;
        let (found, missing) = match find(&using, &path, true)? {
            Some(found) => (vec![top(found)?], Missing::new()),
            None => volumes(&using)?,
        };
        Ok((using, found, missing))
    });
    let (using, tops, missing) = found.await?;
    let name = match tops.as_slice() {
        [only] => only.name().to_vec(),
        _ => using.info().vm_name.clone().into_bytes(),
    };
    let name = [&*name, b".", ending.as_bytes()].concat();
    let mut answer = [
        (header::CONTENT_TYPE, kind.to_owned()),
        (header::CONTENT_DISPOSITION, attachment(&name)),
        (header::X_CONTENT_TYPE_OPTIONS, "nosniff".to_owned()),
        (header::CACHE_CONTROL, "private, no-cache".to_owned()),
    ]
    .into_response();
    if method != Method::HEAD {
        let path = tops.first().map(|top| told(&top.volume, &top.inside)).unwrap_or_default();
        tracing::info!(actor = caller.name, mount = using.info().id, path, "download as archive");
        let scratch = api.restores.scratch().to_owned();
        *answer.body_mut() =
            body(room, move |sink| pack(&using, (&tops, &missing), format, &scratch, sink));
    }
    Ok(answer)
}

fn pack(
    using: &Using,
    (tops, missing): (&[Found], &[(String, String)]),
    format: Format,
    scratch: &HostPath,
    sink: &mut Sink,
) -> io::Result<()> {
    let parts: Vec<_> = tops
        .iter()
        .map(|top| archive::Part { name: top.name().to_vec(), tree: &*top.tree, node: top.node })
        .collect();
    let alive = sink.taken();
    let limits = archive::Limits::default();
    let order = archive::Order { parts: &parts, missing, limits, alive: &alive };
    let report = archive::write(format, &order, scratch, sink)?;
    if !report.is_clean() {
        let lines = report.lines.len();
        tracing::warn!(mount = using.info().id, lines, "an archive is not all there is");
    }
    Ok(())
}

/// A directory that can be packed.
fn top(found: Found) -> Result<Found, Failure> {
    let attributes = found.tree.stat(found.node).map_err(failure)?;
    if attributes.file_type != FileType::Directory {
        let text = format!("'{}' is no directory", told(&found.volume, &found.inside));
        return Err(Failure::new(FailureKind::Invalid, text, "use download"));
    }
    Ok(found)
}

/// The roots of all volumes that are shown, and what cannot be read.
fn volumes(using: &Using) -> Result<(Vec<Found>, Missing), Failure> {
    let (tops, damaged) = roots(using);
    if tops.is_empty() {
        let none = || {
            let text = "no volume of this mount can be shown";
            Failure::new(FailureKind::Unprocessable, text, "`volumes` says why")
        };
        return Err(damaged.into_iter().next().map_or_else(none, |(_, failure)| failure));
    }
    Ok((tops, damaged.into_iter().map(|(volume, failure)| (volume, failure.message)).collect()))
}
