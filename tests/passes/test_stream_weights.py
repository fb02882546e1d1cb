from __future__ import annotations

import pytest
import torch

from onlinequant_backend.passes.stream_weights import stream_weights
from onlinequant_backend.quantization import host_weights, weight_streaming
from onlinequant_backend.quantization.weight_streaming import stream, stream_first
from tests.helpers.graph_probe import GraphProbe
from tests.helpers.hosted import hosted as hosted
from tests.helpers.tiny import net, noise

X = noise(1, 4, 8, 8)


def test_every_candidate_reads_its_weight_through_stream() -> None:
    model = net()
    probe = GraphProbe(model, X).analyze()
    assert probe.run(stream_weights) == {"stream_weights": 7}
    assert (probe.added(stream_first), probe.added(stream)) == (1, 6)
    (result,) = probe.call()
    assert torch.equal(result, model(X))
    probe.assert_settled(stream_weights)


def test_the_next_weights_are_copied_ahead(hosted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    model = net()
    probe = GraphProbe(model, X).analyze()
    probe.run(stream_weights)
    host_weights.move_to_host(list(model.parameters()))
    expected = model(X)
    begun = list[int]()
    begin = weight_streaming._begin
    monkeypatch.setattr(weight_streaming, "_begin", lambda some: begun.extend(map(id, some)) or begin(some))
    for _ in range(2):
        (result,) = probe.call()
        assert torch.equal(result, expected)
    weights = [info.weight for info in probe.infos]
    assert len(begun) == 2 * (len(weights) - 1)  # the first is copied when it is read
    assert not weight_streaming._ahead.copies


class Cast(torch.nn.Linear):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.nn.functional.linear(x, self.weight.to(x.dtype).float())


def test_a_weight_is_copied_before_it_is_cast(hosted: None) -> None:
    model = torch.nn.Sequential(Cast(16, 16), Cast(16, 16)).requires_grad_(False).to(torch.float8_e4m3fn)
    x = noise(4, 16)
    probe = GraphProbe(model, x).analyze()
    assert probe.run(stream_weights) == {"stream_weights": 2}
    reads = [node for node in probe.graph_module.graph.nodes if node.target in (stream, stream_first)]
    assert all(user.target == "to" for read in reads for user in read.users)
    host_weights.move_to_host(list(model.parameters()))
    (result,) = probe.call()
    assert torch.equal(result, model(x))
    probe.assert_settled(stream_weights)


def test_a_call_that_failed_leaves_no_old_values(hosted: None) -> None:
    weights = [noise(4, 4), noise(4, 4, seed=2)]
    host_weights.move_to_host(weights)
    stream_first(weights[0], weights[1])  # and the graph fails
    weights[1].mul_(2)
    stream_first(weights[0], weights[1])
    assert torch.equal(stream(weights[1]), weights[1])


def test_weights_that_are_not_on_the_host_or_are_trained_are_read_where_they_are(hosted: None) -> None:
    plain, trained = noise(4, 4), torch.nn.Parameter(noise(4, 4))
    host_weights.move_to_host([trained])
    assert stream_first(plain, trained) is plain
    assert stream(trained) is trained
    with torch.no_grad():
        assert stream(trained) is not trained


def test_a_weight_that_is_read_twice_is_copied_ahead_once(hosted: None, monkeypatch: pytest.MonkeyPatch) -> None:
    """The memory of a second copy would be used again while it is still being written."""
    weights = [noise(4, 4, seed=seed) for seed in range(3)]
    host_weights.move_to_host(weights)
    first, second, third = weights
    begun = list[int]()
    begin = weight_streaming._begin
    monkeypatch.setattr(weight_streaming, "_begin", lambda some: begun.extend(map(id, some)) or begin(some))
    stream_first(first, second, third, second)
    assert begun == [id(second), id(third)]
    stream(second, third)
    assert begun == [id(second), id(third)]
    for weight in (third, second):
        assert torch.equal(stream(weight), weight)


def test_a_failed_call_keeps_no_copies(hosted: None) -> None:
    weights = [noise(4, 4), noise(4, 4, seed=2)]
    host_weights.move_to_host(weights)

    def graph() -> None:
        with weight_streaming.streaming():
            stream_first(*weights)
            raise MemoryError

    with pytest.raises(MemoryError):
        graph()
    assert not weight_streaming._ahead.copies
