"""Load exports as ordinary dense models, for evaluation."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from globalopt.errors import ArtefactError, one_line
from globalopt.export.adapter import ADAPTER, BASE, require_peft

if TYPE_CHECKING:
    from globalopt.models.loading import LoadedModel


def unpacked(loaded: LoadedModel) -> LoadedModel:
    """Replace the packed layers of a model by dense ones; a model without packed layers is returned as it is.

    >>> from globalopt.models.loading import load_model
    >>> from globalopt.reference import reference_folder
    >>> loaded = load_model(reference_folder(), device="cpu")
    >>> unpacked(loaded) is loaded
    True
    """
    from globalopt.export.quantizer import packed_embeddings, packed_layers

    model: Any = loaded.model
    if not any(True for found in (packed_layers(model), packed_embeddings(model)) for _ in found):
        return loaded
    model = model.dequantize()
    return replace(loaded, model=model.eval().requires_grad_(False))


def is_adapter_export(source: str | Path) -> bool:
    """Tell whether `source` is a folder of a sparse base and an adapter.

    >>> is_adapter_export("my-model")
    False
    """
    try:
        folder = Path(source).expanduser()
        return (folder / BASE / "config.json").is_file() and (folder / ADAPTER / "adapter_config.json").is_file()
    # Whoever loads the model says what is wrong with a name that is too long, or a folder that may not be entered.
    except (OSError, RuntimeError):
        return False


def load_adapter_export(
    folder: Path, dtype: str = "auto", device: str = "auto", trust_remote_code: bool = False
) -> LoadedModel:
    """Load an export of format adapter, with the adapter merged into the base.

    Args:
        dtype, device, trust_remote_code: as for `load_model`.
    Raises:
        ArtefactError: the adapter is broken or does not fit the base, or the base cannot be read (`load_model`).
        UsageError: peft is not installed.

    >>> from globalopt.export.adapter import export_adapter
    >>> from globalopt.export.example import example_run
    >>> export_adapter(example_run(), Path("exported"))
    >>> import warnings
    >>> with warnings.catch_warnings(action="ignore"):  # peft calls what transformers deprecates
    ...     model = load_adapter_export(Path("exported"), device="cpu").model
    >>> tuple(model.get_submodule("model.layers.0.mlp.up_proj").weight.shape)
    (24, 16)
    """
    from globalopt.models.loading import load_model
    from globalopt.models.quiet import quiet

    require_peft(f"{folder} is a base and an adapter, which need peft.")
    from peft import PeftModel

    folder = folder.expanduser()
    loaded = load_model(folder / BASE, dtype, device, trust_remote_code, lazily=False)
    try:
        with quiet():
            merged: Any = PeftModel.from_pretrained(loaded.model, str(folder / ADAPTER), local_files_only=True)
            model = merged.merge_and_unload()
    # peft raises errors of any kind for broken configs and files.
    except Exception as cause:
        reason = one_line(cause)
        raise ArtefactError(f"The adapter in {folder} cannot be loaded ({reason}). Export the run again.") from cause
    return replace(loaded, model=model.eval().requires_grad_(False), name=str(folder))
