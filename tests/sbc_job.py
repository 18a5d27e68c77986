"""What the capture agent does for one backup, its bugs included.

Usage: sbc_job.py START.json SOURCES API [OPTION...]

START.json is the body with which the appliance was started. SOURCES has disk-N.raw, and for changes
disk-N.cbt: a JSON list of [offset, length]. Options: ignore-changeid (copies everything whatever it
is told), complete-twice, die-at-disk=N (exits in the middle of that disk), pause-at-disk=N (waits for
a file SOURCES/go before that disk), pause-in-disk=N (the same in the middle of it).
"""

import json
import os
import sys
import threading
import time
import urllib.error
import urllib.parse
import urllib.request

import nbd

start = json.load(open(sys.argv[1]))
sources, api, options = sys.argv[2], sys.argv[3], sys.argv[4:]
CHUNK = 32 << 20
GAP = 1 << 20
job = start["job_id"]
assert job.startswith("backup-")
for key in ("vm_name", "vcenter_host", "vcenter_user", "vcenter_password", "vm_path", "nbd_host",
            "nbd_targets", "backup_type", "previous_change_id"):
    assert isinstance(start[key], str), key
assert start["backup_type"] != "incremental" or start["previous_change_id"]


def option(name, number):
    return f"{name}={number}" in options


def call(method, path, body=None):
    data = json.dumps(body).encode() if body is not None else None
    request = urllib.request.Request(api + path, data, {"Content-Type": "application/json"},
                                     method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return answer.status, json.load(answer)


def telemetry(status, done, total):
    try:
        call("POST", f"/api/v1/telemetry/backup/{job}", {
            "job_id": job, "job_type": "backup", "status": status, "current_phase": "transferring",
            "bytes_transferred": done, "total_bytes": total, "transfer_speed_bps": 7,
            "eta_seconds": -1, "progress_percent": done * 130 / total, "disks": [],
            "timestamp": "2026-01-01T00:00:00Z"})
    except (urllib.error.URLError, OSError):
        pass  # the agent only logs that


def wait_for_go():
    while not os.path.exists(os.path.join(sources, "go")):
        time.sleep(0.02)


def connect(host, port, export, contexts):
    h = nbd.NBD()
    h.set_request_structured_replies(True)
    h.set_export_name(export)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_tcp(host, port)
    return h


leaked = []


def copy(number, target):
    address, export = target.removeprefix("nbd://").split("/", 1)
    host, port = address.split(":")
    assert export.endswith(f"disk{number}"), export
    # A bug of the agent: it asks about disk 0 for every disk.
    query = urllib.parse.urlencode({"vm_name": start["vm_name"], "disk_id": 0})
    try:
        status, answer = call("GET", f"/api/v1/backups/changeid?{query}")
        assert all(isinstance(value, str) for value in answer.values()), answer
        change_id = answer["change_id"]
    except (urllib.error.URLError, OSError):
        change_id = ""
    if "ignore-changeid" in options:
        change_id = ""
    disk = os.open(os.path.join(sources, f"disk-{number}.raw"), os.O_RDONLY)
    size = os.fstat(disk).st_size
    idle = connect(host, port, export, [])
    data = connect(host, port, export, ["base:allocation"])
    if change_id:
        leaked.append(connect(host, port, export, []))
    one_at_a_time = threading.Lock()
    ranges = []
    if change_id:
        extents = json.load(open(os.path.join(sources, f"disk-{number}.cbt")))
        for first, length in sorted(extents):
            end = min(first + length, size)
            if ranges and first - ranges[-1][1] <= GAP:
                ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
            else:
                ranges.append((first, end))
    else:
        third = size // 3 // 512 * 512
        ranges = [(0, third), (third, 2 * third), (2 * third, size)]
    failures, done = [], [0]

    def send(offset, length):
        content = os.pread(disk, length, offset)
        with one_at_a_time:
            if content.count(0) == length:
                data.zero(length, offset)
            else:
                data.pwrite(content, offset)
            done[0] += length
        telemetry("running", done[0], size)
        if option("pause-in-disk", number):
            open(os.path.join(sources, "paused"), "w").close()
            wait_for_go()
        if option("die-at-disk", number):
            os._exit(1)

    def worker(parts):
        try:
            for at, end in parts:
                while at < end:
                    length = min(CHUNK, end - at)
                    send(at, length)
                    at += length
        except Exception as error:
            failures.append(error)

    threads = [threading.Thread(target=worker, args=(ranges[i::3],)) for i in range(3)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    if failures:
        print(failures, file=sys.stderr)
        os._exit(1)
    serial = open(os.path.join(sources, "serial")).read().strip()
    body = {"change_id": f"52 3c ec 11 9e 2c 4c 3d-87 4a c3 4e 85 f2 ea 9{number}/{serial}",
            "disk_id": number, "bytes_transferred": 0}
    for _ in range(2 if "complete-twice" in options else 1):
        status, _ = call("POST", f"/api/v1/backups/{job}/complete", body)
        assert status == 200
    # The connection that was idle is still open here.
    del idle
    telemetry("completed", size, size)


targets = start["nbd_targets"].split(",")
for number, target in enumerate(targets):
    key, url = target.split(":", 1)
    assert key.isdigit()
    if option("pause-at-disk", number):
        open(os.path.join(sources, "paused"), "w").close()
        wait_for_go()
    copy(number, url)
os._exit(0)
