from __future__ import annotations

import os
import shutil
import stat
import time
from pathlib import Path

import platformdirs
import pytest

from onlinequant_backend.cache import atomic_files, cache_store, locks
from onlinequant_backend.cache.cache_store import Cache
from onlinequant_backend.cache.calibration_file import CALIBRATION_FILE, STATS_FILE, Calibration
from onlinequant_backend.cache.eviction import ENTRIES
from onlinequant_backend.errors import InsecureCacheDirectoryError
from tests.helpers import cache_process
from tests.helpers.calibrations import CALIBRATION, KEY, OTHER_MACHINE, SIBLING, STATS, calibration, content, key
from tests.helpers.stores import root as root
from tests.helpers.stores import store as store


@pytest.fixture(autouse=True)
def _as_in_a_new_process(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cache_store, "_in_use", set())


def import_into(root: Path, made: Calibration, of: str = KEY) -> Path:
    return atomic_files.publish_folder(root, "imported", of[:32], {CALIBRATION_FILE: made.to_bytes(of)})


def age(path: Path, days: float) -> None:
    os.utime(path, (time.time() - days * 86400,) * 2)


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "/ours")
    assert cache_store.cache_directory("/option") == Path("/option")


def test_our_variable_wins_over_the_predecessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "/ours")
    monkeypatch.setenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "/predecessor")
    assert cache_store.cache_directory(None) == Path("/ours")


def test_the_predecessors_variable_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "")  # empty counts as unset
    monkeypatch.setenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "~/predecessor")
    assert cache_store.cache_directory(None) == Path.home() / "predecessor"


def test_without_any_setting_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cache_store.ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert cache_store.cache_directory(None) == platformdirs.user_cache_path("onlinequant")


def test_opening_makes_nothing_and_writing_makes_private_folders(root: Path, store: Cache) -> None:
    assert store.root == root and not root.exists()
    assert store.load(KEY) is None and not store.has(KEY) and store.entries() == [] == store.clear()
    assert not root.exists()
    stats = store.publish(KEY, CALIBRATION, STATS)
    assert stats == root / "entries" / KEY / STATS_FILE and stats.read_text(encoding="utf-8") == STATS
    assert stats.with_name(CALIBRATION_FILE).read_bytes() == CALIBRATION.to_bytes(KEY)
    folders = [path for path in (root, *root.rglob("*")) if path.is_dir()]
    assert {stat.S_IMODE(path.stat().st_mode) for path in folders} == {0o700}


def test_what_was_published_is_loaded_and_replaced(store: Cache) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    assert store.has(KEY) and not store.has(SIBLING)
    assert content(store.load(KEY)) == content(CALIBRATION)
    newer = calibration(calls=40)
    assert store.publish(KEY, newer, "{}") is not None
    assert content(store.load(KEY)) == content(newer)


def test_a_calibration_is_replaced_where_there_is_one(root: Path, store: Cache) -> None:
    newer = calibration(calls=40)
    store.update_calibration(KEY, newer)
    assert not root.exists()
    store.publish(KEY, CALIBRATION, STATS, "times")
    store.update_calibration(KEY, newer)
    assert content(store.load(KEY)) == content(newer)
    assert store.load_autotuning(KEY) == "times"
    assert not locks.is_held_here(root / "locks" / f"{KEY[:48]}.lock")


def test_a_calibration_that_another_process_makes_is_not_replaced(root: Path, store: Cache) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    other = cache_process.start("hold", root)
    assert other.stdout is not None and other.stdout.readline() == "held\n"
    store.update_calibration(KEY, calibration(calls=40))
    other.communicate()
    assert content(store.load(KEY)) == content(CALIBRATION)


def test_another_process_finds_it(root: Path, store: Cache) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    assert cache_process.output("publish_and_load", root, 1) == ["published", "hit"]
    loaded = store.load(KEY)
    assert loaded is not None and loaded.calls not in (20, os.getpid())


def test_other_shapes_of_the_model_share_the_newest_calibration(store: Cache) -> None:
    for days, graph in ((3, "1"), (1, "2"), (2, "3")):
        stats = store.publish(key(graph=graph), calibration(calls=days), STATS)
        assert stats is not None
        age(stats.parent, days)
    loaded = store.load(KEY)
    assert loaded is not None and loaded.calls == 1
    assert store.load(OTHER_MACHINE) is None and store.load(key(weights="0")) is None


