"""The KL divergence from the predictions of a dense model, of which the most probable tokens are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

TOP = 1024
"""Most probable tokens of the dense model kept per position; all other tokens together count as one more."""


@dataclass(frozen=True, eq=False)
class Teacher:
    """Describe the predictions of the dense model on one chunk of windows.

    Args:
        tokens: (windows, T - 1, k) int32, the most probable next tokens.
        log_p: (windows, T - 1, k) float32, their log probabilities.
        tail: (windows, T - 1) float32, the probability of all others together.

    >>> dense, other = torch.randn(2, 3, 7, 50, generator=torch.Generator().manual_seed(0))
    >>> teacher = Teacher.of(dense, top=10)
    >>> teacher.tokens.shape, teacher.tail.shape
    (torch.Size([3, 7, 10]), torch.Size([3, 7]))
    >>> bool(teacher.kl(dense).abs().max() < 1e-6)
    True
    >>> bool((teacher.kl(other) <= Teacher.of(dense, top=50).kl(other)).all())
    True
    """

    tokens: Tensor
    log_p: Tensor
    tail: Tensor

    @classmethod
    def of(cls, logits: Tensor, top: int = TOP) -> Teacher:
        """Keep the `top` most probable tokens of `logits` (windows, T - 1, vocabulary) of the dense model."""
        log_p, tokens = logits.float().log_softmax(-1).topk(min(top, logits.shape[-1]), sorted=False)
        tail = (1 - log_p.exp().sum(-1)).clamp_min(0.0)
        if tokens.shape[-1] == logits.shape[-1]:
            tail.zero_()
        return cls(tokens.int(), log_p, tail)

    def to(self, device: torch.device) -> Teacher:
        """Move to a device."""
        return Teacher(self.tokens.to(device), self.log_p.to(device), self.tail.to(device))

    def kl(self, logits: Tensor) -> Tensor:
        """Compute the mean over positions of KL(dense || candidate), with the tail as one symbol.

        By the data processing inequality it is at most the full KL, and equal to it where the whole vocabulary was
        kept. The difference is `tail x KL` within the tail.

        Args:
            logits: (windows, T - 1, vocabulary) of the candidate.
        Returns:
            (windows,) float64, in nats per token.
        """
        log_q = logits.float()
        log_q = log_q.gather(-1, self.tokens.to(log_q.device).long()) - log_q.logsumexp(-1, keepdim=True)
        log_p, tail = self.log_p.to(log_q.device), self.tail.to(log_q.device)
        kl = (log_p.exp() * (log_p - log_q)).sum(-1)
        tiny = torch.finfo(tail.dtype).eps
        rest = (1 - log_q.exp().sum(-1)).clamp_min(tiny)
        kl = kl + torch.where(tail > tiny, tail * (tail.clamp_min(tiny) / rest).log(), 0.0)
        return kl.mean(-1).cpu().double()
