"""Rows of images with backing files."""

import os
import random
import time

import contenders as c
import disk
from bench import GIB, MIB, copy_in, copy_out, fio, run
from cache import empty_cache, fill_cache


# Starts of a program in each round.
OPENINGS = 10
# Bytes of one change.
BLOCK = 64 << 10


def chain(bench, length):
    """A chain of images: a full of the source, then increments of 2% of the disk, each sent as a capture
    sends it: 64 KiB here and there, from the disk's start to its end."""
    directory = bench.directory / f"chain{length}"
    images = [directory / f"{number}.qcow2" for number in range(length)]
    if not directory.exists():
        directory.mkdir()
        for number, image in enumerate(images):
            c.create_qcow2(image, bench.size, images[number - 1] if number else None)
            with bench.serving(c.ours(image)) as server:
                if number == 0:
                    copy_in(bench.source, server.uri)
                else:
                    send_changes(bench, server.uri, random.Random(number))
    return images[-1]


def send_changes(bench, uri, order):
    import nbd

    handle = nbd.NBD()
    handle.connect_uri(uri)
    with open(bench.source, "rb") as source:
        for place in sorted(order.sample(range(bench.size // BLOCK), bench.size // BLOCK // 50)):
            handle.pwrite(os.pread(source.fileno(), BLOCK, place * BLOCK), place * BLOCK)
    handle.flush()
    handle.shutdown()


def incremental(bench, row):
    total = bench.size // 4
    for length in (1, 10, 30):
        below = chain(bench, length)
        for name, serve in c.qcow2_servers().items():
            image = bench.image("overlay.qcow2")
            c.create_qcow2(image, bench.size, below)
            with bench.serving(serve(image)) as server:
                job = fio(server.uri, "randwrite", "64k", 8, size=bench.size, total=total, seed=99)
                seconds = job["runtime"] / 1000
                bench.results.add(row, f"on a chain of {length}", name, total / MIB / seconds,
                                  "MiB/s", server, total / GIB)
    path = bench.image("plain")
    rate = disk.fio_files("--rw=write", f"--filename={path}", "--bs=64k", "--direct=1",
                     "--ioengine=libaio", "--iodepth=8", f"--size={total}", "--fallocate=posix",
                     "--end_fsync=1")
    bench.results.add(row, "the disk alone, 64 KiB", "fio, direct, reserved, depth 8", rate * 1024,
                      "MiB/s")
    path.unlink()
    with bench.serving(c.nbdkit("null", str(bench.size))) as server:
        job = fio(server.uri, "randwrite", "64k", 8, size=bench.size, total=total, seed=99)
        seconds = job["runtime"] / 1000
        bench.results.add(row, "a server that forgets everything", "nbdkit null",
                          total / MIB / seconds, "MiB/s")


def restore(bench, row):
    for length in (1, 10, 30):
        top = chain(bench, length)
        for name, serve in c.qcow2_servers(read_only=True).items():
            empty_cache()
            with bench.serving(serve(top)) as server:
                for case in ("cold", "cached"):
                    if case == "cached":
                        fill_cache(top.parent)
                    seconds = copy_out(server.uri)
                    bench.results.add(row, f"chain of {length}, sequential, {case}", name,
                                      bench.gib / seconds, "GiB/s", server)
                figures = fio(server.uri, "randread", "64k", 8, size=bench.size, seconds=2)
                bench.results.add(row, f"chain of {length}, random 64 KiB, cached", name,
                                  figures["bw_bytes"] / GIB, "GiB/s", server)
    disk.read_ceilings(bench, row, chain(bench, 1), chain(bench, 30).parent)
    with bench.serving(c.nbdkit("null", str(bench.size))) as server:
        seconds = copy_out(server.uri)
        bench.results.add(row, "a server that reads nothing, sequential", "nbdkit null",
                          bench.gib / seconds, "GiB/s", server)
    with bench.serving(c.nbdkit("file", bench.source)) as server:
        seconds = copy_out(server.uri)
        bench.results.add(row, "a plain file in memory, sequential", "nbdkit file",
                          bench.gib / seconds, "GiB/s", server)
        figures = fio(server.uri, "randread", "64k", 8, size=bench.size, seconds=2)
        bench.results.add(row, "a plain file in memory, random 64 KiB", "nbdkit file",
                          figures["bw_bytes"] / GIB, "GiB/s", server)


def opening(bench, row):
    import nbd

    directory = bench.directory / "long"
    images = [directory / f"{number}.qcow2" for number in range(30)]
    if not directory.exists():
        directory.mkdir()
        run("qemu-img", "create", "-q", "-f", "qcow2", "-o", "preallocation=metadata", images[0],
            "205G")
        run("qemu-img", "resize", "-q", images[0], "1T")
        for number in range(1, 30):
            run("cp", "--sparse=always", images[0], images[number])
            run("qemu-img", "rebase", "-u", "-F", "qcow2", "-b", images[number - 1].name,
                images[number])
    for name, serve in c.qcow2_servers(read_only=True).items():
        for number in range(2 * OPENINGS):
            cold = number < OPENINGS
            if cold:
                # The program is not what is measured.
                empty_cache()
                run("qemu-nbd" if name.startswith("qemu") else c.HUB, "--version")
            start = time.monotonic()
            with bench.serving(serve(images[-1])) as server:
                handle = nbd.NBD()
                handle.connect_uri(server.uri)
                handle.pread(512, 900 * GIB)
                taken = (time.monotonic() - start) * 1000
                case = "images not in memory" if cold else "images in memory"
                bench.results.add(row, f"program start to first byte, {case}", name, taken, "ms",
                                  server)
                del handle
