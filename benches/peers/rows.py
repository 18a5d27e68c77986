"""The rows: each makes its measurements for all contenders, once per round."""

import json
import os
import random
import subprocess
import time
from contextlib import contextmanager

import contenders as c
import files
from cache import empty_cache, fill_cache
from hub import Hub

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

    def image(self, name):
        path = self.directory / name
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


def fresh(bench, name, make):
    """A server of a new, empty disk."""
    size = bench.size
    if name == "nbdkit null":
        return c.nbdkit("null", f"size={size}", **make)
    if name == "nbdkit file":
        path = bench.image("peer.raw")
        path.touch()
        os.truncate(path, size)
        return c.nbdkit("file", path, **make)
    if name == "ours, raw":
        path = bench.image("ours.raw")
        path.touch()
        os.truncate(path, size)
        return c.ours(path, fmt="raw", **make)
    path = bench.image("disk.qcow2")
    c.create_qcow2(path, size)
    return c.qcow2_servers()[name](path, **make)


def ceilings(bench, row):
    """What the disk itself takes, without any server."""
    for name, options in {
        "dd, buffered": [],
        "dd, direct": ["oflag=direct"],
        "fio, direct, reserved, depth 4": None,
    }.items():
        path = bench.image("plain")
        if options is None:
            text = run(
                "fio", "--name=x", f"--filename={path}", "--rw=write", "--bs=1m", "--direct=1",
                "--ioengine=psync", "--thread", "--numjobs=4", f"--size={bench.size // 4}",
                f"--offset_increment={bench.size // 4}", "--fallocate=posix", "--end_fsync=1",
                "--group_reporting", "--output-format=json",
            )
            job = json.loads(text[text.index("{"):])["jobs"][0]["write"]
            seconds = job["runtime"] / 1000
        else:
            seconds = timed(
                "dd", f"if={bench.source}", f"of={path}", "bs=1M", "conv=fsync", *options
            )
        bench.results.add(row, "the disk alone", name, bench.gib / seconds, "GiB/s")
        path.unlink()


def fio_files(*options):
    """GiB a second of fio's own threads on plain files."""
    text = run("fio", "--name=x", "--bs=1m", "--ioengine=psync", "--thread", "--group_reporting",
               "--output-format=json", *options)
    job = json.loads(text[text.index("{"):])["jobs"][0]
    return (job["read"]["bw_bytes"] + job["write"]["bw_bytes"]) / GIB


def read_ceilings(bench, row):
    """What the disk itself gives, without any server."""
    path = bench.directory / "plain-reads"
    if not path.exists():
        run("cp", bench.source, path)
    part = bench.size // 4
    for name, direct in (("fio, through the page cache", 0), ("fio, direct", 1)):
        empty_cache()
        rate = fio_files("--rw=read", f"--filename={path}", f"--direct={direct}", "--numjobs=4",
                         f"--size={part}", f"--offset_increment={part}")
        bench.results.add(row, "the disk alone, cold, depth 4", name, rate, "GiB/s")
    # What a long chain has in one place lies in many: pieces of 64 - 128 KiB on the average.
    files = ":".join(str(path) for path in sorted(chain(bench, 30).parent.iterdir()))
    empty_cache()
    rate = fio_files("--rw=randread", f"--filename={files}", "--file_service_type=random",
                     "--bs=64k", "--direct=1", "--numjobs=16", f"--io_size={bench.size // 16}",
                     "--norandommap", "--randrepeat=0")
    bench.results.add(row, "the disk alone, 64 KiB anywhere in the files of a chain of 30",
                      "fio, direct, depth 16", rate, "GiB/s")


def ingest(bench, row, unix=False):
    names = ["ours", "nbdkit null", *c.QEMU_MODES, "nbdkit file"]
    for connections in (1, 2, 4):
        for name in names:
            with bench.serving(fresh(bench, name, {"unix": unix})) as server:
                seconds = copy_in(bench.source, server.uri, connections)
                case = f"{connections} connection(s)"
                bench.results.add(row, case, name, bench.gib / seconds, "GiB/s", server, bench.gib)
    ceilings(bench, row)


