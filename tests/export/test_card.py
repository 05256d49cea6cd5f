"""The card and the budget file that travel with a model say what was done to it."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from huggingface_hub import ModelCard

from globalopt.export.card import card_facts, model_card
from globalopt.export.formats import export
from globalopt.models.origin import origin_of
from globalopt.runs.folder import Run
from globalopt.values.metrics import Metrics
from globalopt.values.results import Summary
from tests.command import WINDOWS, done, write_text
from tests.export.runs import made_run
from tests.tiny_models import save_tiny

LICENCED = (
    "---\nlicense: other\nlicense_name: my-licence\nlicense_link: LICENSE\nlanguage: [en, de]\nbase_model: a/b\n---\n"
)


@pytest.fixture(scope="module")
def summary(tmp_path_factory) -> Summary:
    return Run.open(made_run(tmp_path_factory.mktemp("made") / "run")).summary()


def measured(summary: Summary) -> Summary:
    shared: dict[str, Any] = dict(
        split="test", nll_stderr=0.1, windows=2, seqlen=16, tokens=30, text_sha256="", dtype="float32"
    )
    dense = Metrics(**shared, perplexity=61.72, nll=4.12, kl=None, kl_stderr=None)
    found = Metrics(**shared, perplexity=62.81, nll=4.14, kl=0.01234, kl_stderr=0.0021)
    return replace(summary, dense=(dense,), compressed=(found,), versions={"torch": "9.9"})


def test_a_card_names_what_a_reader_asks(summary):
    text = model_card(measured(summary), {"license": "mit", "base_model": "owner/model"})
    card: Any = ModelCard(text)
    assert (card.data.license, card.data.base_model, card.data.library_name) == ("mit", "owner/model", "transformers")
    for words in (
        "# owner/model, compressed by globalopt",
        "| licence | mit, that of the base model |",
        "solver 3basil",
    ):
        assert words in text
    assert "| test | 61.72 | 62.81 | 0.0123 ± 0.0021 |" in text
    assert "torch 9.9" in text
    assert "| pattern | 2:4 |" in text


def test_what_is_not_known_is_said(summary):
    text = model_card(summary, {})
    assert "the base model's card names none" in text
    assert "Not measured: the run left out" in text
    assert "license:" not in text


@pytest.mark.parametrize("form", ["dense", "base", "adapter", "packed", "factors"])
def test_every_form_says_how_it_is_loaded(form, summary):
    text = model_card(summary, {}, form)
    compile(text.split("```python")[1].split("```")[0], form, "exec")
    assert ("import globalopt" in text) == (form == "packed")


@pytest.mark.parametrize("body", [b"", b"no front matter", b"---\n: [\n---\n", b"---\n- 1\n---\n", b"\xff\xfe"])
def test_a_card_that_says_nothing_gives_nothing(body, tmp_path):
    (tmp_path / "README.md").write_bytes(body)
    assert card_facts(tmp_path) == {}
    assert card_facts(None) == {}


def test_a_run_keeps_licence_and_budget_and_its_exports_do_too(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    source, text = save_tiny(tmp_path / "source"), write_text(tmp_path / "text.txt")
    (source / "README.md").write_text(LICENCED)
    (source / "budget.json").write_text("{}")
    done("search", source, "--budget", "0.5", "--allocator", "uniform", "--solver", "wanda", "--match", "none",
         "--calibration", text, *WINDOWS, "--out", "run", "-q")  # fmt: skip
    for form in ("packed", "factors"):
        export(Path("run"), form, Path(form))
    for folder in ("run/model", "packed", "factors"):
        card: Any = ModelCard.load(f"{folder}/README.md")
        assert (card.data.license_name, card.data.language) == ("my-licence", ["en", "de"])
        assert "wanda" in card.text
        assert "| test |" in card.text
        assert json.loads(Path(folder, "budget.json").read_text()) == json.loads(Path("run/budget.json").read_text())
        assert (Path(folder, "README.md").stat().st_mode & 0o777) == (text.stat().st_mode & 0o777)
        assert (next(Path(folder).glob("*.safetensors")).stat().st_mode & 0o777) == (text.stat().st_mode & 0o777)


def test_the_card_of_a_model_on_the_hub_is_fetched_for_its_licence(tmp_path, monkeypatch):
    asked = []
    (tmp_path / "config.json").write_text("{}")
    monkeypatch.setattr("globalopt.models.origin.try_to_load_from_cache", lambda *_: str(tmp_path / "config.json"))
    monkeypatch.setattr("globalopt.models.origin.snapshot_download", lambda *_, **o: asked.append(SimpleNamespace(**o)))
    assert origin_of("owner/model") == tmp_path
    assert "README.md" in asked[0].allow_patterns
