"""Exports as ordinary models in memory, to be measured like any other."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globalopt.errors import ArtefactError
from globalopt.export.adapter import ADAPTER, BASE, require_peft

if TYPE_CHECKING:
    from globalopt.models.loading import LoadedModel


def unpacked(loaded: LoadedModel) -> LoadedModel:
    """The model with ordinary linear layers in place of packed ones, each the sum of its parts; itself without such."""
    from globalopt.export.quantizer import packed_layers

    model: Any = loaded.model
    if not any(True for _ in packed_layers(model)):
        return loaded
    model = model.dequantize()
    return replace(loaded, model=model.eval().requires_grad_(False))


def is_adapter_export(source: str | Path) -> bool:
    """Whether `source` is a folder of a sparse base and an adapter."""
    folder = Path(source).expanduser()
    return (folder / BASE / "config.json").is_file() and (folder / ADAPTER / "adapter_config.json").is_file()


def load_adapter_export(
    folder: Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load base and adapter, merged.

    Raises:
        ArtefactError: the adapter is broken or does not fit the base, or the base cannot be read (`load_model`).
        UsageError: peft is not installed.
    """
    from globalopt.models.loading import load_model, quiet

    require_peft(f"{folder} is a base and an adapter, which need peft.")
    from peft import PeftModel

    folder = folder.expanduser()
    loaded = load_model(folder / BASE, dtype, device, trust_remote_code, lazily=False)
    try:
        with quiet():
            merged: Any = PeftModel.from_pretrained(loaded.model, str(folder / ADAPTER), local_files_only=True)
            model = merged.merge_and_unload()
    # peft raises anything on configs and files that are broken.
    except Exception as cause:
        reason = " ".join(str(cause).split())[:300] or type(cause).__name__
        raise ArtefactError(f"The adapter in {folder} cannot be loaded ({reason}). Export the run again.") from cause
    return replace(loaded, model=model.eval().requires_grad_(False), name=str(folder))
