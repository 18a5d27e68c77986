//! Disks captured into exports of a server in this process.
#![allow(clippy::unwrap_used, clippy::expect_used, missing_docs)]

mod capture_support;
mod hub_support;

use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Once};
use std::time::Duration;

use capture_support::observer::{Acting, Told};
use capture_support::{Disk, Proxy, pattern};
use hub_support::Hub;
use hub_support::devices::{Accountant, Scripted};
use sendense_hub::block::{BlockDevice, ZeroOptions};
use sendense_hub::capture::{
    CLUSTER, CaptureError, Changes, Progress, Source, Summary, Target, copy,
};
use sendense_hub::checksum::Checksum;
use sendense_hub::export::memory::MemoryDevice;
use sendense_hub::nbd::limits::Limits;

const MIB: u64 = 1 << 20;
const C: usize = 64 << 10;

fn hub(device: &Arc<impl BlockDevice + 'static>) -> Hub {
    Hub::with(Limits::default(), Arc::clone(device) as Arc<dyn BlockDevice>)
}

fn target(hub: &Hub) -> Target {
    Target::new(&hub.address.to_string(), "disk")
}

fn run(source: &Source, target: &Target, changes: &Changes) -> Result<Summary, CaptureError> {
    copy(source, target, changes, &Progress::new())
}

fn size(bytes: &[u8]) -> u64 {
    bytes.len() as u64
}

/// A device that holds these bytes.
fn holding(bytes: &[u8]) -> Arc<MemoryDevice> {
    let device = MemoryDevice::new(bytes.len(), false);
    device.write(bytes, 0).unwrap();
    Arc::new(device)
}

/// Checksums of a disk as an earlier backup has them.
fn checksums(bytes: &[u8]) -> Changes {
    let of = |cluster: &[u8]| cluster.iter().any(|b| *b != 0).then(|| Checksum::of(cluster));
    let sums: Vec<_> = bytes.chunks(C).map(of).collect();
    Changes::Checksums(Box::new(move |index| sums[usize::try_from(index).unwrap()]))
}

#[test]
fn a_full_of_a_sparse_file_is_equal_and_reads_and_sends_only_data() {
    // Not whole clusters, and not whole sectors.
    let mut disk = Disk::sparse(6 * MIB + 777);
    disk.write(&pattern(3 * C, 1), MIB);
    disk.write(&pattern(700, 2), 6 * MIB);
    // Zeroes that the file system stores.
    disk.write(&vec![0; 2 * C], 3 * MIB);
    for fresh in [true, false] {
        let device = holding(&vec![if fresh { 0 } else { 0xee }; disk.bytes().len()]);
        let hub = hub(&device);
        let target = Target { reads_as_zeroes: fresh, ..target(&hub) };
        let progress = Progress::new();
        let summary = copy(&disk.source(), &target, &Changes::Everything, &progress).unwrap();
        assert!(device.snapshot() == disk.bytes());
        let sent = 3 * CLUSTER + 777;
        let rest = 6 * MIB - 3 * CLUSTER;
        let (zeroed, skipped) = if fresh { (0, rest) } else { (rest, 0) };
        assert_eq!((summary.bytes_sent, summary.bytes_zeroed), (sent, zeroed));
        assert_eq!((summary.bytes_skipped, summary.reconnects), (skipped, 0));
        assert!(summary.bytes_read < 2 * MIB, "{summary:?}");
        assert!(device.flushes() > 0);
        assert_eq!(progress.bytes_planned(), size(&disk.bytes()));
        assert_eq!(progress.bytes_done(), progress.bytes_planned());
        assert_eq!(progress.bytes_sent(), summary.bytes_sent);
        assert_eq!(progress.bytes_read(), summary.bytes_read);
    }
}

#[test]
fn disks_of_any_size_are_equal_afterwards() {
    for length in [0, 1, 511, 512, 513, C - 1, C, C + 1, (1 << 20) - 1, (5 << 20) + 12_345] {
        let bytes = pattern(length, length);
        let disk = Disk::of(&bytes);
        let device = Arc::new(MemoryDevice::new(length, false));
        let hub = hub(&device);
        let target = Target { request: 1 << 17, ..target(&hub) };
        let summary = run(&disk.source(), &target, &Changes::Everything).unwrap();
        assert!(device.snapshot() == bytes, "{length}");
        assert_eq!(summary.bytes_sent, length as u64);
        assert!(device.flushes() > 0, "{length}");
    }
}

