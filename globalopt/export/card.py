"""Write the model card and the budget file that travel with a compressed model."""

from __future__ import annotations

import shutil
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load

from globalopt.runs.files import write_text
from globalopt.runs.folder import Run
from globalopt.values.metrics import Metrics
from globalopt.values.results import Summary

CARD, BUDGET = "README.md", "budget.json"

_KEPT = ("license", "license_name", "license_link", "language", "base_model")
"""Fields of a card that hold for a compressed copy too."""

_LOAD_DENSE = """from transformers import AutoModelForCausalLM

model = AutoModelForCausalLM.from_pretrained("FOLDER")"""
_LOAD_PACKED = f"import globalopt  # registers the packed format\n{_LOAD_DENSE}"
_LOAD_ADAPTER = """from peft import PeftModel
from transformers import AutoModelForCausalLM

base = AutoModelForCausalLM.from_pretrained("FOLDER/base")
model = PeftModel.from_pretrained(base, "FOLDER/adapter").merge_and_unload()"""
_LOAD_FACTORS = """from pathlib import Path

from globalopt.export.factors import read_factors

layers = dict(read_factors(Path("FOLDER")))"""

_FORMS: Mapping[str, tuple[str, str, str]] = {
    "dense": ("transformers", "This is an ordinary checkpoint with the sum of both parts.", _LOAD_DENSE),
    "base": ("transformers", "These are the sparse parts alone; the low-rank parts are in `adapter`.", _LOAD_ADAPTER),
    "adapter": ("peft", "These are the low-rank parts alone; the sparse parts are in `base`.", _LOAD_ADAPTER),
    "packed": ("globalopt", "This checkpoint is packed; no program can load it without globalopt.", _LOAD_PACKED),
    "factors": ("globalopt", "These are the parts of every layer as plain tensors, for research.", _LOAD_FACTORS),
}


def write_card(folder: Path, run: Run, summary: Summary, origin: Path | None, form: str, hub_id: str = "") -> None:
    """Write the model card and the budget file of a run to the model in `folder`.

    Args:
        summary: of the run, which may not have been written yet.
        origin: folder of the model that was compressed, or of the run's own model: its card names licence and language.
        form: "dense", "packed", "factors", or "base" and "adapter" for the two folders of that format.
        hub_id: of the model that was compressed, if it came from the hub.

    >>> from globalopt.export.example import example_run
    >>> run = Run.open(example_run())
    >>> write_card(run.model_folder, run, run.summary(), None, "dense")
    >>> print((run.model_folder / "README.md").read_text().splitlines()[8])
    # tiny, compressed by globalopt
    """
    facts = card_facts(origin)
    if hub_id:
        facts["base_model"] = hub_id
    write_text(folder / CARD, model_card(summary, facts, form))
    if run.budget_path.is_file():
        shutil.copyfile(run.budget_path, folder / BUDGET)


def card_facts(origin: Path | None) -> dict[str, Any]:
    """Read from the card in `origin` what holds for a compressed copy too; empty where there is no card.

    >>> from globalopt.reference import reference_folder
    >>> card_facts(reference_folder())
    {'license': 'apache-2.0', 'language': 'en'}
    """
    path = None if origin is None else origin / CARD
    if path is None or not path.is_file():
        return {}
    try:
        found = metadata_load(path)
    # Anybody writes cards; YAML that is broken raises errors of its own kind. The card then says that no licence is
    # known.
    except Exception:
        return {}
    return {name: found[name] for name in _KEPT if name in found} if isinstance(found, dict) else {}


def model_card(summary: Summary, facts: Mapping[str, Any], form: str = "dense") -> str:
    """Make the text of a model card.

    Args:
        facts: fields of the front matter, see `card_facts`.
        form: as in `write_card`.

    >>> from globalopt.export.example import example_run
    >>> card = model_card(Run.open(example_run(Path("another run"))).summary(), {"license": "mit"}, "packed")
    >>> "license: mit" in card, "import globalopt" in card
    (True, True)
    """
    library, contents, load = _FORMS[form]
    data = ModelCardData(
        **facts,
        library_name=library,
        pipeline_tag="text-generation",
        tags=["globalopt", "sparse", "low-rank"],
        ignore_metadata_errors=True,
    )
    name = _name(summary, facts)
    lines = ["---", data.to_yaml().strip(), "---", f"# {name}, compressed by globalopt", ""]
    lines += [
        f"{len(summary.layers)} linear layers of the decoder blocks were replaced by {_parts(summary)}. {contents}",
        "",
        "| | |",
        "|---|---|",
        *(f"| {key} | {value} |" for key, value in _rows(summary, facts, name).items()),
        "",
        *_measured(summary),
        "The budget file `budget.json` has the rank and the number of nonzeros of every layer. Made by:",
        "",
        f"    {' '.join(summary.command.split())}",
        "",
        "Load it with the path of this model in place of `FOLDER`:",
        "",
        "```python",
        load,
        "```",
    ]
    return "\n".join(lines) + "\n"


