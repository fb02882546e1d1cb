from __future__ import annotations

import pytest
import torch

from onlinequant_backend.compilation import symbolic_inputs
from onlinequant_backend.graph import dynamic_shapes, fx_utils
from tests.helpers.graph_probe import capture
from tests.helpers.tiny import noise


@pytest.mark.parametrize(
    ("batch", "steps", "is_expanded"),
    [(4, 1, True), (4, 4, False), (1, 1, False)],
    ids=["one time step for all images", "one for each", "one image: nobody can tell"],
)
def test_a_size_of_1_beside_a_larger_one_stays(batch: int, steps: int, is_expanded: bool) -> None:
    graph_module, _ = capture(lambda x, t: x.sum() + t.sum(), noise(3, 8), noise(2), dynamic=True)
    values = {node.name: node.meta["example_value"] for node in fx_utils.placeholders(graph_module)}
    sizes = {value.shape[0].node.expr: size for value, size in ((values["l_x_"], batch), (values["l_t_"], steps))}
    inputs = {"l_x_": noise(batch, 8), "l_t_": noise(steps)}
    arguments = [inputs[name] if name in inputs else sizes.get(value.node.expr, 8) for name, value in values.items()]
    step = values["l_t_"].shape[0].node.expr
    assert dynamic_shapes.broadcast_sizes(graph_module, arguments) == ({step} if is_expanded else set())

    made = symbolic_inputs.SymbolicInputs(graph_module, arguments)
    fake = dict(zip(values, made.values, strict=True))
    assert isinstance(fake["l_x_"].shape[0], torch.SymInt)
    assert isinstance(fake["l_t_"].shape[0], torch.SymInt) != is_expanded
    made.finish()
    assert made.fits(arguments, at_least=symbolic_inputs.SMALLEST)
    arguments[[*values].index("l_t_") - 1] = 7
    assert made.fits(arguments, at_least=symbolic_inputs.SMALLEST) != is_expanded
