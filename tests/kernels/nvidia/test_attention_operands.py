"""Keys and values as attention's queries read them."""

from __future__ import annotations

import pytest
import torch

from tests.helpers import exact_floats
from tests.helpers.kernel_operands import FORMATS


@pytest.mark.parametrize("dtype", FORMATS)
def test_keys_and_values_are_laid_out_in_whole_blocks(dtype, device, monkeypatch):
    pytest.importorskip("triton", reason="there is no triton: pip install --no-deps triton")
    exact_floats.install(monkeypatch)
    from onlinequant_backend.kernels.nvidia.attention_operands import prepare

    torch.manual_seed(0)
    k, v = ((torch.randn(2, 41, 3, 40) + 9).half().to(device).transpose(1, 2) for _ in range(2))
    kq, k_scales, vq, v_scales = prepare(k, v, dtype, 64, 32)
    assert (kq.shape, k_scales.shape) == ((6, 64, 64), (6, 2))
    assert not kq[:, 41:].float().any() and not kq[..., 40:].float().any()
    keys = kq.float() * k_scales.repeat_interleave(32, 1)[..., None]
    lost = k.float().flatten(0, 1) - keys[:, :41, :40]
    assert float((lost - lost.mean(1, keepdim=True)).abs().max()) < 0.2  # all keys lose the same, nearly
    assert float((lost - 9).abs().max()) < 1
    if dtype is torch.int8:
        assert vq is None and v_scales is None
        return
    order = [16 * (lane // 16) + 8 * (lane // 2 % 2) + 2 * (lane // 4 % 4) + lane % 2 for lane in range(64)]
    values = torch.empty(6, 64, 64, device=device)
    values[:, order] = (vq.float() * v_scales.repeat_interleave(32, 1)[:, None]).mT
    torch.testing.assert_close(values[:, :41, :40], v.float().flatten(0, 1), rtol=1 / 16, atol=0.03)
    assert not values[:, 41:].any() and not values[..., 40:].any()
