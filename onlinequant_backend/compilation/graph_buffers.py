"""The buffers of a captured call: copies of tensors that keep strides and aliasing."""

from __future__ import annotations

from typing import Any

import torch
from torch.utils._pytree import tree_flatten, tree_leaves, tree_unflatten


def storage_address(tensor: torch.Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


def copied(outputs: Any) -> Any:
    """Copies of the outputs in new memory, with the same strides and the same aliasing among each other."""
    leaves, structure = tree_flatten(outputs)
    tensors = [leaf for leaf in leaves if isinstance(leaf, torch.Tensor)]
    copies = {storage_address(tensor): _bytes(tensor).clone().untyped_storage() for tensor in tensors}
    for i, leaf in enumerate(leaves):
        if isinstance(leaf, torch.Tensor):
            leaves[i] = torch.empty(0, dtype=leaf.dtype, device=leaf.device).set_(
                copies[storage_address(leaf)], leaf.storage_offset(), leaf.size(), leaf.stride()
            )
    return tree_unflatten(leaves, structure)


def copy_storages(outputs: Any, kept: Any) -> None:
    """Copy the storages of ``outputs`` into those of ``kept``, which are copies of outputs of the same function."""
    done = set[int]()
    for source, target in zip(tree_leaves(outputs), tree_leaves(kept), strict=True):
        if isinstance(source, torch.Tensor) and storage_address(target) not in done:
            done.add(storage_address(target))
            _bytes(target).copy_(_bytes(source))


def _bytes(tensor: torch.Tensor) -> torch.Tensor:
    """All of a tensor's storage."""
    return torch.empty(0, dtype=torch.uint8, device=tensor.device).set_(tensor.untyped_storage())


def without_repetitions(tensor: torch.Tensor) -> torch.Tensor:
    """An expanded tensor as it was before ``expand``: copying into repeated elements is not possible."""
    for dim, (size, stride) in enumerate(zip(tensor.size(), tensor.stride(), strict=True)):
        if stride == 0 and size > 1:
            tensor = tensor.narrow(dim, 0, 1)
    return tensor