#[test]
fn changes_by_checksums_send_only_what_changed() {
    // The last cluster is short.
    let before = {
        let mut bytes = pattern(40 * C + 100, 3);
        bytes[10 * C..20 * C].fill(0);
        bytes
    };
    let mut after = before.clone();
    after[5] ^= 1;
    after[12 * C + 9] = 1;
    after[30 * C..32 * C].fill(0);
    *after.last_mut().unwrap() ^= 1;
    let device = holding(&before);
    let hub = hub(&device);
    let disk = Disk::of(&after);
    // That the target is not fresh, whatever is said, is seen from the checksums.
    let target = Target { reads_as_zeroes: true, ..target(&hub) };
    let summary = run(&disk.source(), &target, &checksums(&before)).unwrap();
    assert!(device.snapshot() == after);
    assert_eq!(summary.bytes_sent, 2 * CLUSTER + 100);
    assert_eq!(summary.bytes_zeroed, 2 * CLUSTER);
    assert_eq!(summary.bytes_skipped, size(&after) - 4 * CLUSTER - 100);
    assert_eq!(summary.bytes_read, size(&after));
}

#[test]
fn a_hole_where_the_earlier_backup_has_data_becomes_zeroes() {
    let before = pattern(8 * C, 4);
    let disk = Disk::sparse(size(&before));
    let device = holding(&before);
    let hub = hub(&device);
    let summary = run(&disk.source(), &target(&hub), &checksums(&before)).unwrap();
    assert!(device.snapshot().iter().all(|byte| *byte == 0));
    assert_eq!((summary.bytes_sent, summary.bytes_zeroed), (0, size(&before)));
    let unchanged = run(&disk.source(), &target(&hub), &checksums(&device.snapshot())).unwrap();
    assert_eq!(unchanged.bytes_skipped, size(&before));
}

#[test]
fn changes_by_extents_send_just_those() {
    let before = pattern(20 * C + 5, 5);
    let mut after = pattern(20 * C + 5, 6);
    after[3 * C..4 * C].fill(0);
    let extents = [(100u64, 300u64), (2 * CLUSTER, 3 * CLUSTER), (20 * CLUSTER, 5)];
    let device = holding(&before);
    let hub = hub(&device);
    let disk = Disk::of(&after);
    let changes = Changes::Extents(extents.to_vec());
    let summary = run(&disk.source(), &target(&hub), &changes).unwrap();
    let mut expected = before;
    for (offset, length) in extents {
        let range = usize::try_from(offset).unwrap()..usize::try_from(offset + length).unwrap();
        expected[range.clone()].copy_from_slice(&after[range]);
    }
    assert!(device.snapshot() == expected);
    assert_eq!((summary.bytes_sent, summary.bytes_zeroed), (2 * CLUSTER + 305, CLUSTER));
    let outside = Changes::Extents(vec![(0, size(&after) + 1)]);
    let refused = run(&disk.source(), &target(&hub), &outside);
    assert!(matches!(refused, Err(CaptureError::Invalid(_))), "{refused:?}");
}

#[test]
fn an_nbd_source_is_read_over_several_connections_and_its_holes_are_not() {
    let length = 9 * (1 << 20) + 513;
    let mut scripted = Scripted::new(length);
    scripted.memory.write(&pattern(length, 7), 0).unwrap();
    scripted.hole = MIB + 5..5 * MIB;
    let (from, to) = (MIB + 5, 5 * MIB);
    scripted.memory.write_zeroes(from, to - from, ZeroOptions::default()).unwrap();
    let scripted = Arc::new(scripted);
    let origin = hub(&scripted);
    let source = Source::open(&format!("nbd://{}/disk", origin.address)).unwrap();
    assert_eq!(source.size(), length as u64);
    let device = Arc::new(MemoryDevice::new(length, false));
    let hub = hub(&device);
    let summary = run(&source, &target(&hub), &Changes::Everything).unwrap();
    assert!(device.snapshot() == scripted.memory.snapshot());
    assert_eq!(summary.bytes_zeroed, 4 * MIB - CLUSTER);
    assert_eq!(summary.bytes_read, length as u64 - summary.bytes_zeroed);
}

