"""The command itself: fast help, lazy imports, errors in one line."""

import os
import subprocess
import sys

import pytest

import mikv
from mikv.cache.policies import policy_names
from mikv.cli import COMMANDS, eval, sweep
from mikv.lab.tasks import task_names

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


def test_a_mistyped_command_gets_the_nearest_name(mikv):
    result = mikv("quantise")
    assert result.exit_code == 2
    assert "No such command 'quantise'; did you mean quantize?" in result.stderr


def test_the_names_that_help_lists_are_all_there_are():
    assert list(sweep.POLICIES) == policy_names()
    assert task_names() == eval.TASKS


def complete(shell, words):
    environment = {"_MIKV_COMPLETE": f"complete_{shell}", "COMP_WORDS": words, "COMP_CWORD": "1"}
    environment |= {"_TYPER_COMPLETE_ARGS": words, "_TYPER_COMPLETE_FISH_ACTION": "get-args"}
    code = "from mikv.cli import app; app(prog_name='mikv')"
    return subprocess.run(
        [sys.executable, "-c", code], env=os.environ | environment, capture_output=True, text=True, check=True
    ).stdout


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_knows_the_commands(shell):
    words = complete(shell, "mikv qua")
    assert "quantize" in words
    assert "generate" not in words


def test_completion_can_be_installed(mikv):
    assert "--install-completion" in mikv("--help").stdout


@pytest.mark.parametrize("encoding", ["ascii", "latin-1", "utf-8"])
@pytest.mark.parametrize(
    "arguments", [("info",), ("--help",), ("eval", "--help"), ("generate", "hi", "--preset", "\u2026")]
)
def test_output_degrades_where_its_encoding_ends(arguments, encoding):
    code = f"import sys; from mikv.cli import main; sys.argv = {['mikv', *arguments]!r}; main()"
    environment = os.environ | {"PYTHONIOENCODING": encoding, "PYTHONUTF8": "0"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, capture_output=True, timeout=120)
    assert done.returncode in (0, 2)
    assert b"Traceback" not in done.stderr
    assert (done.stdout + done.stderr).decode(encoding)


def test_an_error_that_nobody_expected_is_one_line(mikv, tiny_folder, monkeypatch):
    def fail(*_, **__):
        raise RuntimeError("out of \x1b]0;memory")

    monkeypatch.setattr("mikv.cli.answer.answer", fail)
    result = mikv("generate", "hi", "-m", tiny_folder)
    assert result.exit_code == 1
    [line] = [line for line in result.stderr.splitlines() if line.startswith("error: ")]
    assert line.startswith(r"error: RuntimeError: out of \x1b]0;memory; with MIKV_TRACEBACK=1")
    monkeypatch.setenv("MIKV_TRACEBACK", "1")
    assert isinstance(mikv("generate", "hi", "-m", tiny_folder).exception, RuntimeError)


def run_script(*arguments, folder):
    code = f"import sys; from mikv.cli import main; sys.argv = {['mikv', *map(str, arguments)]!r}; main()"
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, timeout=120, cwd=folder)


def test_the_console_script_reports_errors_in_one_line_without_traceback(tmp_path):
    done = run_script("generate", "hi", "--model", "./nowhere", folder=tmp_path)
    assert (done.returncode, done.stdout) == (2, "")
    assert (
        done.stderr
        == "error: ./nowhere does not exist; pass smollm2, a folder, a .gguf file or a hub id (owner/name)\n"
    )


def test_the_console_script_prints_the_answer_and_one_summary_line(tmp_path, tiny_folder):
    done = run_script("generate", "hi", "--model", tiny_folder, "--max-new-tokens", 3, folder=tmp_path)
    assert done.returncode == 0
    [summary] = done.stderr.splitlines()
    assert "3 new at" in summary
