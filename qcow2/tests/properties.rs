//! Any sequence of operations against a plain byte vector, on single images and on overlays of
//! three, with clusters so small that every edge is met.
#![allow(
    clippy::unwrap_used,
    clippy::cast_possible_truncation,
    clippy::print_stdout,
    unreachable_pub,
    dead_code,
    missing_docs
)]

use std::collections::HashMap;
use std::path::{Path, PathBuf};
use std::sync::Arc;

use proptest::prelude::*;
use qcow2::storage::{MemStorage, Storage};
use qcow2::{
    BackingFormat, CreateOptions, Error, ErrorKind, Image, MappingKind, OpenGate, OpenOptions,
    Repair, ZeroMode, check_storage, create_in,
};

#[derive(Debug, Clone)]
enum Op {
    Write {
        at: u32,
        length: u32,
        byte: u8,
    },
    /// Written zeroes may be found out.
    WriteZeroBytes {
        at: u32,
        length: u32,
    },
    Zeroes {
        at: u32,
        length: u32,
        keep: bool,
    },
    Discard {
        at: u32,
        length: u32,
    },
    Read {
        at: u32,
        length: u32,
    },
    Flush,
    Reopen,
}

/// Offsets and lengths that like the borders of sectors, clusters and tables.
fn place() -> impl Strategy<Value = u32> {
    prop_oneof![
        3 => 0..=u32::from(u16::MAX) * 4,
        2 => (0..512u32, -1..=1i32).prop_map(|(n, d)| (n * 512).saturating_add_signed(d)),
        1 => (0..64u32, -1..=1i32).prop_map(|(n, d)| (n * 4096).saturating_add_signed(d)),
    ]
}

fn length() -> impl Strategy<Value = u32> {
    prop_oneof![
        4 => 0..2000u32,
        2 => (1..40u32).prop_map(|n| n * 512),
        1 => 0..120_000u32,
    ]
}

fn op() -> impl Strategy<Value = Op> {
    prop_oneof![
        8 => (place(), length(), 1..=255u8).prop_map(|(at, length, byte)| Op::Write { at, length, byte }),
        2 => (place(), length()).prop_map(|(at, length)| Op::WriteZeroBytes { at, length }),
        3 => (place(), length(), any::<bool>()).prop_map(|(at, length, keep)| Op::Zeroes { at, length, keep }),
        2 => (place(), length()).prop_map(|(at, length)| Op::Discard { at, length }),
        2 => (place(), length()).prop_map(|(at, length)| Op::Read { at, length }),
        2 => Just(Op::Flush),
        1 => Just(Op::Reopen),
    ]
}

#[derive(Debug, Clone)]
struct Layer {
    cluster_bits: u32,
    refcount_order: u32,
    size: u64,
    ops: Vec<Op>,
}

fn layer(ops: std::ops::Range<usize>) -> impl Strategy<Value = Layer> {
    let sectors = prop_oneof![Just(0u64), 1..8u64, 100..500u64];
    (9..=12u32, 0..=6u32, sectors, prop::collection::vec(op(), ops)).prop_map(
        |(cluster_bits, refcount_order, sectors, ops)| Layer {
            cluster_bits,
            refcount_order,
            size: sectors * 512,
            ops,
        },
    )
}

#[derive(Clone, Default)]
struct Files(HashMap<String, Arc<MemStorage>>);

impl OpenGate for Files {
    fn open(&self, _: &Path, name: &str) -> qcow2::Result<(PathBuf, Arc<dyn Storage>)> {
        match self.0.get(name) {
            Some(storage) => Ok((PathBuf::from(name), Arc::clone(storage) as _)),
            None => Err(Error::new(ErrorKind::Chain, format!("no '{name}'"))),
        }
    }
}

fn open(storage: &Arc<MemStorage>, files: &Files) -> Image {
    let mut options = OpenOptions::new();
    options.metadata_cache = 1;
    Image::open_storage(Arc::clone(storage) as _, Path::new("top"), files, &options).unwrap()
}

fn read(image: &Image, at: u64, length: u64) -> Vec<u8> {
    let mut bytes = vec![0xee; length as usize];
    image.read_at(&mut bytes, at).unwrap();
    bytes
}

/// What the mapping calls zero is zero, and it covers the disk without gaps.
fn mapping_agrees(image: &Image, model: &[u8]) {
    let mut end = 0;
    image
        .map(0, image.size(), &mut |m| {
            assert_eq!(m.offset, end, "a gap or an overlap");
            assert!(m.length > 0);
            end += m.length;
            let zero = !matches!(m.kind, MappingKind::Data { .. } | MappingKind::Compressed);
            let range = m.offset as usize..end as usize;
            assert!(!zero || model[range].iter().all(|b| *b == 0), "{m:?}");
            true
        })
        .unwrap();
    assert_eq!(end, image.size());
}

