"""Rows of many exports, and of one behind OpenSSH."""

import os
import subprocess
import time

import contenders as c
import disk
from bench import GIB, MIB, copy_in, fresh, run



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
    rate = disk.fio_files("--rw=write", f"--directory={directory}", "--direct=1", "--numjobs=50",
                     "--size=64m", "--fallocate=posix", "--end_fsync=1")
    bench.results.add(row, "50 files written at once", "fio, direct, reserved", rate, "GiB/s")
    run("rm", "-rf", directory)
    for name in ("ours", "nbdkit null"):
        with bench.serving(fresh(bench, name, {})) as server:
            seconds = copy_in(bench.source, server.uri)
            bench.results.add(row, "one export written by one client", name, bench.gib / seconds,
                              "GiB/s", server, bench.gib)


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
