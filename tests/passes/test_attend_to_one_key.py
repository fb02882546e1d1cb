"""Attention to one key is its value: the same result with less to compute, and what keeps it."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from torch import nn

from benchmarks.memory_cell import ROWS
from benchmarks.models import build
from onlinequant_backend.passes.attend_to_one_key import attend_to_one_key
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.tiny import noise, relative_error

HIDDEN, TOKEN, TOKENS = noise(2, 9, 16), noise(2, 1, 8, seed=1), noise(2, 3, 8, seed=1)
ATTENTION = F.scaled_dot_product_attention


class CrossAttention(nn.Module):
    """As diffusers computes it. ``attend`` is the attention itself, and ``end`` is what becomes of the result."""

    def __init__(self, attend: Callable[..., Any] = ATTENTION, end: Callable[..., Any] = torch.add) -> None:
        super().__init__()
        self.norm = nn.LayerNorm(16)
        self.to_q, self.to_k, self.to_v = nn.Linear(16, 16), nn.Linear(8, 16, False), nn.Linear(8, 16)
        self.to_out, self.after = nn.Linear(16, 16), nn.Linear(16, 4)
        self.attend, self.end = attend, end
        self.eval().requires_grad_(False)

    def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
        heads = [
            tensor.view(len(hidden), -1, 2, 8).transpose(1, 2)
            for tensor in (self.to_q(self.norm(hidden)), self.to_k(context), self.to_v(context))
        ]
        result = self.attend(*heads).transpose(1, 2).reshape(len(hidden), -1, 16).to(hidden.dtype)
        return self.after(self.end(F.dropout(self.to_out(result), 0.0) / 1.0, hidden))


def checked(model: nn.Module, *inputs: torch.Tensor, changes: int = 1, dynamic: bool = False) -> GraphProbe:
    expected = model(*(x.clone() for x in inputs))
    probe = GraphProbe(model, *inputs, dynamic=dynamic)
    assert probe.run(attend_to_one_key) == {"attend_to_one_key": changes}
    (result,) = probe.call()
    assert result.shape == expected.shape and relative_error(result, expected) < 1e-5
    probe.assert_settled(attend_to_one_key)
    return probe


@pytest.mark.parametrize("dynamic", [False, True])
@pytest.mark.parametrize("end", [torch.add, lambda x, hidden: hidden + x])
def test_norm_query_and_key_go_and_the_value_is_added_to_each_token(end: Callable[..., Any], dynamic: bool) -> None:
    probe = checked(CrossAttention(end=end), HIDDEN, TOKEN, dynamic=dynamic)
    linears = [node for node in probe.graph_module.graph.nodes if node.target is torch._C._nn.linear]
    assert [tuple(node.meta["example_value"].shape)[1] for node in linears] == [1, 1, 9]  # to_v, to_out, after
    assert not any(node.target in (ATTENTION, F.layer_norm, "expand") for node in probe.graph_module.graph.nodes)


@pytest.mark.parametrize(
    "end", [lambda x, hidden: x.abs(), lambda x, hidden: x.add(hidden, alpha=2), lambda x, hidden: x + hidden[:, :1]]
)
def test_the_result_is_expanded_where_all_tokens_are_read(end: Callable[..., Any]) -> None:
    probe = checked(CrossAttention(end=end), HIDDEN, TOKEN)
    assert sum(node.target == "expand" for node in probe.graph_module.graph.nodes) == 1
    checked(CrossAttention(end=end), HIDDEN, TOKEN, changes=0, dynamic=True)  # how far is not known


@pytest.mark.parametrize(
    "end",
    [
        lambda x, hidden: x.view(-1, 16).view(2, -1, 16),  # cannot be done to what is expanded
        lambda x, hidden: (x + hidden).view(-1, 16).view(2, -1, 16),
        lambda x, hidden: (hidden + x).abs(),
    ],
)
@pytest.mark.parametrize("dynamic", [False, True])
def test_strides_stay_what_they_were(end: Callable[..., Any], dynamic: bool) -> None:
    class Strided(CrossAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
            heads = [tensor[:, None] for tensor in (self.to_q(hidden), self.to_k(context), self.to_v(context))]
            return self.end(self.to_out(ATTENTION(*heads)[:, 0].reshape(len(hidden), -1, 16)), hidden)

    for hidden in (HIDDEN, HIDDEN.transpose(1, 2).contiguous().transpose(1, 2)):
        for model in (Strided(end=end), CrossAttention(end=end)):
            expected = model(hidden, TOKEN)
            probe = GraphProbe(model, hidden, TOKEN, dynamic=dynamic)
            probe.run(attend_to_one_key)
            (result,) = probe.call()
            assert result.stride() == expected.stride()
            assert relative_error(result, expected) < 1e-5


def test_what_the_query_reads_twice_goes_without_a_word(recwarn: pytest.WarningsRecorder) -> None:
    class Gated(CrossAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
            query = self.to_q(hidden)
            query = torch.sigmoid(query) * query
            return hidden + self.to_out(ATTENTION(query, self.to_k(context), self.to_v(context)))

    checked(Gated(), HIDDEN, TOKEN)
    assert not [warning for warning in recwarn if "erase" in str(warning.message)]


def test_the_sum_of_queries_in_one_head() -> None:
    class OneHead(CrossAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
            return hidden + self.to_out(ATTENTION(self.to_q(hidden), self.to_k(context), self.to_v(context)))

    checked(OneHead(), HIDDEN, TOKEN)


@pytest.mark.parametrize(
    "attend",
    [
        lambda q, k, v: ATTENTION(q, k, v, attn_mask=torch.zeros(9, 1)),
        lambda q, k, v: ATTENTION(q, k, v, dropout_p=1e-9),
        lambda q, k, v: ATTENTION(q, k[:1], v[:1]),
        lambda q, k, v: ATTENTION(q, k, v).add_(0),
        lambda q, k, v: (lambda x: x + x.mean(2, True))(ATTENTION(q, k, v)),
    ],
)
def test_other_attention_stays(attend: Callable[..., Any]) -> None:
    model = CrossAttention(attend)
    changes = GraphProbe(model, HIDDEN, TOKEN).run(attend_to_one_key)
    assert changes == {"attend_to_one_key": 0}


def test_attention_to_several_keys_stays() -> None:
    checked(CrossAttention(), HIDDEN, TOKENS, changes=0)


def test_a_value_that_is_written_later_stays() -> None:
    class Writing(CrossAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
            value = self.to_v(context)
            result = ATTENTION(self.to_q(hidden), self.to_k(context), value)
            value.mul_(2)
            return hidden + self.to_out(result) + value

    checked(Writing(), HIDDEN, TOKEN, changes=0)


def test_what_is_returned_has_memory_of_its_own() -> None:
    class Returned(CrossAttention):
        def forward(self, hidden: torch.Tensor, context: torch.Tensor) -> Any:
            return self.to_out(ATTENTION(self.to_q(hidden), self.to_k(context), self.to_v(context)))

    checked(Returned(), HIDDEN, TOKEN, changes=0)


@torch.no_grad()
def test_the_cross_attention_of_svd() -> None:
    model, inputs = build("svd", "cpu", torch.float32, 1, size=(8, 8), config=ROWS["svd"].tiny)
    expected = model(**inputs)[0]
    probe = GraphProbe(lambda: model(**inputs))
    with_one_key = [
        node
        for node in probe.graph_module.graph.nodes
        if node.target is ATTENTION and node.args[1].meta["example_value"].shape[-2] == 1
    ]
    assert probe.run(attend_to_one_key) == {"attend_to_one_key": len(with_one_key)}
    assert len(with_one_key) > 10
    assert relative_error(probe.call()[0], expected) < 1e-5
