"""Numbers that no command can use end as one error that names the option, before any model is loaded."""

import pytest

NUMBERS = ("nan", "inf", "-inf", "-1", "1e30", "-1e30", str(10**30), "x", "", "9" * 5000)


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize("option", ["--budget", "--temperature", "--seed", "--max-new-tokens"])
@pytest.mark.parametrize("command", ["generate", "chat"])
def test_answers_refuse_numbers_that_cannot_be(mikv, tiny_folder, command, option, number):
    prompt = ("hi",) if command == "generate" else ()
    result = mikv(command, *prompt, "--model", tiny_folder, f"{option}={number}", stdin="")
    assert result.exit_code == 2, result.output
    assert option in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("number", NUMBERS)
@pytest.mark.parametrize(
    "option", ["--batch", "--context", "--gpus", "--watts", "--weights", "--cache", "--group-size", "--efficiency"]
)
def test_plans_refuse_numbers_that_cannot_be(mikv, option, number):
    value = f"lut={number}" if option == "--efficiency" else number
    hardware = ("--hardware", "h100", *(("--weights", "bcq3") if option == "--group-size" else ()))
    result = mikv("plan", "llama-3-8b", *hardware, f"{option}={value}")
    assert result.exit_code == 2, result.output
    assert option in result.stderr
    assert "Traceback" not in result.output


@pytest.mark.parametrize("number", NUMBERS)
def test_a_check_refuses_minutes_that_cannot_be(mikv, number):
    result = mikv("check", f"--minutes={number}")
    assert result.exit_code == 2, result.output
    assert "--minutes" in result.stderr
