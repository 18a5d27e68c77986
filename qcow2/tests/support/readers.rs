//! Independent implementations of the format, as opinions on images: imago and qcow2-rs.
#![allow(clippy::unwrap_used, clippy::cast_possible_truncation, unreachable_pub, dead_code)]

use std::path::Path;

use imago::qcow2::Qcow2;
use imago::{FormatAccess, FormatDriverBuilder, PermissiveImplicitOpenGate};
use qcow2::{Image, OpenOptions};
use qcow2_rs::dev::{Qcow2Dev, Qcow2DevParams};
use qcow2_rs::helpers::Qcow2IoBuf;
use qcow2_rs::sync_io::Qcow2IoSync;
use qcow2_rs::utils::qcow2_alloc_dev_sync;

/// Bytes that are compared at a time.
const PIECE: u64 = 16 << 20;

/// qcow2-rs looks for backing files in the current directory: they are opened here.
fn open_with_qcow2_rs(path: &Path) -> Qcow2Dev<Qcow2IoSync> {
    let params = Qcow2DevParams::new(9, None, None, true, false);
    let io = Qcow2IoSync::new(path, true, false);
    let (mut dev, backing) = qcow2_alloc_dev_sync(path, io, &params).unwrap();
    if let Some(name) = backing {
        dev.set_backing_dev(Box::new(open_with_qcow2_rs(&path.parent().unwrap().join(name))));
    }
    dev
}

async fn compare(path: &Path) {
    let ours = Image::open(path, &OpenOptions::new().read_only()).unwrap();
    let imago = Qcow2::<imago::file::File>::builder_path(path)
        .open(PermissiveImplicitOpenGate::default())
        .await
        .unwrap();
    let imago = FormatAccess::new(imago);
    let other = open_with_qcow2_rs(path);
    other.qcow2_prep_io().await.unwrap();
    let size = ours.size();
    assert_eq!((imago.size(), other.info.virtual_size()), (size, size), "{}", path.display());
    for at in (0..size).step_by(PIECE as usize) {
        let length = PIECE.min(size - at) as usize;
        let mut wanted = vec![0; length];
        ours.read_at(&mut wanted, at).unwrap();
        let mut back = vec![0xee; length];
        imago.read(&mut back[..], at).await.unwrap();
        assert!(back == wanted, "imago reads something else in {}", path.display());
        let mut back = Qcow2IoBuf::<u8>::new(length);
        assert_eq!(other.read_at(&mut back, at).await.unwrap(), length);
        assert!(back[..] == wanted[..], "qcow2-rs reads something else in {}", path.display());
    }
}

/// Both must read from the image, and its chain of QCOW2 images, what this engine reads.
pub fn agree(path: &Path) {
    tokio::runtime::Builder::new_current_thread().build().unwrap().block_on(compare(path));
}
