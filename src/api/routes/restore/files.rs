//! Files of a mount: listings, what is known of one, names that match.

use std::sync::Arc;
use std::time::{Duration, Instant};

use axum::Json;
use axum::extract::{Path, State};
use guest::tree::LISTING;
use guest::{Cursor, FileType};
use serde::{Deserialize, Serialize};
use utoipa::{IntoParams, ToSchema};
use utoipa_axum::router::OpenApiRouter;
use utoipa_axum::routes;

use super::path::{AskedPath, GuestPath, told};
use super::view::{FileView, timestamp};
use super::waiting::Waiting;
use super::{Found, download, failure, find, roots};
use crate::api::Api;
use crate::api::auth::Operator;
use crate::api::error::{ApiResult, Query};
use crate::backup::{Failure, FailureKind};
use crate::model::Timestamp;
use crate::restore::Using;
use crate::restore::files::{
    BYTES, Matches, Pattern, SearchLimits, everything, names, search, weight,
};

/// Names of a listing that are told unless the caller says how many.
const NAMES: usize = 1000;
/// Names of an answer at most.
const MOST: usize = 10_000;
/// Time after which an answer is what was found so far.
const TIME: Duration = Duration::from_secs(60);

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new().routes(routes!(list)).routes(routes!(file_info)).routes(routes!(by_name))
}

/// What could not be looked at.
#[derive(Debug, Serialize, ToSchema)]
struct TroubleView {
    path: String,
    error: String,
}

#[derive(Debug, Serialize, ToSchema)]
struct FileList {
    mount_id: String,
    path: String,
    files: Vec<FileView>,
    /// Files in this answer.
    total_count: usize,
    /// There are more than were told.
    more: bool,
    /// What gives the next ones as `cursor`; not of recursive listings.
    #[serde(skip_serializing_if = "Option::is_none")]
    next_cursor: Option<String>,
    /// Volumes and directories below that could not be read; only of recursive listings and searches.
    #[serde(skip_serializing_if = "Vec::is_empty")]
    errors: Vec<TroubleView>,
}

impl FileList {
    fn new(mount_id: String) -> Self {
        Self {
            mount_id,
            path: "/".into(),
            files: Vec::new(),
            total_count: 0,
            more: false,
            next_cursor: None,
            errors: Vec::new(),
        }
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct ListQuery {
    /// List what is below, too; a directory comes before what is in it.
    #[serde(default)]
    recursive: bool,
    /// At most so many.
    limit: Option<usize>,
    /// Go on where an earlier answer ended, by its `next_cursor`.
    cursor: Option<u64>,
}

impl ListQuery {
    fn limit(&self) -> usize {
        self.limit.unwrap_or(if self.recursive { MOST } else { NAMES }).clamp(1, MOST)
    }
}

/// Work that ends with its client, and after [`TIME`].
fn for_a_while(waits: impl Fn() -> bool) -> impl Fn() -> bool {
    let begin = Instant::now();
    move || waits() && begin.elapsed() < TIME
}

/// Lists a directory, in the order of the file system. `/` has the volumes in it.
#[utoipa::path(get, path = "/restore/{id}/files", tag = "restore",
    params(("id" = String, Path), ListQuery,
        ("path" = Option<String>, Query, description = "the directory; `/` where it is left out")),
    responses((status = 200, body = FileList),
        (status = 409, description = "too many searches and recursive listings at a time"),
        (status = 422, description = "the volume is not shown, or damaged")))]
async fn list(
    _operator: Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    asked: AskedPath,
    Query(query): Query<ListQuery>,
) -> ApiResult<Json<FileList>> {
    let path = asked.0.unwrap_or_else(GuestPath::root);
    let room = query.recursive.then(|| api.streams.enter_walk()).transpose()?;
    let (_waiting, waits) = Waiting::new();
    let mounts = Arc::clone(&api.mounts);
    let listed = api.blocking(move |_| {
        let _room = room;
        let go_on = for_a_while(waits);
        let limits = SearchLimits { found: query.limit(), ..SearchLimits::LISTING };
        let using = mounts.using(&id)?;
        let mut list = FileList::new(id);
        match find(&using, &path, true)? {
            Some(found) if query.recursive => below(&mut list, &found, limits, &go_on)?,
            Some(found) => page(&mut list, &found, &query, &go_on)?,
            None => {
                list.files = using.volumes().iter().map(FileView::volume).collect();
                if query.recursive {
                    all_volumes(&mut list, &using, limits, &go_on);
                }
            }
        }
        list.total_count = list.files.len();
        Ok(list)
    });
    Ok(Json(listed.await?))
}

