"""The command itself: fast help, lazy imports, errors in one line."""

import subprocess
import sys

import pytest

import mikv
from mikv.cli import COMMANDS

HEAVY = ("torch", "transformers", "numpy", "matplotlib")


def modules_after(*arguments):
    code = (
        "import sys\n"
        "from mikv.cli import app\n"
        "try:\n"
        f"    app({list(arguments)!r})\n"
        "except SystemExit as leaving:\n"
        "    assert not leaving.code, leaving.code\n"
        "print(*sorted(sys.modules), file=sys.stderr)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=60)
    return done.stdout, set(done.stderr.split())


@pytest.mark.parametrize("arguments", [("--help",), *((name, "--help") for name in COMMANDS), ("--version",)])
def test_help_loads_nothing_heavy(arguments):
    _, modules = modules_after(*arguments)
    assert not modules.intersection(HEAVY)


def test_help_lists_all_commands():
    text, _ = modules_after("--help")
    assert all(f" {name} " in text for name in COMMANDS)


def test_the_version_is_printed():
    text, _ = modules_after("--version")
    assert text == f"mikv {mikv.__version__}\n"


def test_an_unknown_command_is_refused(mikv):
    result = mikv("nonsense")
    assert result.exit_code == 2
    assert "No such command 'nonsense'" in result.stderr


def run_script(*arguments, folder):
    code = f"import sys; from mikv.cli import main; sys.argv = {['mikv', *map(str, arguments)]!r}; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder)


def test_the_console_script_reports_errors_in_one_line_without_traceback(tmp_path):
    done = run_script("generate", "hi", "--model", "./nowhere", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert done.stderr == "error: ./nowhere does not exist; pass smollm2, a folder, a .gguf file or a hub id\n"


def test_the_console_script_prints_the_answer_and_one_summary_line(tmp_path, tiny_folder):
    done = run_script("generate", "hi", "--model", tiny_folder, "--max-new-tokens", 3, folder=tmp_path)
    assert done.returncode == 0
    [summary] = done.stderr.splitlines()
    assert "3 new at" in summary
