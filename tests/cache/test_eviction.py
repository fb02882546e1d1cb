from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from onlinequant_backend.cache import atomic_files, eviction, locks
from onlinequant_backend.cache.eviction import ASIDE, DAY, ENTRIES, IMPORTED, INDUCTOR, TEMPORARY, TRASH
from tests.helpers import cache_process
from tests.helpers.calibrations import KEY, OTHER_MACHINE, SIBLING, key

NAMES = {ENTRIES: KEY, IMPORTED: KEY[:32], INDUCTOR: f"{KEY[:16]}{KEY[32:48]}", ASIDE: f"{KEY}.1234"}


def add(root: Path, kind: str, name: str | None = None, *, size: int = 100, days: float = 0) -> Path:
    """An item of ``size`` bytes that was last used so many days ago."""
    path = atomic_files.publish_folder(root, kind, name or NAMES[kind], {"file": bytes(size)})
    moment = time.time() - days * DAY
    os.utime(path, (moment, moment))
    return path


def kinds(root: Path) -> list[str]:
    return [item.kind for item in eviction.items(root)]


def test_corrupt_entries_come_first_and_then_the_oldest(tmp_path: Path) -> None:
    add(tmp_path, ENTRIES, days=2)
    add(tmp_path, IMPORTED, days=4)
    inductor = add(tmp_path, INDUCTOR, days=3, size=70)
    (inductor / "deep").mkdir()
    (inductor / "deep" / "file").write_bytes(bytes(30))
    os.utime(inductor, (1, 1))
    add(tmp_path, ASIDE)
    assert kinds(tmp_path) == [ASIDE, INDUCTOR, IMPORTED, ENTRIES]
    assert [item.size for item in eviction.items(tmp_path)] == [100] * 4
    assert eviction.items(tmp_path)[1].last_used == 1


def test_what_is_not_ours_is_neither_counted_nor_removed(tmp_path: Path) -> None:
    for path in ("entries/notes", "entries/" + "z" * 64, "inductor/ab", "other/" + KEY, "imported/" + KEY):
        (tmp_path / path).mkdir(parents=True)
    assert eviction.items(tmp_path) == [] == eviction.clear(tmp_path, None, None)
    assert (tmp_path / "entries" / "notes").is_dir()


def test_the_oldest_go_until_the_rest_fits(tmp_path: Path) -> None:
    made = [add(tmp_path, ENTRIES, key(weights=str(days)), days=days) for days in range(5)]
    removed = eviction.evict(tmp_path, 250)
    assert [item.path for item in removed] == [made[4], made[3], made[2]]
    assert [path.exists() for path in made] == [True, True, False, False, False]
    assert eviction.evict(tmp_path, 250) == []


def test_what_is_to_be_kept_stays_however_old(tmp_path: Path) -> None:
    old, new = add(tmp_path, ENTRIES, days=9), add(tmp_path, INDUCTOR)
    assert [item.path for item in eviction.evict(tmp_path, 0, {old})] == [new]


@pytest.mark.parametrize("kind", [ENTRIES, IMPORTED, INDUCTOR])
def test_what_another_process_has_locked_stays(tmp_path: Path, kind: str) -> None:
    used, free = add(tmp_path, kind, days=2), add(tmp_path, ASIDE)
    other = add(tmp_path, ENTRIES, OTHER_MACHINE)
    holder = cache_process.start("hold", tmp_path)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert {item.path for item in eviction.clear(tmp_path, None, None)} == {free, other}
    holder.communicate()
    assert [item.path for item in eviction.clear(tmp_path, None, None)] == [used]


def test_what_this_process_has_locked_stays(tmp_path: Path) -> None:
    add(tmp_path, ENTRIES, SIBLING)
    with locks.acquire(atomic_files.make_private(tmp_path, "locks") / f"{KEY[:48]}.lock", 0) or pytest.fail("locked"):
        assert eviction.evict(tmp_path, 0) == []
    assert len(eviction.evict(tmp_path, 0)) == 1


def test_what_is_used_meanwhile_stays(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = add(tmp_path, ENTRIES, days=3)
    listed = eviction.items(tmp_path)
    os.utime(path)
    monkeypatch.setattr(eviction, "items", lambda root: listed)
    assert eviction.evict(tmp_path, 0) == [] and path.exists()


def test_what_is_removed_meanwhile_is_no_trouble(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    path = add(tmp_path, ENTRIES, days=3)
    listed = eviction.items(tmp_path)
    atomic_files.delete(path)
    monkeypatch.setattr(eviction, "items", lambda root: listed)
    assert eviction.evict(tmp_path, 0) == [] and caplog.records == []


def test_what_cannot_be_removed_does_not_keep_the_others(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    stuck, free = add(tmp_path, ENTRIES, days=3), add(tmp_path, INDUCTOR)
    rename = Path.rename

    def fail(self: Path, target: Path) -> Path:
        if self == stuck:
            raise PermissionError("stuck")
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fail)
    assert [item.path for item in eviction.clear(tmp_path, None, None)] == [free]
    assert f"cannot remove {stuck}: stuck" in caplog.text


def test_clearing_removes_everything_by_default(tmp_path: Path) -> None:
    for kind in NAMES:
        add(tmp_path, kind)
    assert {item.kind for item in eviction.clear(tmp_path, None, None)} == set(NAMES)
    assert kinds(tmp_path) == [] and list((tmp_path / TRASH).iterdir()) == []


def test_clearing_by_age_and_by_size(tmp_path: Path) -> None:
    for days, kind in enumerate((ENTRIES, IMPORTED, INDUCTOR)):
        add(tmp_path, kind, days=days + 0.5)
    add(tmp_path, ASIDE)
    assert [item.kind for item in eviction.clear(tmp_path, 2, None)] == [ASIDE, INDUCTOR]
    add(tmp_path, ASIDE)
    assert [item.kind for item in eviction.clear(tmp_path, None, 100 / 1e9)] == [ASIDE, IMPORTED]
    add(tmp_path, IMPORTED, days=9)
    add(tmp_path, INDUCTOR, days=0.1)
    assert [item.kind for item in eviction.clear(tmp_path, 5, 100 / 1e9)] == [IMPORTED, ENTRIES]
    assert kinds(tmp_path) == [INDUCTOR]


def test_links_are_removed_and_not_followed(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "file").write_bytes(bytes(100_000))
    root = atomic_files.make_private(tmp_path, "root")
    (atomic_files.make_private(root, ENTRIES) / KEY).symlink_to(outside)
    (root / INDUCTOR).symlink_to(outside)
    (outside / NAMES[INDUCTOR]).mkdir()
    (item,) = eviction.items(root)
    assert item.size < 1000
    assert eviction.clear(root, None, None) == [item]
    assert (outside / "file").exists() and (outside / NAMES[INDUCTOR]).exists()


def test_left_overs_are_swept_and_work_in_progress_is_not(tmp_path: Path) -> None:
    dead, alive = (atomic_files.make_private(tmp_path, TEMPORARY, name) for name in ("dead", "alive"))
    trash = atomic_files.make_private(tmp_path, TRASH, "trash")
    (dead / "file").write_text("half")
    for path, age in ((dead, 3700), (alive, 3500), (trash, -1000)):
        os.utime(path, (time.time() - age, time.time() - age))
    eviction.sweep(tmp_path)
    assert (dead.exists(), alive.exists(), trash.exists()) == (False, True, False)
