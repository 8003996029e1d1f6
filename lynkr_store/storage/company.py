"""Whether anybody else has an SQLite file open, for whose sake its write lock is left alone.

SQLite's own locks tell. A process that uses a file with a WAL holds a lock on one byte of its
index for as long (``UNIX_SHM_DMS`` in SQLite's ``os_unix.c``), and the kernel says whether another
process does. Of this process's connections each has the file open, and Linux lists what is open.
"""

import os
import struct
import sys
from collections import defaultdict
from pathlib import Path
from typing import Final

from lynkr_store.process.files import Identity, identity_of

if sys.platform == "linux":
    import fcntl

_IN_USE: Final = 128  # the byte: https://sqlite.org/src/file/src/os_unix.c, UNIX_SHM_DMS
_POINTER_BYTES: Final = 8
_FLOCK: Final = struct.Struct("hhqqi4x")  # struct flock where pointers have so many
_OPEN: Final = Path("/proc/self/fd")


def has_company(path: Path, own: int) -> bool:
    """Whether a file is used by another process, or by this one beyond its own connections.

    Args:
        path: The file.
        own: Connections to it that are not meant; one or more.

    Returns:
        True also where it cannot be told, and for a connection of this process that was closed:
        SQLite keeps its descriptor while others of the process are open.
    """
    if sys.platform != "linux" or struct.calcsize("P") != _POINTER_BYTES:
        return True
    try:
        here = _descriptors()
        index = here[identity_of(Path(f"{path}-shm"))]
        if not index or not 0 < len(here[identity_of(path)]) <= own:
            return True
        # SQLite's own descriptor: closing another of the file would take away SQLite's locks
        asked = _FLOCK.pack(fcntl.F_WRLCK, os.SEEK_SET, _IN_USE, 1, 0)
        found, *_ = _FLOCK.unpack(fcntl.fcntl(index[0], fcntl.F_GETLK, asked))
    except OSError:
        return True
    return bool(found != fcntl.F_UNLCK)


def _descriptors() -> defaultdict[Identity | None, list[int]]:
    """What this process has open: file to descriptors."""
    found: defaultdict[Identity | None, list[int]] = defaultdict(list)
    for entry in _OPEN.iterdir():
        if file := identity_of(int(entry.name)):  # else closed meanwhile, as the list's own is
            found[file].append(int(entry.name))
    return found
