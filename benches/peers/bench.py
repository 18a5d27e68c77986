"""What the rows have in common: where things are, programs that are run, fresh disks."""

import json
import os
import subprocess
import time
from contextlib import contextmanager

import contenders as c


GIB = 1 << 30
MIB = 1 << 20


class Bench:
    """Where inputs and images are, and how large."""

    def __init__(self, results, directory, memory, size, engines):
        self.results = results
        self.directory = directory
        self.memory = memory
        self.size = size
        self.engines = engines
        self.source = memory / "source.raw"
        if not self.source.exists() or self.source.stat().st_size != size:
            with open("/dev/urandom", "rb") as noise, open(self.source, "wb") as out:
                for _ in range(size // MIB):
                    out.write(noise.read(MIB))

    @property
    def gib(self):
        return self.size / GIB

    def image(self, name, directory=None):
        path = (directory or self.directory) / name
        path.unlink(missing_ok=True)
        os.sync()
        return path

    @contextmanager
    def serving(self, server):
        try:
            yield server
        finally:
            if server.process.poll() is None:
                server.stop()


def run(*command, **kw):
    done = subprocess.run([str(a) for a in command], capture_output=True, text=True, **kw)
    if done.returncode != 0:
        raise RuntimeError(f"{command}: {done.stdout}{done.stderr}")
    return done.stdout


def timed(*command):
    start = time.monotonic()
    run(*command)
    return time.monotonic() - start


def copy_in(source, uri, connections=4):
    return timed(
        "nbdcopy", f"--connections={connections}", "--requests=64", "--request-size=1048576",
        "--no-extents", "--sparse=0", "--flush", source, uri,
    )


def copy_out(uri):
    return timed(
        "nbdcopy", "--connections=4", "--requests=64", "--request-size=1048576", uri, "null:"
    )


def fio(uri, mode, block, depth, *, size, seconds=None, total=None, seed=1):
    limit = [f"--runtime={seconds}", "--time_based"] if seconds else [f"--io_size={total}"]
    text = run(
        "fio", "--name=x", "--ioengine=nbd", f"--uri={uri}", f"--rw={mode}", f"--bs={block}",
        f"--iodepth={depth}", f"--size={size}", f"--randseed={seed}", "--norandommap",
        "--randrepeat=0", "--end_fsync=1", "--output-format=json", *limit,
    )
    job = json.loads(text[text.index("{"):])["jobs"][0]
    return job["read" if "read" in mode else "write"]


def fresh(bench, name, make, directory=None):
    """A server of a new, empty disk."""
    size = bench.size
    if name == "ours, null":
        return c.ours_null(size, **make)
    if name == "nbdkit null":
        return c.nbdkit("null", f"size={size}", **make)
    if name == "nbdkit file":
        path = bench.image("peer.raw", directory)
        path.touch()
        os.truncate(path, size)
        return c.nbdkit("file", path, **make)
    if name == "ours, raw":
        path = bench.image("ours.raw", directory)
        path.touch()
        os.truncate(path, size)
        return c.ours(path, fmt="raw", **make)
    path = bench.image("disk.qcow2", directory)
    c.create_qcow2(path, size)
    return c.qcow2_servers()[name](path, **make)