#[test]
fn a_source_without_the_bitmap_says_so() {
    let origin = hub(&Arc::new(MemoryDevice::new(C, false)));
    let source = Source::open(&format!("nbd://{}/disk", origin.address)).unwrap();
    for (source, bitmap) in
        [(&source, Some("b0")), (&source, None), (&Disk::sparse(512).source(), None)]
    {
        let refused = source.changed_extents(bitmap).unwrap_err();
        assert!(refused.to_string().contains("it offers none"), "{refused}");
    }
    assert!(matches!(Source::open("/no/such/disk"), Err(CaptureError::Source { .. })));
    assert!(matches!(Source::open("ftp://x/y"), Err(CaptureError::Invalid(_))));
}

#[test]
fn a_target_of_another_size_is_refused_with_both_sizes_and_nothing_is_sent() {
    let disk = Disk::of(&pattern(3 * C, 8));
    for other in [3 * C - 1, 3 * C + 1] {
        let device = Arc::new(MemoryDevice::new(other, false));
        let hub = hub(&device);
        let refused = run(&disk.source(), &target(&hub), &Changes::Everything).unwrap_err();
        let text = refused.to_string();
        assert!(text.contains("196608") && text.contains(&other.to_string()), "{text}");
        assert!(device.snapshot().iter().all(|byte| *byte == 0));
    }
}

#[test]
fn a_target_that_is_read_only_or_not_there_is_refused() {
    let disk = Disk::sparse(CLUSTER);
    let hub = hub(&Arc::new(MemoryDevice::new(C, true)));
    let refused = run(&disk.source(), &target(&hub), &Changes::Everything).unwrap_err();
    assert!(refused.to_string().contains("read-only"), "{refused}");
    let missing = Target { export: "none".into(), ..target(&hub) };
    let refused = run(&disk.source(), &missing, &Changes::Everything).unwrap_err();
    assert!(matches!(refused, CaptureError::Connect { .. }), "{refused}");
    assert!(refused.to_string().contains("no export named 'none'"), "{refused}");
}

#[test]
fn fewer_connections_than_asked_for_are_enough() {
    let bytes = pattern(4 << 20, 9);
    let device = Arc::new(MemoryDevice::new(bytes.len(), false));
    let limits = Limits { connections_per_export: 2, ..Limits::default() };
    let hub = Hub::with(limits, device.clone());
    let target = Target { request: 1 << 17, ..target(&hub) };
    run(&Disk::of(&bytes).source(), &target, &Changes::Everything).unwrap();
    assert!(device.snapshot() == bytes);
}

#[test]
fn a_flush_goes_out_as_often_as_the_target_says() {
    let bytes = pattern(8 << 20, 10);
    let device = Arc::new(MemoryDevice::new(bytes.len(), false));
    let hub = hub(&device);
    let target = Target { connections: 1, request: 1 << 16, flush_every: MIB, ..target(&hub) };
    run(&Disk::of(&bytes).source(), &target, &Changes::Everything).unwrap();
    // Those in flight at each flush count for the next; the last one is the copy's end.
    assert!((5..=9).contains(&device.flushes()), "{}", device.flushes());
}

/// A disk of 16 MiB over one connection with small requests, so that its flushes are told: one for each
/// MiB that was answered, with at most half a MiB in flight.
fn steady(hub: &Proxy) -> Target {
    let address = hub.address();
    Target { connections: 1, request: 1 << 16, flush_every: MIB, ..Target::new(&address, "disk") }
}

/// Headers of requests and negotiations, in bytes.
const HEADERS: u64 = 64 << 10;

#[test]
fn after_a_cut_only_what_is_not_durable_is_sent_again() {
    let bytes = pattern(16 << 20, 11);
    let device = Arc::new(Accountant::new(bytes.len(), true));
    let hub = hub(&device);
    let durable = Arc::new(AtomicU64::new(0));
    let (told, at_cut) = (Arc::clone(&device), Arc::clone(&durable));
    let proxy = Proxy::start(hub.address, &[8 * MIB + 99], move || {
        told.crash();
        at_cut.store(told.durable_bytes(), Ordering::SeqCst);
    });
    let summary = run(&Disk::of(&bytes).source(), &steady(&proxy), &Changes::Everything).unwrap();
    assert_eq!(summary.reconnects, 1);
    assert!(device.memory.snapshot() == bytes);
    let durable = durable.load(Ordering::SeqCst);
    assert!(durable >= 4 * MIB, "{durable}");
    let again = proxy.passed() - (8 * MIB + 99);
    assert!(again <= 16 * MIB - durable + HEADERS, "{again} bytes after {durable} were durable");
}

