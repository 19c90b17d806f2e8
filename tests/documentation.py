"""Extract the commands that README.md, CONTRIBUTING.md and docs/ show."""

import re
import shlex
from pathlib import Path

ROOT = Path(__file__).parents[1]
TUTORIAL = ROOT / "docs" / "tutorial.md"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted((ROOT / "docs").glob("*.md"))]
_FENCED_BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.DOTALL | re.MULTILINE)
_PROGRAM = re.compile(r"(?:-m|--module|--) (pipeline|data_prep) ")
_SYNOPSIS = re.compile(r"\.\.\.|[{\[]")
"""Matches lines that describe the syntax of a command and cannot be run."""


def blocks(text: str) -> list[tuple[str, str]]:
    """Return (language, content) of each fenced block."""
    return _FENCED_BLOCK.findall(text)


def commands(page: Path) -> list[tuple[str, list[str]]]:
    """Return (program, arguments) of each `pipeline` and `data_prep` command in indented and fenced blocks.

    Shell variables are replaced by 1.
    """
    fenced = "\n".join(content for _, content in blocks(page.read_text()))
    indented = re.findall(r"^ {4}.*$", page.read_text(), re.MULTILINE)
    lines = (fenced + "\n" + "\n".join(indented)).replace("\\\n", " ").splitlines()
    parsed = []
    for line in lines:
        program = _PROGRAM.search(line)
        if program and not _SYNOPSIS.search(line):
            arguments = shlex.split(re.sub(r"\$\w+", "1", line[program.end() :]), comments=True)
            parsed.append((program[1], arguments))
    return parsed
