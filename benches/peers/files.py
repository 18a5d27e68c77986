"""Files out of restore points: the hub beside the kernel and ntfs-3g on a raw copy of the same disk."""

import json
import os
import subprocess
import time
import urllib.parse
import urllib.request
from contextlib import contextmanager

import contenders as c
from cache import empty_cache
from hub import Hub

GIB = 1 << 30
MIB = 1 << 20
DISK = 3 * GIB
NAMES = 10_000
MOUNTS = 32
# Names that are asked for at a time.
PAGE = 10_000


def run(*command):
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


@contextmanager
def mounted(kind, image, at, options):
    at.mkdir(exist_ok=True)
    loop = None
    if kind == "ntfs":
        run("ntfs-3g", image, at, "-o", options)
    else:
        # The device may be written to even where the mount may not: a journal is replayed onto it.
        loop = run("losetup", "--show", "-f", image).strip()
        run("mount", "-o", options, loop, at)
    try:
        yield at
    finally:
        run("umount", at)
        if loop:
            run("losetup", "-d", loop)


def noise(path, length):
    with open("/dev/urandom", "rb") as source, open(path, "wb") as out:
        for _ in range(length // MIB):
            out.write(source.read(MIB))


def states(bench, kind):
    """Three copies of a disk that is written to; the last one is made in the middle of it."""
    copies = [bench.directory / f"{kind}-{number}.raw" for number in range(3)]
    if copies[-1].exists():
        return copies
    image = bench.directory / f"{kind}.raw"
    image.touch()
    os.truncate(image, DISK)
    run(*(["mkntfs", "-F", "-Q"] if kind == "ntfs" else ["mkfs.ext4", "-q", "-F"]), image)
    at = bench.directory / f"{kind}-made"
    with mounted(kind, image, at, "rw"):
        noise(at / "big.bin", GIB)
        (at / "many").mkdir()
        for number in range(NAMES):
            (at / "many" / f"entry {number:05}").write_bytes(b"x" * (number % 100))
        for number, copy in enumerate(copies):
            noise(at / f"day-{number}.bin", 50 * MIB)
            with open(at / "big.bin", "r+b") as big:
                big.seek(number * 100 * MIB)
                big.write(os.urandom(20 * MIB))
            os.sync()
            for late in range(500):
                (at / f"late-{number}-{late}").write_bytes(b"late")
            if kind != "ntfs":
                fd = os.open(at / f"late-{number}-0", os.O_RDONLY)
                os.fsync(fd)
                os.close(fd)
            run("cp", "--sparse=always", image, copy)
    image.unlink()
    return copies


def rate(path):
    start = time.monotonic()
    run("dd", f"if={path}", "of=/dev/null", "bs=1M")
    return 1 / (time.monotonic() - start)


def listing(directory):
    start = time.monotonic()
    names = [entry.stat(follow_symlinks=False).st_size for entry in os.scandir(directory)]
    assert len(names) == NAMES, len(names)
    return (time.monotonic() - start) * 1000


class Files:
    """A hub that has a disk's three states as a chain."""

    def __init__(self, bench, copies):
        self.hub = Hub(c.HUB, bench.directory / "files-hub")
        disks = [{"disk_id": 0, "label": "d", "capacity_bytes": DISK}]
        self.hub.ask("PUT", "vms/vm", {"disks": disks})
        for number, copy in enumerate(copies):
            backup, uri = self.hub.begin("incremental" if number else "full")
            run("nbdcopy", "--connections=4", "--flush", copy, uri)
            self.hub.complete(backup)
            self.backup = backup

    def get(self, path):
        request = urllib.request.Request(
            f"{self.hub.api}/{path}", headers={"Authorization": f"Bearer {self.hub.token}"})
        with urllib.request.urlopen(request) as answer:
            return json.load(answer)

    def mount(self, **more):
        return self.hub.ask("POST", "restore/mount", {"backup_id": self.backup, **more})

    def unmount(self, mount):
        self.hub.ask("DELETE", f"restore/{mount}", {})

    def listing(self, mount):
        start = time.monotonic()
        count, cursor = 0, ""
        while cursor is not None:
            page = self.get(f"restore/{mount}/files?path=/disk0/many&limit={PAGE}"
                            + (f"&cursor={urllib.parse.quote(str(cursor))}" if cursor else ""))
            count += len(page["files"])
            cursor = page.get("next_cursor")
        assert count == NAMES, count
        return (time.monotonic() - start) * 1000

    def download(self, mount):
        start = time.monotonic()
        run("curl", "-sf", "-o", "/dev/null", "-H", f"Authorization: Bearer {self.hub.token}",
            f"{self.hub.api}/restore/{mount}/download?path=/disk0/big.bin")
        return 1 / (time.monotonic() - start)


def one(bench, row, kind):
    copies = states(bench, kind)
    title = "ext4, journal to replay" if kind == "ext4" else "NTFS"
    other = "kernel" if kind == "ext4" else "ntfs-3g"

    def add(case, who, value, unit):
        bench.results.add(row, f"{title}: {case}", who, value, unit)

    files = Files(bench, copies)
    try:
        empty_cache()
        start = time.monotonic()
        mount = files.mount()["mount_id"]
        add("ready, cold", "ours", (time.monotonic() - start) * 1000, "ms")
        add("first listing of 10,000", "ours", files.listing(mount), "ms")
        empty_cache()
        add("1 GiB file, cold", "ours", files.download(mount), "GiB/s")
        add("1 GiB file, cached", "ours", files.download(mount), "GiB/s")
        files.unmount(mount)

        empty_cache()
        start = time.monotonic()
        tree = files.mount(mount_path="bench")
        add("ready, cold", "ours, as a tree", (time.monotonic() - start) * 1000, "ms")
        at = f"{tree['mount_path']}/disk0"
        add("first listing of 10,000", "ours, as a tree", listing(f"{at}/many"), "ms")
        empty_cache()
        add("1 GiB file, cold", "ours, as a tree", rate(f"{at}/big.bin"), "GiB/s")
        add("1 GiB file, cached", "ours, as a tree", rate(f"{at}/big.bin"), "GiB/s")
        files.unmount(tree["mount_id"])

        # A mount replays the journal into the file: the others get a copy of their own.
        copy = bench.directory / "replayed.raw"
        run("cp", "--sparse=always", copies[-1], copy)
        empty_cache()
        start = time.monotonic()
        with mounted(kind, copy, bench.directory / "peer", "ro") as at:
            add("ready, cold", other, (time.monotonic() - start) * 1000, "ms")
            add("first listing of 10,000", other, listing(at / "many"), "ms")
            empty_cache()
            add("1 GiB file, cold", other, rate(at / "big.bin"), "GiB/s")
            add("1 GiB file, cached", other, rate(at / "big.bin"), "GiB/s")
        copy.unlink()

        if kind == "ext4":
            start = time.monotonic()
            mounts = [files.mount()["mount_id"] for _ in range(MOUNTS)]
            bench.results.add(row, f"{MOUNTS} mounts at once", "ours", time.monotonic() - start, "s")
            for mount in mounts:
                files.listing(mount)
            resources = files.get("restore/resources")
            memory = resources["worker_memory_bytes"] / MIB
            bench.results.add(row, "memory of all their workers", "ours", memory, "MiB")
            for mount in mounts:
                files.unmount(mount)
    finally:
        files.hub.stop()


def measure(bench, row):
    for kind in ("ext4", "ntfs"):
        one(bench, row, kind)
