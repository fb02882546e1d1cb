"""Runs of tokens that occur more than once in a sequence."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import numpy as np


def repeated_runs(tokens: Sequence[int]) -> Iterator[tuple[int, list[int]]]:
    """Every longest run that occurs more than once: its length and its sorted start positions.

    "Longest": its occurrences are not all followed by the same token. They may overlap. These are the inner nodes of
    the suffix tree, computed from the suffix array (Abouelhoda, Kurtz, Ohlebusch, "Replacing suffix trees with enhanced
    suffix arrays", 2004), fewer than there are tokens.
    """
    order = _suffix_array(tokens)
    common = [*_common_prefixes(tokens, order), 0]
    open_runs: list[tuple[int, int]] = []  # length, first suffix
    for end, length in enumerate(common):
        first = max(end - 1, 0)
        while open_runs and open_runs[-1][0] > length:
            closed, first = open_runs.pop()
            yield closed, sorted(order[first:end])
        if length and (not open_runs or open_runs[-1][0] < length):
            open_runs.append((length, first))


def _suffix_array(tokens: Sequence[int]) -> list[int]:
    """The start positions of the suffixes in sorted order, by prefix doubling."""
    rank = np.unique(np.asarray(tokens, dtype=np.int64), return_inverse=True)[1]
    order, width = np.argsort(rank, kind="stable"), 1
    while len(rank) and rank[order[-1]] < len(rank) - 1:
        behind = np.full_like(rank, -1)
        behind[:-width] = rank[width:]
        order = np.lexsort((behind, rank))
        differs = (np.diff(rank[order]) != 0) | (np.diff(behind[order]) != 0)
        rank = np.empty_like(rank)
        rank[order] = np.concatenate(([0], np.cumsum(differs)))
        width *= 2
    return [int(position) for position in order]


def _common_prefixes(tokens: Sequence[int], order: Sequence[int]) -> list[int]:
    """How many tokens each suffix in the array has in common with the one before it (Kasai et al., 2001)."""
    place = {position: index for index, position in enumerate(order)}
    common = [0] * len(order)
    length = 0
    for position in range(len(tokens)):
        if place[position] == 0:
            length = 0
            continue
        other = order[place[position] - 1]
        while max(position, other) + length < len(tokens) and tokens[position + length] == tokens[other + length]:
            length += 1
        common[place[position]] = length
        length = max(length - 1, 0)
    return common
