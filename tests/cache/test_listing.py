from __future__ import annotations

import os
import re
import time
from pathlib import Path

import pytest

from onlinequant_backend.cache import atomic_files, listing
from onlinequant_backend.cache.listing import EntryInfo
from tests.helpers.calibrations import CALIBRATION, KEY, OTHER_MACHINE, SIBLING, STATS, key


def add(root: Path, of: str, stats: str = STATS) -> Path:
    contents = {"calibration.safetensors": CALIBRATION.to_bytes(of), "quantization_stats.json": stats.encode()}
    return atomic_files.publish_folder(root, "entries", of, contents)


def info(**changes: object) -> EntryInfo:
    values: dict[str, object] = {"key": KEY, "path": Path(KEY), "model": "UNet", "quantized": 3, "layers": 7}
    values |= {"size": 1500, "last_used": time.time()}
    return EntryInfo(**{**values, **changes})  # type: ignore[arg-type]


def test_entries_and_imported_calibrations_are_listed_last_used_first(tmp_path: Path) -> None:
    entry = add(tmp_path, KEY)
    imported = atomic_files.publish_folder(
        tmp_path, "imported", KEY[:32], {"calibration.safetensors": CALIBRATION.to_bytes(KEY)}
    )
    atomic_files.publish_folder(tmp_path, "inductor", "0" * 32, {})
    atomic_files.publish_folder(tmp_path, "aside", "corrupt", {})
    os.utime(entry, (10, 10))
    os.utime(imported, (20, 20))
    size = len(CALIBRATION.to_bytes(KEY))
    assert listing.entries(tmp_path) == [
        EntryInfo(KEY[:32], imported, "UNet2DConditionModel", None, 2, size, 20),
        EntryInfo(KEY, entry, "UNet2DConditionModel", 1, 2, size + len(STATS), 10),
    ]


NO_COUNTS = ("1e999", "NaN", "1.5", "-1", '"1"', "true", "9" * 4000, "9" * 5000)


@pytest.mark.parametrize(
    "stats",
    [
        *("", "{}", "[" * 100_000, '{"model":"m","counts":3}', '{"model":"\\u001b[2J","counts":{}}', "\ud800"[:0]),
        *(re.sub(r'("candidates_conv":\s*)\d+', rf"\g<1>{number}", STATS) for number in NO_COUNTS),
    ],
)
def test_an_entry_that_cannot_be_read_is_listed_all_the_same(tmp_path: Path, stats: str) -> None:
    add(tmp_path, KEY, stats)
    (entry,) = listing.entries(tmp_path)
    assert (entry.model, entry.quantized, entry.layers) == ("(unreadable)", None, None)


def test_a_name_that_would_command_the_terminal_is_not_shown(tmp_path: Path) -> None:
    add(tmp_path, KEY, STATS.replace("UNet2D", "\\u001b[2J"))
    assert "\x1b" not in listing.render(listing.entries(tmp_path))


def test_a_link_is_listed_and_not_followed(tmp_path: Path) -> None:
    add(tmp_path, KEY).rename(tmp_path / "outside")
    (tmp_path / "entries" / KEY).symlink_to(tmp_path / "outside")
    (entry,) = listing.entries(tmp_path)
    assert entry.model == "(unreadable)"


def test_keys_are_as_short_as_tells_them_apart() -> None:
    assert listing.abbreviations([KEY, SIBLING]) == {KEY: "aaaa-bbbb-cccc-dddd", SIBLING: "aaaa-bbbb-cccc-eeee"}
    close = KEY[:-1] + "0"
    assert listing.abbreviations([KEY, close])[close] == "-".join(["a" * 16, "b" * 16, "c" * 16, "d" * 15 + "0"])
    assert listing.abbreviations([KEY[:5] + "0" + KEY[6:], KEY])[KEY] == "aaaaaa-bbbbbb-cccccc-dddddd"
    assert listing.abbreviations([KEY[:32], KEY]) == {KEY[:32]: "aaaa-bbbb", KEY: "aaaa-bbbb-cccc-dddd"}
    assert listing.abbreviations([]) == {}


@pytest.mark.parametrize(
    ("wanted", "matches"),
    [
        ("a", True),
        ("AAAA", True),
        (KEY, True),
        (KEY[:40], True),
        ("aaaa-bbbb-cccc-dddd", True),
        ("aaaa-bb", True),
        ("", True),
        ("b", False),
        ("aaaa-cccc", False),
        ("aaaa-bbbb-cccc-dddd-eeee", False),
        ("a" * 17 + "-b", False),
        (f"{KEY}0", False),
    ],
)
def test_a_key_is_found_by_its_beginning_or_its_abbreviation(wanted: str, matches: bool) -> None:
    assert listing.matcher(wanted)(KEY) is matches


def test_the_table_says_what_each_entry_is() -> None:
    day = 86400
    text = listing.render(
        [
            info(),
            info(key=SIBLING, quantized=0, size=2_345_678, last_used=time.time() - 3700),
            info(key=OTHER_MACHINE, model="m" * 200, last_used=time.time() - 2.5 * day),
            info(key=key(weights="0")[:32], quantized=None, last_used=time.time() - 70),
            info(key=key(weights="1"), model="(unreadable)", quantized=None, layers=None, last_used=time.time() + day),
        ]
    )
    assert max(map(len, text.splitlines())) <= 120
    rows = [re.sub(" {2,}", "|", row) for row in text.splitlines() if re.match("a{4}-", row)]
    assert [row.replace("m" * 20, "m").count("|") for row in rows] == [4] * 5
    assert rows[0] == "aaaa-bbbb-cccc-dddd|UNet|3 of 7|1.5 kB|just now"
    assert rows[1] == "aaaa-bbbb-cccc-eeee|UNet|0 of 7|2.3 MB|1 hour ago"
    assert rows[2].endswith("2 days ago")
    assert rows[3] == "aaaa-0000|UNet|imported, 7 layers|1.5 kB|1 minute ago"
    assert rows[4].startswith("aaaa-1111-cccc-dddd|(unreadable)|?|")


@pytest.mark.parametrize(("size", "text"), [(0, "0 B"), (999, "999 B"), (1000, "1.0 kB"), (20_123_456_789, "20.1 GB")])
def test_sizes_are_in_powers_of_1000(size: int, text: str) -> None:
    assert listing.human_size(size) == text


def test_statistics_that_cannot_be_read_hide_no_others(tmp_path: Path) -> None:
    add(tmp_path, KEY, STATS.replace('_linear": 1', '_linear": 1e999'))
    add(tmp_path, SIBLING)
    assert sorted(entry.model for entry in listing.entries(tmp_path)) == ["(unreadable)", "UNet2DConditionModel"]
