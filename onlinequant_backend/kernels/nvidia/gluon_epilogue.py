"""What becomes of the sums of ``gluon_conv``: scaled, biased, added to, and stored, a few columns at a time."""

# Gluon compiles neither (first, *others) nor early returns.
# ruff: noqa: RET505, RUF005

from __future__ import annotations

from triton.experimental import gluon
from triton.experimental.gluon import language as gl

from .gluon_names import async_store, fence_async_shared, store_wait


@gluon.jit
def _columns(x, PIECES: gl.constexpr):
    """``x`` [M, N] as a tuple of [M, N / PIECES], with no data moved between threads."""
    if PIECES == 1:
        return (x,)
    else:  # a return in each branch of a constexpr condition is what Gluon can compile
        left, right = x.reshape([x.shape[0], 2, x.shape[1] // 2]).permute(0, 2, 1).split()
        return _columns(left, PIECES // 2) + _columns(right, PIECES // 2)


@gluon.jit
def _pixels(place, sizes, BLOCK: gl.constexpr, PART: gl.constexpr, ROWS: gl.constexpr, layout: gl.constexpr):
    """Image, row of ``out`` as a matrix, and whether there is such a pixel: each [ROWS]."""
    n0, h0, w0, _ = place
    N, H_out, W_out, _, _, _, _ = sizes
    m = PART * ROWS + gl.arange(0, ROWS, layout)
    n = n0 + m // (BLOCK[1] * BLOCK[2])
    h = h0 + m // BLOCK[2] % BLOCK[1]
    w = w0 + m % BLOCK[2]
    return n, ((n * H_out + h) * W_out + w).to(gl.int64), (n < N) & (h < H_out) & (w < W_out)


@gluon.constexpr_function
def _chunk(dtype):
    """Columns that are stored at a time.

    A row of them in 16 bit is the 128 bytes of a box; more columns of 32 bit would not fit into the registers.
    """
    return 64 if dtype.primitive_bitwidth == 16 else 32


@gluon.jit
def _load_pieces(k0, n0, K, ends, layout: gl.constexpr, CHUNK: gl.constexpr, PIECES: gl.constexpr, BLOCK: gl.constexpr):
    """What each piece of columns is multiplied by and what is added to it, a tuple for each: [CHUNK], as stored."""
    _, _, scale, weight_scale, bias, channel_add, weight_stride, channel_stride = ends
    k = k0 + gl.arange(0, CHUNK, gl.SliceLayout(0, layout))
    inside = k < K
    factors = gl.load(weight_scale + k * weight_stride, mask=inside, other=0.0)
    piece = (gl.load(scale), factors)
    if bias is not None:
        piece = piece + (gl.load(bias + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    if channel_add is not None and BLOCK[0] == 1:  # all pixels are of one image
        piece = piece + (gl.load(channel_add + n0 * channel_stride + k, mask=inside, other=0.0),)  # type: ignore[assignment]
    if PIECES == 1:
        return (piece,)
    else:
        return (piece,) + _load_pieces(k0 + CHUNK, n0, K, ends, layout, CHUNK, PIECES - 1, BLOCK)


@gluon.jit
def load_coefficients(sums, place, sizes, ends, BLOCK: gl.constexpr):
    """As ``_load_pieces``, for all columns of ``sums``, whose values do not matter yet.

    Loaded while the last product still runs, for they come from far away.
    """
    CHUNK: gl.constexpr = _chunk(ends[0].dtype.element_ty)
    PIECES: gl.constexpr = sums.shape[1] // CHUNK
    whole: gl.constexpr = sums.type.layout
    like = _columns(gl.zeros([sums.shape[0], sums.shape[1]], gl.float32, whole), PIECES)
    layout: gl.constexpr = like[0].type.layout
    return _load_pieces(place[3], place[0], sizes[4], ends, layout, CHUNK, PIECES, BLOCK)


@gluon.jit
def _finished(sums, piece, k0, place, sizes, ends, BLOCK: gl.constexpr, PART: gl.constexpr):
    """Sums [ROWS, columns] scaled, biased and added to, in the dtype of ``out``."""
    out, _, _, _, _, channel_add, _, channel_stride = ends
    K = sizes[4]
    ROWS: gl.constexpr = sums.shape[0]
    COLUMNS: gl.constexpr = sums.shape[1]
    layout: gl.constexpr = sums.type.layout
    y = sums.to(gl.float32) * (piece[0] * piece[1])[None, :]
    for i in gl.static_range(2, len(piece)):
        y += piece[i].to(gl.float32)[None, :]
    if channel_add is not None and BLOCK[0] > 1:
        n, _, valid = _pixels(place, sizes, BLOCK, PART, ROWS, gl.SliceLayout(1, layout))
        k = k0 + gl.arange(0, COLUMNS, gl.SliceLayout(0, layout))
        at = n[:, None] * channel_stride + k[None, :]
        y += gl.load(channel_add + at, mask=valid[:, None] & (k < K)[None, :], other=0.0).to(gl.float32)
    return y.to(out.dtype.element_ty)


@gluon.jit
def _send(y, out_boxes, room, n0, h0, w0, k, BLOCK: gl.constexpr, PART: gl.constexpr):
    """Have ``y`` [ROWS, columns] stored by the TMA, which leaves out what is not in the image."""
    SIZE: gl.constexpr = out_boxes.block_shape
    store_wait(0)  # what was in the room before has left
    room.reshape([y.shape[0], y.shape[1]]).store(y)
    fence_async_shared()
    # Parts follow each other in the first dimension that is divided.
    at_n = n0 + PART * (BLOCK[0] - SIZE[0])
    at_h = h0 + PART * (BLOCK[1] - SIZE[1])
    at_w = w0 + PART * (BLOCK[2] - SIZE[2])
    async_store(out_boxes, [at_n, at_h, at_w, k], room)


@gluon.jit
def finish(sums, coefficients, room, place, sizes, ends, BLOCK: gl.constexpr, PART: gl.constexpr):
    """Finish ``sums`` [ROWS, BLOCK_K] and store them, some columns after the others: that needs less shared memory.

    With a descriptor of ``out`` they go through ``room`` and the TMA.
    """
    out, out_boxes, _, _, _, _, _, _ = ends
    n0, h0, w0, k0 = place
    K = sizes[4]
    WARPS: gl.constexpr = gl.num_warps()
    ROWS: gl.constexpr = sums.shape[0]
    CHUNK: gl.constexpr = _chunk(out.dtype.element_ty)
    PIECES: gl.constexpr = sums.shape[1] // CHUNK
    blocked: gl.constexpr = gl.BlockedLayout([1, 8], [4, 8], [WARPS, 1], [1, 0])
    pieces = _columns(sums, PIECES)
    for i in gl.static_range(PIECES):
        k = k0 + i * CHUNK
        y = _finished(pieces[i], coefficients[i], k, place, sizes, ends, BLOCK, PART)
        if out_boxes is not None:
            _send(y, out_boxes, room.index(PART), n0, h0, w0, k, BLOCK, PART)
        else:
            _, rows, valid = _pixels(place, sizes, BLOCK, PART, ROWS, gl.SliceLayout(1, blocked))
            c = k + gl.arange(0, CHUNK, gl.SliceLayout(0, blocked))
            mask = valid[:, None] & (c < K)[None, :]
            gl.store(out + rows[:, None] * K + c[None, :], gl.convert_layout(y, blocked), mask=mask)


@gluon.jit
def new_room(ends, otherwise, PARTS: gl.constexpr):
    """Shared memory for what is on its way to ``out``, if the TMA stores it."""
    out_boxes = ends[1]
    if out_boxes is None:
        return otherwise
    else:
        return gl.allocate_shared_memory(out_boxes.dtype, [PARTS] + out_boxes.block_shape, out_boxes.layout)