def test_its_own_entry_comes_first_and_an_imported_one_last(root: Path, store: Cache) -> None:
    import_into(root, calibration(calls=3), of=OTHER_MACHINE)
    loaded = [store.load(KEY)]
    store.publish(SIBLING, calibration(calls=2), STATS)
    loaded.append(store.load(KEY))
    store.publish(KEY, calibration(calls=1), STATS)
    loaded.append(store.load(KEY))
    assert [made and made.calls for made in loaded] == [3, 2, 1]
    assert store.load(key(weights="0")) is None


def test_loading_counts_as_use(root: Path, store: Cache) -> None:
    stats = store.publish(KEY, CALIBRATION, STATS)
    assert stats is not None
    for path in (stats.parent, import_into(root, CALIBRATION, of=key(portable="1"))):
        age(path, 5)
        store.load(key(portable="1") if path.parent.name == "imported" else KEY)
        assert time.time() - path.stat().st_mtime < 60


@pytest.mark.parametrize("wrong", ["", "..", "a" * 63, "a" * 65, "A" * 64, "../" * 21 + "a", KEY + "\n"])
def test_a_key_that_is_none_is_refused(store: Cache, wrong: str) -> None:
    for method in (store.load, store.has, store.inductor_directory):
        with pytest.raises(ValueError, match="64 lower-case hex digits"):
            method(wrong)
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        store.publish(wrong, CALIBRATION, STATS)
    with pytest.raises(ValueError, match="64 lower-case hex digits"):
        store.lock(wrong, 0)


def test_inductors_folder_is_shared_by_checkpoints_and_not_by_machines(root: Path, store: Cache) -> None:
    folder = store.inductor_directory(KEY)
    assert folder == root / "inductor" / ("a" * 16 + "c" * 16)
    assert stat.S_IMODE(folder.stat().st_mode) == 0o700
    assert store.inductor_directory(key(weights="0", graph="0")) == folder
    assert store.inductor_directory(OTHER_MACHINE) not in (folder, None)
    age(folder, 5)
    store.inductor_directory(KEY)
    assert time.time() - folder.stat().st_mtime < 60


def test_publishing_evicts_the_oldest_but_not_what_is_in_use(root: Path) -> None:
    small = Cache.open(str(root), size_limit=0)
    old = small.publish(key(weights="0"), CALIBRATION, STATS)
    used = small.inductor_directory(key(weights="0", machine="0"))
    unused = atomic_files.make_private(root, "inductor", "0" * 32)
    (unused / "code").write_text("code")
    new = small.publish(KEY, CALIBRATION, STATS)
    assert old is not None and used is not None and new is not None
    assert (old.exists(), used.exists(), unused.exists(), new.exists()) == (False, True, False, True)


def test_the_limit_is_in_gigabytes(root: Path) -> None:
    Cache.open(str(root), size_limit=1).publish(SIBLING, CALIBRATION, STATS)
    Cache.open(str(root), size_limit=1).publish(KEY, CALIBRATION, STATS)
    Cache.open(str(root), size_limit=1e-6).publish(OTHER_MACHINE, CALIBRATION, STATS)
    assert [entry.key for entry in Cache.open(str(root)).entries()] == [OTHER_MACHINE]


def test_entries_are_listed_and_cleared(root: Path, store: Cache) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    store.inductor_directory(KEY)
    assert [(entry.key, entry.quantized, entry.layers) for entry in store.entries()] == [(KEY, 1, 2)]
    assert {item.kind for item in store.clear()} == {"entries", "inductor"}
    assert store.load(KEY) is None and store.entries() == []


@pytest.mark.posix
def test_a_directory_that_others_can_write_to_is_refused(root: Path) -> None:
    root.mkdir()
    root.chmod(0o775)
    with pytest.raises(InsecureCacheDirectoryError, match=f"chmod 700 {root}"):
        Cache.open(str(root))
    root.chmod(0o755)
    Cache.open(str(root))


