"""Every command takes a GGUF file where it takes a model, and models in fp8; the dequantised copy is made once."""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
from transformers import AutoModelForCausalLM, AutoTokenizer

import globalopt
from globalopt.models.example import example_gguf
from globalopt.models.quantised import QuantisedModel
from tests.command import WINDOWS, done, no_partial_files, read, refused
from tests.quantised_models import save_fp8

FAILED, USAGE = 1, 2


@pytest.fixture
def cheap(tiny_text: Path) -> tuple[str, ...]:
    method = ("--budget", "0.5", "--solver", "wanda", "--match", "none", "--samples", "0", "-q")
    return (*method, "--calibration", str(tiny_text), *WINDOWS)


@pytest.fixture
def file(tmp_path: Path) -> Path:
    return example_gguf(tmp_path / "tiny.Q8_0.gguf")


def copies(cache: Path) -> list[Path]:
    return sorted((cache / "dequantised").iterdir())


def test_a_search_of_a_gguf_file(file: Path, cheap: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "half"
    words = [word for word in cheap if word != "-q"]
    shown = done("search", file, "--allocator", "uniform", *words, "--out", run, "--json").stderr
    assert f"{file} is quantised (GGUF Q8_0); its dequantised copy is" in " ".join(shown.split())
    summary = read(run / "summary.json")
    assert (summary["model"], summary["quantisation"]) == (str(file), "GGUF Q8_0")
    assert f"The dense model is {file}, dequantised from GGUF Q8_0." in summary["notes"]
    assert "dequantise" in [stage["name"] for stage in summary["stages"]]
    assert read(run / "manifest.json")["facts"]["quantisation"] == "GGUF Q8_0"
    card = (run / "model" / "README.md").read_text()
    assert "| base model | tiny.Q8_0.gguf |" in card
    assert "| weights of the base model | dequantised from GGUF Q8_0 |" in card
    assert "license: mit" in card
    assert "quantization_config" not in read(run / "model" / "config.json")
    assert (run / "model" / "chat_template.jinja").is_file()
    assert no_partial_files(tmp_path / "runs" / "globalopt-cache" / "dequantised")
    done("eval", run, "-q")
    assert done("export", run, "--out", tmp_path / "packed", "--format", "packed").exit_code == 0


def test_the_copy_is_made_once_and_again_where_the_file_changed(
    file: Path, cheap: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    written: list[Path] = []
    write = QuantisedModel.write

    def noted(model: QuantisedModel, folder: Path, *rest: object) -> None:
        written.append(folder)
        write(model, folder, *rest)  # pyright: ignore[reportArgumentType]

    monkeypatch.setattr(QuantisedModel, "write", noted)
    monkeypatch.chdir(tmp_path)
    done("compress", file, *cheap)
    assert (tmp_path / "runs" / "tiny.Q8_0-0.5-uniform-wanda-compressed-seed0" / "model").is_dir()
    moved = Path(shutil.copy(file, tmp_path / "moved.gguf"))
    done("compress", moved, *cheap)
    done("eval", moved, "--calibration", cheap[cheap.index("--calibration") + 1], "--seqlen", "16", "-q")
    assert len(written) == 1
    example_gguf(moved, "F16")
    done("compress", moved, *cheap, "--fresh")
    assert len(written) == len(copies(tmp_path / "runs" / "globalopt-cache")) == 2
    assert "dequantised" in done("cache", "list").stdout


def test_a_conversion_that_was_stopped_leaves_nothing_half_done(
    file: Path, cheap: tuple[str, ...], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def stopped(*arguments: object, **options: object) -> None:
        raise KeyboardInterrupt

    words = ("compress", file, *cheap, "--out", tmp_path / "runs" / "half")
    with monkeypatch.context() as patch:
        patch.setattr("globalopt.models.saving.write_tensors", stopped)
        with pytest.raises(AssertionError):
            done(*words)
    (entry,) = copies(tmp_path / "runs" / "globalopt-cache")
    assert not (entry / "model").exists()
    done(*words)
    assert (entry / "model" / "model.safetensors").is_file()


def test_a_folder_of_several_files(file: Path, cheap: tuple[str, ...], tmp_path: Path) -> None:
    example_gguf(tmp_path / "other.gguf", "F16")
    out = ("--out", tmp_path / "runs" / "half")
    message = refused(USAGE, "compress", tmp_path, *cheap, *out)
    assert "choose one with --gguf-file: other.gguf, tiny.Q8_0.gguf." in message
    done("compress", tmp_path, "--gguf-file", file.name, *cheap, *out)
    assert read(tmp_path / "runs" / "half" / "summary.json")["quantisation"] == "GGUF Q8_0"
    # The dense model of the run is that file again.
    done("eval", tmp_path / "runs" / "half", "-q")


def test_a_dry_run_writes_nothing(file: Path, cheap: tuple[str, ...], tmp_path: Path) -> None:
    shown = done("search", file, *cheap, "--out", tmp_path / "runs" / "half", "--dry-run").stdout
    assert "dequantised" in shown
    assert "dequantise " in shown
    assert [path.name for path in tmp_path.iterdir()] == [file.name]


def test_an_fp8_model_is_compressed(cheap: tuple[str, ...], tmp_path: Path) -> None:
    save_fp8(tmp_path / "fp8", blocks=True)
    done("compress", tmp_path / "fp8", *cheap, "--out", tmp_path / "runs" / "half")
    summary = read(tmp_path / "runs" / "half" / "summary.json")
    assert summary["quantisation"] == "fp8"
    assert "quantization_config" not in read(tmp_path / "runs" / "half" / "model" / "config.json")


def test_a_budget_of_a_gguf_file_is_checked(file: Path, cheap: tuple[str, ...], tmp_path: Path) -> None:
    run = tmp_path / "runs" / "half"
    done("compress", file, *cheap, "--out", run)
    done("budget", "validate", run / "budget.json", "--model", file)


@pytest.mark.parametrize(
    ("options", "code", "says"),
    [
        (["--no-cache"], USAGE, "leave out --no-cache"),
        (["--gguf-file", "tiny.Q8_0.gguf"], USAGE, "is a file"),
    ],
)
def test_options_that_do_not_fit(
    options: list[str], code: int, says: str, file: Path, cheap: tuple[str, ...], tmp_path: Path
) -> None:
    assert says in refused(code, "compress", file, *cheap, "--out", tmp_path / "runs" / "half", *options)


def test_a_file_of_no_model_is_refused(cheap: tuple[str, ...], tmp_path: Path) -> None:
    message = refused(USAGE, "compress", "--gguf-file", "a.gguf", *cheap, "--out", tmp_path / "half")
    assert message == "--gguf-file a.gguf is a file of a model: give its folder or hub id too."
    (tmp_path / "b.gguf").write_text("<html>")
    assert "cannot be read as a GGUF file" in refused(
        FAILED, "compress", tmp_path / "b.gguf", *cheap, "--out", tmp_path / "half"
    )


def test_a_model_that_transformers_has_dequantised_is_taken_from_python(file: Path, tiny_text: Path) -> None:
    model = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name)
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    sizes = {"nsamples": 8, "seqlen": 16, "eval_windows": 2, "samples": 0, "progress": False}
    found = globalopt.compress(model, tokenizer, tiny_text, budget=0.5, solver="wanda", **sizes)
    assert found.summary.quantisation == "GGUF"
    assert getattr(found.model.config, "quantization_config", None) is None
    assert model.config.quantization_config is not None
