//! A file as clients see it.

use guest::tree::Listed;
use guest::{Attributes, FileType, Status, Time, VolumeAbout};
use serde::Serialize;
use utoipa::ToSchema;

use crate::model::Timestamp;
use crate::restore::files::names;

/// A file, directory, or anything else that has a name.
#[derive(Debug, Serialize, ToSchema)]
pub(super) struct FileView {
    /// Its name. A byte that is no UTF-8 is `\xNN`, and a backslash before such letters is doubled.
    name: String,
    /// Its path in the mount: what other addresses take.
    pub(super) path: String,
    /// `file`, `directory`, `symlink`, `char_device`, `block_device`, `fifo`, `socket`, or `opaque`:
    /// `note` says why its content cannot be read.
    r#type: &'static str,
    /// Bytes of a file.
    size: u64,
    /// Permission bits in octal, such as `0644`.
    mode: String,
    #[schema(value_type = Option<String>)]
    modified_time: Option<Timestamp>,
    is_symlink: bool,
    /// Where a link points.
    #[serde(skip_serializing_if = "Option::is_none")]
    symlink_target: Option<String>,
    /// What people should know of it.
    #[serde(skip_serializing_if = "Option::is_none")]
    note: Option<String>,
    uid: u32,
    gid: u32,
    /// Names that it has.
    links: u32,
}

pub(super) fn type_word(file_type: FileType) -> &'static str {
    match file_type {
        FileType::File => "file",
        FileType::Directory => "directory",
        FileType::Symlink => "symlink",
        FileType::CharDevice => "char_device",
        FileType::BlockDevice => "block_device",
        FileType::Fifo => "fifo",
        FileType::Socket => "socket",
        FileType::Opaque => "opaque",
    }
}

pub(super) fn timestamp(time: Option<Time>) -> Option<Timestamp> {
    time.and_then(|time| Timestamp::at(time.seconds, time.nanoseconds))
}

impl FileView {
    pub(super) fn new(
        name: &[u8],
        path: String,
        attributes: &Attributes,
        target: Option<&[u8]>,
    ) -> Self {
        Self {
            name: names::shown(name),
            path,
            r#type: type_word(attributes.file_type),
            size: attributes.size,
            mode: format!("{:04o}", attributes.mode & 0o7777),
            modified_time: timestamp(attributes.modified),
            is_symlink: attributes.file_type == FileType::Symlink,
            symlink_target: target.map(names::shown),
            note: attributes.note.clone(),
            uid: attributes.uid,
            gid: attributes.gid,
            links: attributes.links,
        }
    }

    /// A name in a directory. Damage of what it names is told in its place.
    pub(super) fn listed(directory: &str, listed: &Listed) -> Self {
        let path = format!("{directory}/{}", names::shown(&listed.name));
        match &listed.attributes {
            Ok(attributes) => Self::new(&listed.name, path, attributes, listed.target.as_deref()),
            Err(error) => Self {
                note: Some(error.message.clone()),
                ..Self::made_up(names::shown(&listed.name), path, FileType::Opaque)
            },
        }
    }

    /// Something of which nothing else is known.
    fn made_up(name: String, path: String, file_type: FileType) -> Self {
        Self {
            name,
            path,
            r#type: type_word(file_type),
            size: 0,
            mode: "0000".into(),
            modified_time: None,
            is_symlink: false,
            symlink_target: None,
            note: None,
            uid: 0,
            gid: 0,
            links: 0,
        }
    }

    fn directory(name: String, path: String) -> Self {
        let made_up = Self::made_up(name, path, FileType::Directory);
        Self { mode: "0555".into(), links: 1, ..made_up }
    }

    /// The directory that the volumes are in.
    pub(super) fn root() -> Self {
        Self::directory("/".into(), "/".into())
    }

    /// A volume, as a directory.
    pub(super) fn volume(volume: &VolumeAbout) -> Self {
        let note = match &volume.status {
            Status::Clean | Status::Replayed => None,
            Status::Stale(reason) => Some(format!("stale: {reason}")),
            Status::Refused(reason) => Some(format!("refused: {reason}")),
        };
        Self { note, ..Self::directory(volume.name.clone(), format!("/{}", volume.name)) }
    }
}
