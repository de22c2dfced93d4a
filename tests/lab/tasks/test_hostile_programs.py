"""Programs that are out to harm or to deceive get nothing: each entry is named after what it tries."""

import platform
import resource
import textwrap
import time
from concurrent.futures import ThreadPoolExecutor

import pytest
from refused_calls import CALLS

from mikv.errors import ConfigError
from mikv.lab.tasks.execution import passes_tests, require_sandbox
from mikv.lab.tasks.sandbox import messages

try:
    require_sandbox()
except ConfigError as error:
    pytest.skip(str(error), allow_module_level=True)

# tests that `return sum(numbers)` passes, and a constant does not
GIVEN = "def decoded(text):\n    return [int(word) for word in text.split()]\n"
TESTS = """
import random
def check(candidate):
    assert candidate([]) == 0
    assert candidate([1, 2]) == 3
    numbers = [5, 7]
    assert candidate(numbers) == sum(numbers)
    numbers = [random.randint(1, 10**9) for _ in range(4)]
    assert candidate(numbers) == sum(numbers)
    assert candidate(decoded('1 2 3')) == 6
"""


def passes(program, seconds=5, tests=TESTS):
    return passes_tests(textwrap.dedent(program), GIVEN, tests, "total", seconds)


def test_the_right_answer_passes_and_a_wrong_one_fails():
    assert passes("def total(numbers): return sum(numbers)")
    assert not passes("def total(numbers): return 3")
    assert not passes("")


FORGERIES = {
    "ends with status 0 on loading": "import os; os._exit(0)",
    "ends with the judge's status": "import os\ndef total(numbers): os._exit(80)",
    "leaves by SystemExit": "def total(numbers): raise SystemExit(80)",
    "leaves by KeyboardInterrupt": "def total(numbers): raise KeyboardInterrupt",
    "raises the judge's own exception": "class UnsendableError(Exception): pass\ndef total(n): raise UnsendableError",
    "raises in the place of an answer": "def total(numbers): raise AssertionError('passed')",
    "defines its own check": "def check(candidate): pass\ndef total(numbers): pass",
    "is no function": "total = 3",
    "a value that equals everything": """
        class Any:
            def __eq__(self, other): return True
        def total(numbers): return Any()
    """,
    "unittest.mock.ANY": "from unittest.mock import ANY\ndef total(numbers): return ANY",
    "a number that equals everything": """
        class Any(int):
            def __eq__(self, other): return True
            __hash__ = None
        def total(numbers): return Any(1)
    """,
    "a text, a list, a dict that equal everything": """
        def always(*_): return True
        def total(numbers):
            made = [type("A", (kind,), {"__eq__": always, "__len__": always})() for kind in (str, list, dict, set)]
            return made[len(numbers) % 4]
    """,
    "a class that claims to be int": """
        class Any:
            __class__ = int
            def __eq__(self, other): return True
            def __index__(self): return 3
        def total(numbers): return Any()
    """,
    "not a number": "def total(numbers): return float('nan')",
    "empties the arguments": "def total(numbers):\n    numbers.clear()\n    return 0",
    "makes chance foreseeable": """
        import random
        random.randint = lambda a, b: 0
        random.seed = random.random = lambda *a: 0
        def total(numbers): return {0: 0, 2: 3 if numbers[:1] == [1] else 12, 3: 6}.get(len(numbers), 0)
    """,
    "replaces what the tests call": """
        import builtins
        builtins.sum = builtins.abs = builtins.len = builtins.int = lambda *a: 0
        decoded = lambda text: []
        def total(numbers): return 0
    """,
    "replaces AssertionError": """
        import builtins
        builtins.AssertionError = type("Silent", (Warning,), {})
        def total(numbers): return 0
    """,
    "replaces modules": """
        import sys
        class Everything:
            def __getattr__(self, name): return lambda *a, **k: Everything()
            def __eq__(self, other): return True
        for name in list(sys.modules): sys.modules[name] = Everything()
        def total(numbers): return 0
    """,
    "replaces the encoding": """
        import sys
        messages = sys.modules["mikv.lab.tasks.sandbox.messages"]
        messages.encode = sys.modules["mikv.lab.tasks.sandbox.candidate"].encode = lambda value: True
        def total(numbers): return 0
    """,
    "replaces sending": """
        import sys, os
        def send(descriptor, message): os.write(descriptor, b"\\4\\0\\0\\0true")
        sys.modules["mikv.lab.tasks.sandbox.candidate"].send = send
        def total(numbers): return 0
    """,
    "sends answers ahead": """
        import os
        body = b'["tuple", ["value", ["int", "3"]]]'
        for descriptor in range(3, 4096):
            try: os.write(descriptor, (len(body).to_bytes(4, "little") + body) * 50)
            except OSError: pass
        def total(numbers): return 3
    """,
    "writes a verdict to all descriptors": """
        import os
        for descriptor in range(64):
            for word in (b"passed", b"80", b"\\x50", b"True", b"1"):
                try: os.write(descriptor, word)
                except OSError: pass
        os._exit(80)
    """,
    "writes it at the end of the process": """
        import atexit, os, sys
        def end(): [os.write(d, b"passed") for d in (1, 2)]; os._exit(80)
        atexit.register(end)
        sys.excepthook = lambda *a: os._exit(80)
        def total(numbers): sys.exit()
    """,
    "raises while it is deleted": """
        class Last:
            def __del__(self): raise SystemExit(80)
        def total(numbers):
            Last()
            return 0
    """,
    "takes answers from the arguments of argv": """
        import sys
        def total(numbers): return sys.argv[-1]
    """,
    "rewinds the runner's frames": """
        import sys
        frame = sys._getframe()
        while frame.f_back: frame = frame.f_back
        frame.f_globals["PASSED"] = frame.f_builtins["PASSED"] = 0
        def trace(*a):
            a[0].f_trace_lines = True
            return trace
        sys.settrace(trace); sys.setprofile(trace)
        def total(numbers): return 0
    """,
    "corrupts memory": "import ctypes\ndef total(numbers): ctypes.memset(id(0), 255, 4000)",
    "an object that is a generator of answers": "def total(numbers): yield sum(numbers)",
    "a list of all possible answers": "def total(numbers): return [0, 3, 12, 6]",
}


