//! Restore points as disks, and the files on them.

mod diff;
mod download;
mod exports;
mod files;
mod mounts;
mod path;
mod range;
mod stream;
mod view;
mod waiting;

pub(in crate::api) use stream::Streams;

use std::sync::Arc;

use guest::{ErrorKind, Node, Status, Tree};
use utoipa_axum::router::OpenApiRouter;

use crate::api::Api;
use crate::backup::{Failure, FailureKind};
use crate::restore::{self, Using};
use path::GuestPath;

pub(super) fn router() -> OpenApiRouter<Api> {
    OpenApiRouter::new()
        .merge(exports::router())
        .merge(diff::router())
        .merge(mounts::router())
        .merge(files::router())
        .merge(download::router())
}

/// What a reader says, for clients. What a guest's disk cannot give is no defect of the hub.
fn failure(error: guest::Error) -> Failure {
    let next = match error.kind {
        ErrorKind::Io => {
            "unmount it and mount the backup again; if that fails too, verify the backup"
        }
        _ => "",
    };
    let kind = match error.kind {
        ErrorKind::NotFound => FailureKind::NotFound,
        ErrorKind::NotADirectory | ErrorKind::NotAFile | ErrorKind::NotALink => {
            FailureKind::Invalid
        }
        ErrorKind::Corrupt | ErrorKind::Unsupported | ErrorKind::Limit => {
            FailureKind::Unprocessable
        }
        ErrorKind::Io if restore::is_end_of_worker(&error) => FailureKind::Conflict,
        ErrorKind::Io => FailureKind::Internal,
    };
    Failure::new(kind, error.message, next)
}

/// Something in a volume of a mount.
struct Found {
    volume: String,
    tree: Arc<dyn Tree>,
    node: Node,
    /// Its path in the volume, without links.
    inside: Vec<u8>,
}

impl Found {
    /// Its name: of a volume's root the volume's.
    fn name(&self) -> &[u8] {
        let last = self.inside.rsplit(|byte| *byte == b'/').next().unwrap_or_default();
        if last.is_empty() { self.volume.as_bytes() } else { last }
    }
}

/// The roots of the volumes that are shown; and the volumes whose roots cannot be read, and why. One that
/// is damaged hides no other.
fn roots(using: &Using) -> (Vec<Found>, Vec<(String, Failure)>) {
    let (mut roots, mut damaged) = (Vec::new(), Vec::new());
    for about in using.volumes() {
        if matches!(about.status, Status::Refused(_)) {
            continue;
        }
        let volume = about.name.clone();
        let root = |tree: Arc<dyn Tree>| Ok((tree.root().map_err(failure)?, tree));
        match using.tree(&volume).and_then(root) {
            Ok((node, tree)) => {
                roots.push(Found { volume, tree, node, inside: b"/".to_vec() });
            }
            Err(failure) => damaged.push((volume, failure)),
        }
    }
    (roots, damaged)
}

/// Finds what a path stands for; nothing for `/`. Links are followed inside the volume, the last one
/// where `follow` is set.
fn find(using: &Using, path: &GuestPath, follow: bool) -> Result<Option<Found>, Failure> {
    let Some(volume) = &path.volume else { return Ok(None) };
    let tree = using.tree(volume)?;
    let resolved = tree.resolve(&path.inside, follow).map_err(|error| {
        // Something on the way is no directory: then there is nothing below it.
        let absent = error.kind == ErrorKind::NotADirectory;
        let kind = if absent { ErrorKind::NotFound } else { error.kind };
        failure(guest::Error { kind, ..error })
    })?;
    Ok(Some(Found { volume: volume.clone(), tree, node: resolved.node, inside: resolved.path }))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn a_worker_that_ended_is_a_conflict_and_a_disk_that_fails_is_not() {
        let of = |text: &str| failure(guest::Error::new(ErrorKind::Io, text));
        let ended = of("the worker ended: it gave no answer in time");
        assert_eq!(ended.kind, FailureKind::Conflict);
        let disk = of("disk 0: a cluster cannot be read");
        assert_eq!(disk.kind, FailureKind::Internal);
        for failure in [ended, disk] {
            assert!(failure.details.contains("verify the backup"), "{failure:?}");
        }
    }
}