/// A part of a directory.
fn page(
    list: &mut FileList,
    found: &Found,
    query: &ListQuery,
    go_on: &dyn Fn() -> bool,
) -> Result<(), Failure> {
    list.path = told(&found.volume, &found.inside);
    let mut next = Some(Cursor(query.cursor.unwrap_or_default()));
    let limit = query.limit();
    let mut bytes = BYTES;
    // Every name has the whole path with it. There is one name at least, so that callers get on.
    while let Some(cursor) = next.filter(|_| {
        list.files.is_empty() || (list.files.len() < limit && bytes > list.path.len() && go_on())
    }) {
        let fitting = (bytes / (list.path.len() + 1)).max(1);
        let wanted = (limit - list.files.len()).min(fitting).min(LISTING);
        let listing = found.tree.list(found.node, cursor, wanted).map_err(failure)?;
        if listing.entries.is_empty() && listing.next.is_some() {
            let text = format!("the listing of '{}' goes on without names", list.path);
            return Err(Failure::new(FailureKind::Unprocessable, text, ""));
        }
        let weights = listing.entries.iter().map(|entry| list.path.len() + weight(entry));
        bytes = bytes.saturating_sub(weights.sum());
        list.files.extend(listing.entries.iter().map(|entry| FileView::listed(&list.path, entry)));
        next = listing.next;
    }
    list.more = next.is_some();
    list.next_cursor = next.map(|cursor| cursor.0.to_string());
    Ok(())
}

fn take(list: &mut FileList, directory: &str, matches: Matches) {
    list.more |= matches.more;
    let path = |inside: &[u8]| match inside {
        b"" => directory.to_owned(),
        inside => format!("{directory}/{}", names::shown(inside)),
    };
    for found in matches.found {
        let mut view = FileView::listed(directory, &found.listed);
        view.path = path(&found.path);
        list.files.push(view);
    }
    list.errors.extend(
        matches
            .troubles
            .into_iter()
            .map(|trouble| TroubleView { path: path(&trouble.path), error: trouble.error.message }),
    );
}

/// All that is below a directory.
fn below(
    list: &mut FileList,
    found: &Found,
    limits: SearchLimits,
    go_on: &dyn Fn() -> bool,
) -> Result<(), Failure> {
    let attributes = found.tree.stat(found.node).map_err(failure)?;
    list.path = told(&found.volume, &found.inside);
    if attributes.file_type != FileType::Directory {
        let text = format!("'{}' is no directory", list.path);
        return Err(Failure::new(FailureKind::Invalid, text, ""));
    }
    let directory = list.path.clone();
    take(list, &directory, everything(&*found.tree, found.node, limits, go_on));
    Ok(())
}

/// All that is in the volumes that are shown. They share the bounds.
fn all_volumes(list: &mut FileList, using: &Using, limits: SearchLimits, go_on: &dyn Fn() -> bool) {
    let found = limits.found.saturating_sub(list.files.len());
    let mut left = SearchLimits { found, ..limits };
    for root in of_volumes(list, using) {
        let matches = everything(&*root.tree, root.node, left, go_on);
        left = left.after(&matches);
        take(list, &told(&root.volume, &root.inside), matches);
    }
}

/// The roots of the volumes that are shown. Which cannot be read is told in the list.
fn of_volumes(list: &mut FileList, using: &Using) -> Vec<Found> {
    let (roots, damaged) = roots(using);
    let trouble = |(volume, failure): (String, Failure)| TroubleView {
        path: format!("/{volume}"),
        error: failure.message,
    };
    list.errors.extend(damaged.into_iter().map(trouble));
    roots
}

/// All that is known of a file.
#[derive(Debug, Serialize, ToSchema)]
struct FileInfo {
    mount_id: String,
    #[serde(flatten)]
    file: FileView,
    /// Bytes that it takes on the volume, where that is known.
    #[serde(skip_serializing_if = "Option::is_none")]
    allocated: Option<u64>,
    #[schema(value_type = Option<String>)]
    accessed_time: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    changed_time: Option<Timestamp>,
    #[schema(value_type = Option<String>)]
    created_time: Option<Timestamp>,
    /// Entity tag of a file's content: what a download of it has.
    #[serde(skip_serializing_if = "Option::is_none")]
    etag: Option<String>,
    /// Extended attributes with their lengths.
    xattrs: Vec<XattrView>,
    /// Status of its volume.
    volume_status: &'static str,
    /// Why the volume is stale.
    #[serde(skip_serializing_if = "Option::is_none")]
    volume_reason: Option<String>,
}

