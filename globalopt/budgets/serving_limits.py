"""Restrict a search to targets that a serving engine can hold: profiles of engines, as limits of every layer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace

from globalopt.errors import UnknownNameError, UsageError
from globalopt.protocols import Solver
from globalopt.values.budget import NO_LIMITS, Limits
from globalopt.values.storage import Storage


@dataclass(frozen=True)
class ServingProfile:
    """Describe the targets that a way of serving can hold.

    Args:
        format: the export format that it loads (`globalopt export --format`).
        limits: of every layer.
        pattern: the N:M pattern that every `S` must have; None: any.
        sparse_part: whether the solver must have a sparse part.
        low_rank_part: whether the solver must have a low-rank part, and at least one layer room for it.
        codes: whether numbers may be stored in fewer than 16 bits.

    >>> PROFILES["two-four"].choices()
    {'pattern': '2:4', 'scaling': 'activation'}
    """

    format: str
    limits: Limits = NO_LIMITS
    pattern: str | None = None
    sparse_part: bool = False
    low_rank_part: bool = False
    codes: bool = True

    def choices(self, pattern: str | None = None, scaling: str | None = None) -> dict[str, str]:
        """Fill in the pattern and the span scaling that were not given."""
        return {
            "pattern": pattern or self.pattern or "unstructured",
            "scaling": scaling or ("activation" if self.limits.sparse else "direct"),
        }


PROFILES: Mapping[str, ServingProfile] = {
    # An ordinary checkpoint holds any sum, also of numbers that another format stores in few bits.
    "dense": ServingProfile("dense"),
    # vLLM takes LoRA ranks up to 512; layers of one rank share a pattern, which keeps matching them cheap.
    "adapter": ServingProfile("adapter", Limits(rank_multiple=8, max_rank=512), low_rank_part=True, codes=False),
    # The one sparse product that GPUs have; any rank beside it.
    "two-four": ServingProfile("packed", pattern="2:4", sparse_part=True),
    # Two thin products, which are fast everywhere.
    "factors": ServingProfile("factors", Limits(sparse=False), low_rank_part=True, codes=False),
}


def get_profile(name: str) -> ServingProfile:
    """Look up a serving profile; `UnknownNameError` if there is none called `name`.

    >>> get_profile("adapter").limits.max_rank
    512
    """
    if name not in PROFILES:
        raise UnknownNameError("serving profile", name, PROFILES)
    return PROFILES[name]


def limits_of(profile: str, rank_multiple: int | None, max_rank: int | None = None) -> Limits:
    """Return the limits of a profile, with ranks in multiples of `rank_multiple` and at most `max_rank` if given.

    Raises:
        UsageError: `max_rank` is above the profile's own, or leaves no rank to a profile that needs some.

    >>> limits_of("factors", rank_multiple=16).floor(50), limits_of("adapter", None, max_rank=64).floor(100)
    (48, 64)
    """
    place = get_profile(profile)
    limits = place.limits
    if rank_multiple is not None:
        limits = replace(limits, rank_multiple=rank_multiple)
    if max_rank is None:
        return limits
    if limits.max_rank is not None and max_rank > limits.max_rank:
        raise UsageError(
            f"--serving-profile {profile} serves ranks up to {limits.max_rank}; lower --max-rank, which is {max_rank}."
        )
    if place.low_rank_part and max_rank < limits.rank_multiple:
        raise UsageError(
            f"--serving-profile {profile} needs some rank, of at least {limits.rank_multiple}, and --max-rank "
            f"{max_rank} leaves none. Raise --max-rank."
        )
    return replace(limits, max_rank=max_rank)


def check_storages(profile: str, storages: Iterable[Storage]) -> None:
    """Check that a profile holds numbers in the bits of `storages`.

    Raises:
        UsageError: it holds 16 bits alone, so that the bytes of a search in fewer would be those of no file.

    >>> check_storages("two-four", [Storage(4, 8)])
    >>> check_storages("adapter", [Storage(), Storage(4, 8)])
    Traceback (most recent call last):
    globalopt.errors.UsageError: --serving-profile adapter holds numbers of 16 bits alone, not of 4/8. Leave out ...
    """
    few = [str(storage) for storage in storages if not storage.plain]
    if few and not get_profile(profile).codes:
        raise UsageError(
            f"--serving-profile {profile} holds numbers of 16 bits alone, not of {few[0]}. Leave out --storage, or use "
            "another profile."
        )


def check_solver(profile: str, limits: Limits, solver: Solver) -> None:
    """Check that a solver meets targets within a profile and `limits`.

    Raises:
        UsageError: the solver lacks a part that the profile needs, or converts targets into some beyond the limits.

    >>> from solvers import get_solver
    >>> check_solver("adapter", limits_of("adapter", None), get_solver("3basil"))
    >>> check_solver("adapter", limits_of("adapter", None), get_solver("wanda"))
    Traceback (most recent call last):
    globalopt.errors.UsageError: --serving-profile adapter needs a solver with a low-rank part; wanda has none.
    """
    place = get_profile(profile)
    if (place.sparse_part and not solver.sparse) or (place.low_rank_part and not solver.low_rank):
        part = "sparse" if place.sparse_part else "low-rank"
        raise UsageError(f"--serving-profile {profile} needs a solver with a {part} part; {solver.name} has none.")
    if limits == NO_LIMITS:
        return
    if solver.signs:
        raise UsageError(f"Solver {solver.name} keeps a plane of signs of rank 1, which is not within limits of rank.")
    if limits.sparse and solver.low_rank and not solver.sparse:
        raise UsageError(
            f"Solver {solver.name} turns nonzeros into any rank; limits of rank need another solver, or "
            "--serving-profile factors."
        )
