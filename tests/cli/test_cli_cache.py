"""The commands that show, clear and move what is in the cache."""

from __future__ import annotations

from pathlib import Path

import pytest

from onlinequant_backend.cache import atomic_files
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cli import commands
from onlinequant_backend.report.report import Report
from tests.helpers.calibrations import CALIBRATION, KEY, STATS


@pytest.fixture
def root(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A cache with one entry and one folder of compiled code."""
    root = tmp_path.resolve() / "cache"
    store = Cache.open(str(root))
    store.publish(KEY, CALIBRATION, STATS)
    folder = store.inductor_directory(KEY)
    assert folder is not None
    (folder / "code.cpp").write_bytes(bytes(10**6))
    return root


def test_stats_lists_the_cache(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    assert commands.main(["stats", "--cache-dir", str(root)]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "aaaa-bbbb-cccc-dddd UNet2DConditionModel 1 of 2" in out and "just now" in out
    assert f"1 calibration in {root}" in out


def test_stats_of_an_empty_cache_makes_no_folder(capsys: pytest.CaptureFixture[str], tmp_path: Path) -> None:
    assert commands.main(["stats", "--cache-dir", str(tmp_path / "absent")]) == 0
    assert "There is no calibration in" in capsys.readouterr().out
    assert not (tmp_path / "absent").exists()


def test_stats_looks_where_the_environment_says(
    capsys: pytest.CaptureFixture[str], root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", str(root))
    assert commands.main(["stats"]) == 0
    assert "UNet2DConditionModel" in capsys.readouterr().out


def test_stats_of_the_caches_folder_prints_every_layer(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    Report("Whole", key=KEY).save(tmp_path / "stats.json")
    Cache.open(str(root)).publish(KEY, CALIBRATION, (tmp_path / "stats.json").read_text(encoding="utf-8"))
    assert commands.main(["stats", str(root)]) == 0
    assert "Whole" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("options", "removed", "left"),
    [
        ([], "1 calibration, 1 Inductor cache; 1.0 MB in all", 0),
        (["--older-than", "1"], "nothing", 2),
        (["--older-than", "0"], "1 calibration, 1 Inductor cache", 0),
        (["--max-size", "0.5"], "nothing", 2),
        (["--max-size", "0"], "1 calibration, 1 Inductor cache; 1.0 MB in all", 0),
    ],
)
def test_clear_removes_what_it_is_told_to(
    capsys: pytest.CaptureFixture[str], root: Path, options: list[str], removed: str, left: int
) -> None:
    assert commands.main(["clear", *options, "--cache-dir", str(root)]) == 0
    assert f"Removed from {root}: {removed}" in capsys.readouterr().out
    assert len(list((root / "entries").iterdir())) + len(list((root / "inductor").iterdir())) == left


def test_clear_says_that_something_is_in_use(capsys: pytest.CaptureFixture[str], root: Path) -> None:
    lock = Cache.open(str(root)).lock(KEY, 0)
    assert lock is not None
    assert commands.main(["clear", "--cache-dir", str(root)]) == 1
    lock.release()
    captured = capsys.readouterr()
    assert "Removed from" in captured.out and "2 could not be removed, because they are in use" in captured.err


def test_a_calibration_is_exported_and_imported(capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path) -> None:
    file, other = tmp_path / "file", tmp_path / "other"
    assert commands.main(["export", "aaaa-bbbb", str(file), "--cache-dir", str(root)]) == 0
    assert f"2 layers of UNet2DConditionModel to {file}" in capsys.readouterr().out
    assert commands.main(["import", str(file), "--cache-dir", str(other)]) == 0
    assert f"2 layers of UNet2DConditionModel into {other.resolve()}" in capsys.readouterr().out
    loaded = Cache.open(str(other)).load(KEY)
    assert loaded is not None and loaded.to_bytes(KEY) == CALIBRATION.to_bytes(KEY)


def test_stats_of_an_exported_calibration_says_what_it_is(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    file = tmp_path / "a file"
    commands.main(["export", "aaaa", str(file), "--cache-dir", str(root)])
    capsys.readouterr()
    assert commands.main(["stats", str(file)]) == 0
    captured = capsys.readouterr()
    assert captured.err == ""
    assert f"{file} is a calibration of 2 layers of UNet2DConditionModel, observed in 20 calls" in captured.out
    assert f"`onlinequant import '{file}'` takes it into the cache" in captured.out
    assert all(f"\n  {name}: {value}" in captured.out for name, value in CALIBRATION.about.items())


def test_a_cache_of_imported_calibrations_is_not_said_to_have_statistics(
    capsys: pytest.CaptureFixture[str], root: Path, tmp_path: Path
) -> None:
    commands.main(["stats", "--cache-dir", str(root)])
    assert f"`onlinequant stats {root}` prints every layer" in capsys.readouterr().out
    commands.main(["export", "aaaa", str(tmp_path / "file"), "--cache-dir", str(root)])
    commands.main(["import", str(tmp_path / "file"), "--cache-dir", str(tmp_path / "other")])
    capsys.readouterr()
    assert commands.main(["stats", "--cache-dir", str(tmp_path / "other")]) == 0
    out = capsys.readouterr().out
    assert "imported, 2 layers" in out
    assert out.endswith(f"1 calibration in {tmp_path / 'other'}.\n")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [(["export", "ffff", "file"], "begins with 'ffff'"), (["import", "absent"], "Cannot read 'absent'")],
)
def test_mistakes_are_named_and_end_with_2(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str], message: str
) -> None:
    assert commands.main([*arguments, "--cache-dir", str(root)]) == 2
    captured = capsys.readouterr()
    assert captured.out == "" and captured.err.startswith("onlinequant: ") and message in captured.err


COMMANDS = [["stats"], ["clear"], ["export", "a", "file"], ["import", "file"]]


@pytest.mark.parametrize("arguments", COMMANDS)
def test_no_command_touches_a_cache_that_is_not_safe(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str]
) -> None:
    root.chmod(0o777)
    assert commands.main([*arguments, "--cache-dir", str(root)]) == 2
    assert f"chmod 700 {root}" in capsys.readouterr().err
    root.chmod(0o700)
    assert atomic_files.directory_size(root) > 10**6


@pytest.mark.parametrize("arguments", COMMANDS)
def test_without_a_cache_every_command_says_so(
    capsys: pytest.CaptureFixture[str], root: Path, arguments: list[str]
) -> None:
    assert commands.main([*arguments, "--cache-dir", "~nobody-of-this-name/cache"]) == 2
    assert "name one with --cache-dir" in capsys.readouterr().err