def _parts(summary: Summary) -> str:
    """Say what the layers consist of."""
    ranked = any(layer.rank for layer in summary.layers)
    if not any(layer.nnz for layer in summary.layers):
        return "low-rank products `U V`"
    return "a sparse matrix plus a low-rank product each, `S + U V`" if ranked else "sparse matrices"


def _name(summary: Summary, facts: Mapping[str, Any]) -> str:
    """Name the base model: its hub id, or the last part of its path."""
    hub_id = facts.get("base_model")
    return hub_id if isinstance(hub_id, str) else Path(summary.model).name or summary.model


def _rows(summary: Summary, facts: Mapping[str, Any], name: str) -> dict[str, str]:
    """Make the rows of the table: base model, licence, method, budget and versions."""
    licence = facts.get("license_name") or facts.get("license")
    unit = "bytes" if summary.accounting == "bytes" else "parameters"
    patterns = sorted({layer.pattern for layer in summary.layers if layer.pattern})
    storages = Counter(layer.storage for layer in summary.layers)
    beside = " and of the embeddings" if summary.embeddings else ""
    trained = "the whole model" if any(match.block is None for match in summary.matching) else "block by block"
    rows = {
        "base model": name,
        "weights of the base model": f"dequantised from {summary.quantisation}" if summary.quantisation else "",
        "licence": f"{licence}, that of the base model" if licence else "the base model's card names none",
        "method": f"solver {summary.solver}, allocator {summary.allocator}",
        "pattern": ", ".join(patterns),
        "bits of values and factors": "" if set(storages) == {"16"} else _bits(storages),
        "bits of embeddings": _embedding_bits(summary),
        "matched to the base model": trained if summary.matching else "no",
        "budget": f"{summary.asked:g} of the {unit} of {len(summary.layers)} layers{beside}: "
        f"{summary.used:,} of {summary.total:,} kept",
        "versions": ", ".join(f"{package} {number}" for package, number in summary.versions.items()),
    }
    return {key: value for key, value in rows.items() if value}


def _bits(storages: Mapping[str, int]) -> str:
    """Say how many layers have their numbers in how many bits, the most frequent first."""
    order = sorted(storages, key=lambda storage: (-storages[storage], storage))
    said = ", ".join(f"{storage} in {storages[storage]} layers" for storage in order)
    return f"{said}; as codes only in the formats packed and factors"


def _embedding_bits(summary: Summary) -> str:
    """Say in how many bits each embedding is stored; "" where the budget counts none."""
    if not summary.embeddings:
        return ""
    said = ", ".join(f"{each.bits} of {each.name}" for each in summary.embeddings)
    return f"{said}; as codes only in the format packed" if any(each.bits < 16 for each in summary.embeddings) else said


def _measured(summary: Summary) -> list[str]:
    """Make the table of what the run measured; a sentence where it measured nothing."""
    dense = {metrics.split: metrics for metrics in summary.dense}
    found = [metrics for metrics in summary.compressed if metrics.split in dense]
    if not found:
        return ["Not measured: the run left out the comparison with the base model.", ""]
    first = found[0]
    head = (
        f"Measured by the run on text that nothing was chosen on, {first.windows} windows of {first.seqlen} tokens of "
        f"each split, computed in {first.dtype}:"
    )
    table = ["| split | perplexity of the base model | perplexity | KL to the base model, nats per token |"]
    return [head, "", *table, "|---|---|---|---|", *(_line(dense[each.split], each) for each in found), ""]


def _line(dense: Metrics, compressed: Metrics) -> str:
    """Make the row of one split."""
    error = "" if compressed.kl_stderr is None else f" ± {compressed.kl_stderr:.2g}"
    kl = "not measured" if compressed.kl is None else f"{compressed.kl:.3g}{error}"
    before, after = (f"{each.perplexity:#.4g}".rstrip(".") for each in (dense, compressed))
    return f"| {compressed.split} | {before} | {after} | {kl} |"
