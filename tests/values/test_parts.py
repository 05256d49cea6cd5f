"""Bytes of a layer by part: they add up, and are those of the packed numbers."""

from __future__ import annotations

import itertools

import numpy as np
import pytest

from globalopt.values.budget import Parts, Target, bytes_by_part
from globalopt.values.layer import NM, Shape
from globalopt.values.storage import GROUP, PLAIN, Storage, number_bytes

SHAPE = Shape(48, 80)
STORAGES = (PLAIN, Storage(8, 8), Storage(4, 8), Storage(3, 16), Storage(16, 5))


@pytest.mark.parametrize("storage", STORAGES, ids=str)
@pytest.mark.parametrize("pattern", [None, NM(2, 4)], ids=str)
def test_parts_add_up_to_the_bytes(storage, pattern):
    for rank, nnz in itertools.product((0, 1, 7), (0, 1, GROUP, 1921, SHAPE.numel)):
        kept = nnz if pattern is None else pattern.nnz(SHAPE)
        target = Target(rank, kept, pattern, storage=storage)
        parts = target.parts(SHAPE)
        assert sum(parts) == target.bytes(SHAPE)
        assert all(isinstance(part, int) and part >= 0 for part in parts)
        # Numbers with their scales, counted the other way round: by where they are, not by what they are.
        assert parts.values + parts.factors + parts.scales == storage.value_bytes(kept) + storage.factor_bytes(
            rank, 48, 80
        )
        assert (parts.scales == 0) == ((storage.values == 16 or not kept) and (storage.factors == 16 or not rank))
        assert (parts.index == 0) == (kept in (0, SHAPE.numel))


def test_a_part_by_hand():
    # 100 codes of 3 bits are 38 bytes in 2 groups; 48 and 80 of 8 bits are 1 and 2 groups; a bitmap of 3840 bits.
    target = Target(1, 100, storage=Storage(3, 8))
    assert target.parts(SHAPE) == Parts(values=38, index=396, scales=4 + 2 + 4, factors=128, signs=0)
    # Column indices, 2 x 100 + 4 x 49, are smaller than the bitmap of 480.
    assert Target(2, 3840, signs=True).parts(SHAPE) == Parts(values=7680, index=0, scales=0, factors=512, signs=480)


def test_a_layer_with_few_zeros_is_stored_whole_in_16_bits_and_not_in_fewer():
    numel, bitmap = SHAPE.numel, SHAPE.numel // 8
    assert [Target(0, n).bytes(SHAPE) for n in (numel - 1, numel - bitmap // 2, numel - bitmap // 2 - 1)] == [
        2 * numel,
        2 * numel,
        2 * numel - 2,
    ]
    assert Target(0, numel - 1).parts(SHAPE) == Target(0, numel).parts(SHAPE)
    eight = Storage(8)
    assert Target(0, numel - 1, storage=eight).bytes(SHAPE) == eight.value_bytes(numel - 1) + bitmap


def test_arrays_are_counted_as_single_targets_are():
    nnz, bits = np.array([0, 64, 65, 3840, 3839, 3839]), np.array([16, 8, 4, 3, 16, 8])
    parts = bytes_by_part(2, nnz, 0, 48, 80, 0, bits, 8)
    for i, (n, b) in enumerate(zip(nnz.tolist(), bits.tolist(), strict=True)):
        one = Target(2, n, storage=Storage(b, 8)).parts(SHAPE)
        assert [int(np.broadcast_to(part, nnz.shape)[i]) for part in parts] == list(one)
    assert parts.total.tolist() == np.sum(np.broadcast_arrays(*parts), axis=0).tolist()
    assert number_bytes(nnz, bits).tolist() == [0, 66, 33 + 4, 1440 + 120, 7678, 3839 + 120]