#[test]
fn a_server_that_cannot_tell_gets_everything_since_the_last_flush_again() {
    let bytes = pattern(16 << 20, 12);
    let device = Arc::new(Accountant::new(bytes.len(), false));
    let hub = hub(&device);
    let lost = Arc::clone(&device);
    let cuts = [8 * MIB + 99, 3 * MIB];
    let proxy = Proxy::start(hub.address, &cuts, move || lost.crash());
    let summary = run(&Disk::of(&bytes).source(), &steady(&proxy), &Changes::Everything).unwrap();
    assert_eq!(summary.reconnects, 2);
    assert!(device.memory.snapshot() == bytes);
    let again = proxy.passed() - (11 * MIB + 99);
    assert!(again < 16 * MIB - 5 * MIB, "{again} bytes after the cuts");
}

#[test]
fn many_connections_that_are_cut_again_and_again_leave_an_equal_disk() {
    let mut before = pattern(24 * (1 << 20) + 77, 13);
    before[5 << 20..9 << 20].fill(0);
    let mut after = before.clone();
    after[3 << 20..6 << 20].copy_from_slice(&pattern(3 << 20, 14));
    after[12 << 20..20 << 20].copy_from_slice(&pattern(8 << 20, 15));
    after[21 << 20..22 << 20].fill(0);
    let disk = Disk::of(&after);
    for (tells, by_checksums) in [(true, true), (false, true), (true, false), (false, false)] {
        let device = Arc::new(Accountant::new(before.len(), tells));
        device.write(&before, 0).unwrap();
        device.flush().unwrap();
        device.begin();
        let hub = hub(&device);
        let lost = Arc::clone(&device);
        let proxy = Proxy::start(hub.address, &[MIB, 2 * MIB, 300, MIB], move || lost.crash());
        let changes = if by_checksums { checksums(&before) } else { Changes::Everything };
        let target =
            Target { connections: 4, request: 1 << 17, flush_every: MIB, ..steady(&proxy) };
        let summary = run(&disk.source(), &target, &changes).unwrap();
        assert!(summary.reconnects >= 3, "{summary:?}");
        assert!(device.memory.snapshot() == after, "{tells} {by_checksums}");
    }
}

#[test]
fn a_server_that_does_not_come_back_ends_the_copy_with_the_cause() {
    let bytes = pattern(4 << 20, 16);
    let device = Arc::new(MemoryDevice::new(bytes.len(), false));
    let hub = hub(&device);
    let proxy = Proxy::start(hub.address, &[MIB], || {});
    proxy.stay_closed();
    let target = Target { reconnect: Duration::from_millis(200), ..steady(&proxy) };
    let progress = Progress::new();
    let lost = copy(&Disk::of(&bytes).source(), &target, &Changes::Everything, &progress);
    assert!(matches!(lost, Err(CaptureError::Lost { .. })), "{lost:?}");
    assert!(progress.cuts() > 1);
}

/// A copy in small requests; `act` is called once 2 MiB were sent.
fn disturbed(
    bytes: &[u8],
    target: &Target,
    act: impl Fn() + Sync,
) -> Result<Summary, CaptureError> {
    let target = Target { request: 1 << 16, ..target.clone() };
    let acted = Once::new();
    let observer = Acting::new(|progress, told| {
        if told == Told::Sent && progress.bytes_sent() >= 2 * MIB {
            acted.call_once(&act);
        }
    });
    copy(&Disk::of(bytes).source(), &target, &Changes::Everything, &observer)
}

#[test]
fn a_server_that_says_it_is_about_to_end_is_waited_for() {
    let bytes = pattern(16 << 20, 21);
    let device = Arc::new(MemoryDevice::new(bytes.len(), false));
    let hub = hub(&device);
    // As after a restart: whoever comes now gets another export of the same disk.
    let restart = || {
        hub.server.exports.remove("disk").unwrap().begin_shutdown();
        hub.add("disk", device.clone());
    };
    let summary = disturbed(&bytes, &target(&hub), restart).unwrap();
    assert_eq!(summary.reconnects, 1);
    assert!(device.snapshot() == bytes);
}

