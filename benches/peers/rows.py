"""The rows: each makes its measurements for all contenders, once per round."""

import chains
import files
import many
import writing

ROWS = {
    "ingest": ("Full ingest over TCP", writing.ingest,
               "A fresh QCOW2 image, `nbdcopy` with 1 MiB requests over loopback, ending with a "
               "flush."),
    "unix": ("Full ingest over a Unix socket", writing.ingest_unix, "The same over a Unix socket."),
    "memory": ("Full ingest into memory", writing.ingest_memory,
               "The same over TCP, with the image in a tmpfs: the disk is as fast as it can be."),
    "engines": ("Image engines without NBD", writing.engines, "A fresh image, closed durably."),
    "agent": ("The capture agent's pattern", writing.capture_agent,
              "One connection, one request of 32 MiB at a time, from three ranges, no flush."),
    "small": ("4 KiB requests", writing.small_requests,
              "`fio` with its nbd engine, allocated disks."),
    "incremental": ("Incrementals on chains", chains.incremental,
                    "A quarter of the disk in random 64 KiB writes into a fresh overlay, flushed."),
    "restore": ("Restore from chains", chains.restore,
                "Read-only exports; `nbdcopy` to nothing, `fio`. Each increment changes 2% of the disk."),
    "backup": ("A whole backup", writing.backup,
               "From the request to the restore point: with checksums, sealed, checked, in the "
               "catalog. The others end with a flush of the image."),
    "files": ("Files out of restore points", files.measure,
              "A chain of three of a 3 GiB disk that was copied while it was written to; the others "
              "have a raw copy. A download over HTTP with curl, a tree with dd."),
    "zeroes": ("Zeroes", writing.zeroes, "Time in proportion to data, not to the disk's size."),
    "opening": ("Opening a chain of 30 images of 1 TiB", chains.opening,
                "A fifth of each is allocated; a byte that no image has, so all are asked."),
    "scale": ("Many exports at once", many.scale, "One process."),
    "metadata": ("A disk of 16 TiB", writing.metadata, "The cost of a write stays flat."),
    "tunnel": ("Through OpenSSH", many.tunnel, "sshd on loopback, default cipher, one connection."),
}
