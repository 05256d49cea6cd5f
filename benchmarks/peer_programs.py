"""Run llm-compressor inside its own environment, for `peers.py`: one method on one model, saved as a plain model.

    python peer_programs.py JOB

globalopt need not be installed there. JOB is a JSON object of

    model, out      folders of the dense model and of the result
    dtype           in which the result is written, that of the dense model
    tokens          .npy of the token ids of the calibration windows (windows, tokens), which are read as they are
    batch_size      windows of a calibration batch
    layers          input width of every layer to compress, by name
    method          "sparsegpt", "wanda", "rtn" or "gptq"
    sparsity, mask_structure      of the first two
    bits, group_sizes             of the last two, the size of a group of weights by layer

Models compute in float32, as globalopt does on a CPU. Rounded weights are saved as the values that they stand for. The
versions of the packages are the last line of stdout, as JSON.
"""

# llm-compressor is installed in an environment of its own, where no type checker looks.
# pyright: reportMissingImports=false
from __future__ import annotations

import json
import sys
from collections import defaultdict
from collections.abc import Mapping
from importlib.metadata import version
from pathlib import Path
from typing import Any

import numpy as np

PACKAGES = ("llmcompressor", "compressed-tensors", "torch", "transformers")


def dataset(tokens: np.ndarray) -> Any:
    """Make a data set of windows, none of whose tokens are padding."""
    import datasets

    rows = tokens.tolist()
    return datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[1] * len(row) for row in rows]})


def groups(layers: Mapping[str, int], sizes: Mapping[str, int], bits: int) -> dict[str, Any]:
    """Describe a rounding of weights to nearest in `bits` bits, symmetric, with one 16-bit scale per group.

    Args:
        layers: to round. sizes: of the groups of a layer, by its name.

    >>> made = groups({"q": 64, "down": 128}, {"q": 64, "down": 128}, 4)
    >>> [(each["targets"], each["weights"]["group_size"]) for each in made.values()]
    [(['q'], 64), (['down'], 128)]
    """
    alike: dict[int, list[str]] = defaultdict(list)
    for name in layers:
        alike[sizes[name]].append(name)
    weights = {"num_bits": bits, "type": "int", "symmetric": True, "strategy": "group", "scale_dtype": "torch.bfloat16"}
    return {
        f"group_{number}": {"targets": names, "weights": {**weights, "group_size": size}}
        for number, (size, names) in enumerate(alike.items())
    }


def recipe(job: Mapping[str, Any]) -> Any:
    """Make the modifier of a job."""
    layers = job["layers"]
    if job["method"] in ("rtn", "gptq"):
        from llmcompressor.modifiers.gptq import GPTQModifier
        from llmcompressor.modifiers.quantization import QuantizationModifier

        kind = QuantizationModifier if job["method"] == "rtn" else GPTQModifier
        return kind(config_groups=groups(layers, job["group_sizes"], job["bits"]))
    from llmcompressor.modifiers.pruning import SparseGPTModifier, WandaPruningModifier

    kind = SparseGPTModifier if job["method"] == "sparsegpt" else WandaPruningModifier
    return kind(sparsity=job["sparsity"], mask_structure=job["mask_structure"], targets=list(layers))


def rounded(model: Any, names: Mapping[str, int]) -> dict[str, Any]:
    """Compute the values that the rounded weights of layers stand for, by the name of the parameter."""
    import torch
    from compressed_tensors.quantization.lifecycle.forward import fake_quantize

    values = {}
    for name in names:
        layer = model.get_submodule(name)
        args = layer.quantization_scheme.weights
        zero = getattr(layer, "weight_zero_point", None)
        zero = torch.zeros_like(layer.weight_scale) if zero is None else zero
        values[f"{name}.weight"] = fake_quantize(layer.weight, layer.weight_scale, zero, args)
    return values


def main(path: str) -> int:
    """Run one job."""
    import torch
    from llmcompressor import oneshot
    from transformers import AutoModelForCausalLM, AutoTokenizer

    job = json.loads(Path(path).read_text(encoding="utf-8"))
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    windows = np.load(job["tokens"])
    oneshot(
        model=model,
        tokenizer=tokenizer,
        recipe=recipe(job),
        dataset=dataset(windows),
        num_calibration_samples=len(windows),
        max_seq_length=windows.shape[1],
        shuffle_calibration_samples=False,
        pad_to_max_length=False,
        batch_size=job["batch_size"],
    )
    if job["method"] in ("rtn", "gptq"):
        # Its own way of saving keeps integers and scales, which only its own reader opens.
        with torch.no_grad():
            values = rounded(model, job["layers"])
        model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32)
        lost = set(values) - set(model.state_dict())
        if lost:
            raise ValueError(f"{sorted(lost)[0]} is no weight of the model in {job['model']}")
        model.load_state_dict(values, strict=False)
    model.to(getattr(torch, job["dtype"])).save_pretrained(job["out"])
    tokenizer.save_pretrained(job["out"])
    print(f"\n{json.dumps({package: version(package) for package in PACKAGES})}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1]))
