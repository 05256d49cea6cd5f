"""The memory that a dry run states is an upper bound of what a whole search takes, measured in a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from globalopt.machine.memory import size_text
from tests.command import write_text
from tests.tiny_models import VOCAB, save_tiny

LOOSE = 1.6
"""Times what was measured that an estimate may be; most of it is the libraries, of which all models need the same."""


def output_of(words: list[str]) -> Any:
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"}
    done = subprocess.run(words, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_a_search_takes_no_more_memory_than_its_dry_run_states(tmp_path: Path) -> None:
    folder = save_tiny(tmp_path / "model")
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=VOCAB,
        hidden_size=256,
        intermediate_size=512,
        num_hidden_layers=2,
        num_attention_heads=8,
        max_position_embeddings=64,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    LlamaForCausalLM(config).save_pretrained(folder)
    text = write_text(tmp_path / "text.txt")
    run = tmp_path / "run"
    words = [sys.executable, "-m", "globalopt", "search", str(folder), "--calibration", str(text), "--device", "cpu"]
    words += ["--nsamples", "16", "--seqlen", "32", "--eval-windows", "4", "--effort", "quick"]
    # What is held depends on sizes, and on no number of steps.
    words += ["--set", "steps=20", "--match-set", "epochs=1", "--search-tokens", "1000"]
    words += ["--out", str(run), "--json"]
    stated = output_of([*words, "--dry-run"])["peak_bytes"]
    output_of(words)
    stages = json.loads((run / "summary.json").read_text())["stages"]
    measured = max(stage["peak_bytes"] for stage in stages)
    assert measured <= stated <= LOOSE * measured, (size_text(measured), size_text(stated), stages)
