"""One file, written whole or not at all, and never over what is not meant. Knows nothing about what is in it.

The bytes are collected in a private folder beside the target and brought to the disk before the file gets its name: a
crash, a full disk or another process leave the old file or the new one, nothing between.
"""

import errno
import os
import shutil
import signal
import stat
import tempfile
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from mikv.errors import CheckpointError

PRIVATE = 0o600
PUBLIC = 0o644
_PREFIX, _SUFFIX = ".mikv-", ".partial"
_ABANDONED_SECONDS = 24 * 3600
_ENDING_SIGNALS = [getattr(signal, name) for name in ("SIGINT", "SIGTERM", "SIGHUP") if hasattr(signal, name)]
_KINDS = (
    (stat.S_ISDIR, "a folder"),
    (stat.S_ISFIFO, "a pipe"),
    (stat.S_ISSOCK, "a socket"),
    (stat.S_ISCHR, "a device"),
    (stat.S_ISBLK, "a device"),
)


def write_file(
    path: str | os.PathLike[str], write: Callable[[Path], object], *, overwrite: bool = False, mode: int = PRIVATE
) -> None:
    """Make `path` the file that `write(temporary)` writes to the path it is given.

    Without `overwrite`, of all processes that write to a path one succeeds. A symbolic link is followed: the file that
    it leads to is replaced, the link stays. `write` is not called if the target cannot be one. What it raises passes,
    errors of the operating system excepted; signals that end the process wait until the file stands.

    Raises CheckpointError, leaving what was there, if `path` exists and `overwrite` is False, is not a regular file or
    leads nowhere, if its folder does not exist, and for every error of the operating system.
    """
    try:
        target = _target(Path(path), overwrite)
        with _signals_wait(), _private_folder(target.parent) as folder:
            temporary = folder / target.name
            write(temporary)
            _settle(temporary, mode)
            _publish(temporary, target, overwrite)
            with suppress(OSError):  # not every system lets folders be opened
                _sync(target.parent)
    except FileExistsError as error:
        raise _exists(path) from error
    except OSError as error:
        raise CheckpointError(f"cannot write {path}: {error.strerror or error}; {_way_out(error)}") from error


def require_file(path: str | os.PathLike[str]) -> None:
    """Raise CheckpointError unless `path` is a regular file, or a link to one: reading others may never end."""
    path = Path(path)
    _require_name(path)
    try:
        found = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError) as error:
        raise CheckpointError(f"{path} does not exist") from error
    except OSError as error:
        raise CheckpointError(f"cannot read {path}: {error.strerror}") from error
    _require_regular(found, path)


def _target(path: Path, overwrite: bool) -> Path:
    """Where the file will be, links followed. Raises CheckpointError if nothing may be written there."""
    _require_name(path)
    if path.is_symlink() and not path.exists():
        raise CheckpointError(f"{path} is a symbolic link that leads nowhere; remove it or choose another name")
    given, path = path, Path(os.path.realpath(path))
    try:
        found = path.stat().st_mode
    except (FileNotFoundError, NotADirectoryError):
        if not path.parent.is_dir():
            raise CheckpointError(
                f"the folder {given.parent} does not exist; create it or choose another one"
            ) from None
        return path
    _require_regular(found, path)
    if not overwrite:
        raise _exists(path)
    return path


def _require_name(path: Path) -> None:
    try:
        impossible = b"\0" in os.fsencode(path)
    except UnicodeEncodeError:
        impossible = True
    if impossible:
        raise CheckpointError(f"{str(path)!r} cannot be the name of a file; choose another one")


def _require_regular(mode: int, path: Path) -> None:
    if not stat.S_ISREG(mode):
        kind = next((name for is_kind, name in _KINDS if is_kind(mode)), "something else")
        raise CheckpointError(f"{path} is {kind}, not a regular file; choose another name")


def _exists(path: str | os.PathLike[str]) -> CheckpointError:
    return CheckpointError(f"{path} exists; pass overwrite=True or choose another name")


@contextmanager
def _private_folder(parent: Path) -> Iterator[Path]:
    """A folder that nobody else uses, for the file and for the temporaries that libraries make beside it."""
    _delete_abandoned(parent)
    folder = Path(tempfile.mkdtemp(prefix=_PREFIX, suffix=_SUFFIX, dir=parent))
    try:
        yield folder
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _delete_abandoned(parent: Path) -> None:
    """What processes that were killed left behind more than a day ago takes disk space for nothing."""
    for folder in parent.glob(f"{_PREFIX}*{_SUFFIX}"):
        with suppress(OSError):
            if time.time() - folder.lstat().st_mtime > _ABANDONED_SECONDS:
                shutil.rmtree(folder, ignore_errors=True)


@contextmanager
def _signals_wait() -> Iterator[None]:
    """Ctrl-C, SIGTERM and SIGHUP take effect at the end of the block. Other threads than the main one are not asked."""
    came: list[int] = []
    handlers = {}
    if threading.current_thread() is threading.main_thread():
        # a handler that Python did not set is None and could not be given back
        handlers = {
            number: signal.getsignal(number) for number in _ENDING_SIGNALS if signal.getsignal(number) is not None
        }
    try:
        for number in handlers:
            signal.signal(number, lambda number, _: came.append(number))
        yield
    finally:
        for number, handler in handlers.items():
            signal.signal(number, handler)
        for number in came:
            signal.raise_signal(number)


def _settle(temporary: Path, mode: int) -> None:
    """Give the file its permissions and bring its bytes to the disk."""
    with suppress(PermissionError):  # file systems without permissions
        temporary.chmod(mode)
    _sync(temporary)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _publish(temporary: Path, target: Path, overwrite: bool) -> None:
    """Give the file its name. Raises FileExistsError if another one has it and `overwrite` is False."""
    if overwrite:
        temporary.replace(target)
        return
    try:
        os.link(temporary, target)  # unlike a rename, this never replaces
        return
    except FileExistsError:
        raise
    except OSError:  # a file system without hard links: the name is claimed, then the claim replaced
        os.close(os.open(target, os.O_CREAT | os.O_EXCL | os.O_WRONLY, PRIVATE))
    try:
        temporary.replace(target)
    except BaseException:
        target.unlink(missing_ok=True)
        raise


def _way_out(error: OSError) -> str:
    if error.errno == errno.ENAMETOOLONG:
        return "choose a shorter name"
    return "is there room on the disk, and may you write there?"