@pytest.mark.parametrize("tries", FORGERIES)
def test_a_verdict_cannot_be_forged(tries):
    assert not passes(FORGERIES[tries], seconds=3)


@pytest.mark.parametrize(
    "message",
    [
        b"\xff\xff\xff\xff",
        b"\x00\x00\x00\x80[",
        b"\x00\x00\x00\x00",
        b"\x05\x00\x00\x00{}",
        b"\x02\x00\x00\x00{}",
        b"\x09\x00\x00\x00[[[[[[[[[",
        (100_000).to_bytes(4, "little") + b"[" * 100_000,
        b'\x1b\x00\x00\x00["tuple", ["value", "PASS"]]',
        b"\x09\x00\x00\x00" + b'"\xff\xfe\xfd\xfc"',
        b'\x0b\x00\x00\x00["eval", 1]',
    ],
)
def test_a_message_that_is_none_fails(message):
    program = f"""
        import os
        message = {message!r}
        for descriptor in range(3, 4096):
            try: os.write(descriptor, message)
            except OSError: pass
        def total(numbers): return sum(numbers)
    """
    start = time.monotonic()
    assert not passes(program, seconds=2)
    assert time.monotonic() - start < 12


def test_the_tests_are_nowhere_in_the_program_s_process():
    program = """
        import gc, os, sys
        def total(reversed_words):
            objects = gc.get_objects() + list(sys.modules.values())
            frame = sys._getframe()
            while frame:
                objects += [frame.f_locals, frame.f_globals, frame.f_code.co_consts]
                frame = frame.f_back
            objects += [dict(os.environ), sys.argv, sys.orig_argv]
            texts = [one for one in gc.get_referents(*objects) if isinstance(one, (str, bytes, bytearray))]
            words = [word[::-1] for word in reversed_words]
            return [word for word in words if any(word in str(text) for text in texts)]
    """
    words = ["etadidnac tressa", "kcehc fed"]
    tests = f"def check(candidate):\n    assert candidate({words}) == []\n"
    assert passes(program, tests=tests)
    assert not passes(program + "    'assert candidate'", tests=tests)  # it would have been found


@pytest.mark.skipif(platform.machine() != "x86_64", reason="the numbers are those of x86-64")
def test_every_call_that_is_not_computing_is_refused():
    program = f"""
        import ctypes, os, mmap
        CALLS = {CALLS!r}
        libc = ctypes.CDLL(None, use_errno=True)
        buffer, root = ctypes.create_string_buffer(4096), ctypes.create_string_buffer(b"/")
        page = ctypes.addressof(ctypes.c_char.from_buffer(memory := mmap.mmap(-1, 4096)))
        words = {{"buffer": ctypes.addressof(buffer), "root": ctypes.addressof(root), "page": page}}
        def total(name):
            words["parent"] = os.getppid()
            for words["pipe"] in range(3, 64):
                try: os.fstat(words["pipe"]); break
                except OSError: pass
            number, *arguments = CALLS[name]
            ctypes.set_errno(0)
            got = libc.syscall(number, *(ctypes.c_long(words.get(one, one)) for one in arguments))
            return got, ctypes.get_errno()
    """
    tests = f"""
def check(candidate):
    for name in {list(CALLS)!r}:
        assert candidate(name) == (-1, 1), name
"""
    assert passes(program, seconds=20, tests=tests)


