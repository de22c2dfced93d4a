"""A file is written whole or not at all, by one process of many, and never over what is not a regular file."""

import errno
import os
import signal
import socket
import stat
import subprocess
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path

import pytest

from mikv.atomic_file import PUBLIC, require_file, write_file
from mikv.errors import CheckpointError

OLD, NEW = "old", "new" * 1000


def new(path: Path) -> None:
    path.write_text(NEW)


def no_call(path: Path) -> None:
    raise AssertionError("the target should have been refused before any work")


def failing(number: int) -> Callable[..., None]:
    def fail(*_: object, **__: object) -> None:
        raise OSError(number, os.strerror(number))

    return fail


def names(folder: Path) -> list[str]:
    return sorted(path.name for path in folder.iterdir())


def test_the_file_is_private_unless_asked_otherwise_and_nothing_is_beside_it(tmp_path: Path) -> None:
    write_file(tmp_path / "a", new)
    write_file(tmp_path / "b", new, mode=PUBLIC)
    assert [stat.S_IMODE((tmp_path / name).stat().st_mode) for name in "ab"] == [0o600, 0o644]
    assert (tmp_path / "a").read_text() == NEW
    assert names(tmp_path) == ["a", "b"]


def test_what_is_there_is_replaced_only_if_asked_and_takes_the_new_permissions(tmp_path: Path) -> None:
    (tmp_path / "a").write_text(OLD)
    (tmp_path / "a").chmod(0o644)
    with pytest.raises(CheckpointError, match="a exists; pass overwrite=True or choose another name"):
        write_file(tmp_path / "a", no_call)
    assert (tmp_path / "a").read_text() == OLD
    write_file(tmp_path / "a", new, overwrite=True)
    assert (tmp_path / "a").read_text() == NEW
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o600


def test_a_link_to_a_file_stays_and_its_file_is_replaced(tmp_path: Path) -> None:
    (tmp_path / "disk").mkdir()
    (tmp_path / "disk" / "file").write_text(OLD)
    (tmp_path / "link").symlink_to(Path("disk", "file"))
    with pytest.raises(CheckpointError, match="exists; pass overwrite=True"):
        write_file(tmp_path / "link", no_call)
    write_file(tmp_path / "link", new, overwrite=True)
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "disk" / "file").read_text() == NEW
    assert names(tmp_path / "disk") == ["file"]


def folder(path: Path) -> None:
    path.mkdir()


def full_socket(path: Path) -> None:
    with socket.socket(socket.AF_UNIX) as server:
        server.bind(str(path))


def link_to(target: str) -> Callable[[Path], None]:
    return lambda path: path.symlink_to(target)


def link_to_pipe(path: Path) -> None:
    os.mkfifo(path.with_name("pipe"))
    path.symlink_to("pipe")


IRREGULAR = {
    "folder": (folder, "is a folder, not a regular file"),
    "pipe": (os.mkfifo, "is a pipe, not a regular file"),
    "socket": (full_socket, "is a socket, not a regular file"),
    "link to a device": (link_to("/dev/null"), "/dev/null is a device, not a regular file"),
    "link to a folder": (link_to("."), "is a folder, not a regular file"),
    "link to a pipe": (link_to_pipe, "is a pipe, not a regular file"),
    "dangling link": (link_to("nothing"), "is a symbolic link that leads nowhere"),
    "loop": (link_to("target"), "is a symbolic link that leads nowhere"),
}


@pytest.mark.parametrize("overwrite", [False, True])
@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_replaced(kind: str, overwrite: bool, tmp_path: Path) -> None:
    make, message = IRREGULAR[kind]
    path = tmp_path / "target"
    make(path)
    before = path.lstat().st_mode, names(tmp_path)
    with pytest.raises(CheckpointError, match=message):
        write_file(path, no_call, overwrite=overwrite)
    assert (path.lstat().st_mode, names(tmp_path)) == before


