from __future__ import annotations

from pathlib import Path

import platformdirs
import pytest

from onlinequant_backend import cache


def test_the_option_wins_over_the_environment(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "/ours")
    assert cache.cache_directory("/option") == Path("/option")


def test_our_variable_wins_over_the_predecessors(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "/ours")
    monkeypatch.setenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "/predecessor")
    assert cache.cache_directory(None) == Path("/ours")


def test_the_predecessors_variable_still_works(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("ONLINEQUANT_CACHE_DIR", "")  # empty counts as unset
    monkeypatch.setenv("COMFYUI_ONEDIFF_SAVE_GRAPH_DIR", "~/predecessor")
    assert cache.cache_directory(None) == Path.home() / "predecessor"


def test_without_any_setting_the_platform_decides(monkeypatch: pytest.MonkeyPatch) -> None:
    for name in cache.ENVIRONMENT_VARIABLES:
        monkeypatch.delenv(name, raising=False)
    assert cache.cache_directory(None) == platformdirs.user_cache_path("onlinequant")


def test_an_entry_is_a_folder_of_the_root(tmp_path: Path) -> None:
    assert cache.entry_directory(tmp_path, "00ff") == tmp_path / "00ff"


@pytest.mark.parametrize("key", ["", "..", "a/b", "ABCD", "xyz", "ab\n"])
def test_a_key_that_is_no_hex_digest_is_refused(tmp_path: Path, key: str) -> None:
    with pytest.raises(ValueError, match="hex digest"):
        cache.entry_directory(tmp_path, key)


def test_the_size_counts_files_in_all_folders_but_no_links(tmp_path: Path) -> None:
    outside = tmp_path / "outside"
    outside.mkdir()
    (outside / "large").write_bytes(bytes(100_000))
    root = tmp_path / "root"
    cache.write_atomically(root / "a" / "b" / "one", "12345")
    cache.write_atomically(root / "two", "123")
    (root / "folder").symlink_to(outside)
    (root / "file").symlink_to(outside / "large")
    assert 8 <= cache.directory_size(root) < 1000


def test_a_directory_that_is_not_there_has_no_size(tmp_path: Path) -> None:
    assert cache.directory_size(tmp_path / "absent") == 0


def test_writing_makes_folders_replaces_and_leaves_nothing_else(tmp_path: Path) -> None:
    path = tmp_path / "new" / "file.json"
    cache.write_atomically(path, "old")
    cache.write_atomically(path, "näw")
    assert path.read_text(encoding="utf-8") == "näw"
    assert list(path.parent.iterdir()) == [path]


def test_a_write_that_fails_keeps_the_old_file(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = tmp_path / "file.json"
    cache.write_atomically(path, "old")

    def fail(self: Path, target: Path) -> None:
        raise OSError("disk is full")

    monkeypatch.setattr(Path, "replace", fail)
    with pytest.raises(OSError, match="disk is full"):
        cache.write_atomically(path, "new")
    assert path.read_text(encoding="utf-8") == "old"
    assert list(tmp_path.iterdir()) == [path]


def test_a_file_where_the_folder_should_be_is_an_os_error(tmp_path: Path) -> None:
    (tmp_path / "taken").write_text("")
    with pytest.raises(OSError, match="taken"):
        cache.write_atomically(tmp_path / "taken" / "file.json", "text")
