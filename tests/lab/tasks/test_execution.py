"""Programs that a model has written can compute, and nothing else; what does not come to its end has failed."""

import os
import threading
import time
from http.server import BaseHTTPRequestHandler, HTTPServer

import pytest

from mikv.errors import ConfigError
from mikv.lab.tasks import execution, sandbox
from mikv.lab.tasks.execution import require_sandbox, succeeds

try:
    require_sandbox()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)


@pytest.mark.parametrize(
    "program",
    [
        "",
        "assert sorted([3, 1, 2]) == [1, 2, 3]",
        "import math, re, hashlib, collections, itertools, typing, random, heapq, json, datetime, decimal, fractions",
        "print('x' * 1_000_000)",
        "import sys\nsys.stderr.write('warning')",
        "import time\ntime.sleep(0.01)",
        "if __name__ == '__main__':\n    import __main__\n    assert __main__.__dict__ is globals()",
        "from dataclasses import dataclass\n@dataclass\nclass A:\n    x: 'int' = 1\nassert A().x == 1",
        "def f():\n    from concurrent import futures\n    return futures\nassert f() and __import__('xml.dom').dom",
        "from datetime import datetime\nassert datetime.strptime('3/2024', '%m/%Y').month == 3",
        "assert 'é'.encode('latin-1') == b'\\xe9'\nimport warnings\nwarnings.warn('careful')",
    ],
)
def test_a_program_that_comes_to_its_end_succeeds(program):
    assert succeeds(program, seconds=10)


@pytest.mark.parametrize(
    "program",
    [
        "assert 1 == 2",
        "syntax error",
        "1 / 0",
        "exit()",
        "raise SystemExit(0)",
        "import os\nos._exit(0)",
        "def f(): return f()\nf()",
        "import ctypes\nctypes.string_at(0)",
        "import torch",
    ],
)
def test_a_program_that_ends_early_fails(program):
    assert not succeeds(program, seconds=10)


@pytest.mark.parametrize("program", ["while True: pass", "import time\ntime.sleep(1000)", "input()\nwhile True: pass"])
def test_an_endless_program_is_ended(program):
    start = time.monotonic()
    assert not succeeds(program, seconds=1)
    assert time.monotonic() - start < 10


def test_a_program_cannot_take_the_memory_of_the_machine():
    assert succeeds("x = bytearray(200_000_000)", seconds=10)
    assert not succeeds(f"x = bytearray({sandbox.MEMORY_BYTES})", seconds=10)
    assert not succeeds("x = []\nwhile True: x.append(bytearray(100_000_000))", seconds=10)


def refused(action):
    """A program that succeeds only if `action` raises PermissionError, not any other error."""
    return f"import os, signal\ntry:\n    {action}\nexcept PermissionError:\n    pass\nelse:\n    raise AssertionError"


@pytest.mark.parametrize(
    "action",
    [
        "os.fork()",
        "os.posix_spawn('/bin/true', ['/bin/true'], {})",
        "os.execv('/bin/true', ['/bin/true'])",
        "import subprocess; subprocess.run(['/bin/true'])",
        "import socket; socket.socket()",
        "import socket; socket.socketpair()",
        "os.kill(os.getppid(), signal.SIGKILL)",
        "import resource; resource.prlimit(0, resource.RLIMIT_CPU, (99, 99))",
        "open('here', 'w')",
        "os.mkdir('here')",
        "os.chmod('.', 0o777)",
        "os.chdir('/')",
        "os.mkfifo('here')",
        "os.symlink('a', 'b')",
        "os.setuid(0)",
    ],
)
def test_everything_but_computing_is_refused(action):
    assert succeeds(refused(action), seconds=10)


@pytest.mark.parametrize(
    "action",
    [
        f"open({execution.__file__!r})",
        "open('/proc/self/mem', 'rb')",
        "open(f'/proc/{os.getppid()}/environ', 'rb')",
        "os.listdir()",
        "os.stat('/')",
        "os.readlink('/proc/self/fd/0')",
    ],
)
def test_a_program_reads_no_files(action):
    assert succeeds(refused(action), seconds=10)


def test_a_program_cannot_change_files(tmp_path):
    file = tmp_path / "kept"
    file.write_text("before")
    path = str(file)
    for action in (
        f"open({path!r}, 'w')",
        f"open({path!r}, 'a')",
        f"open({path!r}, 'r+')",
        f"os.truncate({path!r}, 0)",
        f"os.remove({path!r})",
        f"os.rename({path!r}, {path + '2'!r})",
        f"os.chmod({path!r}, 0)",
        f"os.utime({path!r}, (0, 0))",
        f"open({path + '2'!r}, 'x')",
    ):
        assert succeeds(refused(action), seconds=10), action
    assert [entry.name for entry in tmp_path.iterdir()] == ["kept"]
    assert file.read_text() == "before"


def test_a_fork_bomb_starts_nothing():
    before = len(os.listdir("/proc"))
    assert not succeeds("import os\nwhile True: os.fork()", seconds=5)
    assert not succeeds(
        "import os\nwhile True:\n    try: os.fork()\n    except OSError: pass\n", seconds=1
    )  # refused, but endless
    assert len(os.listdir("/proc")) < before + 50


def test_a_program_cannot_start_threads():
    assert not succeeds("import threading\nthreading.Thread(target=print).start()", seconds=10)


def test_a_program_cannot_reach_a_server_on_this_machine():
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def do_GET(self):
            asked.append(self.path)

    server = HTTPServer(("127.0.0.1", 0), Handler)
    thread = threading.Thread(target=server.serve_forever, daemon=True)
    thread.start()
    url = f"http://127.0.0.1:{server.server_port}/"
    assert not succeeds(f"import urllib.request\nurllib.request.urlopen({url!r})", seconds=5)
    server.shutdown()
    thread.join()
    server.server_close()
    assert asked == []


def test_a_program_does_not_see_the_environment(monkeypatch):
    monkeypatch.setenv("MIKV_TEST_SECRET", "1")
    assert succeeds("import os\nassert 'MIKV_TEST_SECRET' not in os.environ", seconds=10)


def test_a_machine_that_cannot_confine_is_refused(monkeypatch):
    monkeypatch.setattr(execution.platform, "machine", lambda: "s390x")
    with pytest.raises(ConfigError, match=r"x86_64 and aarch64 only, and this is Linux s390x"):
        require_sandbox()


def test_a_kernel_without_filters_is_refused(monkeypatch):
    monkeypatch.setattr(execution, "succeeds", lambda program, seconds: False)
    with pytest.raises(ConfigError, match="seccomp"):
        require_sandbox()