#[test]
fn an_export_that_takes_no_more_or_is_gone_ends_the_copy_with_the_servers_word() {
    let bytes = pattern(16 << 20, 22);
    for connections in [1, 4] {
        let hub = hub(&Arc::new(MemoryDevice::new(bytes.len(), false)));
        let target = Target { connections, ..target(&hub) };
        let close = || hub.server.exports.get("disk").unwrap().begin_shutdown();
        let closed = disturbed(&bytes, &target, close).unwrap_err();
        assert!(matches!(closed, CaptureError::Closed { .. }), "{closed}");
        assert!(closed.to_string().contains("shutting down"), "{closed}");
    }
    let hub = hub(&Arc::new(MemoryDevice::new(bytes.len(), false)));
    let target = Target { reconnect: Duration::from_secs(1), ..target(&hub) };
    let remove = || hub.server.exports.remove("disk").unwrap().begin_shutdown();
    let lost = disturbed(&bytes, &target, remove).unwrap_err();
    assert!(matches!(lost, CaptureError::Lost { .. }), "{lost}");
    assert!(lost.to_string().contains("no export named 'disk'"), "{lost}");
}

#[test]
fn a_connection_that_never_carries_enough_is_given_up() {
    let bytes = pattern(4 << 20, 17);
    let device = Arc::new(MemoryDevice::new(bytes.len(), false));
    let hub = hub(&device);
    let proxy = Proxy::start(hub.address, &[10_000; 100], || {});
    let given_up = run(&Disk::of(&bytes).source(), &steady(&proxy), &Changes::Everything);
    assert!(matches!(given_up, Err(CaptureError::Unstable { .. })), "{given_up:?}");
}

#[test]
fn an_error_that_the_server_answers_is_final_and_told_in_its_words() {
    let bytes = pattern(8 << 20, 18);
    let device = Arc::new(Accountant::new(bytes.len(), true));
    device.full_at.store(3 * MIB, Ordering::SeqCst);
    let hub = hub(&device);
    let failed = run(&Disk::of(&bytes).source(), &target(&hub), &Changes::Everything);
    let failed = failed.unwrap_err();
    assert!(matches!(failed, CaptureError::Failed { .. }), "{failed}");
    let text = failed.to_string();
    assert!(text.contains("NoSpc") && text.contains("the repository is full"), "{text}");
}

#[test]
fn a_last_flush_that_fails_fails_the_copy() {
    let device = Arc::new(Scripted::new(C));
    device.broken_flush.store(true, Ordering::SeqCst);
    let hub = hub(&device);
    let disk = Disk::of(&pattern(C, 19));
    let failed = run(&disk.source(), &target(&hub), &Changes::Everything).unwrap_err();
    assert!(failed.to_string().contains("the disk does not flush"), "{failed}");
}

/// Cancels once so much was sent, or at the first cut.
fn impatient(after: u64) -> Acting<impl Fn(&Progress, Told) + Sync> {
    Acting::new(move |progress, told| {
        if told == Told::Cut || (told == Told::Sent && progress.bytes_sent() >= after) {
            progress.cancel();
        }
    })
}

#[test]
fn cancelling_stops_the_copy_while_it_sends_and_while_it_waits() {
    let bytes = pattern(16 << 20, 20);
    let disk = Disk::of(&bytes);
    let device = Arc::new(Accountant::new(bytes.len(), true));
    let hub = hub(&device);
    let observer = impatient(2 * MIB);
    let target = Target { request: 1 << 16, ..target(&hub) };
    let stopped = copy(&disk.source(), &target, &Changes::Everything, &observer);
    assert!(matches!(stopped, Err(CaptureError::Cancelled)), "{stopped:?}");
    assert!(device.written.load(Ordering::SeqCst) < 8 * MIB);

    let proxy = Proxy::start(hub.address, &[MIB], || {});
    proxy.stay_closed();
    let observer = impatient(u64::MAX);
    let stopped = copy(&disk.source(), &steady(&proxy), &Changes::Everything, &observer);
    assert!(matches!(stopped, Err(CaptureError::Cancelled)), "{stopped:?}");
}
