"""The script that remakes the bundled texts and model, and the texts it made."""

from __future__ import annotations

import importlib.util
import math
import sys
from pathlib import Path
from types import ModuleType

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from globalopt import reference
from globalopt.errors import ArtefactError
from tests.tiny_models import save_tiny

SCRIPT = Path(__file__).parent.parent / "benchmarks" / "reference_model.py"


@pytest.fixture(scope="module")
def script() -> ModuleType:
    spec = importlib.util.spec_from_file_location("reference_model", SCRIPT)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    # Dataclasses look their module up here.
    sys.modules["reference_model"] = module
    spec.loader.exec_module(module)
    return module


def article(title: str, sentences: int) -> str:
    body = f" {title} is a town in the north @-@ west , with 1 @,@ 200 people ( 2 @.@ 5 % <unk> ) . " * sentences
    return f" = {title} = \n \n{body}\n \n = = History = = \n \n It ' s old . \n \n"


@pytest.fixture
def wikitext(tmp_path) -> Path:
    folder = tmp_path / "wikitext"
    folder.mkdir()
    for part, count in (("train", 30), ("valid", 12), ("test", 9)):
        text = " \n" + "".join(article(f"{part.title()} {i}", 1 + i % 4) for i in range(count))
        (folder / f"wiki.{part}.tokens").write_text(text)
    return folder


@pytest.mark.parametrize(
    ("tokenised", "plain"),
    [
        ("the north @-@ west", "the north-west"),
        ("1 @,@ 200 and 2 @.@ 5", "1,200 and 2.5"),
        ("a <unk> word", "a unk word"),
        ("Well , yes ; no : what ? stop ! end .", "Well, yes; no: what? stop! end."),
        ("( in 1999 ) and [ sic ]", "(in 1999) and [sic]"),
        ("the town 's hall", "the town's hall"),
        (' " quoted " - dash', ' " quoted " - dash'),
        ("\n = Title = \n \n Text . \n", "\n = Title = \n \n Text. \n"),
    ],
)
def test_detokenise(script, tokenised, plain):
    assert script.detokenise(tokenised) == plain


def test_articles_start_at_titles_and_nowhere_else(script):
    text = (
        " \n" + article("One", 2) + article("Two", 1) + " not = a = title \n = Nor this = \n \n" + article("Three", 1)
    )
    pieces = script.articles(text)
    assert "".join(pieces) == text
    assert [piece.lstrip(" \n").split("\n")[0] for piece in pieces] == ["= One = ", "= Two = ", "= Three = "]
    with pytest.raises(ValueError, match="not WikiText"):
        script.articles("Just text.\n")


def test_spread_takes_whole_pieces_evenly(script):
    pieces = [f"{i:03d}" + "x" * (i * 37 % 50) for i in range(200)]
    taken = script.spread(pieces, 1500)
    chosen = [i for i, piece in enumerate(pieces) if piece in taken]
    assert "".join(pieces[i] for i in chosen) == taken
    assert abs(len(taken) - 1500) < 60
    assert max(b - a for a, b in zip([0, *chosen], [*chosen, 200], strict=True)) < 12
    assert script.spread(pieces, 10**6) == "".join(pieces)


def test_slices_are_of_the_right_parts_and_share_no_article(script, wikitext, tmp_path, monkeypatch, capsys):
    monkeypatch.setattr(script, "SLICES", {"calibration": 900, "selection": 400, "validation": 400, "test": 600})
    assert script.main(["text", str(wikitext), str(tmp_path / "out")]) == 0
    texts = {name: (tmp_path / "out" / f"{name}.txt").read_text() for name in reference.SPLITS}
    origin = {"calibration": "Train", "selection": "Valid", "validation": "Valid", "test": "Test"}
    titles = {name: [a.strip().split("\n")[0] for a in script.articles(text)] for name, text in texts.items()}
    for name, words in titles.items():
        assert words
        assert all(title.startswith(f"= {origin[name]} ") for title in words)
    assert all(int(title.split()[2]) < 6 for title in titles["selection"])
    assert all(int(title.split()[2]) >= 6 for title in titles["validation"])
    assert "calibration.txt" in capsys.readouterr().out


