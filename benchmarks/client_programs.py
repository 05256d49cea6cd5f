"""What `clients.py` runs inside the environment of a client: load a model with it, and write what it predicts.

    python client_programs.py PROGRAM FOLDER TOKENS OUT [--ignore-mismatched]

globalopt need not be installed there. TOKENS is a .npy of token ids (tokens,); OUT becomes a .npy (tokens, vocabulary)
of log probabilities of the next token, computed in float32 on the CPU, NaN where the client does not say them. The
exit code is 3 where the client raised an error, whose text is the last thing on stdout, after a line of dashes.
"""

# The clients are installed in environments of their own, where no type checker looks.
# pyright: reportMissingImports=false, reportCallIssue=false, reportAttributeAccessIssue=false
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np

RULE = "-" * 20
REFUSED = 3


def log_softmax(logits: Any) -> np.ndarray:
    """Log probabilities (tokens, vocabulary) of logits of the same shape."""
    values = np.asarray(logits, dtype=np.float64)
    values = values - values.max(-1, keepdims=True)
    return values - np.log(np.exp(values).sum(-1, keepdims=True))


def by_torch(model: Any, tokens: np.ndarray) -> np.ndarray:
    import torch

    with torch.inference_mode():
        return log_softmax(model(input_ids=torch.tensor(tokens)[None]).logits[0].float().numpy())