@pytest.mark.parametrize("kind", IRREGULAR)
def test_only_regular_files_are_read(kind: str, tmp_path: Path) -> None:
    make, _ = IRREGULAR[kind]
    make(tmp_path / "target")
    with pytest.raises(CheckpointError, match=r"target is a .*, not a regular file|does not exist|cannot read"):
        require_file(tmp_path / "target")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("missing", "missing does not exist"),
        ("file/name", "name does not exist"),
        ("n" * 256, "cannot read .*File name too long"),
        ("a\0b", "cannot be the name of a file"),
    ],
)
def test_what_cannot_be_read_is_named(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(OLD)
    (tmp_path / "link").symlink_to("file")
    require_file(tmp_path / "file")
    require_file(tmp_path / "link")
    with pytest.raises(CheckpointError, match=message):
        require_file(tmp_path / name)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("/dev/null", "is a device, not a regular file"),
        (".", "is a folder"),
        ("", "is a folder"),
        ("n" * 256, "choose a shorter name"),
        ("missing/name", "the folder .*missing does not exist"),
        ("file/name", "the folder .*file does not exist"),
        ("loop/name", "cannot write .*Too many levels of symbolic links"),
        ("a\0b", "cannot be the name of a file"),
        ("\udfff", "cannot be the name of a file"),
    ],
)
def test_impossible_names_are_refused_before_any_work(name: str, message: str, tmp_path: Path) -> None:
    (tmp_path / "file").write_text(OLD)
    (tmp_path / "loop").symlink_to("loop")
    with pytest.raises(CheckpointError, match=message):
        write_file(tmp_path / name, no_call, overwrite=True)
    assert names(tmp_path) == ["file", "loop"]


def test_the_longest_name_that_the_file_system_takes_works(tmp_path: Path) -> None:
    write_file(tmp_path / ("n" * 255), new)
    assert names(tmp_path) == ["n" * 255]


