from __future__ import annotations

import dataclasses
import json
import math
import os
import threading
from pathlib import Path
from typing import Any

import pytest

import onlinequant_backend as oq
from onlinequant_backend.cache.calibration_file import STATS_FILE
from onlinequant_backend.errors import StatsFileError
from onlinequant_backend.report import report
from onlinequant_backend.report.decision import DECISION_TYPES, NodeDecision
from onlinequant_backend.report.report import CANDIDATE, SCHEMA_VERSION, Report
from tests.helpers.reports import decision, made


def test_a_decision_without_a_reason_is_refused() -> None:
    with pytest.raises(ValueError, match=r"down_blocks\.0\.resnets\.0\.conv1 has no reason"):
        decision(reason="")


def test_a_decision_of_an_unknown_kind_is_refused() -> None:
    with pytest.raises(ValueError, match="embedding"):
        decision(kind="embedding")


def test_counts_are_by_kind() -> None:
    assert made().counts() == {
        "quantized_conv": 1,
        "candidates_conv": 2,
        "quantized_linear": 0,
        "candidates_linear": 3,
        "quantized_attention": 0,
        "candidates_attention": 0,
    }


def test_the_summary_says_how_many_layers_or_why_none() -> None:
    assert made().summary() == "UNet2DConditionModel: quantized: 1 of 5 layers in int8"
    assert made(phase="float", phase_reason="why").summary() == "UNet2DConditionModel: float: why"


def test_a_layer_is_in_8_bit_only_while_the_model_is() -> None:
    decisions = [decision(reason=CANDIDATE), decision(quantized=False), decision(kind="linear", reason=CANDIDATE)]
    chosen = [dataclasses.replace(each, reason="selected") for each in decisions]
    for phase, known, standing, headline in (
        ("calibrating", decisions, "candidate", "1 of 2 conv, 1 of 1 linear layers may go into 8 bit"),
        ("compiling", decisions, "candidate", "1 of 2 conv, 1 of 1 linear layers may go into 8 bit"),
        ("compiling", chosen, "chosen", "1 of 2 conv, 1 of 1 linear layers go into 8 bit"),
        ("quantized", chosen, "8 bit", "1 of 2 conv, 1 of 1 linear layers in 8 bit"),
        ("float", chosen, "float", "0 of 2 conv, 0 of 1 linear layers in 8 bit"),
    ):
        report = made(phase=phase, decisions=known)
        assert list(map(report.standing, known)) == [standing, "float", standing]
        assert report.headline() == headline and headline in report.table()
        assert ("8 bit " in report.table().partition("reason")[2]) == (phase == "quantized")


def test_while_it_observes_it_says_how_far_it_is() -> None:
    assert made(phase="calibrating", calls_observed=4).summary() == "UNet2DConditionModel: observed 4 of 20 steps"


def test_a_saved_report_comes_back_as_it_was(tmp_path: Path) -> None:
    original = made()
    original.save(tmp_path / "new folder" / STATS_FILE)
    assert original.stats_path == str(tmp_path / "new folder" / STATS_FILE)
    assert Report.load(original.stats_path) == original


def test_the_file_has_the_predecessors_names(tmp_path: Path) -> None:
    made().save(tmp_path / "stats.json")
    data = json.loads((tmp_path / "stats.json").read_text(encoding="utf-8"))
    assert data["schema_version"] == SCHEMA_VERSION and data["key"] == "00ff"
    assert data["counts"] == made().counts()
    assert data["decisions"][0]["compute_density"] == 1379.4
    assert (data["decisions"][0]["mae"], data["decisions"][0]["mse"]) == (0.004, 0.00002)
    assert data["decisions"][1]["mae"] is None and "density" not in data["decisions"][1]


def test_numbers_that_json_lacks_are_written_as_null(tmp_path: Path) -> None:
    Report("model", decisions=[decision(sensitivity=float("inf"), mae=float("nan"))]).save(tmp_path / "stats.json")
    loaded = Report.load(tmp_path / "stats.json").decisions[0]
    assert loaded.sensitivity is None and loaded.mae is None and loaded.mse == 0.00002


def test_options_that_json_lacks_do_not_stop_saving(tmp_path: Path) -> None:
    made(config={"inductor": {"hook": print}}).save(tmp_path / "stats.json")
    assert "built-in function print" in Report.load(tmp_path / "stats.json").config["inductor"]["hook"]


def test_a_missing_file_says_how_to_get_one(tmp_path: Path) -> None:
    with pytest.raises(StatsFileError, match=r"absent\.json.*No such file.*stats_path"):
        Report.load(tmp_path / "absent.json")


def test_a_file_of_bytes_that_are_no_text_is_named(tmp_path: Path) -> None:
    (tmp_path / "stats.json").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(StatsFileError, match=r"stats\.json"):
        Report.load(tmp_path / "stats.json")


