"""Which file a path names, whose it is, and files that only their owner may read.

A process that closes any descriptor of a file loses every lock that it holds on that file (POSIX),
SQLite's among them, in whatever thread. Therefore nothing here opens a file that SQLite may have
open: `make_private` makes one by ``mknod``, which needs no descriptor, and `private` looks at one
through a descriptor of Linux's ``O_PATH``, which can neither read nor write and whose end releases
no lock (``filp_close`` in the kernel's ``fs/open.c``). Other systems have no such descriptor; there
``lstat`` and ``chmod`` that follow no link take the path, and the caller compares the identity
before and after: in a directory where other users cannot rename files that is as good.
"""

import errno
import os
import stat
from pathlib import Path
from typing import Final

Identity = tuple[int, int]

_MODE: Final = 0o600
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_PATH_ONLY: Final[int | None] = getattr(os, "O_PATH", None)


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


def make_private(path: Path) -> bool:
    """Make an empty file that its owner alone may read, unless the path is taken.

    Returns:
        Whether this call made it. A link at the path, even one that leads nowhere, stays as it is.

    Raises:
        OSError: It cannot be made there, or not without a descriptor on this system.
    """
    try:
        os.mknod(path, _MODE | stat.S_IFREG)
    except FileExistsError:
        return False
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    return True


def make_directory(path: Path) -> None:
    """Make a directory that its owner alone may enter, and those above it, where they are missing.

    Raises:
        OSError: It cannot be made.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def refuse_open_directory(path: Path) -> None:
    """Refuse a directory in which any user can put another file in the place of one of ours.

    In one with the sticky bit, as ``/tmp`` has it, users can rename and remove only what they own.

    Raises:
        PermissionError: The reason and the remedy, as its ``strerror``.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise _refused(
            f"any user can replace files in {path}: give a path in a directory where only its "
            "owner may write, or run chmod o-w on this one"
        )


def private(path: Path, *, shut: bool = False) -> Identity:
    """Tell which file it is, provided that it is a file of this user's under one name.

    Args:
        path: Its last part may be no link.
        shut: Take away the rights that other users have on it. Whoever had it open before goes on.

    Raises:
        FileNotFoundError: There is none.
        PermissionError: It is another user's, or no such file; the reason and the remedy, as its
            ``strerror``.
    """
    if not hasattr(os, "geteuid"):  # Windows: there a file's mode says nothing of other users
        found = os.lstat(path)
        return found.st_dev, found.st_ino
    if _PATH_ONLY is None:
        found = _checked(os.lstat(path))
        if shut and found.st_mode & _OTHERS:
            path.chmod(_MODE, follow_symlinks=False)
            found = _checked(os.lstat(path), shut=True)
        return found.st_dev, found.st_ino
    descriptor = os.open(path, _PATH_ONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    try:
        found = _checked(os.fstat(descriptor))
        if shut and found.st_mode & _OTHERS:
            _shut(descriptor)
            _checked(os.fstat(descriptor), shut=True)
    finally:
        os.close(descriptor)
    return found.st_dev, found.st_ino


def _shut(descriptor: int) -> None:
    try:
        # that very file, whatever name it has by now; fchmod() takes no such descriptor
        Path(f"/proc/self/fd/{descriptor}").chmod(_MODE)
    except FileNotFoundError:
        raise _refused("without /proc its mode cannot be changed: run chmod 600 on it") from None


def _checked(found: os.stat_result, *, shut: bool = False) -> os.stat_result:
    if stat.S_ISLNK(found.st_mode):
        raise _refused("it is a symbolic link: give the path of the file itself")
    if not stat.S_ISREG(found.st_mode):
        raise _refused("it is no regular file: remove it, or give another path")
    if found.st_uid != os.geteuid():
        raise _refused(
            f"it belongs to another user (uid {found.st_uid}): remove it, or give another path"
        )
    if found.st_nlink > 1:
        raise _refused("it has another name, a hard link: remove that, or give another path")
    if shut and found.st_mode & _OTHERS:
        raise _refused("this file system lets others read it: give a path on another one")
    return found


def _refused(why: str) -> PermissionError:
    return PermissionError(errno.EPERM, why)