def transformers(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import torch
    from transformers import AutoModelForCausalLM

    # transformers 4.57 knows both names of the type, and older ones `torch_dtype` alone.
    model = AutoModelForCausalLM.from_pretrained(folder, torch_dtype=torch.float32, ignore_mismatched_sizes=ignore)
    return by_torch(model.eval(), tokens)


def tokenizer(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    """The tokenizer loads and returns the tokens of their own text; nothing is predicted."""
    from transformers import AutoTokenizer

    loaded = AutoTokenizer.from_pretrained(folder)
    again = loaded(loaded.decode(tokens.tolist()), add_special_tokens=False)["input_ids"]
    if again != tokens.tolist():
        raise ValueError("the tokenizer gives other tokens")
    return np.full((len(tokens), len(loaded)), np.nan)


def packed(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import globalopt  # noqa: F401

    return transformers(folder, tokens, ignore)


def packed_again(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    """Saved and loaded again, then made dense."""
    import torch
    from transformers import AutoModelForCausalLM

    import globalopt  # noqa: F401

    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    with tempfile.TemporaryDirectory() as place:
        model.save_pretrained(place)
        model.dequantize()
        loaded: Any = AutoModelForCausalLM.from_pretrained(place)
        return by_torch(loaded.dequantize().eval(), tokens)


def peft(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import torch
    from peft import AutoPeftModelForCausalLM

    return by_torch(AutoPeftModelForCausalLM.from_pretrained(folder / "adapter", dtype=torch.float32).eval(), tokens)


def peft_merged(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import torch
    from peft import PeftModel
    from transformers import AutoModelForCausalLM

    base = AutoModelForCausalLM.from_pretrained(folder / "base", dtype=torch.float32)
    return by_torch(PeftModel.from_pretrained(base, str(folder / "adapter")).merge_and_unload().eval(), tokens)


def lm_eval(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import torch
    from lm_eval.models.huggingface import HFLM

    adapter = {"peft": str(folder / "adapter")} if (folder / "base").is_dir() else {}
    where = folder / "base" if adapter else folder
    model = HFLM(pretrained=str(where), dtype="float32", device="cpu", batch_size=1, **adapter)
    with torch.inference_mode():
        return log_softmax(model._model_call(torch.tensor(tokens)[None])[0].float().numpy())


def ctranslate2(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import ctranslate2
    from ctranslate2.converters import TransformersConverter
    from transformers import AutoTokenizer

    words = AutoTokenizer.from_pretrained(folder).convert_ids_to_tokens(tokens.tolist())
    with tempfile.TemporaryDirectory() as place:
        TransformersConverter(str(folder)).convert(place, quantization="float32", force=True)
        generator = ctranslate2.Generator(place, device="cpu", compute_type="float32")
        return log_softmax(np.array(generator.forward_batch([words]))[0])


def onnxruntime(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    import torch
    from optimum.onnxruntime import ORTModelForCausalLM

    model = ORTModelForCausalLM.from_pretrained(folder, export=True, use_cache=False, use_io_binding=False)
    ids = torch.tensor(tokens)[None]
    return log_softmax(model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0].float().numpy())


def llama_cpp(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    """llama.cpp's converters, then its library, with a LoRA adapter where the folder has one.

    The source of llama.cpp is `llama.cpp` in the folder of the environment.
    """
    import torch
    from llama_cpp import Llama

    source = Path(sys.prefix) / "llama.cpp"
    base = folder / "base" if (folder / "base").is_dir() else folder
    with tempfile.TemporaryDirectory() as place:
        model, adapter = Path(place) / "model.gguf", Path(place) / "adapter.gguf"
        _converted("convert_hf_to_gguf.py", source, "--outtype", "f32", "--outfile", model, base)
        options: dict[str, Any] = {}
        if base != folder:
            words = ("--outtype", "f32", "--outfile", adapter, "--base", base, folder / "adapter")
            _converted("convert_lora_to_gguf.py", source, *words)
            options["lora_path"] = str(adapter)
        loaded = Llama(str(model), n_ctx=512, logits_all=True, verbose=False, **options)
        loaded.eval(tokens.tolist())
        return log_softmax(torch.tensor(loaded.scores[: len(tokens)]).numpy())


def _converted(name: str, source: Path, *words: object) -> None:
    """Run a converter; its last line is the error where it fails."""
    done = subprocess.run(
        [sys.executable, str(source / name), *map(str, words)], capture_output=True, text=True, check=False
    )
    if done.returncode:
        raise RuntimeError((done.stderr.strip() or "no message").splitlines()[-1])


def vllm(folder: Path, tokens: np.ndarray, ignore: bool) -> np.ndarray:
    from transformers import AutoConfig
    from vllm import LLM, SamplingParams

    adapter = folder / "adapter" if (folder / "base").is_dir() else None
    where = folder / "base" if adapter else folder
    size = AutoConfig.from_pretrained(where).vocab_size
    lora: dict[str, Any] = {"enable_lora": True, "max_lora_rank": 512} if adapter else {}
    # By default it takes nearly all memory of the machine for its cache.
    sizes = {"max_model_len": 256, "max_logprobs": 20, "gpu_memory_utilization": 0.3}
    model = LLM(str(where), dtype="float32", enforce_eager=True, **sizes, **lora)
    more: dict[str, Any] = {}
    if adapter:
        from vllm.lora.request import LoRARequest

        more["lora_request"] = LoRARequest("adapter", 1, str(adapter))
    asked = SamplingParams(max_tokens=1, prompt_logprobs=20)
    made = model.generate([{"prompt_token_ids": tokens.tolist()}], asked, **more)[0]
    found = np.full((len(tokens), size), np.nan)
    # What it says of a position is predicted by the one before.
    for place, known in enumerate((made.prompt_logprobs or [])[1:]):
        for token, each in (known or {}).items():
            found[place, token] = each.logprob
    return found


PROGRAMS: dict[str, Callable[[Path, np.ndarray, bool], np.ndarray]] = {
    "transformers": transformers,
    "tokenizer": tokenizer,
    "packed": packed,
    "packed-again": packed_again,
    "peft": peft,
    "peft-merged": peft_merged,
    "lm-eval": lm_eval,
    "ctranslate2": ctranslate2,
    "onnxruntime": onnxruntime,
    "llama.cpp": llama_cpp,
    "vllm": vllm,
}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", choices=PROGRAMS)
    parser.add_argument("folder", type=Path)
    parser.add_argument("tokens", type=Path)
    parser.add_argument("out", type=Path)
    parser.add_argument("--ignore-mismatched", action="store_true")
    options = parser.parse_args()
    tokens = np.load(options.tokens)
    try:
        found = PROGRAMS[options.program](options.folder, tokens, options.ignore_mismatched)
    # Clients raise errors of any kind; which one it was is the result.
    except Exception as error:
        traceback.print_exc()
        print(f"{RULE}\n{type(error).__name__}: {error}")
        return REFUSED
    np.save(options.out, found.astype(np.float32))
    return 0


if __name__ == "__main__":
    sys.exit(main())