#[derive(Debug, Serialize, ToSchema)]
struct XattrView {
    name: String,
    size: usize,
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct InfoQuery {
    /// Of a link, tell of what it points to, inside the volume.
    #[serde(default)]
    follow: bool,
}

/// Tells all that is known of a file or directory.
#[utoipa::path(get, path = "/restore/{id}/file-info", tag = "restore",
    params(("id" = String, Path), ("path" = String, Query, description = "the file"), InfoQuery),
    responses((status = 200, body = FileInfo)))]
async fn file_info(
    _operator: Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    asked: AskedPath,
    Query(query): Query<InfoQuery>,
) -> ApiResult<Json<FileInfo>> {
    let path = asked.needed()?;
    let mounts = Arc::clone(&api.mounts);
    let info = api.blocking(move |_| {
        let using = mounts.using(&id)?;
        match find(&using, &path, query.follow)? {
            Some(found) => info(id, &using, &found),
            None => Ok(of_root(id)),
        }
    });
    Ok(Json(info.await?))
}

fn info(mount_id: String, using: &Using, found: &Found) -> Result<FileInfo, Failure> {
    let attributes = found.tree.stat(found.node).map_err(failure)?;
    let target = match attributes.file_type {
        FileType::Symlink => Some(found.tree.read_link(found.node).map_err(failure)?),
        _ => None,
    };
    let xattrs = found.tree.xattrs(found.node).map_err(failure)?;
    let volume = using.volumes().iter().find(|volume| volume.name == found.volume);
    let (volume_status, reason) =
        volume.map_or(("clean", None), |v| super::mounts::told(&v.status));
    let path = told(&found.volume, &found.inside);
    let etag =
        (attributes.file_type == FileType::File).then(|| download::tag(using, found, &attributes));
    Ok(FileInfo {
        mount_id,
        file: FileView::new(found.name(), path, &attributes, target.as_deref()),
        allocated: attributes.allocated,
        accessed_time: timestamp(attributes.accessed),
        changed_time: timestamp(attributes.changed),
        created_time: timestamp(attributes.created),
        etag,
        xattrs: xattrs
            .into_iter()
            .map(|(name, value)| XattrView { name: names::shown(&name), size: value.len() })
            .collect(),
        volume_status,
        volume_reason: reason.map(str::to_owned),
    })
}

/// The directory that the volumes are in.
fn of_root(mount_id: String) -> FileInfo {
    FileInfo {
        mount_id,
        file: FileView::root(),
        allocated: None,
        accessed_time: None,
        changed_time: None,
        created_time: None,
        etag: None,
        xattrs: Vec::new(),
        volume_status: "clean",
        volume_reason: None,
    }
}

#[derive(Debug, Deserialize, IntoParams)]
#[into_params(parameter_in = Query)]
struct NameQuery {
    /// A part of the name, in any case; or all of it with `*` for anything and `?` for a character.
    name: String,
    /// At most so many.
    limit: Option<usize>,
}

/// Finds names below a directory.
#[utoipa::path(get, path = "/restore/{id}/search", tag = "restore",
    params(("id" = String, Path), NameQuery,
        ("path" = Option<String>, Query, description = "the directory; all volumes where it is left out")),
    responses((status = 200, body = FileList),
        (status = 409, description = "too many searches and recursive listings at a time")))]
async fn by_name(
    _operator: Operator,
    State(api): State<Api>,
    Path(id): Path<String>,
    asked: AskedPath,
    Query(query): Query<NameQuery>,
) -> ApiResult<Json<FileList>> {
    let path = asked.0.unwrap_or_else(GuestPath::root);
    let limit = query.limit.unwrap_or(NAMES).clamp(1, MOST);
    let room = api.streams.enter_walk()?;
    let (_waiting, waits) = Waiting::new();
    let mounts = Arc::clone(&api.mounts);
    let found = api.blocking(move |_| {
        let _room = room;
        let go_on = for_a_while(waits);
        let pattern = Pattern::new(&query.name)
            .map_err(|error| Failure::new(FailureKind::Invalid, error.message, ""))?;
        let using = mounts.using(&id)?;
        let mut list = FileList::new(id);
        // What is left for the volumes that follow.
        let mut left = SearchLimits { found: limit, ..SearchLimits::default() };
        let mut look = |list: &mut FileList, found: &Found| {
            let matches = search(&*found.tree, found.node, &pattern, left, &go_on);
            left = left.after(&matches);
            take(list, &told(&found.volume, &found.inside), matches);
        };
        match find(&using, &path, true)? {
            Some(found) => {
                list.path = told(&found.volume, &found.inside);
                look(&mut list, &found);
            }
            None => {
                for root in of_volumes(&mut list, &using) {
                    look(&mut list, &root);
                }
            }
        }
        list.total_count = list.files.len();
        Ok(list)
    });
    Ok(Json(found.await?))
}