fn apply(op: &Op, storage: &Arc<MemStorage>, files: &Files, image: &mut Image, model: &mut [u8]) {
    let size = model.len() as u64;
    let clip = |at: u32, length: u32| {
        let at = u64::from(at).min(size);
        let length = u64::from(length).min(size - at);
        (at, length, at as usize..(at + length) as usize)
    };
    match *op {
        Op::Write { at, length, byte } => {
            let (at, length, range) = clip(at, length);
            image.write_at(&vec![byte; length as usize], at).unwrap();
            model[range].fill(byte);
        }
        Op::WriteZeroBytes { at, length } => {
            let (at, length, range) = clip(at, length);
            image.write_at(&vec![0; length as usize], at).unwrap();
            model[range].fill(0);
        }
        Op::Zeroes { at, length, keep } => {
            let (at, length, range) = clip(at, length);
            let mode = if keep { ZeroMode::KeepAllocated } else { ZeroMode::Unmap };
            image.write_zeroes(at, length, mode).unwrap();
            model[range].fill(0);
        }
        Op::Discard { at, length } => {
            let (at, length, range) = clip(at, length);
            image.discard(at, length).unwrap();
            // Each byte is as before or zero.
            let bytes = read(image, at, length);
            for (now, before) in bytes.iter().zip(&mut model[range]) {
                assert!(*now == 0 || now == before, "a discard invented {now}");
                *before = *now;
            }
        }
        Op::Read { at, length } => {
            let (at, length, range) = clip(at, length);
            assert!(read(image, at, length) == model[range], "{op:?}");
        }
        Op::Flush => image.flush().unwrap(),
        Op::Reopen => {
            image.close().unwrap();
            *image = open(storage, files);
        }
    }
}

fn run(layers: &[Layer]) {
    let mut files = Files::default();
    let mut below: Option<String> = None;
    let mut model: Vec<u8> = Vec::new();
    for (number, layer) in layers.iter().enumerate() {
        let mut options = CreateOptions::new(layer.size).cluster_size(1 << layer.cluster_bits);
        options.refcount_bits = 1 << layer.refcount_order;
        options.backing = below.take().map(|name| (name, BackingFormat::Qcow2));
        let storage = Arc::new(MemStorage::default());
        create_in(&*storage, &options).unwrap();
        model.resize(layer.size as usize, 0);
        let mut image = open(&storage, &files);
        assert!(read(&image, 0, layer.size) == model, "before the first write");
        for op in &layer.ops {
            apply(op, &storage, &files, &mut image, &mut model);
        }
        assert!(read(&image, 0, layer.size) == model, "before closing");
        mapping_agrees(&image, &model);
        image.close().unwrap();
        let report = check_storage(&*storage, Repair::None).unwrap();
        assert!(report.is_clean(), "{:?}", report.findings);
        let image = open(&storage, &files);
        assert!(read(&image, 0, layer.size) == model, "after reopening");
        mapping_agrees(&image, &model);
        let name = format!("layer{number}");
        files.0.insert(name.clone(), storage);
        below = Some(name);
    }
}

fn cases(cases: u32) -> ProptestConfig {
    ProptestConfig { cases, failure_persistence: None, ..ProptestConfig::default() }
}

proptest! {
    #![proptest_config(cases(768))]

    #[test]
    fn any_sequence_of_operations_on_an_image_equals_a_byte_vector(layer in layer(1..40)) {
        run(&[layer]);
    }

    #[test]
    fn any_sequence_of_operations_on_an_overlay_of_three_equals_a_byte_vector(
        layers in [layer(0..12), layer(0..12), layer(1..24)],
    ) {
        run(&layers);
    }
}

#[test]
fn an_image_outgrows_its_refcount_table_many_times_and_stays_right() {
    let big = |at, length, byte| Op::Write { at, length, byte };
    let mut ops = Vec::new();
    for round in 0..6u8 {
        for part in 0..40 {
            ops.push(big(part * 131_072, 131_072 - 7, 1 + round));
        }
        ops.extend([Op::Flush, Op::Flush]);
        ops.push(Op::Discard { at: 0, length: 3 << 20 });
        ops.extend([Op::Flush, Op::Flush]);
    }
    run(&[Layer { cluster_bits: 9, refcount_order: 6, size: 5 << 20, ops }]);
}
