"""Round matrices to codes of few bits, every number to its nearest level, and decode them."""

from __future__ import annotations

import torch
from torch import Tensor

from globalopt.kernels.grid import SCALE, codes, fit_scales, levels, never_zero, spread
from globalopt.values.bits import pack_numbers, packed_size, unpack_numbers
from globalopt.values.embeddings import CodedMatrix
from globalopt.values.storage import GROUP

VERSION = 2
"""Raised whenever the codes of a matrix change."""

AT_ONCE = 2**22
"""Numbers that are rounded or decoded together: whole groups, and whole bytes of codes. Embeddings are large."""

LEAST = torch.finfo(torch.float32).tiny ** 0.5
"""Stands for numbers that are zero: a group of them would have no scale, and codes hold no zeros."""


@torch.no_grad()
def encode_matrix(W: Tensor, bits: int) -> CodedMatrix:
    """Round `W` (rows, width) to its nearest levels in groups of 64 in row-major order, on the CPU.

    Args:
        bits: of a number, at most 8.

    >>> coded = encode_matrix(torch.eye(64, 128), bits=8)
    >>> coded.nbytes, float((decode_matrix(coded, torch.float32) - torch.eye(64, 128)).abs().max()) < 0.01
    (8448, True)
    """
    packed, scales = [], []
    for part in W.detach().reshape(-1).split(AT_ONCE):
        numbers = part.cpu().float()
        numbers = torch.where(numbers == 0, LEAST, numbers)
        each = fit_scales(numbers, bits, GROUP)
        packed.append(pack_numbers(codes(numbers, spread(each, GROUP, len(numbers)), bits), bits))
        scales.append(each.to(SCALE))
    rows, width = W.shape
    return CodedMatrix(torch.cat(packed), torch.cat(scales), rows, width, bits)


@torch.no_grad()
def decode_matrix(coded: CodedMatrix, dtype: torch.dtype) -> Tensor:
    """Compute the matrix (rows, width) in `dtype` that codes stand for, on their device.

    >>> coded = encode_matrix(torch.tensor([[1.0, -1.0, 0.5, 0.0]]), bits=6)
    >>> decode_matrix(coded, torch.float32).mul(100).round().tolist()
    [[100.0, -100.0, 49.0, 2.0]]
    """
    n = coded.rows * coded.width
    found = torch.empty(n, dtype=dtype, device=coded.codes.device)
    for start in range(0, n, AT_ONCE):
        count = min(AT_ONCE, n - start)
        first = start * coded.bits // 8
        packed = coded.codes[first : first + packed_size(count, coded.bits)]
        scales = coded.scales[start // GROUP : -(-(start + count) // GROUP)].float()
        exact = levels(unpack_numbers(packed, coded.bits, count), spread(scales, GROUP, count), coded.bits)
        found[start : start + count] = never_zero(exact.to(dtype), exact)
    return found.view(coded.rows, coded.width)
