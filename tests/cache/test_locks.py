from __future__ import annotations

import gc
import logging
import multiprocessing
import os
import threading
import time
from pathlib import Path

import pytest

from onlinequant_backend.cache import locks
from onlinequant_backend.cache.cache_store import Cache
from tests.helpers import cache_process
from tests.helpers.calibrations import KEY, OTHER_MACHINE, SIBLING


def lock_file(root: Path) -> Path:
    return root / "locks" / f"{KEY[:48]}.lock"


@pytest.fixture
def root(tmp_path: Path) -> Path:
    (tmp_path / "locks").mkdir(mode=0o700)
    return tmp_path


def test_a_lock_keeps_other_processes_out_until_it_is_released(root: Path) -> None:
    lock = Cache.open(str(root)).lock(KEY, 0)
    assert lock is not None
    assert cache_process.output("try_lock", root) == ["locked"]
    lock.release()
    lock.release()
    assert cache_process.output("try_lock", root) == ["free"]


def test_two_models_of_one_process_hold_it_together(root: Path) -> None:
    first, second = Cache.open(str(root)).lock(KEY, 0), Cache.open(str(root)).lock(SIBLING, 0)
    assert first is not None and second is not None
    first.release()
    first.release()  # twice is once, so the second still holds
    assert locks.is_held_here(lock_file(root))
    assert cache_process.output("try_lock", root) == ["locked"]
    second.release()
    assert not locks.is_held_here(lock_file(root))


def test_models_with_other_keys_do_not_wait_for_each_other(root: Path) -> None:
    with Cache.open(str(root)).lock(OTHER_MACHINE, 0) or pytest.fail("locked"):
        assert cache_process.output("try_lock", root) == ["free"]


def test_a_lock_can_be_taken_in_one_thread_and_released_in_another(root: Path) -> None:
    taken: list[locks.Lock | None] = []
    thread = threading.Thread(target=lambda: taken.append(locks.acquire(lock_file(root), 0)))
    thread.start()
    thread.join()
    assert locks.is_held_here(lock_file(root))
    assert taken[0] is not None
    taken[0].release()
    assert not locks.is_held_here(lock_file(root))


def test_many_threads_take_and_release_it_and_leave_it_free(root: Path) -> None:
    def use() -> None:
        for _ in range(20):
            with locks.acquire(lock_file(root), 10) or pytest.fail("not locked"):
                assert locks.is_held_here(lock_file(root))

    threads = [threading.Thread(target=use) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert not locks.is_held_here(lock_file(root))


def test_a_forgotten_lock_is_released(root: Path) -> None:
    lock = locks.acquire(lock_file(root), 0)
    cycle = [lock]
    cycle.append(cycle)  # type: ignore[arg-type]
    del lock, cycle
    gc.collect()
    assert not locks.is_held_here(lock_file(root))


def test_a_killed_process_holds_nothing(root: Path) -> None:
    holder = cache_process.start("hold", root)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    assert locks.acquire(lock_file(root), 0) is None
    holder.kill()
    holder.communicate()
    lock = locks.acquire(lock_file(root), 0)
    assert lock is not None
    lock.release()


@pytest.mark.posix
@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.filterwarnings("ignore:.*multi-threaded.*fork")
def test_a_fork_neither_has_its_parents_lock_nor_releases_it(root: Path) -> None:
    lock = locks.acquire(lock_file(root), 0)
    assert lock is not None
    context = multiprocessing.get_context("fork")
    free = context.Queue()

    def child() -> None:
        lock.release()
        free.put(locks.acquire(lock_file(root), 0) is not None)

    process = context.Process(target=child)
    process.start()
    assert free.get(timeout=30) is False
    process.join()
    assert cache_process.output("try_lock", root) == ["locked"]
    lock.release()
    assert cache_process.output("try_lock", root) == ["free"]


def test_waiting_is_shown_and_ends_when_the_other_is_done(root: Path, caplog: pytest.LogCaptureFixture) -> None:
    holder = cache_process.start("hold", root)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    timer = threading.Timer(1.2, holder.communicate)  # closes the pipe that it waits for
    timer.start()
    with caplog.at_level(logging.INFO, "onlinequant"):
        lock = Cache.open(str(root)).lock(KEY, 60)
    timer.join()
    assert lock is not None
    lock.release()
    assert "waiting for another process that is calibrating this model" in caplog.text


def test_waiting_has_an_end(root: Path) -> None:
    holder = cache_process.start("hold", root)
    assert holder.stdout is not None and holder.stdout.readline() == "held\n"
    start = time.monotonic()
    assert locks.acquire(lock_file(root), 0.3, "waiting") is None
    assert 0.25 < time.monotonic() - start < 20
    holder.communicate()


def test_a_link_is_no_lock_file(root: Path, tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    lock_file(root).symlink_to(outside)
    with pytest.raises(OSError, match=r"\.lock"):
        locks.acquire(lock_file(root), 0)
    assert not outside.exists()


def test_without_its_folder_there_is_no_lock(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(OSError, match="file"):
        locks.acquire(tmp_path / "file" / "one.lock", 0)