@pytest.mark.posix
def test_a_directory_of_somebody_else_is_refused(root: Path, store: Cache, monkeypatch: pytest.MonkeyPatch) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    monkeypatch.setattr(atomic_files.os, "geteuid", lambda: root.stat().st_uid + 1)
    with pytest.raises(InsecureCacheDirectoryError, match="belongs to the user"):
        Cache.open(str(root))


@pytest.mark.posix
@pytest.mark.parametrize("name", ["entries", "imported", "inductor", "locks", "aside", "temporary", "trash"])
def test_a_part_that_is_a_link_or_open_to_others_is_refused(root: Path, tmp_path: Path, name: str) -> None:
    (tmp_path / "outside").mkdir(mode=0o700)
    root.mkdir(mode=0o700)
    (root / name).symlink_to(tmp_path / "outside")
    with pytest.raises(InsecureCacheDirectoryError, match=f"{root / name}.*is a link"):
        Cache.open(str(root))
    (root / name).unlink()
    (root / name).mkdir()
    (root / name).chmod(0o777)
    with pytest.raises(InsecureCacheDirectoryError, match=f"chmod 700 {root / name}"):
        Cache.open(str(root))


def test_the_directory_itself_may_be_a_link(root: Path, store: Cache, tmp_path: Path) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    (tmp_path / "link").symlink_to(root)
    linked = Cache.open(str(tmp_path / "link"))
    assert linked.root == root and linked.load(KEY) is not None


def test_a_part_that_becomes_a_link_is_not_followed(
    root: Path, store: Cache, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    for name in ("entries", "inductor", "locks"):
        shutil.rmtree(root / name, ignore_errors=True)
        (tmp_path / name).mkdir(mode=0o700)
        (root / name).symlink_to(tmp_path / name)
    assert store.publish(KEY, CALIBRATION, STATS) is None
    assert store.load(KEY) is None and store.inductor_directory(KEY) is None and store.lock(KEY, 0) is None
    assert store.entries() == [] == store.clear()
    assert [list((tmp_path / name).iterdir()) for name in ("entries", "inductor", "locks")] == [[], [], []]
    assert len(caplog.records) == 1 and "is a link" in caplog.text


def test_an_entry_in_a_linked_folder_is_not_read(root: Path, store: Cache, tmp_path: Path) -> None:
    store.publish(KEY, CALIBRATION, STATS)
    (root / "entries").rename(tmp_path / "outside")
    (root / "entries").symlink_to(tmp_path / "outside")
    assert store.load(KEY) is None and (tmp_path / "outside" / KEY).exists()


@pytest.mark.posix
def test_inductors_folder_may_not_be_open_to_others(store: Cache, caplog: pytest.LogCaptureFixture) -> None:
    folder = store.inductor_directory(KEY)
    assert folder is not None
    folder.chmod(0o777)
    assert store.inductor_directory(KEY) is None
    assert f"chmod 700 {folder}" in caplog.text


def test_measured_timings_are_shared_by_checkpoints_on_a_machine(store: Cache) -> None:
    assert store.load_autotuning(KEY) is None
    store.publish(KEY, CALIBRATION, STATS)
    assert store.load_autotuning(KEY) is None
    store.publish(SIBLING, CALIBRATION, STATS, "another")
    store.publish(OTHER_MACHINE, CALIBRATION, STATS, "another machine's")
    assert store.load_autotuning(key(weights="9")) == "another"
    assert store.load_autotuning(KEY) == "another"
    store.publish(KEY, CALIBRATION, STATS, "own")
    assert store.load_autotuning(KEY) == "own"
    assert content(store.load(KEY)) == content(CALIBRATION)
    assert store.load_autotuning(key(portable="8")) is None


def test_timings_that_are_no_text_or_a_link_are_a_miss(root: Path, store: Cache, tmp_path: Path) -> None:
    store.publish(KEY, CALIBRATION, STATS, "own")
    path = root / ENTRIES / KEY / "autotuning.json"
    path.write_bytes(bytes([0xFF]))
    assert store.load_autotuning(KEY) is None
    path.unlink()
    (tmp_path / "elsewhere").write_text("theirs", encoding="utf-8")
    path.symlink_to(tmp_path / "elsewhere")
    assert store.load_autotuning(KEY) is None
