from __future__ import annotations

import re
import time
from io import StringIO

import pytest
from rich.console import Console

from globalopt.protocols import Progress
from reports import LineProgress, LiveProgress, QuietProgress, make_progress

HIDE, SHOW = "\x1b[?25l", "\x1b[?25h"


def terminal(width: int = 100) -> Console:
    environment = {"TERM": "xterm-256color"}
    return Console(file=StringIO(), force_terminal=True, width=width, _environ=environment)


def written(console: Console) -> str:
    assert isinstance(console.file, StringIO)
    return console.file.getvalue()


def plain(console: Console) -> str:
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]", "", written(console))


def run(progress: Progress, steps: int, error: BaseException | None = None) -> None:
    with progress.stage("span", 3, "layers") as step:
        for i in range(steps):
            step(f"model.layers.{i}.[q]")
        if error is not None:
            raise error


def test_the_console_decides() -> None:
    assert isinstance(make_progress(terminal()), LiveProgress)
    assert isinstance(make_progress(Console(file=StringIO())), LineProgress)
    dumb = Console(file=StringIO(), force_terminal=True, _environ={"TERM": "dumb"})
    assert isinstance(make_progress(dumb), LineProgress)
    assert isinstance(make_progress(terminal(), quiet=True), QuietProgress)


def test_a_log_has_a_line_per_stage_and_not_one_per_step() -> None:
    console = Console(file=StringIO(), width=20)
    progress = make_progress(console)
    progress.note("a [note] that is longer than the console is wide")
    run(progress, 3)
    first, last = written(console).splitlines()
    assert first == "a [note] that is longer than the console is wide"
    assert re.fullmatch(r"span done  3/3 layers  \d\.\d\d s", last)


def test_a_log_says_every_interval_how_far_the_innermost_stage_is() -> None:
    console = Console(file=StringIO(), width=20)
    progress = LineProgress(console, interval=0.02)
    with progress.stage("search", 4, "chunks") as outer:
        with progress.stage("span", 3, "layers") as step:
            step("model.layers.0.[q]")
            time.sleep(0.1)
        outer("one")
    lines = written(console).splitlines()
    # On a busy machine the outer stage has a line of its own before the inner one opens, or after it has ended.
    between = [line for line in lines[:-1] if not line.startswith("search  ")]
    assert len(between) > 1
    for line in between[:-1]:
        assert re.fullmatch(r"span  [01]/3 layers  0\.\d\d s(, 0\.\d\d s left  model\.layers\.0\.\[q\])?", line)
    assert between[-1].startswith("span done  1/3 layers")
    assert lines[-1].startswith("search done  1/4 chunks")


def test_a_log_that_was_closed_ends_the_lines_in_between_without_a_traceback(
    capsys: pytest.CaptureFixture[str],
) -> None:
    file = StringIO()

    def close_within_a_stage() -> None:
        with LineProgress(Console(file=file), 0.01).stage("span", 3, "layers"):
            file.close()
            time.sleep(0.05)

    with pytest.raises(ValueError, match="closed"):
        close_within_a_stage()
    assert capsys.readouterr() == ("", "")


def test_a_failed_stage_is_marked_and_its_error_goes_on() -> None:
    console = Console(file=StringIO())
    with pytest.raises(ZeroDivisionError):
        run(make_progress(console), 1, ZeroDivisionError())
    assert re.search(r"^span failed  1/3 layers  \d", written(console), re.MULTILINE)
    assert "done" not in written(console)


def test_quiet_says_nothing(capsys: pytest.CaptureFixture[str]) -> None:
    console = Console(file=StringIO())
    progress = make_progress(console, quiet=True)
    progress.note("nothing")
    run(progress, 2)
    assert written(console) == ""
    assert capsys.readouterr() == ("", "")


def test_a_finished_stage_stays_as_a_line_and_the_cursor_comes_back() -> None:
    console = terminal()
    progress = make_progress(console)
    run(progress, 3)
    run(progress, 2)
    text = written(console)
    assert text.count(HIDE) == text.count(SHOW) == 2
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert len(re.findall(r"span done  \d/3 layers  \d\.\d\d s\n", plain(console))) == 2


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_the_terminal_is_restored_after_an_error(error: type[BaseException]) -> None:
    console = terminal()
    with pytest.raises(error):
        run(make_progress(console), 1, error())
    text = written(console)
    assert text.rindex(SHOW) > text.rindex(HIDE)
    assert re.search(r"span failed  1/3 layers  \d\.\d\d s\n$", plain(console))


def test_the_live_display_shows_count_rate_time_and_the_end_of_the_detail() -> None:
    console = terminal(width=80)
    progress = LiveProgress(console)
    with progress.stage("sensitivity", 4, "blocks") as step:
        step("model.layers.10.self_attn.gate_proj")
        progress.note("a [note]")
        progress._display.refresh()
    text = plain(console)
    frames = [line for line in re.split(r"[\r\n]", text) if "1/4 blocks" in line and "left" in line]
    assert frames
    for frame in frames:
        assert re.search(r"1/4 blocks .*(/s|each) .*0:00, 0:0\d left", frame)
        assert frame.rstrip().endswith("gate_proj")
        assert len(frame) <= 80
    assert "a [note]" in text


def test_an_inner_stage_leaves_the_outer_one_running() -> None:
    console = terminal()
    progress = LiveProgress(console)
    with progress.stage("outer", 2, "rounds") as step:
        run(progress, 3)
        assert written(console).count(SHOW) == 0
        step("one")
    text = plain(console)
    assert text.index("span done") < text.index("outer done")
    assert written(console).count(SHOW) == 1


def test_memory_in_use_is_shown(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("reports.progress.in_use", lambda: 3 * 2**29)
    console = terminal(80)
    run(make_progress(console), 2)
    assert " 1.5G " in plain(console)
