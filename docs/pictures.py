"""Make every picture and terminal capture of the guide, on the bundled model, by the real commands.

    python docs/pictures.py --out runs/docs

Runs that are finished are not made again. A capture is what a command prints on a colour terminal of 80 columns.
"""

from __future__ import annotations

import argparse
import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

from rich.console import Console
from rich.terminal_theme import TerminalTheme
from rich.text import Text

PICTURES = Path(__file__).parent / "pictures"
COLUMNS = 80

THEME = TerminalTheme(
    (255, 255, 255),
    (36, 41, 47),
    [
        (36, 41, 47),
        (207, 34, 46),
        (17, 99, 41),
        (125, 78, 0),
        (9, 105, 218),
        (130, 80, 223),
        (27, 124, 131),
        (87, 96, 106),
    ],
    [
        (87, 96, 106),
        (164, 14, 38),
        (26, 127, 55),
        (99, 60, 1),
        (33, 139, 255),
        (164, 117, 249),
        (49, 146, 170),
        (140, 149, 159),
    ],
)

# Rich's own frame fetches its font from the network.
SVG = """<svg class="rich-terminal" viewBox="0 0 {width} {height}" xmlns="http://www.w3.org/2000/svg">
<style>
.{unique_id}-matrix {{ font-family: ui-monospace, Menlo, Consolas, "DejaVu Sans Mono", monospace;
  font-size: {char_height}px; line-height: {line_height}px; font-variant-east-asian: full-width; }}
{styles}
</style>
<defs><clipPath id="{unique_id}-clip-terminal"><rect x="0" y="0" width="{terminal_width}" height="{terminal_height}"/>
</clipPath>{lines}</defs>
<rect fill="#ffffff" stroke="#d0d7de" x="0.1%" y="0.1%" width="99.8%" height="99.8%" rx="6"/>
<g transform="translate({terminal_x}, {terminal_y})" clip-path="url(#{unique_id}-clip-terminal)">
{backgrounds}<g class="{unique_id}-matrix">{matrix}</g></g></svg>
"""


def runs(out: Path) -> dict[str, list[str]]:
    """The commands behind the pictures, by the run they make."""
    searched = ["search", "--budget", "0.3", "--out", str(out / "search")]
    budget = str(out / "search" / "budget.json")
    return {
        "search": searched,
        "unmatched": ["compress", "--budget-file", budget, "--match", "none", "--out", str(out / "unmatched")],
        "wanda": ["compress", "--budget-file", budget, "--solver", "wanda", "--out", str(out / "wanda")],
        "family": ["search", "--budget", "0.1,0.2,0.3,0.4,0.5,0.7", "--out", str(out / "family")],
    }


def captures(out: Path) -> dict[str, list[str]]:
    """The commands whose output is shown, by the name of the picture."""
    search, budget = str(out / "search"), str(out / "search" / "budget.json")
    return {
        "report": ["report", search],
        "compare": ["report", str(out / "unmatched"), search, str(out / "wanda")],
        "family": ["report", str(out / "family")],
        "budget": ["budget", "show", budget],
    }


def program(words: list[str], **environment: str) -> subprocess.CompletedProcess[str]:
    """Run the command; its progress goes to this terminal."""
    command = [sys.executable, "-m", "globalopt", *words]
    return subprocess.run(command, stdout=subprocess.PIPE, text=True, check=True, env={**os.environ, **environment})


def capture(name: str, words: list[str]) -> None:
    """Write what a command prints as `NAME.svg`."""
    shown = program(words, FORCE_COLOR="1", COLORTERM="truecolor", COLUMNS=str(COLUMNS)).stdout.rstrip()
    with open(os.devnull, "w", encoding="utf-8") as nowhere:
        console = Console(record=True, width=COLUMNS, file=nowhere, force_terminal=True, color_system="truecolor")
        console.print(Text(f"$ globalopt {shlex.join(words)}", style="bold"))
        console.print(Text.from_ansi(shown))
        svg = console.export_svg(theme=THEME, code_format=SVG, unique_id=name)
    (PICTURES / f"{name}.svg").write_text(svg, encoding="utf-8")


def on_pages() -> set[str]:
    """Names of the pictures that a page of the guide or the README shows."""
    pages = [*PICTURES.parent.glob("**/*.md"), PICTURES.parent.parent / "README.md"]
    return {name for page in pages for name in re.findall(r"pictures/([\w.-]+)", page.read_text(encoding="utf-8"))}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("runs/docs"), help="folder of the runs (%(default)s)")
    out: Path = parser.parse_args().out
    PICTURES.mkdir(exist_ok=True)
    for words in runs(out).values():
        program([*words, "--quiet"])
    for name, words in captures(out).items():
        capture(name, words)
    for run in ("search", "family"):
        for picture in sorted((out / run / "report").glob("*.png")):
            if picture.name in on_pages():
                shutil.copy(picture, PICTURES / picture.name)


if __name__ == "__main__":
    main()
