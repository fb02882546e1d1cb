"""Repeated runs, against a search that is slow and obviously right."""

from __future__ import annotations

import hypothesis
import hypothesis.strategies as st
import pytest

from onlinequant_backend.graph.repeated_runs import repeated_runs


def occurrences(tokens: list[int], run: tuple[int, ...]) -> list[int]:
    return [i for i in range(len(tokens) - len(run) + 1) if tuple(tokens[i : i + len(run)]) == run]


def expected(tokens: list[int]) -> list[tuple[int, list[int]]]:
    """Runs whose occurrences are not all followed by the same token; the end is a token of its own."""
    found = set()
    for start in range(len(tokens)):
        for end in range(start + 1, len(tokens) + 1):
            places = occurrences(tokens, tuple(tokens[start:end]))
            following = {tokens[p + end - start] if p + end - start < len(tokens) else None for p in places}
            if len(places) > 1 and len(following) > 1:
                found.add((end - start, tuple(places)))
    return sorted((length, list(places)) for length, places in found)


@hypothesis.given(st.lists(st.integers(0, 3), max_size=24))
@hypothesis.settings(max_examples=300, deadline=None)
def test_all_and_only_the_longest_runs_are_found(tokens: list[int]) -> None:
    assert sorted(repeated_runs(tokens)) == expected(tokens)


@pytest.mark.parametrize("tokens", [[], [1], [1, 2, 3], [5] * 6, [1, 2] * 5, list(range(50)) * 3])
def test_extremes(tokens: list[int]) -> None:
    assert sorted(repeated_runs(tokens)) == expected(tokens)


def test_a_period_is_found_with_all_its_places() -> None:
    block = list(range(40))
    assert (40, [0, 40, 80, 120]) in [*repeated_runs([*block * 4, 99])]
