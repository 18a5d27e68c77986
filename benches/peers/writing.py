"""Rows of disks that are written."""

import os
import random
import time
from contextlib import nullcontext

import contenders as c
import disk
from bench import GIB, MIB, copy_in, fio, fresh, run, timed
from hub import Hub

INGEST = ["ours", "ours, null", "nbdkit null", *c.QEMU_MODES, "nbdkit file"]


def ingest(bench, row, unix=False):
    for connections in (1, 2, 4):
        for name in INGEST:
            case = f"{connections} connection(s)"
            with bench.serving(fresh(bench, name, {"unix": unix})) as server:
                with disk.busy(bench, row, case, name) if name == "ours" else nullcontext():
                    seconds = copy_in(bench.source, server.uri, connections)
                bench.results.add(row, case, name, bench.gib / seconds, "GiB/s", server, bench.gib)
    disk.ceilings(bench, row)


def ingest_unix(bench, row):
    ingest(bench, row, unix=True)


def ingest_memory(bench, row):
    """Where the disk costs least: what is left is the servers' own work."""
    for connections in (1, 4):
        for name in INGEST:
            directory = bench.memory / "images"
            directory.mkdir()
            with bench.serving(fresh(bench, name, {}, directory)) as server:
                seconds = copy_in(bench.source, server.uri, connections)
                bench.results.add(row, f"{connections} connection(s)", name, bench.gib / seconds,
                                  "GiB/s", server, bench.gib)
            run("rm", "-r", directory)


def engines(bench, row):
    for name in ("ours", "imago", "qcow2-rs"):
        path = bench.image("engine.qcow2")
        seconds = float(run(bench.engines, name, bench.source, path))
        bench.results.add(row, "1 MiB writes, durable", name, bench.gib / seconds, "GiB/s")
        path.unlink()
    disk.ceilings(bench, row)


def capture_agent(bench, row):
    import nbd

    with open(bench.source, "rb") as file:
        data = file.read(32 * MIB)
    third = bench.size // 3 // 512 * 512
    parts = [[0, third], [third, 2 * third], [2 * third, bench.size]]
    for name in ["ours", "nbdkit null", *c.QEMU_MODES]:
        with bench.serving(fresh(bench, name, {})) as server:
            handle = nbd.NBD()
            handle.add_meta_context("base:allocation")
            handle.connect_uri(server.uri)
            places = [list(part) for part in parts]
            start = time.monotonic()
            while any(at < end for at, end in places):
                for place in places:
                    length = min(32 * MIB, place[1] - place[0])
                    if length:
                        handle.pwrite(data if length == len(data) else data[:length], place[0])
                        place[0] += length
            sent = time.monotonic() - start
            bench.results.add(row, "sending", name, bench.gib / sent, "GiB/s", server, bench.gib)
            del handle
            server.stop()
            if name != "nbdkit null":
                os.sync()
            sealed = time.monotonic() - start
            bench.results.add(row, "until sealed on disk", name, bench.gib / sealed, "GiB/s")


def small_requests(bench, row):
    names = ["ours", *c.QEMU_MODES, "ours, raw", "nbdkit file", "nbdkit null"]
    for name in names:
        with bench.serving(fresh(bench, name, {})) as server:
            copy_in(bench.source, server.uri)
            for mode in ("randwrite", "randread"):
                for depth in (1, 32):
                    figures = fio(server.uri, mode, "4k", depth, size=bench.size, seconds=2)
                    case = f"4 KiB {mode}, depth {depth}"
                    bench.results.add(row, case, name, figures["iops"], "IOPS", server)


def zeroes(bench, row):
    virtual, data = 100 * GIB, bench.memory / "sparse.raw"
    if not data.exists():
        data.touch()
        os.truncate(data, virtual)
        with open(data, "r+b") as out, open(bench.source, "rb") as noise:
            for number in range(100):
                out.seek(number * GIB)
                out.write(noise.read(virtual // 100 // 100 // MIB * MIB))
    for name, serve in c.qcow2_servers().items():
        image = bench.image("zeroes.qcow2")
        c.create_qcow2(image, virtual)
        with bench.serving(serve(image)) as server:
            seconds = timed("nbdcopy", "--connections=4", "--requests=64",
                            "--request-size=1048576", "--flush", data, server.uri)
            bench.results.add(row, "100 GiB, 1% data, holes as WRITE_ZEROES", name, seconds, "s",
                              server)
        used = image.stat().st_blocks * 512 / MIB
        bench.results.add(row, "the same: size of the image", name, used, "MiB")
    blank = bench.memory / "blank.raw"
    if not blank.exists():
        blank.touch()
        os.truncate(blank, 4 * GIB)
    for name, serve in c.qcow2_servers().items():
        image = bench.image("zeroes.qcow2")
        c.create_qcow2(image, 4 * GIB)
        with bench.serving(serve(image)) as server:
            seconds = copy_in(blank, server.uri)
            bench.results.add(row, "4 GiB of zeroes as data", name, seconds, "s", server, 4)
        used = image.stat().st_blocks * 512 / MIB
        bench.results.add(row, "4 GiB of zeroes as data: size of the image", name, used, "MiB")


def metadata(bench, row):
    for name, serve in c.qcow2_servers().items():
        image = bench.image("huge.qcow2")
        c.create_qcow2(image, 16 << 40)
        with bench.serving(serve(image)) as server:
            for number in range(4):
                figures = fio(server.uri, "randwrite", "64k", 8, size=16 << 40, total=256 * MIB,
                              seed=random.randrange(1 << 30))
                case = f"16 TiB, scattered 64 KiB writes, part {number + 1} of 4"
                bench.results.add(row, case, name, figures["iops"], "IOPS", server)


def backup(bench, row):
    """From request to restore point: sealed, checksummed, checked."""
    for name in ("ours, export only", "qemu-nbd"):
        plain = "ours" if name.startswith("ours") else name
        with bench.serving(fresh(bench, plain, {})) as server:
            seconds = copy_in(bench.source, server.uri)
            bench.results.add(row, "full", name, bench.gib / seconds, "GiB/s", server, bench.gib)
    with bench.serving(Hub(c.HUB, bench.directory / "hub")) as hub:
        disks = [{"disk_id": 0, "capacity_bytes": bench.size}]
        hub.ask("PUT", "vms/vm", {"disks": disks})
        for case, kind in (("full", "full"),
                           ("everything again, as an incremental", "incremental")):
            start = time.monotonic()
            identity, uri = hub.begin(kind)
            copy_in(bench.source, uri)
            hub.complete(identity)
            seconds = time.monotonic() - start
            bench.results.add(row, case, "ours", bench.gib / seconds, "GiB/s", hub, bench.gib)
