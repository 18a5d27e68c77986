"""The page cache."""

import os


def empty_cache():
    os.sync()
    try:
        with open("/proc/sys/vm/drop_caches", "w") as caches:
            caches.write("3")
    except OSError:
        print("  the page cache cannot be emptied without root: cold is warm here")


def fill_cache(directory):
    """Reads every file of a directory."""
    for path in sorted(directory.iterdir()):
        with open(path, "rb", buffering=0) as file:
            while file.read(8 << 20):
                pass
