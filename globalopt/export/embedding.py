"""Look up and multiply by embedding matrices that are stored as codes of few bits.

A packed embedding NAME has, in place of its weight,

    NAME.weight          uint8, 1-D   the codes, ceil(rows width bits / 8) bytes
    NAME.weight_scales   int16        the bits of a bfloat16 for every 64 numbers, in row-major order

A head that is tied to it has no tensors of its own and computes with the decoded matrix. A head with a matrix of its
own is an ordinary packed layer (`linear`).
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from globalopt.errors import ArtefactError
from globalopt.export.codes import SCALE_BITS, decode, decode_codes
from globalopt.export.linear import UNPACK
from globalopt.export.packing import unpacked_numbers
from globalopt.export.shape import SCALES
from globalopt.values.bits import packed_size
from globalopt.values.embeddings import CodedMatrix, Embedding
from globalopt.values.storage import GROUP

SCALED = "ScaledWordEmbedding"
"""End of the names of embedding classes of transformers that multiply a row by a number."""


@dataclass(frozen=True)
class EmbeddingShape:
    """Describe a packed embedding beside its tensors, as it stands in the config of a checkpoint.

    Args:
        rows, width: of the matrix. bits: of a number, 8 or 6.
        head: module path of the head that is tied to it; None without one.
    Raises:
        ArtefactError: there is no such embedding.

    >>> shape = EmbeddingShape(rows=100, width=64, bits=6, head="lm_head")
    >>> shape.tensors(), shape.bytes
    ({'weight': (4800,), 'weight_scales': (100,)}, 5000)
    """

    rows: int
    width: int
    bits: int
    head: str | None = None

    def __post_init__(self) -> None:
        sizes = (self.rows, self.width, self.bits)
        whole = all(isinstance(size, int) and not isinstance(size, bool) and size > 0 for size in sizes)
        if not whole or self.bits not in (8, 6) or not isinstance(self.head, str | None):
            raise ArtefactError(f"A packed embedding of {self.rows} x {self.width} in {self.bits} bits is none.")

    def record(self) -> dict[str, Any]:
        """Return the description as JSON values; a head is named where one is tied."""
        tied = {} if self.head is None else {"head": self.head}
        return {"rows": self.rows, "width": self.width, "bits": self.bits, **tied}

    @classmethod
    def parse(cls, record: Any) -> EmbeddingShape:
        """Parse what `record` returns; `ArtefactError` if it is something else."""
        try:
            return cls(**record)
        except TypeError:
            raise ArtefactError(f"{str(record)[:120]} does not describe a packed embedding.") from None

    @property
    def numel(self) -> int:
        """Count the numbers of the matrix."""
        return self.rows * self.width

    def tensors(self) -> dict[str, tuple[int, ...]]:
        """Return the shapes of the tensors by name."""
        return {"weight": (packed_size(self.numel, self.bits),), "weight" + SCALES: (-(-self.numel // GROUP),)}

    @staticmethod
    def dtype(name: str) -> torch.dtype:
        """Return the type of the tensor `name`."""
        return SCALE_BITS if name.endswith(SCALES) else torch.uint8

    @property
    def bytes(self) -> int:
        """Count the bytes of the tensors."""
        return sum(self.dtype(name).itemsize * math.prod(size) for name, size in self.tensors().items())

    @property
    def aligned(self) -> bool:
        """Tell whether every row begins with a group of its own, so that it is decoded by itself."""
        return self.width % GROUP == 0


class PackedEmbedding(nn.Module):
    """Look up rows of a matrix that is stored as codes, and decode these rows alone.

    Where groups span rows (a width that is no multiple of 64), and where a tied head computes with the whole matrix,
    that is decoded once and stays in memory beside the codes; with `compute` "unpack" it is decoded anew in every call.

    Args:
        shape: of the matrix.
        old: the embedding that it replaces, whose number a row is multiplied by.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> dense = nn.Embedding(10, 64)
    >>> packed = PackedEmbedding.of(encode_matrix(dense.weight, bits=8), dense, torch.float32)
    >>> ids = torch.tensor([[3, 7]])
    >>> packed(ids).shape, bool((packed(ids) - dense(ids)).abs().max() < 0.05)
    (torch.Size([1, 2, 64]), True)
    """

    weight: nn.Parameter
    weight_scales: Tensor

    def __init__(
        self, shape: EmbeddingShape, old: nn.Embedding, dtype: torch.dtype, device: torch.device | str | None = None
    ) -> None:
        super().__init__()
        self.shape, self.compute = shape, "auto"
        self.num_embeddings, self.embedding_dim = shape.rows, shape.width
        self._kind, self._padding_idx, self._scale = type(old), old.padding_idx, _scale_of(old)
        # Classes that hold the number as a tensor round it to the type of the weight.
        self._rounds_scale = isinstance(getattr(old, "embed_scale", None), Tensor)
        self._dtype = dtype
        self._held: Tensor | None = None
        made = {
            name: torch.empty(size, dtype=shape.dtype(name), device=device) for name, size in shape.tensors().items()
        }
        self.weight = nn.Parameter(made["weight"], requires_grad=False)
        self.register_buffer("weight_scales", made["weight" + SCALES])

    @classmethod
    def of(cls, coded: CodedMatrix, old: nn.Embedding, dtype: torch.dtype, head: str | None = None) -> PackedEmbedding:
        """Make the packed form of `old` from its codes, to compute in `dtype`; `head` is tied to it."""
        made = cls(EmbeddingShape(coded.rows, coded.width, coded.bits, head), old, dtype, "meta")
        made.weight = nn.Parameter(coded.codes, requires_grad=False)
        made.weight_scales = coded.scales.view(SCALE_BITS)
        return made

    @property
    def dtype(self) -> torch.dtype:
        """The floating-point type that rows are decoded in."""
        return self._dtype

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> PackedEmbedding:
        """Apply a cast or a move; codes stay, and are decoded in the new type from then on."""
        self._dtype, self._held = fn(torch.empty(0, dtype=self._dtype)).dtype, None
        return super()._apply(fn, recurse)

    def use(self, compute: str) -> None:
        """Decode the matrix anew in every call with "unpack"; else keep it where it is needed as a whole."""
        self.compute, self._held = compute, None

    def matrix(self) -> Tensor:
        """Decode the whole matrix (rows, width); `ArtefactError` where the tensors do not describe one."""
        numbers = decode(self.weight, self.weight_scales, self.shape.bits, self.shape.numel, self._dtype)
        return numbers.view(self.shape.rows, self.shape.width)

    def whole(self) -> Tensor:
        """Return the whole matrix, decoded now or, but for "unpack", at the first call."""
        if self.compute == UNPACK:
            return self.matrix()
        if self._held is None:
            # A matrix made in inference mode could not be differentiated through.
            with torch.inference_mode(False), torch.no_grad():
                self._held = self.matrix()
        return self._held

    def forward(self, input_ids: Tensor) -> Tensor:
        """Look up the rows of `input_ids` (...) -> (..., width)."""
        if self._held is None and self.shape.aligned:
            rows = self._rows(input_ids.flatten()).view(*input_ids.shape, self.shape.width)
        else:
            rows = F.embedding(input_ids, self.whole())
        if self._scale is None:
            return rows
        return rows * (rows.new_tensor(self._scale) if self._rounds_scale else self._scale)

    def _rows(self, ids: Tensor) -> Tensor:
        """Decode the rows `ids` (n,) alone, (n, width)."""
        how, n = self.shape, len(ids)
        if not n:
            return torch.empty(0, how.width, dtype=self._dtype, device=ids.device)
        codes = self.weight.view(how.rows, -1)[ids].flatten()
        scales = self.weight_scales.view(how.rows, -1)[ids].flatten()
        numbers = unpacked_numbers(codes, how.bits, n * how.width)
        return decode_codes(numbers, scales, how.bits, self._dtype).view(n, how.width)

    def dense(self, dtype: torch.dtype | None = None) -> nn.Embedding:
        """Make the ordinary embedding of the same rows."""
        W = self.matrix().to(dtype or self._dtype)
        scale = {} if self._scale is None else {"embed_scale": self._scale}
        kind: Any = self._kind
        # Of one row: its numbers are replaced, and making them all would take time and memory.
        made = kind(1, 1, None, **scale).to(W.device)
        made.num_embeddings, made.embedding_dim, made.padding_idx = *W.shape, self._padding_idx
        made.weight = nn.Parameter(W, requires_grad=False)
        return made

    def extra_repr(self) -> str:
        """Describe the embedding in the printed model."""
        return f"{self.shape.rows}, {self.shape.width}, bits={self.shape.bits}"


class TiedHead(nn.Module):
    """Compute the logits `y = W x` with the matrix `W` of a packed embedding.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> dense = nn.Embedding(10, 64)
    >>> packed = PackedEmbedding.of(encode_matrix(dense.weight, bits=8), dense, torch.float32)
    >>> TiedHead(packed)(torch.ones(1, 64)).shape
    torch.Size([1, 10])
    """

    def __init__(self, embedding: PackedEmbedding) -> None:
        super().__init__()
        self.in_features, self.out_features = embedding.shape.width, embedding.shape.rows
        # transformers ties it to that of the embedding: the codes, which the state dict then holds once.
        self.weight = embedding.weight
        # No module of this one, or its tensors would be saved a second time.
        self.__dict__["embedding"] = embedding

    def forward(self, x: Tensor) -> Tensor:
        """Compute the logits of `x` (..., width) -> (..., rows)."""
        embedding: PackedEmbedding = self.__dict__["embedding"]
        return F.linear(x, embedding.whole().to(x.device))

    def extra_repr(self) -> str:
        """Describe the head in the printed model."""
        return f"{self.in_features}, {self.out_features}, tied"


def packable(module: nn.Module, head: nn.Module | None) -> bool:
    """Tell whether an embedding can be packed: it looks up rows, and at most multiplies them by a number.

    Args:
        head: that is tied to it; one with a bias cannot be packed.

    >>> packable(nn.Embedding(4, 4), None), packable(nn.Linear(4, 4), None)
    (True, False)
    """
    if not isinstance(module, nn.Embedding) or module.max_norm is not None:
        return False
    if head is not None and getattr(head, "bias", None) is not None:
        return False
    scaled = type(module).__name__.endswith(SCALED) and _scale_of(module) is not None
    return type(module) is nn.Embedding or scaled


def pack_embedding(model: Any, each: Embedding, coded: CodedMatrix, dtype: torch.dtype) -> EmbeddingShape | None:
    """Pack a token embedding of a model, and the head that is tied to it, in place.

    Returns:
        its description; None where it cannot be packed and stays as it is.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> coded = encode_matrix(model.lm_head.weight, bits=8)
    >>> pack_embedding(model, Embedding("model.embed_tokens", 64, 16, 8), coded, torch.float32)
    EmbeddingShape(rows=64, width=16, bits=8, head=None)
    """
    old, head = model.get_submodule(each.name), model.get_output_embeddings()
    tied = head is not None and getattr(head, "weight", None) is old.weight
    if not packable(old, head if tied else None):
        return None
    name = next(path for path, module in model.named_modules() if module is head) if tied else None
    made = PackedEmbedding.of(coded, old, dtype, name)
    model.set_submodule(each.name, made)
    if name is not None:
        model.set_submodule(name, TiedHead(made))
    return made.shape


def place_empty(model: Any, name: str, shape: EmbeddingShape, dtype: torch.dtype) -> None:
    """Replace an embedding of a model, and its tied head, by empty packed ones, before weights are loaded.

    Raises:
        ArtefactError: the architecture has no such embedding or head, or one of another shape.

    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> place_empty(model, "model.embed_tokens", EmbeddingShape(64, 16, 8), torch.float32)
    >>> model.model.embed_tokens.weight.dtype
    torch.uint8
    """
    try:
        old = model.get_submodule(name)
        head = None if shape.head is None else model.get_submodule(shape.head)
    except AttributeError:
        raise ArtefactError(f"The packed model has an embedding {name} that its architecture has not.") from None
    if not packable(old, head) or not isinstance(head, nn.Linear | None):
        raise ArtefactError(f"{name} is no embedding of this architecture that can be packed; the model is broken.")
    if tuple(old.weight.shape) != (shape.rows, shape.width):
        raise ArtefactError(
            f"Embedding {name} is {' x '.join(map(str, old.weight.shape))} in this architecture and {shape.rows} x "
            f"{shape.width} in the packed model."
        )
    made = PackedEmbedding(shape, old, dtype, "meta")
    model.set_submodule(name, made)
    if shape.head is not None:
        model.set_submodule(shape.head, TiedHead(made))


def unpack_embedding(model: Any, name: str, packed: PackedEmbedding, dtype: torch.dtype | None = None) -> None:
    """Replace a packed embedding of a model, and the head that is tied to it, by ordinary ones.

    >>> from globalopt.embeddings.coding import encode_matrix
    >>> from globalopt.reference.tiny import tiny_llama
    >>> model = tiny_llama()
    >>> each, coded = Embedding("model.embed_tokens", 64, 16, 8), encode_matrix(model.lm_head.weight, bits=8)
    >>> _ = pack_embedding(model, each, coded, torch.float32)
    >>> unpack_embedding(model, each.name, model.model.embed_tokens)
    >>> type(model.model.embed_tokens).__name__
    'Embedding'
    """
    made = packed.dense(dtype)
    model.set_submodule(name, made)
    if packed.shape.head is not None:
        with torch.device("meta"):
            head = nn.Linear(packed.shape.width, packed.shape.rows, bias=False)
        head.weight = made.weight
        model.set_submodule(packed.shape.head, head)


def _scale_of(module: nn.Module) -> float | None:
    """Return the number that an embedding multiplies a row by; None where it has none that can be read."""
    for field in ("scalar_embed_scale", "embed_scale"):
        scale = getattr(module, field, None)
        if isinstance(scale, int | float):
            return float(scale)
    return None
