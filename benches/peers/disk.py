"""What the disk itself takes and gives, without any server."""

import json
import os
import time
from contextlib import contextmanager

from bench import GIB, run, timed
from cache import empty_cache


# Memory in huge pages: a transfer around the page cache in small ones has a part for each page, and
# a virtual disk is slower by up to a half.
HUGE_PAGES = ("glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold=1073741824:"
              "glibc.malloc.top_pad=67108864")


def fio_files(*options):
    """GiB a second of fio's own processes on plain files."""
    text = run("fio", "--name=x", "--bs=1m", "--ioengine=psync", "--group_reporting",
               "--output-format=json", *options,
               env={**os.environ, "GLIBC_TUNABLES": HUGE_PAGES})
    job = json.loads(text[text.index("{"):])["jobs"][0]
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / GIB


def busy_milliseconds(directory):
    """How long the disk under a directory has had work; `None` where the system does not tell."""
    device = os.stat(directory).st_dev
    try:
        with open(f"/sys/dev/block/{os.major(device)}:{os.minor(device)}/stat") as fields:
            return int(fields.read().split()[9])
    except OSError:
        return None


@contextmanager
def busy(bench, row, case, name):
    """Adds the share of the time in which the disk had work."""
    before, start = busy_milliseconds(bench.directory), time.monotonic()
    yield
    if before is not None:
        share = (busy_milliseconds(bench.directory) - before) / (time.monotonic() - start) / 10
        bench.results.add(row, f"{case}: time the disk is busy", name, min(share, 100), "%")


def ceilings(bench, row):
    """What it takes of one file."""
    for name, options in (("dd, buffered", []), ("dd, direct", ["oflag=direct"])):
        path = bench.image("plain")
        seconds = timed("dd", f"if={bench.source}", f"of={path}", "bs=1M", "conv=fsync", *options)
        bench.results.add(row, "the disk alone", name, bench.gib / seconds, "GiB/s")
        path.unlink()
    for depth in (4, 16):
        path = bench.image("plain")
        rate = fio_files("--rw=write", f"--filename={path}", "--direct=1", "--ioengine=libaio",
                         f"--iodepth={depth}", f"--size={bench.size}", "--fallocate=posix",
                         "--end_fsync=1")
        bench.results.add(row, "the disk alone", f"fio, direct, reserved, depth {depth}", rate,
                          "GiB/s")
        path.unlink()


def read_ceilings(bench, row, image, images):
    """What it gives: of one image, and of pieces of the files of a directory."""
    case = "the disk alone, cold: the file of the chain of 1"
    for name, readers in (("one reader", 1), ("four readers", 4)):
        part = bench.size // readers
        empty_cache()
        rate = fio_files("--rw=read", f"--filename={image}", f"--numjobs={readers}",
                         f"--size={part}", f"--offset_increment={part}")
        bench.results.add(row, case, f"fio, through the page cache, {name}", rate, "GiB/s")
    for depth in (1, 4, 8):
        empty_cache()
        rate = fio_files("--rw=read", f"--filename={image}", "--direct=1", "--ioengine=libaio",
                         f"--iodepth={depth}", f"--size={bench.size}")
        bench.results.add(row, case, f"fio, direct, depth {depth}", rate, "GiB/s")
    # What a long chain has in one place lies in many: pieces of 64 - 128 KiB on the average.
    files = ":".join(str(path) for path in sorted(images.iterdir()))
    for depth in (8, 16):
        empty_cache()
        rate = fio_files("--rw=randread", f"--filename={files}", "--file_service_type=random",
                         "--bs=64k", "--direct=1", "--ioengine=libaio", f"--iodepth={depth}",
                         f"--io_size={bench.size}", "--norandommap", "--randrepeat=0")
        bench.results.add(row, "the disk alone, cold: 64 KiB anywhere in the files of the chain of 30",
                          f"fio, direct, depth {depth}", rate, "GiB/s")
