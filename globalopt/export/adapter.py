"""Format adapter: the sparse parts as an ordinary model (`base/`), the low-rank parts as a LoRA adapter (`adapter/`).

It is for fine-tuning `L` alone, or quantising `S` alone. Inference with an unmerged adapter is slower than with one
dense weight; PEFT's `merge_and_unload` sums the two.

By default the factors of every layer are padded with zeros to the largest rank. Converters and servers read one rank or
one alpha for all layers (llama.cpp, vLLM) and would scale layers of other ranks wrongly without a word.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors.torch import save_file
from torch import Tensor
from torch.nn.functional import pad
from transformers.pytorch_utils import Conv1D

from globalopt.errors import UnknownNameError, UsageError
from globalopt.export.source import Source, check_out, read_source
from globalopt.models.saving import save_dense
from globalopt.runs.files import replacing
from globalopt.values.layer import LayerSpec

if TYPE_CHECKING:
    from peft import LoraConfig

BASE, ADAPTER = "base", "adapter"
PADDED, OWN = "padded", "own"
RANKS = (PADDED, OWN)


def export_adapter(run: Path, folder: Path, trust_remote_code: bool = False, ranks: str = PADDED) -> None:
    """Export the model of a finished run as base and adapter to `folder`.

    Args:
        ranks: "padded": all layers have the largest rank, the factors of the others padded with zeros; "own": every
            layer has its own rank, which PEFT reads and others may not.
    Raises:
        ArtefactError: the run is missing, unfinished or broken, or `folder` holds something.
        UsageError: a layer has a plane of signs, which no adapter holds; or none has rank; or peft is not installed.

    >>> from globalopt.export.example import example_run
    >>> export_adapter(example_run(), Path("exported"))
    >>> sorted(path.name for path in Path("exported/adapter").iterdir() if path.suffix != ".md")
    ['adapter_config.json', 'adapter_model.safetensors']
    """
    if ranks not in RANKS:
        raise UnknownNameError("ranks", ranks, RANKS)
    check_out(folder)
    require_peft("--format adapter needs peft.")
    source = read_source(run, trust_remote_code)
    factors: dict[str, tuple[Tensor, Tensor]] = {}
    transposed = True
    for spec, value in source.values():
        if value.signs is not None:
            raise UsageError(
                f"Layer {spec.name} has a plane of signs, which no adapter holds. Use --format packed or dense."
            )
        if value.rank:
            factors[spec.name] = value.U, value.V
            transposed = transposed and isinstance(source.layers.module(spec.name), Conv1D)
        source.layers.place(spec.name, partial(_sparse_part, source, spec))
    if not factors:
        raise UsageError(f"No layer of {run} has rank; an adapter would be empty. Use --format dense or packed.")
    with replacing(folder) as staging:
        staging.mkdir()
        loaded, origin = source.loaded, source.run.saved_model
        save_dense(loaded.model, loaded.tokenizer, staging / BASE, source.dtype, origin)
        adapter = staging / ADAPTER
        adapter.mkdir()
        if ranks == PADDED:
            factors = _padded(factors)
        shown = {name: U.shape[1] for name, (U, _) in factors.items()}
        _lora_config(shown, transposed, folder.resolve() / BASE).save_pretrained(str(adapter))
        save_file(_lora_tensors(factors), adapter / "adapter_model.safetensors", metadata={"format": "pt"})
        for part in (BASE, ADAPTER):
            source.write_card(staging / part, part)


def _padded(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, tuple[Tensor, Tensor]]:
    """Pad `U` with zero columns and `V` with zero rows to the largest rank; the products stay the same."""
    most = max(U.shape[1] for U, _ in factors.values())
    return {
        name: (pad(U, (0, most - U.shape[1])), pad(V, (0, 0, 0, most - V.shape[0]))) for name, (U, V) in factors.items()
    }


def _sparse_part(source: Source, spec: LayerSpec) -> Tensor:
    """Read the sparse part of a layer in the stored dtype."""
    return source.run.layer(spec).S.to(source.dtype)


def _lora_tensors(factors: Mapping[str, tuple[Tensor, Tensor]]) -> dict[str, Tensor]:
    """Name the factors as PEFT does: `lora_A` is `V` (rank, d_in), `lora_B` is `U` (d_out, rank)."""
    tensors: dict[str, Tensor] = {}
    for name, (U, V) in factors.items():
        tensors[f"base_model.model.{name}.lora_A.weight"] = V.contiguous()
        tensors[f"base_model.model.{name}.lora_B.weight"] = U.contiguous()
    return tensors


def _lora_config(ranks: Mapping[str, int], transposed: bool, base: Path = Path(BASE)) -> LoraConfig:
    """Make the adapter's config; alpha is the rank everywhere, so that the scaling `alpha / rank` is 1.

    Where all ranks are equal there are no patterns. Layers of one rank share a pattern: PEFT matches every pattern
    against every module, and `re` caches few.

    Args:
        ranks: by layer name.
        transposed: whether the layers are GPT-2's `Conv1D`, which stores the transposed weight.
        base: folder of the base model.
    """
    from peft import LoraConfig

    names = defaultdict(list)
    for name, rank in ranks.items():
        names[rank].append(re.escape(name))
    patterns: Any = {f"(?:{'|'.join(each)})": rank for rank, each in names.items()} if len(names) > 1 else {}
    most = max(ranks.values())
    return LoraConfig(
        task_type="CAUSAL_LM",
        inference_mode=True,
        # PEFT takes a relative path for a name on the hub wherever the process is not beside it.
        base_model_name_or_path=str(base),
        r=most,
        lora_alpha=most,
        rank_pattern=patterns,
        alpha_pattern=dict(patterns),
        target_modules=list(ranks),
        init_lora_weights=False,
        fan_in_fan_out=transposed,
    )


def require_peft(why: str) -> None:
    """Check that peft is installed; `UsageError` that begins with `why` otherwise.

    >>> require_peft("--format adapter needs peft.")
    """
    try:
        import peft  # noqa: F401
    except ImportError:
        raise UsageError(f"{why} Install it with: pip install 'globalopt[adapter]'") from None
