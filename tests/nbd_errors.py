"""Error numbers and texts, as a libnbd client sees them. Usage: nbd_errors.py URI writable|read-only"""

import errno
import sys

import nbd

uri, kind = sys.argv[1:]
h = nbd.NBD()
# Let everything through to the server.
h.set_strict_mode(0)
h.connect_uri(uri)
size = h.get_size()


def fails(wanted, call):
    try:
        call()
    except nbd.Error as error:
        assert error.errnum == wanted, (error.errnum, wanted, error.string)
        return
    raise AssertionError("the call succeeded")


if kind == "read-only":
    assert h.is_read_only()
    fails(errno.EPERM, lambda: h.pwrite(b"x" * 512, 0))
    fails(errno.EPERM, lambda: h.zero(512, 0))
    fails(errno.EPERM, lambda: h.trim(512, 0))
    fails(errno.EPERM, lambda: h.pwrite(b"x" * (1 << 20), 0))
else:
    fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size))
    fails(errno.ENOSPC, lambda: h.pwrite(b"x" * 512, size - 1))
    fails(errno.ENOSPC, lambda: h.zero(512, size))
    fails(errno.EINVAL, lambda: h.trim(512, size))
    # Longer than advertised: refused, the payload skipped, the connection lives on.
    fails(errno.EINVAL, lambda: h.pwrite(b"x" * (5 << 20), 0))
    h.pwrite(b"y" * (4 << 20), 512, nbd.CMD_FLAG_FUA)
    assert h.pread(4 << 20, 512) == b"y" * (4 << 20)
    h.zero(1 << 20, 0, nbd.CMD_FLAG_FAST_ZERO)
    assert h.pread(1 << 20, 0) == bytes(1 << 20)
    h.zero(0, 0)
    h.flush()
fails(errno.EINVAL, lambda: h.pread(512, size))
fails(errno.EINVAL, lambda: h.pread(512, 2**63 - 1))
fails(errno.EINVAL, lambda: h.pread(5 << 20, 0))
assert len(h.pread(512, size - 512)) == 512
h.shutdown()
