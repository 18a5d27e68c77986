"""What the capture agent does on the wire. Usage: sbc_agent.py full|incr PORT EXPORT DISK

Two connections: A negotiates and stays idle; B carries the data, shared by the workers with
synchronous calls. Ranges are thirds of the disk cut to 512 bytes, walked in large chunks in turn.
Nothing is flushed, nobody says goodbye: the process just ends.
"""

import os
import sys
import threading

import nbd

mode, port, export, path = sys.argv[1:]
CHUNK = 32 << 20
GAP = 1 << 20


def connect(contexts):
    h = nbd.NBD()
    h.set_request_structured_replies(True)
    h.set_export_name(export)
    for context in contexts:
        h.add_meta_context(context)
    h.connect_tcp("127.0.0.1", port)
    return h


disk = os.open(path, os.O_RDWR)
size = os.fstat(disk).st_size
idle = connect([])
data = connect(["base:allocation"])
leaked = connect([]) if mode == "incr" else None
assert data.get_size() == size, (data.get_size(), size)
one_at_a_time = threading.Lock()


def send(offset, length):
    content = os.pread(disk, length, offset)
    with one_at_a_time:
        if content.count(0) == length:
            data.zero(length, offset)
        else:
            data.pwrite(content, offset)


def walk(start, end):
    at = start
    while at < end:
        length = min(CHUNK, end - at)
        send(at, length)
        at += length


if mode == "full":
    third = size // 3 // 512 * 512
    ranges = [(0, third), (third, 2 * third), (2 * third, size)]
else:
    changed = []
    for number in range(40):
        offset = (number * 7919 * 65536 + number * 512) % (size - 65536) // 512 * 512
        os.pwrite(disk, os.urandom(65536), offset)
        changed.append((offset, offset + 65536))
    ranges = []
    for start, end in sorted(changed):
        if ranges and start - ranges[-1][1] <= GAP:
            ranges[-1] = (ranges[-1][0], max(end, ranges[-1][1]))
        else:
            ranges.append((start, end))

failures = []


def worker(parts):
    try:
        for start, end in parts:
            walk(start, end)
    except Exception as error:
        failures.append(error)


threads = [threading.Thread(target=worker, args=(ranges[i::3],)) for i in range(3)]
for thread in threads:
    thread.start()
for thread in threads:
    thread.join()
assert not failures, failures
os._exit(0)
