"""The servers that are compared, each started on a file and stopped again."""

import os
import socket
import subprocess
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
HUB = ROOT / "target/release/sendense-hub"
START_SECONDS = 30
TICKS = os.sysconf("SC_CLK_TCK")

QEMU_MODES = {
    "qemu-nbd": [],
    "qemu-nbd native": ["--cache=none", "--aio=native"],
    "qemu-nbd io_uring": ["--cache=none", "--aio=io_uring"],
}


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    """A running server: its URI, and what it has cost so far."""

    def __init__(self, arguments, uri, prints_uri=False):
        out = subprocess.PIPE if prints_uri else subprocess.DEVNULL
        self.arguments = [str(a) for a in arguments]
        self.process = subprocess.Popen(self.arguments, stdout=out, stderr=subprocess.DEVNULL)
        self.uris = [uri]
        if not prints_uri:
            self.await_socket(uri)

    def read_uris(self, count):
        self.uris = [self.process.stdout.readline().decode().strip() for _ in range(count)]
        return self

    def await_socket(self, uri):
        end = time.monotonic() + START_SECONDS
        while time.monotonic() < end:
            try:
                if uri.startswith("nbd+unix"):
                    with socket.socket(socket.AF_UNIX) as probe:
                        probe.connect(uri.split("socket=")[1])
                else:
                    port = int(uri.split(":")[2].split("/")[0])
                    socket.create_connection(("127.0.0.1", port)).close()
                return
            except OSError:
                time.sleep(0.01)
        raise RuntimeError(f"{self.arguments} does not listen")

    @property
    def uri(self):
        return self.uris[0]

    def cpu(self):
        fields = Path(f"/proc/{self.process.pid}/stat").read_text().rsplit(")", 1)[1].split()
        return (int(fields[11]) + int(fields[12])) / TICKS

    def peak_rss(self):
        status = Path(f"/proc/{self.process.pid}/status").read_text()
        return int(status.split("VmHWM:")[1].split()[0]) / 1024

    def stop(self):
        self.process.terminate()
        self.process.wait()


def ours(image, *, fmt="qcow2", read_only=False, unix=False, extra=()):
    listen = ["--unix", tempfile.mktemp(".sock")] if unix else ["--listen", "127.0.0.1:0"]
    mode = ["--read-only"] if read_only else []
    command = [HUB, "export", *listen, *mode, *extra, f"d={fmt}:{image}"]
    return Server(command, "", prints_uri=True).read_uris(1)


def ours_null(size, *, unix=False):
    """The hub's NBD server in front of a disk that forgets everything."""
    listen = ["--unix", tempfile.mktemp(".sock")] if unix else ["--listen", "127.0.0.1:0"]
    command = [HUB, "export", *listen, f"d=null:{size}"]
    return Server(command, "", prints_uri=True).read_uris(1)


def qemu_nbd(options, image, *, fmt="qcow2", read_only=False, unix=False):
    mode = ["-r"] if read_only else []
    common = ["qemu-nbd", "-t", "-e", "32", "-x", "d", "-f", fmt, *mode, *options]
    if unix:
        path = tempfile.mktemp(".sock")
        return Server([*common, "-k", path, image], f"nbd+unix:///d?socket={path}")
    port = free_port()
    return Server([*common, "-p", port, image], f"nbd://127.0.0.1:{port}/d")


def nbdkit(*plugin, unix=False):
    if unix:
        path = tempfile.mktemp(".sock")
        return Server(["nbdkit", "-f", "-U", path, *plugin], f"nbd+unix:///?socket={path}")
    port = free_port()
    return Server(["nbdkit", "-f", "-p", port, *plugin], f"nbd://127.0.0.1:{port}/d")


def create_qcow2(path, size, backing=None):
    below = ["-b", str(backing), "-F", "qcow2"] if backing else []
    command = ["qemu-img", "create", "-q", "-f", "qcow2", *below, str(path), str(size)]
    subprocess.run(command, check=True)


def qcow2_servers(read_only=False):
    """Name to a function that serves a QCOW2 image."""
    servers = {"ours": lambda image, **kw: ours(image, read_only=read_only, **kw)}
    for name, options in QEMU_MODES.items():
        servers[name] = lambda image, options=options, **kw: qemu_nbd(
            options, image, read_only=read_only, **kw
        )
    return servers
