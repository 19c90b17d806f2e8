"""The commands that README and docs/ show, as a reader would type them."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]
_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(r"(?:-m|--module|--) (pipeline|data_prep) ")
_SYNOPSIS = re.compile(r"\.\.\.|[{\[]")
"""What only a description of a command holds."""


def blocks(text: str) -> list[tuple[str, str]]:
    """(language, content) of the fenced blocks."""
    return _BLOCK.findall(text)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """(program, arguments) of every command of `pipeline` and `data_prep` in a page's blocks, which are
    indented or fenced. A shell's variable stands as 1."""
    fenced = "\n".join(content for _, content in blocks(page.read_text()))
    indented = re.findall(r"^ {4}.*$", page.read_text(), re.MULTILINE)
    lines = (fenced + "\n" + "\n".join(indented)).replace("\\\n", " ").splitlines()
    found = []
    for line in lines:
        program = _PROGRAM.search(line)
        if program and not _SYNOPSIS.search(line):
            words = shlex.split(re.sub(r"\$\w+", "1", line[program.end() :]), comments=True)
            found.append((program[1], words))
    return found
