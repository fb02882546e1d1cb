from __future__ import annotations

import dataclasses
import re
import traceback
from typing import Any

import pytest
import torch
from torch import nn

import onlinequant_backend as oq
from onlinequant_backend import errors
from onlinequant_backend.config import QuantConfig

DEFAULTS = {
    "quantized_conv_percentage": 100,
    "quantized_linear_percentage": 100,
    "quantized_attention_percentage": 100,
    "conv_compute_density_threshold": None,
    "linear_compute_density_threshold": None,
    "precision": "auto",
    "calibration_steps": 20,
    "calibration_method": "mse",
    "exclude": [],
    "sensitivity": "gradient",
    "selection": "auto",
    "shapes": "auto",
    "max_error": None,
    "drift_check_every": 64,
    "compile_in_background": False,
    "regional_compilation": "auto",
    "float_weights": "auto",
    "free_float_weights": False,
    "save_weights": False,
    "cache_dir": None,
    "cache_size_limit": 20,
    "lock_timeout": 600,
    "cuda_graphs": "auto",
    "inductor": {},
    "mode": None,
}
OTHER_VALUES = {
    "quantized_conv_percentage": 99.5,
    "quantized_linear_percentage": 0,
    "quantized_attention_percentage": 0,
    "conv_compute_density_threshold": 0,
    "linear_compute_density_threshold": 301,
    "precision": "float",
    "calibration_steps": 1,
    "calibration_method": "minmax",
    "exclude": ("conv_in",),
    "sensitivity": "end_to_end",
    "selection": "density",
    "shapes": "static",
    "max_error": 0.1,
    "drift_check_every": 0,
    "float_weights": "host",
    "free_float_weights": True,
    "save_weights": True,
    "cache_dir": "/somewhere/else",
    "cache_size_limit": 0,
    "lock_timeout": 1.5,
    "cuda_graphs": False,
    "compile_in_background": True,
    "regional_compilation": True,
    "inductor": {"max_autotune": True},
    "mode": "max-autotune",
}
PERCENTAGES = [f"quantized_{kind}_percentage" for kind in ("conv", "linear")]
THRESHOLDS = [f"{kind}_compute_density_threshold" for kind in ("conv", "linear")]
NAN, INF = float("nan"), float("inf")
# Too large for a float, and too long to be written.
HUGE = (10**400, 10**5000)


def test_defaults() -> None:
    assert QuantConfig().to_dict() == DEFAULTS
    assert QuantConfig.from_options(None) == QuantConfig.from_options({}) == QuantConfig()


@pytest.mark.parametrize(
    ("option", "values", "error", "allowed"),
    [
        *(
            (name, [-1, 100.5, NAN, "50", True, None, *HUGE], errors.InvalidPercentageError, "[0, 100]")
            for name in PERCENTAGES
        ),
        *(
            (name, [-0.1, INF, NAN, "high", True, *HUGE], errors.InvalidThresholdError, "[0, inf)")
            for name in THRESHOLDS
        ),
        ("precision", ["int4", "INT8", 8, None, *HUGE], errors.UnknownPrecisionError, "'auto', 'int8', 'fp8', 'float'"),
        ("calibration_steps", [0, -3, 2.0, True, "20", *HUGE], errors.InvalidCalibrationStepsError, "at least 1"),
        ("calibration_method", ["entropy", None, ["mse"]], errors.InvalidOptionError, "'mse', 'percentile', 'minmax'"),
        ("max_error", [-0.1, INF, NAN, "low", True, *HUGE], errors.InvalidOptionError, "[0, inf)"),
        ("drift_check_every", [-1, 2.0, True, None, "64", *HUGE], errors.InvalidOptionError, "0 for never"),
        ("sensitivity", ["global", None], errors.InvalidOptionError, "'gradient', 'local', 'end_to_end'"),
        ("cuda_graphs", ["on", 1, 0, None], errors.InvalidOptionError, "'auto', True, False"),
        ("regional_compilation", ["on", 1, 0, None], errors.InvalidOptionError, "'auto', True, False"),
        ("shapes", ["any", True, None], errors.InvalidOptionError, "'auto', 'static', 'dynamic'"),
        ("compile_in_background", ["yes", 1, None], errors.InvalidOptionError, "True, False"),
        ("free_float_weights", ["yes", 1, None], errors.InvalidOptionError, "True, False"),
        ("save_weights", ["yes", 1, None], errors.InvalidOptionError, "True, False"),
        ("cache_size_limit", [-1, INF, NAN, "20", True, None, *HUGE], errors.InvalidOptionError, "[0, inf)"),
        ("lock_timeout", [-1, INF, NAN, "20", True, None, *HUGE], errors.InvalidOptionError, "[0, inf)"),
        ("exclude", ["conv_in", None, {"a"}], errors.InvalidOptionError, "tuple of glob patterns"),
        ("exclude", [("a", 1), (None,), HUGE], errors.InvalidOptionError, "must be a string"),
        ("cache_dir", ["", "a\0b", 5, *HUGE], errors.InvalidOptionError, "a directory's path, or None"),
        ("inductor", [None, "max_autotune", [("max_autotune", True)]], errors.InvalidOptionError, "a dict"),
        (
            "inductor",
            [{"max_autotoon": True}, {1: 2}, {HUGE[1]: 2}],
            errors.UnknownOptionError,
            "torch._inductor.list_options()",
        ),
        ("inductor", [{"max-autotune": 3}, {"max_autotune": "yes"}], errors.InvalidOptionError, "must be of type bool"),
        ("inductor", [{"cpp.threads": "2"}, {"cpp.threads": None}], errors.InvalidOptionError, "must be of type int"),
        (
            "mode",
            ["fast", 3, ["default"], 0, False, "", [], {}, *HUGE],
            errors.InvalidOptionError,
            "torch.compile does not know",
        ),
    ],
)
def test_wrong_value_names_the_option_and_what_is_allowed(
    option: str, values: list[Any], error: type[Exception], allowed: str
) -> None:
    for value in values:
        with pytest.raises(errors.OnlineQuantError, match=re.escape(allowed)) as raised:
            QuantConfig.from_options({option: value})
        assert type(raised.value) is error
        assert option in str(raised.value).lower()