def test_the_bundled_texts_are_detokenised_and_share_no_article(script):
    texts = {name: reference.text_file(name).read_text(encoding="utf-8") for name in reference.SPLITS}
    seen: dict[str, str] = {}
    for name, text in texts.items():
        assert 0.9 * script.SLICES[name] < len(text.encode()) < 1.1 * script.SLICES[name]
        assert not any(mark in text for mark in (" @-@ ", " @,@ ", " @.@ ", "<unk>", " , ", " . "))
        for paragraph in text.split("\n"):
            if len(paragraph) > 80:
                assert seen.setdefault(paragraph, name) == name


def test_the_learning_rate_rises_stays_and_falls(script):
    recipe = script.Recipe()
    assert recipe.learning_rate(0, 0.0) == pytest.approx(3e-3 / 200)
    assert recipe.learning_rate(199, 0.1) == recipe.learning_rate(1000, 0.3) == 3e-3
    assert recipe.learning_rate(1000, 0.65) == pytest.approx(3e-3 * (0.02 + 0.98 / 2))
    assert recipe.learning_rate(1000, 1.0) == pytest.approx(3e-3 * 0.02)


TINY = {"vocabulary": 280, "blocks": 1, "width": 32, "ffn": 48, "heads": 2, "kv-heads": 1, "context": 32, "seqlen": 16}


def test_a_tiny_training_learns_and_is_a_model_folder(script, wikitext, tmp_path, capsys):
    out = tmp_path / "model"
    options = {**TINY, "batch": 4, "steps": 100, "warmup": 5, "lr": 1e-2}
    arguments = [f"--{name}={value}" for name, value in options.items()]
    assert script.main(["train", str(wikitext), str(out), *arguments]) == 0
    printed = capsys.readouterr().out
    model = AutoModelForCausalLM.from_pretrained(out)
    tokenizer = AutoTokenizer.from_pretrained(out)
    assert model.dtype == torch.bfloat16
    assert (model.config.vocab_size, len(tokenizer)) == (280, 280)
    assert (tokenizer.bos_token_id, tokenizer.eos_token_id) == (0, 1)
    ids = tokenizer("Train 3 is a town")["input_ids"]
    assert 0 not in ids
    assert tokenizer.decode(ids) == "Train 3 is a town"
    card = (out / "README.md").read_text()
    assert "valid: perplexity" in card
    perplexity = float(printed.split("valid: perplexity ")[1].split()[0])
    assert perplexity < math.sqrt(280)
    assert not (out / "checkpoint.pt").exists()


def test_an_interrupted_training_goes_on_to_the_same_weights(script, tmp_path, monkeypatch, capsys):
    tokens = torch.randint(60, (500,), generator=torch.Generator().manual_seed(0))
    sizes = {"blocks": 1, "width": 16, "ffn": 16, "heads": 2, "kv_heads": 1, "seqlen": 8, "batch": 2, "warmup": 2}
    recipe = script.Recipe(steps=6, minutes=None, **sizes)
    whole = script.train_model(tokens, recipe, 60)

    class Stopped(Exception):
        pass

    save = script._save_checkpoint

    def save_and_stop(path, model, optimizer, draw, step, seconds):
        save(path, model, optimizer, draw, step, seconds)
        if step == 3:
            raise Stopped

    # A clock that jumps two minutes at each look makes every step save.
    ticks = iter(range(0, 10**6, 120))
    monkeypatch.setattr(script.time, "monotonic", lambda: next(ticks))
    monkeypatch.setattr(script, "_save_checkpoint", save_and_stop)
    checkpoint = tmp_path / "checkpoint.pt"
    with pytest.raises(Stopped):
        script.train_model(tokens, recipe, 60, checkpoint)
    monkeypatch.setattr(script, "_save_checkpoint", save)
    resumed = script.train_model(tokens, recipe, 60, checkpoint)
    assert "going on from step 3" in capsys.readouterr().out
    for one, other in zip(whole.parameters(), resumed.parameters(), strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=0)


def test_a_missing_model_is_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(reference, "__file__", str(tmp_path / "__init__.py"))
    with pytest.raises(ArtefactError, match="install the package again"):
        reference.reference_folder()
    save_tiny(tmp_path / "model")
    assert reference.reference_folder() == tmp_path / "model"
