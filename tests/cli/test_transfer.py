from __future__ import annotations

import os
from pathlib import Path

import pytest

from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cli.transfer import export_calibration, import_calibration
from onlinequant_backend.errors import CalibrationFileError
from tests.helpers.calibrations import CALIBRATION, KEY, OTHER_MACHINE, SIBLING, STATS, calibration, content, key


@pytest.fixture
def here(tmp_path: Path) -> Cache:
    return Cache.open(str(tmp_path / "here"))


@pytest.fixture
def there(tmp_path: Path) -> Cache:
    return Cache.open(str(tmp_path / "there"))


def publish(cache: Cache, of: str, calls: int, used: float = 0) -> Path:
    stats = cache.publish(of, calibration(calls=calls), STATS)
    assert stats is not None
    if used:
        os.utime(stats.parent, (used, used))
    return stats.parent


def test_a_calibration_goes_to_another_machine(here: Cache, there: Cache, tmp_path: Path) -> None:
    here.publish(KEY, CALIBRATION, STATS)
    file = tmp_path / "new folder" / "file.safetensors"
    assert content(export_calibration(here, "aaaa-bbbb-cccc-dddd", file)) == content(CALIBRATION)
    imported, made = import_calibration(there, file)
    assert imported == KEY and content(made) == content(CALIBRATION)
    assert content(there.load(OTHER_MACHINE)) == content(CALIBRATION)
    assert there.load(key(weights="0")) is None and not there.has(KEY)


def test_an_imported_calibration_can_be_exported_and_replaced(here: Cache, there: Cache, tmp_path: Path) -> None:
    publish(here, KEY, 1)
    export_calibration(here, KEY, tmp_path / "file")
    import_calibration(there, tmp_path / "file")
    publish(here, KEY, 2)
    export_calibration(here, KEY, tmp_path / "file")
    import_calibration(there, tmp_path / "file")
    assert export_calibration(there, "aaaa", tmp_path / "again").calls == 2
    assert (tmp_path / "again").read_bytes() == (tmp_path / "file").read_bytes()


def test_of_calibrations_that_serve_alike_the_last_used_is_exported(here: Cache, tmp_path: Path) -> None:
    publish(here, KEY, 1, used=10)
    publish(here, SIBLING, 2, used=30)
    publish(here, OTHER_MACHINE, 3, used=20)
    assert export_calibration(here, "a", tmp_path / "file").calls == 2
    assert export_calibration(here, OTHER_MACHINE[:40], tmp_path / "file").calls == 3


def test_a_key_that_is_not_unique_is_refused_with_those_it_may_mean(here: Cache, tmp_path: Path) -> None:
    publish(here, KEY, 1)
    publish(here, key(weights="0"), 2)
    with pytest.raises(CalibrationFileError, match=r"names 2 .*aaaa-0000-cccc-dddd, aaaa-bbbb-cccc-dddd.*more digits"):
        export_calibration(here, "aaaa", tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_key_that_is_not_there_is_refused(here: Cache, tmp_path: Path) -> None:
    with pytest.raises(CalibrationFileError, match=r"begins with 'ffff'. `onlinequant stats` lists"):
        export_calibration(here, "ffff", tmp_path / "file")


def test_a_damaged_entry_is_not_exported(here: Cache, tmp_path: Path) -> None:
    (publish(here, KEY, 1) / "calibration.safetensors").write_bytes(b"")
    with pytest.raises(CalibrationFileError, match="cannot be read: its 0 bytes"):
        export_calibration(here, KEY, tmp_path / "file")
    assert not (tmp_path / "file").exists()


def test_a_file_that_cannot_be_written_is_named(here: Cache, tmp_path: Path) -> None:
    publish(here, KEY, 1)
    (tmp_path / "taken").write_text("")
    with pytest.raises(CalibrationFileError, match=r"Cannot write .*taken.*Choose another"):
        export_calibration(here, KEY, tmp_path / "taken" / "file")


def test_a_device_or_a_pipe_is_not_replaced(here: Cache, tmp_path: Path) -> None:
    here.publish(KEY, CALIBRATION, STATS)
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "link").symlink_to("pipe")
    for name in ("pipe", "link"):
        with pytest.raises(CalibrationFileError, match=r"it exists and is no regular file.*Choose another file"):
            export_calibration(here, KEY, tmp_path / name)
    assert (tmp_path / "pipe").is_fifo() and (tmp_path / "link").is_symlink()


def test_what_does_not_fit_is_not_imported_and_says_why(there: Cache, tmp_path: Path) -> None:
    good = CALIBRATION.to_bytes(KEY)
    for data, why in (
        (b"", "0 bytes are no safetensors file"),
        (good[:-1], "bytes instead of"),
        (good.replace(b'"version":"4"', b'"version":"7"'), "its version is '7'; this onlinequant reads '4'"),
        (good.replace(b"UNet2D", b"UNet3D"), "its checksum is wrong"),
    ):
        (tmp_path / "file").write_bytes(data)
        with pytest.raises(CalibrationFileError, match=f"is refused: .*{why}"):
            import_calibration(there, tmp_path / "file")
    assert there.root is not None and not there.root.exists()


def test_a_file_that_cannot_be_read_is_named(there: Cache, tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe")
    (tmp_path / "loop").symlink_to("loop")
    for name, why in (("absent", "No such file"), ("pipe", "no regular file"), ("loop", "loop"), (".", "regular")):
        with pytest.raises(CalibrationFileError, match=why):
            import_calibration(there, tmp_path / name)


def test_a_link_to_a_file_may_be_imported(there: Cache, tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CALIBRATION.to_bytes(KEY))
    (tmp_path / "link").symlink_to("file")
    assert import_calibration(there, tmp_path / "link")[0] == KEY


def test_without_a_cache_nothing_is_imported(tmp_path: Path) -> None:
    (tmp_path / "file").write_bytes(CALIBRATION.to_bytes(KEY))
    with pytest.raises(CalibrationFileError, match="there is no cache directory"):
        import_calibration(Cache(None, 1), tmp_path / "file")
    with pytest.raises(CalibrationFileError, match="Cannot write to the cache"):
        import_calibration(Cache.open(str(tmp_path / "file")), tmp_path / "file")


def test_an_empty_key_names_nothing(here: Cache, tmp_path: Path) -> None:
    publish(here, KEY, 1)
    with pytest.raises(CalibrationFileError, match=r"No key in .* begins with ''"):
        export_calibration(here, "", tmp_path / "file")
    assert not (tmp_path / "file").exists()
