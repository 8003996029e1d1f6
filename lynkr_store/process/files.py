"""Identifies files, checks their owner, and creates files that only their owner can read.

When a process closes any descriptor of a file, it loses all its locks on that file (POSIX),
including SQLite's, in every thread. So nothing here opens a file that SQLite may have open.
`make_private` creates a file with ``mknod``, which needs no descriptor. `private` examines a file
through a descriptor of Linux's ``O_PATH``, which can neither read nor write and releases no lock
when it is closed (``filp_close`` in the kernel's ``fs/open.c``). Other systems have no such
descriptor. There ``lstat`` and ``chmod`` act on the path without following links, and the caller
compares the identity before and after; that is equivalent in a directory where other users cannot
rename files.
"""

import errno
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Final

Identity = tuple[int, int]

_MODE: Final = 0o600
_OTHERS: Final = stat.S_IRWXG | stat.S_IRWXO
_PATH_ONLY: Final[int | None] = getattr(os, "O_PATH", None)


def identity_of(file: Path | int) -> Identity | None:
    """The device and inode number that identify a file; None if it does not exist.

    Args:
        file: A path, or a descriptor of this process.
    """
    try:
        found = os.stat(file)  # noqa: PTH116 - a descriptor is no Path
    except OSError:
        return None
    return found.st_dev, found.st_ino


class OpenedFile:
    """Remembers which file a path named when it was opened; later it may name another, or none.

    Args:
        path: None for what is no file: nothing is remembered then.
    """

    def __init__(self, path: Path | None) -> None:
        self.path = path
        self._opened: Identity | None = None

    def _named(self) -> Identity | None:
        return identity_of(self.path) if self.path else None

    def forget(self) -> Identity | None:
        """Remember none; return which file the path names now."""
        self._opened = None
        return self._named()

    def remember(self, before: Identity | None) -> bool:
        """Remember the file that the path names now.

        Args:
            before: The one that it named before the file was opened, None for none.

        Returns:
            False where it names none, or another than before.
        """
        self._opened = self._named()
        return not self.path or (self._opened is not None and before in (None, self._opened))

    def is_other(self) -> bool:
        """Whether the path names another file than the one remembered, or none."""
        opened = self._opened  # read once: another thread that opens the file forgets it meanwhile
        return opened is not None and self._named() != opened


def make_private(path: Path) -> bool:
    """Create an empty file that only its owner can read, unless the path exists.

    Returns:
        Whether this call created it. An existing link stays as it is, even a dangling one.

    Raises:
        OSError: It cannot be created there, or this system needs a descriptor for that.
    """
    try:
        os.mknod(path, _MODE | stat.S_IFREG)
    except FileExistsError:
        return False
    except AttributeError:
        raise OSError(errno.ENOSYS, os.strerror(errno.ENOSYS)) from None
    return True


@contextmanager
def alone(file: IO[bytes], path: Path) -> Iterator[None]:
    """Keep other processes that ask for the same from writing a file, on POSIX systems.

    Raises:
        OSError: Another process writes it.
    """
    try:
        import fcntl  # noqa: PLC0415 - other systems lack it
    except ImportError:  # pragma: no cover
        yield
        return
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        raise OSError(errno.EBUSY, "another process writes it", str(path)) from None
    yield


def make_directory(path: Path) -> None:
    """Create a directory that only its owner can enter, with missing parents.

    Raises:
        OSError: It cannot be created.
    """
    path.mkdir(mode=0o700, parents=True, exist_ok=True)


def refuse_open_directory(path: Path) -> None:
    """Refuse a directory in which any user can replace our files.

    In a directory with the sticky bit, such as ``/tmp``, users can rename and remove only their
    own.

    Raises:
        PermissionError: The reason and the remedy, in ``strerror``.
    """
    mode = path.stat().st_mode
    if mode & stat.S_IWOTH and not mode & stat.S_ISVTX:
        raise _refused(
            f"any user can replace files in {path}: give a path in a directory where only its "
            "owner may write, or run chmod o-w on this one"
        )


def private(path: Path, *, shut: bool = False) -> Identity:
    """Return a file's identity, if it is a regular file of this user with a single name.

    Args:
        path: The last component must not be a link.
        shut: Remove other users' rights. A process that already has it open keeps its access.

    Raises:
        FileNotFoundError: It does not exist.
        PermissionError: It belongs to another user, or is not such a file; the reason and the
            remedy are in ``strerror``.
    """
    if not hasattr(os, "geteuid"):  # Windows: a file's mode says nothing about other users
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
        # the opened file, even if it was renamed; fchmod() does not accept such a descriptor
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