@pytest.mark.parametrize(
    "text",
    ["", "{", "[]", "3", '{"schema_version": 3}', "{}", "[" * 200_000, '{"a":' * 200_000, "9" * 5000, '"\\ud800"'],
    ids=range(10),
)
def test_a_file_that_is_no_statistics_is_refused(tmp_path: Path, text: str) -> None:
    (tmp_path / "stats.json").write_text(text)
    with pytest.raises(StatsFileError, match="If onlinequant wrote it, delete it and run the model again"):
        Report.load(tmp_path / "stats.json")


@pytest.mark.parametrize(("name", "depth"), [("decisions", 500), ("config", 500), ("model", 500), ("key", 900)])
def test_deeply_nested_values_are_refused_or_kept(tmp_path: Path, name: str, depth: int) -> None:
    nested: Any = []
    for _ in range(depth):
        nested = [nested]
    with pytest.raises(StatsFileError):
        Report.load(written(tmp_path, {**made().to_dict(), name: nested}))


@pytest.mark.parametrize("name", [*report._REPORT_TYPES])
def test_a_report_with_a_wrong_or_missing_field_is_refused(tmp_path: Path, name: str) -> None:
    data = made().to_dict()
    with pytest.raises(StatsFileError, match=name):
        Report.load(written(tmp_path, {**data, name: 1 if name == "decisions" else []}))
    del data[name]
    with pytest.raises(StatsFileError, match=name):
        Report.load(written(tmp_path, data))


@pytest.mark.parametrize(
    ("name", "value"),
    [("widened", {"conv": "2"}), ("widened", {"conv": math.inf}), ("config", {"exclude": 3})],
)
def test_a_report_whose_table_could_not_be_printed_is_refused(tmp_path: Path, name: str, value: Any) -> None:
    with pytest.raises(StatsFileError, match=r"conv|exclude"):
        Report.load(written(tmp_path, {**made().to_dict(), name: value}))


def test_what_is_no_regular_file_is_neither_read_nor_replaced(tmp_path: Path) -> None:
    pipe = tmp_path / "pipe"
    os.mkfifo(pipe)
    with pytest.raises(StatsFileError, match="no regular file"):
        Report.load(pipe)
    with pytest.raises(OSError, match="no regular file"):
        made().save(pipe)
    assert pipe.is_fifo()


@pytest.mark.parametrize("name", [*DECISION_TYPES])
def test_a_decision_with_a_wrong_or_missing_field_is_refused(tmp_path: Path, name: str) -> None:
    data = made().to_dict()
    data["decisions"][1][name] = {}
    with pytest.raises(StatsFileError, match=f"'{name}' of decision 1"):
        Report.load(written(tmp_path, data))
    del data["decisions"][1][name]
    with pytest.raises(StatsFileError, match=f"decision 1 has no '{name}'"):
        Report.load(written(tmp_path, data))


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"reason": ""}, "has no reason"),
        ({"kind": "embedding"}, "embedding"),
        ({"shape": [1, "2"]}, "shape of decision 0"),
        ({"flops": True}, "'flops' of decision 0 is True"),
        ({"compute_density": 10**400}, "'compute_density' of decision 0 is too large"),
    ],
)
def test_a_decision_with_a_value_that_cannot_be_is_refused(
    tmp_path: Path, changes: dict[str, Any], message: str
) -> None:
    data = made().to_dict()
    data["decisions"][0].update(changes)
    with pytest.raises(StatsFileError, match=message):
        Report.load(written(tmp_path, data))


def written(folder: Path, data: Any) -> Path:
    path = folder / "stats.json"
    path.write_text(json.dumps(data))
    return path


def test_the_table_sums_up_and_lists_every_layer() -> None:
    text = made().table()
    assert "quantized: 8-bit layers compiled by Inductor" in text
    assert "int8: this CPU has avx512_vnni" in text
    assert "1 of 2 conv, 0 of 3 linear" in text
    for one in made().decisions:
        assert one.name in text
    assert "2x320x128x128" in text and "1379" in text and "0.0123" in text
    assert max(map(len, text.splitlines())) <= 120


@pytest.mark.parametrize(("kind", "whose"), [("local", "the layer's"), ("gradient", "the model's")])
def test_short_titles_are_explained(kind: str, whose: str) -> None:
    text = made(sensitivity_kind=kind).table()
    assert f"sens.        sensitivity: the relative error of {whose} output if this layer runs in 8 bit" in text
    assert "FLOP/B       compute density: floating-point operations per byte moved" in text
    unmeasured = made(decisions=[decision(sensitivity=None)]).table()
    assert "sensitivity:" not in unmeasured and "compute density:" in unmeasured