RESOURCES = {
    "processor time": "def total(numbers):\n    while True: pass",
    "processor time, its signal caught": """
        import signal
        for number in range(1, 65):
            try: signal.signal(number, signal.SIG_IGN)
            except (OSError, ValueError): pass
        while True: pass
    """,
    "time": "import time\ndef total(numbers): time.sleep(10**6)",
    "memory": "def total(numbers):\n    x = []\n    while True: x.append(bytearray(10**8))",
    "memory by numbers": "def total(numbers): return len(str(9 ** 9 ** 9))",
    "descriptors": "import os\nheld = [os.dup(0) for _ in range(1000)]\ndef total(numbers): return sum(numbers)",
    "processes": "import os\ndef total(numbers):\n    while True: os.fork()",
    "threads": "import _thread\n_thread.start_new_thread(print, ())\ndef total(numbers): return sum(numbers)",
    "an answer without end": "def total(numbers):\n    while True: yield 1",
    "a long answer": "def total(numbers): return 'x' * 50_000_000",
    "an answer in a circle": "def total(numbers):\n    x = []\n    x.append(x)\n    return x",
    "a deep answer": "def total(numbers):\n    x = []\n    for _ in range(10**6): x = [x]\n    return x",
}


def test_what_a_program_uses_is_limited():
    def run(program):
        start = time.monotonic()
        return passes(program, seconds=1), time.monotonic() - start > 20

    with ThreadPoolExecutor(4) as threads:
        results = dict(zip(RESOURCES, threads.map(run, RESOURCES.values()), strict=True))
    assert results == dict.fromkeys(RESOURCES, (False, False))


@pytest.mark.parametrize(
    "flood",
    [
        "os.write(descriptor, b'x' * (1 << 20))",  # whole
        "os.write(descriptor, b'x')",  # byte by byte
        "os.write(descriptor, (1 << 20).to_bytes(4, 'little') + b'\"' + b'x' * ((1 << 20) - 2) + b'\"')",  # as messages
        "os.close(descriptor)",
    ],
)
def test_output_does_not_grow_in_this_process(flood):
    program = f"""
        import os
        while True:
            for descriptor in range(20):
                try: {flood}
                except OSError: pass
    """
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    assert not passes(program, seconds=1)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 10 * 1024  # KiB


VALUES = [
    *(None, True, False, 0, -5, 10**5000, 0.1, -0.0, float("inf"), 1 + 2j, "", "é\ud800\0", b"\xff", [], (), {}),
    *({1, 2}, frozenset({"a"}), [1, (2, [3.0, None])], {"a": [1], 2: {"b": ()}, (1, 2): True}),
]


def test_plain_values_arrive_as_they_were():
    for value in VALUES:
        decoded = messages.decode(messages.encode(value))
        assert type(decoded) is type(value)
        assert decoded == value
    assert str(messages.decode(messages.encode([-0.0, float("nan")]))) == "[-0.0, nan]"


def test_values_like_plain_ones_arrive_as_plain_ones():
    program = """
        import collections, decimal, enum, fractions
        Pair = collections.namedtuple("Pair", "a b")
        class Color(enum.IntEnum): RED = 3
        def total(which):
            return {
                "counter": collections.Counter("aab"), "pair": Pair(1, 2), "enum": Color.RED,
                "decimal": decimal.Decimal("0.5"), "fraction": fractions.Fraction(1, 2), "map": map(abs, [-1, 2]),
            }[which]
    """
    tests = """
def check(candidate):
    assert candidate("counter") == {"a": 2, "b": 1}
    assert candidate("pair") == (1, 2)
    assert candidate("enum") == 3 and type(candidate("enum")) is int
    assert candidate("decimal") == candidate("fraction") == .5
    assert candidate("map") != [1, 2] and list(candidate("map")) == [1, 2]
    try:
        candidate("nothing")
    except KeyError:
        return
    raise AssertionError
"""
    assert passes(program, tests=tests)


def test_an_answer_that_is_asked_about_again_cannot_stop_the_evaluation():
    program = "def total(x): return 'x' * ((1 << 20) - 40)"
    assert not passes(program, tests="def check(candidate): assert candidate(candidate(1) + '.' * 99)")


def test_tests_that_pass_more_than_data_are_refused():
    with pytest.raises(ConfigError, match="tests of total call it with a value that cannot be sent"):
        passes("def total(f): return f()", tests="def check(candidate): assert candidate(lambda: 1) == 1")
