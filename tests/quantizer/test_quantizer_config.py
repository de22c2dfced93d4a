import re

import pytest

import mikv
from mikv.errors import CheckpointError, ConfigError


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"bits": 0}, "bits=0 must be a whole number from 1 to 8"),
        ({"bits": 9}, "bits=9"),
        ({"bits": 3.0}, "bits=3.0"),
        ({"bits": True}, "bits=True"),
        ({"group_size": 100}, "group_size=100 is not a multiple of 32"),
        ({"group_size": 0}, "group_size=0"),
        ({"method": "best"}, "method='best' is not one of auto, rtn"),
        ({"quantize_embeddings": "yes"}, "quantize_embeddings='yes' must be True or False"),
        ({"modules_to_not_convert": "lm_head"}, "must be a list of names"),
        ({"module_settings": {"a": 4}}, "must map layers to settings"),
        ({"module_settings": {"a": {"bit": 4}}}, "module_settings of 'a': unknown setting 'bit'"),
        ({"module_settings": {"a": {"bits": 12}}}, "module_settings of 'a': bits=12"),
        ({"nested_bits": (3,), "bits": 4}, "what can be nested is nested_bits=(2, 3) in bits=4"),
        ({"nested_bits": (2,), "bits": 3}, "what can be nested"),
        ({"nested_bits": 2, "bits": 4}, "must be a list"),
        ({"nested_bits": (2, 3), "method": "gptq"}, "cannot find nested weights"),
        ({"nested_bits": (2, 3), "module_settings": {"a": {"bits": 2}}}, "cannot be combined"),
    ],
)
def test_a_value_that_cannot_work_is_refused_by_name(settings: dict[str, object], message: str) -> None:
    with pytest.raises(ConfigError, match=re.escape(message)):
        mikv.BCQConfig(**settings)


def test_settings_survive_a_file() -> None:
    config = mikv.BCQConfig(bits=3, group_size=None, method="rtn", module_settings={"a.b": {"bits": 4}})
    again = mikv.BCQConfig.from_dict(config.to_dict())
    assert again == config
    assert again.of_module("a.b").bits == 4
    assert again.of_module("a.c").bits == 3
    assert again.of_module("a.b").uniform


def test_an_unknown_setting_of_a_file_is_named() -> None:
    with pytest.raises(ConfigError, match="unknown setting 'groupsize'; the settings are bits"):
        mikv.BCQConfig.from_dict({"quant_method": "mikv_bcq", "groupsize": 64})


def test_a_newer_format_is_refused_whatever_else_it_says() -> None:
    with pytest.raises(CheckpointError, match="format 3, this mikv reads up to 2; update mikv"):
        mikv.BCQConfig.from_dict({"quant_method": "mikv_bcq", "format": 3, "of_the_future": 1})


@pytest.mark.parametrize("value", ["1", 0, None, True])
def test_a_format_that_is_no_version_is_refused(value: object) -> None:
    with pytest.raises(CheckpointError, match="not a version number"):
        mikv.BCQConfig.from_dict({"format": value})


def test_auto_is_the_best_method_that_there_is_data_for() -> None:
    assert mikv.BCQConfig().resolved_method(calibrated=True) == "refined"
    assert mikv.BCQConfig().resolved_method(calibrated=False) == "offset"
    assert mikv.BCQConfig(nested_bits=(2, 3)).resolved_method(calibrated=True) == "refined"
    with pytest.raises(ConfigError, match=r"'gptq' needs calibration.*mikv.quantize"):
        mikv.BCQConfig(method="gptq").resolved_method(calibrated=False)
