"""The page cache."""

import os


def empty_cache():
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as caches:
            caches.write("3")
    except OSError:
        print("  the page cache cannot be emptied without root: cold is warm here")
