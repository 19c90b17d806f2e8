"""Both command lines: closed pipes, terminals without UTF-8, packages that are missing, and caches."""

import os
import re
import subprocess
import sys
from pathlib import Path

import forkserver
import pytest

from data_prep.optional_packages import DALI, EXTRAS
from pipeline.commands.exit_codes import CACHES, run_command
from pipeline.errors import missing_package_error

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def labeled_set(tmp_path_factory, photographs) -> Path:
    """A shard set with a class name that ASCII lacks and one that UTF-8 lacks."""
    folder = tmp_path_factory.mktemp("classes")
    names = ("Käfer", os.fsdecode(b"latin-\xe9"))
    files = sorted(path for path in photographs.rglob("*") if path.is_file())
    for name, photograph in zip(names, files, strict=False):
        (folder / "src" / name).mkdir(parents=True)
        (folder / "src" / name / "1.jpg").write_bytes(photograph.read_bytes())
    assert forkserver.run(["-m", "data_prep", "folder", folder / "src", folder / "set"]).returncode == 0
    return folder / "set"


def _start(*arguments: str | Path, stdout: int = subprocess.PIPE, **variables: str) -> subprocess.CompletedProcess:
    environment = {**os.environ, "PYTHONUNBUFFERED": "", "PYTHONPATH": str(ROOT), **variables}
    command = [sys.executable, *map(str, arguments)]
    return subprocess.run(command, stdout=stdout, stderr=subprocess.PIPE, env=environment, check=False)


@pytest.mark.parametrize(
    "arguments",
    [
        ("data_prep", "--help"),
        ("data_prep", "info", "SET"),
        ("data_prep", "info", "SET", "--json"),
        ("data_prep", "verify", "SET"),
        ("data_prep", "finalize", "SET"),
        ("data_prep", "folder", "SRC", "SET"),
        ("pipeline", "--help"),
        ("pipeline", "pretrain", "--help"),
    ],
    ids=" ".join,
)
def test_a_closed_pipe_ends_a_command_silently(labeled_set, arguments):
    places = {"SET": labeled_set, "SRC": labeled_set.parent / "src"}
    reader, writer = os.pipe()
    os.close(reader)
    ended = _start("-m", *(places.get(word, word) for word in arguments), stdout=writer)
    os.close(writer)
    assert (ended.returncode, ended.stderr) == (141, b"")


def test_commands_run_without_a_stdout(labeled_set):
    command = f"exec {sys.executable} -m data_prep info {labeled_set} >&-"
    ended = subprocess.run(["bash", "-c", command], stderr=subprocess.PIPE, cwd=ROOT, check=False)
    assert (ended.returncode, ended.stderr) == (0, b"")


def test_data_prep_reports_a_full_disk_behind_stdout(labeled_set):
    with open("/dev/full", "w") as full:
        ended = _start("-m", "data_prep", "info", labeled_set, stdout=full.fileno())
    assert ended.returncode == 2 and ended.stderr.count(b"\n") == 1 and b"No space left" in ended.stderr


@pytest.mark.parametrize("encoding", ["ascii", "utf-8"])
def test_characters_that_stdout_lacks_are_replaced(labeled_set, encoding):
    ascii_only = {"PYTHONUTF8": "0", "PYTHONCOERCECLOCALE": "0", "LC_ALL": "C"} if encoding == "ascii" else {}
    ended = _start("-m", "data_prep", "info", labeled_set, **ascii_only)
    assert ended.returncode == 0 and b"latin-?" in ended.stdout, ended.stderr
    assert ("K?fer" if encoding == "ascii" else "Käfer") in ended.stdout.decode(encoding)
    print_name = "import sys; from pipeline.commands.exit_codes import run_command\n"
    print_name += "sys.exit(run_command(lambda: print('K\\u00e4fer latin-\\udce9')))"
    ended = _start("-c", print_name, **ascii_only)
    assert ended.returncode == 0 and b"latin-?" in ended.stdout, ended.stderr


HIDDEN = """
import sys
sys.modules[{hidden!r}] = None  # as if it were not installed
sys.path[:0] = {path!r}
import {package}.__main__
sys.exit({package}.__main__.main({arguments!r}))
"""


@pytest.fixture
def without(shards):
    """Run a command without a module, or with more packages installed; returns its error line."""

    def run(package: str, *arguments: str, hidden: str = "none", path: tuple[str, ...] = ()) -> str:
        words = [word.replace("SET", str(shards)) for word in arguments]
        code = HIDDEN.format(package=package, hidden=hidden, path=list(path), arguments=words)
        ended = _start("-c", code, DS_ACCELERATOR="cpu")
        assert ended.returncode == 2 and b"Traceback" not in ended.stderr, ended.stderr.decode()
        (line,) = (line for line in ended.stderr.decode().splitlines() if line.startswith(package))
        return line

    return run


NEEDS_DALI = {
    "pipeline": ("pretrain", "demo_emae", "--data", "SET", "--run", "/nowhere/run"),
    "data_prep": ("verify", "SET", "--deep"),
}


@pytest.mark.parametrize("package", NEEDS_DALI)
def test_missing_dali_is_one_line_with_both_extras(without, package):
    line = without(package, *NEEDS_DALI[package], hidden="nvidia.dali")
    assert "DALI" in line and all(f"[{extra}]" in line for extra in DALI) and "nvidia-smi" in line


@pytest.mark.parametrize("package", ["data_prep", pytest.param("pipeline", marks=pytest.mark.soak)])
def test_two_dali_packages_are_one_line(without, package, tmp_path):
    for name in DALI.values():
        folder = tmp_path / f"{name.replace('-', '_')}-2.0.dist-info"
        folder.mkdir()
        (folder / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 2.0\n")
    line = without(package, *NEEDS_DALI[package], path=(str(tmp_path),))
    assert all(name in line for name in DALI.values()) and "uninstall" in line


@pytest.mark.parametrize("package", EXTRAS)
def test_missing_package_errors_name_package_and_extra(package):
    error = str(missing_package_error(f"{package}.part"))
    assert f"pip install {package}" in error and f"-e '.[{EXTRAS[package]}]'" in error


def test_extras_are_those_of_the_setup():
    setup = (ROOT / "setup.py").read_text()
    assert all(f'"{extra}":' in setup for extra in {*EXTRAS.values(), *DALI})
    assert all(f'"{package.replace("_", "-")}>=' in setup for package in (*EXTRAS, *DALI.values()))
    assert missing_package_error("torch") is None


def test_nothing_advises_to_install_an_unpublished_name():
    text = re.compile(r"pip install[^\n`]*\bshardmae\b")
    files = [*ROOT.glob("*.md"), *ROOT.glob("docs/*.md"), *ROOT.rglob("slurm/*"), *ROOT.rglob("demo/*")]
    files += [path for package in ("pipeline", "data_prep") for path in (ROOT / package).rglob("*.py")]
    assert len(files) > 100
    assert [str(path) for path in files if text.search(path.read_text())] == []


@pytest.mark.parametrize(("name", "is_cache"), [(".cache/torch_extensions", True), ("runs/l16", False)])
def test_unwritable_caches_are_named_with_their_variables(capsys, name, is_cache):
    path = Path.home() / name

    def write():
        raise PermissionError(13, "Permission denied", str(path))

    assert run_command(write) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1 and str(path) in error
    assert all((variable in error) == is_cache for variable in CACHES)
    assert all(variable in (ROOT / "docs" / "running.md").read_text() for variable in CACHES)