def test_the_path_of_the_statistics_is_in_one_piece(tmp_path: Path) -> None:
    path = tmp_path / ("deep/" * 30) / "stats.json"
    path.parent.mkdir(parents=True)
    report = made()
    report.save(path)
    assert f"\nstatistics   {path}\n" in report.table()


@pytest.mark.parametrize("precision", ["int8", "fp8", "auto", "float"])
def test_8_bit_that_was_asked_for_by_name_and_not_had_is_a_warning(precision: str) -> None:
    def warnings(*decisions: NodeDecision, phase: str = "float") -> list[str]:
        changes = {"phase": phase, "phase_reason": "too small", "config": {"precision": precision}}
        return made(decisions=[*decisions], **changes).warnings()

    warning = f"precision={precision!r} was asked for, but no layer of this graph is quantized: too small"
    assert warnings(decision(quantized=False)) == ([warning] if precision in ("int8", "fp8") else [])
    assert warnings() == []  # a part of a model without layers
    assert warnings(decision(quantized=False, reason="excluded by '*'")) == []
    assert warnings(decision(quantized=True)) == []  # it could not be compiled, which is said elsewhere
    assert warnings(decision(quantized=False), phase="calibrating") == []


def test_reasons_for_float_are_grouped_whatever_their_numbers() -> None:
    reasons = made().table().partition("why layers stay in float:\n")[2].splitlines()
    assert reasons == [
        "    3  density ... is below the threshold of ...",
        "    1  excluded by 'to_out*'",
    ]


def test_long_names_and_reasons_are_folded_and_not_cut() -> None:
    name = "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_out.0"
    reason = "a reason of many words " * 6 + "to the end"
    text = made(decisions=[decision(name=name, reason=reason)]).table()
    assert max(map(len, text.splitlines())) <= 120
    rows = text.splitlines()
    first = next(index for index, row in enumerate(rows) if row.startswith("down_blocks"))
    assert rows[first].split()[0] == "down_blocks.1.attentions.0."
    assert "".join(row.split(" ")[0] for row in rows[first : first + 2]) == name
    column = rows[first].index("a reason")
    assert " ".join(" ".join(row[column:] for row in rows[first:]).split()) == reason


def test_square_brackets_are_no_markup() -> None:
    assert "x[bold]y" in made(decisions=[decision(name="x[bold]y")]).table()


def test_a_report_without_layers_has_a_table() -> None:
    text = Report("Tiny", phase="float", phase_reason="the graph has no convolution").table()
    assert "float: the graph has no convolution" in text and "why layers stay" not in text


def test_reports_are_listed_newest_last_and_forgotten() -> None:
    report.clear()
    first, second = made(), made()
    report.register(first)
    report.register(second)
    assert [id(one) for one in report.reports()] == [id(first), id(second)]
    report.reports().clear()  # a copy
    assert len(report.reports()) == 2
    report.clear()
    assert report.reports() == []


def test_no_report_yet_is_a_mistake_that_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(report, "_reports", [])
    assert oq.reports() == [] and oq.reports()[:1] == [] and list(oq.reports()) == []
    for index in (-1, 0):
        with pytest.raises(oq.OnlineQuantError, match="There is no report yet") as raised:
            oq.reports()[index]
        assert isinstance(raised.value, IndexError)
    report.register(made())
    assert oq.reports()[-1].model == made().model and oq.reports()[:1] == oq.reports()
    with pytest.raises(IndexError, match="out of range"):
        oq.reports()[5]  # for which Python's own words will do


def test_reports_of_many_threads_all_arrive() -> None:
    report.clear()
    threads = [threading.Thread(target=lambda: [report.register(made()) for _ in range(50)]) for _ in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(report.reports()) == 400


def test_a_report_follows_the_runtime() -> None:
    entry = Report("model")
    entry.phase, entry.calls_observed = "quantized", 3
    entry.decisions = [dataclasses.replace(decision(), quantized=False, reason="late")]
    assert entry.to_dict()["phase"] == "quantized" and entry.to_dict()["decisions"][0]["reason"] == "late"


def test_what_was_observed_in_vain_is_said_when_the_process_ends(caplog: pytest.LogCaptureFixture) -> None:
    report.clear()
    done = {"model": "Done", "calibration_steps": 20}
    for one in (
        Report("Short", phase="calibrating", calls_observed=4, calibration_steps=20),
        Report("Idle", phase="calibrating", calibration_steps=20),
        Report(phase="calibrating", calls_observed=1, **done),
        Report(phase="quantized", calls_observed=20, **done),
    ):
        report.register(one)
    report.say_what_is_lost()
    (message,) = caplog.messages
    assert message.startswith("Short: 4 of 20 calls were observed")
    assert "calibration_steps" in message and "sampling_run" in message
    report.clear()
