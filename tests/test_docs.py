"""Run every command and every block of Python in the guide on a tiny model, and check links and the glossary."""

from __future__ import annotations

import importlib.util
import re
import shlex
from dataclasses import replace
from pathlib import Path
from types import ModuleType

import pytest

from allocators import ALLOCATORS
from globalopt import api
from globalopt.models.example import example_gguf
from globalopt.pipeline.effort import EFFORTS
from solvers import SOLVERS
from solvers.three_basil import STEPS
from tests.command import done, write_text
from tests.evaluation.test_task_files import write
from tests.tiny_models import save_tiny

ROOT = Path(__file__).parent.parent
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
METHODS = sorted((ROOT / "docs" / "methods").glob("*.md"))
EVERY = [ROOT / "benchmarks" / "README.md", *PAGES, *METHODS]
GLOSSARY = ROOT / "docs" / "glossary.md"
MODULE = re.compile(r"`((?:globalopt|solvers|allocators|reports)/[\w/.]*)`")

SMALL = {"nsamples": 8, "seqlen": 16, "eval_windows": 2}
"""Sizes for a tiny model, in place of defaults that are made for real models."""

INSTALLS = "python -m venv "
"""Start of the two commands that install the package, which no test can run from inside."""

SIZED = ("search", "compress")
FENCE = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def name_of(page: Path) -> str:
    return str(page.relative_to(ROOT).with_suffix("")).replace("/", "-")


def blocks(page: Path, *languages: str) -> list[tuple[str, str]]:
    """Return (language, text) of the fenced blocks in these languages, in order."""
    return [(found[1], found[2]) for found in FENCE.finditer(page.read_text(encoding="utf-8")) if found[1] in languages]


def commands(text: str) -> list[list[str]]:
    """Split every command of a block into its arguments, without comments."""
    lines = [line for line in text.splitlines() if not line.startswith(INSTALLS)]
    return [words for line in lines if (words := shlex.split(line, comments=True))]


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Make a folder with the model, the text and the tasks that the guide names, shared by all pages."""
    folder = tmp_path_factory.mktemp("guide")
    save_tiny(folder / "my-model")
    example_gguf(folder / "my-model.gguf")
    write_text(folder / "my-text.txt")
    (folder / "my-tasks").mkdir()
    write(folder / "my-tasks" / "piqa.jsonl", {"query": "the cat sat on", "choices": ["a mat", "the dog"], "gold": 0})
    return folder


@pytest.fixture
def at_home(home: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.chdir(home)
    for preset in STEPS:
        monkeypatch.setitem(STEPS, preset, 10)
    for name, level in EFFORTS.items():
        monkeypatch.setitem(EFFORTS, name, replace(level, probe_steps=4, epochs=1))
    small: dict[str, object] = {**SMALL, "progress": False}
    for function, sizes in ((api.search, {**small, "search_tokens": 2000}), (api.compress, small)):
        monkeypatch.setattr(function, "__kwdefaults__", {**(function.__kwdefaults__ or {}), **sizes})
    return home


def run_command(words: list[str], drawn: bool = False) -> None:
    """Run a command of a page at small sizes; a report is made only if `drawn`."""
    program, verb, *rest = words
    assert program == "globalopt", f"a page asks for `{program}`, which is not run here"
    if verb in SIZED:
        rest += [] if drawn else ["--quiet"]
        for name, value in {**SMALL, **({"search_tokens": 2000} if verb == "search" else {})}.items():
            option = "--" + name.replace("_", "-")
            rest += [] if option in rest else [option, str(value)]
    done(verb, *rest)


def make_half(home: Path) -> None:
    """Make the run of the first page, which later pages start from."""
    if not (home / "runs" / "half" / "summary.json").exists():
        words = "globalopt search my-model --budget 0.5 --calibration my-text.txt --out runs/half"
        run_command(shlex.split(words), drawn=True)


@pytest.mark.parametrize("page", PAGES, ids=name_of)
def test_a_page_does_what_it_says(page: Path, at_home: Path) -> None:
    make_half(at_home)
    names: dict[str, object] = {"__name__": "page"}
    for language, text in blocks(page, "bash", "python"):
        if language == "bash":
            for words in commands(text):
                run_command(words)
        else:
            # Dataclasses look their module up by name.
            exec(compile(text, f"{page.name}", "exec", dont_inherit=True), names)


@pytest.mark.parametrize("page", EVERY, ids=name_of)
def test_links_lead_somewhere(page: Path) -> None:
    text = page.read_text(encoding="utf-8")
    for target in re.findall(r"\]\(([^)\s]+)\)", text) + re.findall(r'src="([^"]+)"', text):
        if re.match(r"[a-z]+:", target):
            continue
        path, _, anchor = target.partition("#")
        place = (page.parent / path).resolve() if path else page
        assert place.exists(), target
        if anchor:
            headings = re.findall(r"^#+ (.*)$", place.read_text(encoding="utf-8"), re.MULTILINE)
            assert anchor in {re.sub(r"[^\w -]", "", heading.lower()).replace(" ", "-") for heading in headings}, target


def test_every_picture_is_shown_on_a_page() -> None:
    shown = {name for page in EVERY for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}
    assert shown == {path.name for path in (ROOT / "docs" / "pictures").iterdir()}


def test_every_term_of_the_glossary_names_a_module_that_exists() -> None:
    entries = re.findall(r"^\* (.+(?:\n  .+)*)", GLOSSARY.read_text(encoding="utf-8"), re.MULTILINE)
    assert len(entries) > 50
    for entry in entries:
        assert MODULE.search(entry), f"no module is named: {entry}"
        for path in MODULE.findall(entry):
            assert (ROOT / path).exists(), f"{path} does not exist; it is named in: {entry}"


def test_the_entrances_lead_to_the_glossary() -> None:
    for page, target in ((ROOT / "README.md", "docs/glossary.md"), (ROOT / "docs" / "README.md", "glossary.md")):
        assert f"]({target})" in page.read_text(encoding="utf-8"), page


def script(name: str) -> ModuleType:
    path = ROOT / "docs" / f"{name}.py"
    spec = importlib.util.spec_from_file_location(f"docs_{name}", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_method_pages_are_what_the_docstrings_say() -> None:
    for name, text in script("methods").pages().items():
        assert (ROOT / "docs" / "methods" / name).read_text(encoding="utf-8") == text, "run python docs/methods.py"
        assert ">>>" not in text


def test_the_readme_lists_every_solver_and_allocator() -> None:
    rows = re.findall(r"^\| `([\w-]+)` \|", (ROOT / "README.md").read_text(encoding="utf-8"), re.MULTILINE)
    assert sorted(rows) == sorted([*SOLVERS, *ALLOCATORS])