def ingest_unix(bench, row):
    ingest(bench, row, unix=True)


def engines(bench, row):
    for name in ("ours", "imago", "qcow2-rs"):
        path = bench.image("engine.qcow2")
        seconds = float(run(bench.engines, name, bench.source, path))
        bench.results.add(row, "1 MiB writes, durable", name, bench.gib / seconds, "GiB/s")
        path.unlink()
    ceilings(bench, row)


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


def chain(bench, length):
    """A chain of images: a full of the source, then increments of 2% of the disk."""
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
                    total = bench.size // 50
                    fio(server.uri, "randwrite", "64k", 8, size=bench.size, total=total,
                        seed=number)
    return images[-1]


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
    rate = fio_files("--rw=write", f"--filename={path}", "--bs=64k", "--direct=1",
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
    read_ceilings(bench, row)
    with bench.serving(c.nbdkit("file", bench.source)) as server:
        seconds = copy_out(server.uri)
        bench.results.add(row, "a plain file in memory, sequential", "nbdkit file",
                          bench.gib / seconds, "GiB/s", server)
        figures = fio(server.uri, "randread", "64k", 8, size=bench.size, seconds=2)
        bench.results.add(row, "a plain file in memory, random 64 KiB", "nbdkit file",
                          figures["bw_bytes"] / GIB, "GiB/s", server)


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
        for _ in range(4):
            start = time.monotonic()
            with bench.serving(serve(images[-1])) as server:
                handle = nbd.NBD()
                handle.connect_uri(server.uri)
                handle.pread(512, 900 * GIB)
                taken = (time.monotonic() - start) * 1000
                bench.results.add(row, "program start to first byte", name, taken, "ms", server)
                del handle


def scale(bench, row):
    part = bench.memory / "part.raw"
    length = 64 * MIB
    with open(bench.source, "rb") as source, open(part, "wb") as out:
        out.write(source.read(length))
    total = 50 * length / GIB
    directory = bench.directory / "many"
    for name in ("ours", "ours, null"):
        run("rm", "-rf", directory)
        directory.mkdir()
        os.sync()
        if name == "ours":
            images = [f"d{n}={directory}/{n}.qcow2" for n in range(150)]
            images = ["--create", length, *images]
        else:
            images = [f"d{n}=null:{length}" for n in range(150)]
        command = [c.HUB, "export", "--listen", "127.0.0.1:0", *images]
        with bench.serving(c.Server(command, "", prints_uri=True).read_uris(150)) as server:
            start = time.monotonic()
            copies = [
                subprocess.Popen(["nbdcopy", "--requests=16", "--request-size=1048576",
                                  "--no-extents", "--sparse=0", "--flush", str(part), uri])
                for uri in server.uris[:50]
            ]
            failed = [copy.args for copy in copies if copy.wait() != 0]
            if failed:
                raise RuntimeError(f"failed: {failed}")
            seconds = time.monotonic() - start
            bench.results.add(row, "50 exports written by 50 clients, 100 idle", name,
                              total / seconds, "GiB/s", server, total)
    run("rm", "-rf", directory)
    directory.mkdir()
    rate = fio_files("--rw=write", f"--directory={directory}", "--direct=1", "--numjobs=50",
                     "--size=64m", "--fallocate=posix", "--end_fsync=1")
    bench.results.add(row, "50 files written at once", "fio, direct, reserved", rate, "GiB/s")
    run("rm", "-rf", directory)
    for name in ("ours", "nbdkit null"):
        with bench.serving(fresh(bench, name, {})) as server:
            seconds = copy_in(bench.source, server.uri)
            bench.results.add(row, "one export written by one client", name, bench.gib / seconds,
                              "GiB/s", server, bench.gib)


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


def tunnel(bench, row):
    keys = bench.directory / "ssh"
    if not keys.exists():
        keys.mkdir()
        for key in ("host", "client"):
            run("ssh-keygen", "-q", "-t", "ed25519", "-N", "", "-f", keys / key)
        (keys / "authorized").write_text((keys / "client.pub").read_text())
    port = c.free_port()
    os.makedirs("/run/sshd", exist_ok=True)
    daemon = subprocess.Popen(
        ["/usr/sbin/sshd", "-D", "-p", str(port), "-h", str(keys / "host"), "-o",
         f"AuthorizedKeysFile={keys}/authorized", "-o", "StrictModes=no", "-o", "PidFile=none",
         "-o", "ListenAddress=127.0.0.1", "-o", "UsePAM=no"], stderr=subprocess.DEVNULL)
    ssh = ["ssh", "-i", str(keys / "client"), "-p", str(port), "-o", "StrictHostKeyChecking=no",
           "-o", "UserKnownHostsFile=/dev/null", "-o", "LogLevel=ERROR", "root@127.0.0.1"]
    try:
        time.sleep(0.5)
        start = time.monotonic()
        with open(bench.source, "rb") as source:
            subprocess.run([*ssh, "cat > /dev/null"], stdin=source, check=True)
        seconds = time.monotonic() - start
        bench.results.add(row, "one stream", "ssh cat", bench.gib / seconds, "GiB/s")
        for name in ("ours", "qemu-nbd", "nbdkit null"):
            with bench.serving(fresh(bench, name, {})) as server:
                inner = server.uri.split(":")[2].split("/")[0]
                outer = c.free_port()
                forward = subprocess.Popen([*ssh[:-1], "-N", "-L", f"{outer}:127.0.0.1:{inner}",
                                            ssh[-1]])
                try:
                    server.await_socket(f"nbd://127.0.0.1:{outer}/d")
                    seconds = copy_in(bench.source, f"nbd://127.0.0.1:{outer}/d", 1)
                    bench.results.add(row, "one stream", name, bench.gib / seconds, "GiB/s",
                                      server, bench.gib)
                finally:
                    forward.terminate()
                    forward.wait()
    finally:
        daemon.terminate()
        daemon.wait()


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


ROWS = {
    "ingest": ("Full ingest over TCP", ingest,
               "A fresh QCOW2 image, `nbdcopy` with 1 MiB requests over loopback, ending with a "
               "flush."),
    "unix": ("Full ingest over a Unix socket", ingest_unix, "The same over a Unix socket."),
    "engines": ("Image engines without NBD", engines, "A fresh image, closed durably."),
    "agent": ("The capture agent's pattern", capture_agent,
              "One connection, one request of 32 MiB at a time, from three ranges, no flush."),
    "small": ("4 KiB requests", small_requests, "`fio` with its nbd engine, allocated disks."),
    "incremental": ("Incrementals on chains", incremental,
                    "A quarter of the disk in random 64 KiB writes into a fresh overlay, flushed."),
    "restore": ("Restore from chains", restore, "Read-only exports; `nbdcopy` to nothing, `fio`."),
    "backup": ("A whole backup", backup,
               "From the request to the restore point: with checksums, sealed, checked, in the "
               "catalog. The others end with a flush of the image."),
    "files": ("Files out of restore points", files.measure,
              "A chain of three of a 3 GiB disk that was copied while it was written to; the others "
              "have a raw copy. A download over HTTP with curl, a tree with dd."),
    "zeroes": ("Zeroes", zeroes, "Time in proportion to data, not to the disk's size."),
    "opening": ("Opening a chain of 30 images of 1 TiB", opening,
                "A fifth of each is allocated; a byte that no image has, so all are asked."),
    "scale": ("Many exports at once", scale, "One process."),
    "metadata": ("A disk of 16 TiB", metadata, "The cost of a write stays flat."),
    "tunnel": ("Through OpenSSH", tunnel, "sshd on loopback, default cipher, one connection."),
}
