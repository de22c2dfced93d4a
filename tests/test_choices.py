"""A mistyped name, wherever one can be given, is refused with the name that was probably meant."""

import pytest

from mikv.cache.config import MiKVConfig
from mikv.cache_names import parse_cache
from mikv.choices import did_you_mean, require_one_of
from mikv.errors import ConfigError
from mikv.integrations.quantizer import BCQConfig
from mikv.lab.grid import Grid
from mikv.lab.tasks import parse_task
from mikv.models import require_dtype
from mikv.plan.cache_formats import parse_cache_format
from mikv.plan.constants import CPU
from mikv.plan.hardware import named_hardware
from mikv.plan.weight_formats import parse_weights


@pytest.mark.parametrize(
    ("ask", "near"),
    [
        (lambda: MiKVConfig.preset("balancd"), "balanced"),
        (lambda: MiKVConfig.preset("SMALL"), "small"),
        (lambda: MiKVConfig.from_dict({"polcy": "far"}), "policy"),
        (lambda: MiKVConfig(high="itn8"), "int8"),
        (lambda: MiKVConfig(policy="windw"), "window"),
        (lambda: parse_cache("mikv:smal"), "small"),
        (lambda: parse_cache("kivi3"), "kivi2"),
        (lambda: BCQConfig(method="gptq_bcq"), "gptq-bcq"),
        (lambda: BCQConfig.from_dict({"group_sise": 32}), "group_size"),
        (lambda: parse_task("paskey"), "passkey"),
        (lambda: parse_task("passkey:lenght=3"), "length"),
        (lambda: parse_task("text:kind=pros"), "prose"),
        (lambda: Grid(transforms=("no-hadamrd",)), "no-hadamard"),
        (lambda: require_dtype("bfloat"), "bfloat16"),
        (lambda: parse_cache_format("balancd"), "balanced"),
        (lambda: parse_weights("fp61", None), "fp16"),
        (lambda: CPU.overridden("lutt=1"), "lut"),
        (lambda: named_hardware("A100_80"), "a100-80"),
    ],
)
def test_the_nearest_name_is_in_the_message(ask, near):
    with pytest.raises(ConfigError) as refused:
        ask()
    meant = str(refused.value).partition("did you mean ")[2].partition("?")[0]
    assert near in meant.split(" or ")


def test_a_name_that_resembles_none_gets_the_list_only():
    assert did_you_mean("zzz", ("small", "balanced")) == ""
    with pytest.raises(ConfigError, match=r"^--layers 'zzz' is not one of small, balanced$"):
        require_one_of("--layers", "zzz", ("small", "balanced"))
    with pytest.raises(ConfigError, match=r"^bits=5 is not one of 1, 2$"):
        require_one_of("bits", 5, (1, 2))


def test_case_does_not_hide_a_name_and_length_costs_nothing():
    assert did_you_mean("LLAMA-3-8B", ("Llama-3-8b",)) == "; did you mean Llama-3-8b?"
    assert did_you_mean("x" * 1_000_000, ("small",)) == ""