@pytest.mark.parametrize(
    ("option", "value"),
    [
        *((name, value) for name in PERCENTAGES for value in (0, 33.3, 100)),
        *((name, value) for name in THRESHOLDS for value in (None, 0, 0.5, 1e9)),
        *(("precision", value) for value in ("auto", "int8", "fp8", "float")),
        *(("cuda_graphs", value) for value in ("auto", True, False)),
        *(("mode", value) for value in (None, "default", "reduce-overhead", "max-autotune-no-cudagraphs")),
        ("calibration_steps", 1),
        ("exclude", ["a", "b.*"]),
        ("inductor", {"max_autotune": True, "cpp.threads": 2, "triton.cudagraphs": False}),
        ("inductor", {"post_grad_custom_pre_pass": None, "cpp.min_chunk_size": 1}),
        ("cache_dir", "relative/path"),
    ],
)
def test_allowed_values(option: str, value: Any) -> None:
    assert QuantConfig.from_options({option: value}).to_dict()[option] == value


@pytest.mark.parametrize(
    ("wrong", "meant"),
    [("quantized_conv_percent", "quantized_conv_percentage"), ("steps_of_calibration", None), ("max_autotune", None)],
)
def test_unknown_option_lists_the_known_ones(wrong: str, meant: str | None) -> None:
    with pytest.raises(errors.UnknownOptionError) as raised:
        QuantConfig.from_options({wrong: 1})
    message = str(raised.value)
    assert message.startswith(f"Unknown option {wrong!r}.")
    assert all(name in message for name in DEFAULTS)
    assert "options={'inductor': {...}}" in message
    assert (f"Did you mean {meant!r}?" in message) is (meant is not None)


def test_option_whose_name_is_no_text_is_unknown() -> None:
    options: list[Any] = [{1: 1}, {None: 1}, {HUGE[1]: 1}]
    for given in options:
        with pytest.raises(errors.UnknownOptionError, match="Unknown option"):
            QuantConfig.from_options(given)


def test_a_long_value_is_cut_in_the_message() -> None:
    with pytest.raises(errors.InvalidOptionError) as raised:
        QuantConfig.from_options({"cache_dir": list(range(10**5))})
    assert len(str(raised.value)) < 300


def within_another(*arguments: Any, **options: Any) -> Any:
    return oq.onlinequant(*arguments, **options)


@pytest.mark.parametrize("backend", [oq.onlinequant, "onlinequant", within_another])
def test_mistake_reaches_the_user_of_torch_compile_as_it_is(backend: Any) -> None:
    compiled = torch.compile(nn.Linear(2, 2), backend=backend, options={"precison": "int8"})
    with pytest.raises(errors.UnknownOptionError, match="Did you mean 'precision'") as raised:
        compiled(torch.ones(1, 2))
    assert type(raised.value) is errors.UnknownOptionError and "TORCHDYNAMO_VERBOSE" not in str(raised.value)
    shown = "".join(traceback.format_exception(raised.value))
    assert "onlinequant_backend.errors.UnknownOptionError: Unknown option" in shown
    assert "BackendCompilerFailed" not in shown and "another exception" not in shown


def test_mode_is_that_of_torch_compile_unless_given_as_an_option() -> None:
    assert QuantConfig.from_options({}, "max-autotune").mode == "max-autotune"
    assert QuantConfig.from_options({"mode": "default"}, "max-autotune").mode == "default"


def test_inductor_options_come_after_those_of_the_mode() -> None:
    config = QuantConfig(mode="max-autotune-no-cudagraphs", inductor={"max-autotune": False, "freezing": True})
    assert config.inductor == {"max_autotune": False, "freezing": True}
    options = config.inductor_options()
    assert (options["max_autotune"], options["freezing"], options["coordinate_descent_tuning"]) == (False, True, True)
    assert QuantConfig().inductor_options() == {}


def test_cache_key_changes_with_every_option_but_the_place() -> None:
    assert OTHER_VALUES.keys() == DEFAULTS.keys() == {field.name for field in dataclasses.fields(QuantConfig)}
    keys = {name: QuantConfig.from_options({name: value}).cache_key() for name, value in OTHER_VALUES.items()}
    default = QuantConfig().cache_key()
    for name in (
        "cache_dir",
        "cache_size_limit",
        "compile_in_background",
        "drift_check_every",
        "float_weights",
        "lock_timeout",
        "save_weights",
    ):
        assert keys.pop(name) == default
    assert len({default, *keys.values()}) == len(keys) + 1


def test_cache_key_depends_on_values_alone() -> None:
    one = QuantConfig(inductor={"max_autotune": True, "freezing": False}, exclude=("a", "b"))
    other = QuantConfig.from_options({"exclude": ["a", "b"], "inductor": {"freezing": False, "max-autotune": True}})
    assert one.cache_key() == other.cache_key() == one.cache_key()
    assert re.fullmatch("[0-9a-f]{64}", one.cache_key())


def test_config_cannot_be_changed() -> None:
    given = {"max_autotune": True}
    config = QuantConfig(inductor=given)
    with pytest.raises(dataclasses.FrozenInstanceError):
        config.precision = "float"  # type: ignore[misc]
    given["max_autotune"] = False
    assert config.inductor == {"max_autotune": True}
