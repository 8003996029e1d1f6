"""Which file it is, whatever name it has now."""

import os
from pathlib import Path

Identity = tuple[int, int]


def identity_of(file: Path | int) -> Identity | None:
    """What tells a file from every other: its device and number there; None where there is none.

    Args:
        file: A path, or a descriptor of this process.
    """
    try:
        found = os.stat(file)  # noqa: PTH116 - a descriptor is no Path
    except OSError:
        return None
    return found.st_dev, found.st_ino