@pytest.mark.parametrize("step", ["write", "fsync", "link", "replace"])
@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EIO, errno.EROFS])
def test_a_full_disk_at_any_step_leaves_what_was_there(
    step: str, number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = tmp_path / "a"
    overwrite = step != "link"
    if overwrite:
        path.write_text(OLD)
    if step == "fsync":
        monkeypatch.setattr(os, "fsync", failing(number))
    if step == "link":
        monkeypatch.setattr(os, "link", failing(number))
    if step in ("link", "replace"):
        monkeypatch.setattr(Path, "replace", failing(number))
    with pytest.raises(CheckpointError, match=f"cannot write {path}: {os.strerror(number)}; is there room"):
        write_file(path, failing(number) if step == "write" else new, overwrite=overwrite)
    assert names(tmp_path) == (["a"] if overwrite else [])
    assert not overwrite or path.read_text() == OLD


def test_other_errors_of_the_writer_pass_and_leave_nothing(tmp_path: Path) -> None:
    def broken(path: Path) -> None:
        path.write_text("half")
        raise KeyError("mine")

    with pytest.raises(KeyError, match="mine"):
        write_file(tmp_path / "a", broken)
    assert names(tmp_path) == []


def test_without_hard_links_it_is_exclusive_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(os, "link", failing(errno.EPERM))
    write_file(tmp_path / "a", new)
    assert (tmp_path / "a").read_text() == NEW

    def overtaken(path: Path) -> None:
        new(path)
        (tmp_path / "b").write_text(OLD)

    with pytest.raises(CheckpointError, match="b exists"):
        write_file(tmp_path / "b", overtaken)
    assert (tmp_path / "b").read_text() == OLD
    assert names(tmp_path) == ["a", "b"]


def test_what_a_killed_process_left_never_blocks_and_goes_after_a_day(tmp_path: Path) -> None:
    def left_behind(name: str, age_hours: float) -> None:
        (tmp_path / name).mkdir()
        (tmp_path / name / "a").write_text("half")
        then = time.time() - age_hours * 3600
        os.utime(tmp_path / name, (then, then))

    left_behind(".mikv-old.partial", 25)
    left_behind(".mikv-now.partial", 1)
    left_behind(".mikv-other", 25)
    write_file(tmp_path / "a", new)
    assert names(tmp_path) == [".mikv-now.partial", ".mikv-other", "a"]


# Each process waits for a line, so that all start together, then writes `rounds` files with 1 MB of its own letter.
WRITER = """
import sys
from mikv import atomic_file
from mikv.errors import CheckpointError
path, letter, rounds = sys.argv[1], sys.argv[2], int(sys.argv[3])
overwrite, links = sys.argv[4] == "1", sys.argv[5] == "1"
if not links:
    def no_link(*_): raise PermissionError(1, "no hard links here")
    atomic_file.os.link = no_link
print("ready", flush=True)
sys.stdin.readline()
for i in range(rounds):
    try:
        atomic_file.write_file(f"{path}{i}", lambda p: p.write_text(letter * 1_000_000), overwrite=overwrite)
        print("saved", flush=True)
    except CheckpointError as error:
        print("refused" if "exists" in str(error) else error, flush=True)
"""


def start(path: Path, letter: str, rounds: int, overwrite: bool, links: bool = True) -> subprocess.Popen[str]:
    arguments = [sys.executable, "-c", WRITER, str(path), letter, str(rounds), str(int(overwrite)), str(int(links))]
    process = subprocess.Popen(
        arguments, stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )
    assert process.stdout is not None
    assert process.stdout.readline() == "ready\n"
    return process


def let_go(process: subprocess.Popen[str]) -> None:
    assert process.stdin is not None
    process.stdin.write("\n")
    process.stdin.flush()


@pytest.mark.parametrize("links", [True, False], ids=["hard links", "no hard links"])
@pytest.mark.parametrize("overwrite", [False, True])
def test_many_processes_write_to_one_path(overwrite: bool, links: bool, tmp_path: Path) -> None:
    rounds = 12
    processes = [start(tmp_path / "file", letter, rounds, overwrite, links) for letter in "abcd"]
    for process in processes:
        let_go(process)
    said = [process.communicate()[0].split() for process in processes]
    for i, results in enumerate(zip(*said, strict=True)):
        text = (tmp_path / f"file{i}").read_text()
        assert len(text) == 1_000_000
        assert text == text[0] * len(text)
        saved = [letter for letter, result in zip("abcd", results, strict=True) if result == "saved"]
        assert saved == (list("abcd") if overwrite else [text[0]])
        assert set(results) <= {"saved", "refused"}
    assert len(names(tmp_path)) == rounds


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGHUP, signal.SIGKILL])
def test_a_process_that_is_ended_while_it_writes_leaves_the_old_file_or_the_new(number: int, tmp_path: Path) -> None:
    path = tmp_path / "file0"
    path.write_text("a" * 1_000_000)
    for delay in (0, 0.002, 0.005, 0.01):
        process = start(tmp_path / "file", "b", 100_000, overwrite=True)
        (tmp_path / "file1").unlink(missing_ok=True)
        let_go(process)
        time.sleep(delay)
        process.send_signal(number)
        process.communicate()
        assert process.returncode == -number
        for written in tmp_path.glob("file*"):
            text = written.read_text()
            assert len(text) == 1_000_000
            assert text == text[0] * len(text)
        if number != signal.SIGKILL:
            assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT])
def test_signals_wait_until_the_file_stands_and_handlers_are_given_back(number: int, tmp_path: Path) -> None:
    came = []
    before = signal.signal(number, lambda number, _: came.append((number, names(tmp_path))))

    def signalled(path: Path) -> None:
        signal.raise_signal(number)
        assert not came
        new(path)

    try:
        write_file(tmp_path / "a", signalled)
        assert came == [(number, ["a"])]
        signal.raise_signal(number)
        assert len(came) == 2
    finally:
        signal.signal(number, before)


def test_another_thread_can_write(tmp_path: Path) -> None:
    thread = threading.Thread(target=write_file, args=(tmp_path / "a", new))
    thread.start()
    thread.join()
    assert (tmp_path / "a").read_text() == NEW
