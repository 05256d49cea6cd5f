"""Hold the token ids of one forward pass."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from globalopt.errors import CalibrationError


@dataclass(frozen=True, eq=False)
class Batch:
    """Hold the token ids of one forward pass, and a mask of the real tokens among them.

    Args:
        input_ids: (b, t) int64.
        attention_mask: (b, t), 1 for a real token and 0 for padding, or None if all are real.
    Raises:
        CalibrationError: the ids or the mask have another shape or type, or no token is real.

    >>> batch = Batch(torch.tensor([[5, 6, 7], [8, 0, 0]]), attention_mask=torch.tensor([[1, 1, 1], [1, 0, 0]]))
    >>> batch.tokens, tuple(batch.select(torch.zeros(2, 3, 16)).shape)
    (4, (4, 16))
    """

    input_ids: Tensor
    attention_mask: Tensor | None = None

    def __post_init__(self) -> None:
        ids, mask = self.input_ids, self.attention_mask
        if ids.ndim != 2 or not ids.numel() or ids.dtype != torch.long:
            raise CalibrationError(f"A batch is (b, t) int64 token ids; got {tuple(ids.shape)} of {ids.dtype}.")
        if mask is not None and mask.shape != ids.shape:
            raise CalibrationError(f"The mask {tuple(mask.shape)} does not match the token ids {tuple(ids.shape)}.")
        if mask is not None and not bool(mask.any()):
            raise CalibrationError("The mask of a batch leaves no token; drop the batch.")

    @property
    def real(self) -> Tensor | None:
        """Return the mask of the real tokens, (b t,) bool, or None if all are real."""
        if self.attention_mask is None or bool(self.attention_mask.all()):
            return None
        return self.attention_mask.bool().flatten()

    @property
    def tokens(self) -> int:
        """Count the real tokens."""
        return self.input_ids.numel() if self.attention_mask is None else int(self.attention_mask.count_nonzero())

    def select(self, x: Tensor) -> Tensor:
        """Select the rows of real tokens from `x` (b, t, d) or (b t, d), as (tokens, d).

        Raises:
            CalibrationError: the batch is padded, and `x` does not have a row per token, as in a model that routes
                tokens.
        """
        rows = x.reshape(-1, x.shape[-1])
        real = self.real
        if real is None:
            return rows
        if len(rows) != len(real):
            raise CalibrationError(
                f"{len(rows)} rows came out of a padded batch of {len(real)} tokens, so padding cannot be told apart: "
                "the model routes tokens. Use windows without padding."
            )
        return rows[real.to(rows.device)]
