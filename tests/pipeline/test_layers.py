"""Import rules: the layers of `pipeline`, and which modules may import what. See docs/architecture.md."""

import ast
import functools
import os
import subprocess
import sys
from pathlib import Path

import forkserver
import pytest

ROOT = Path(__file__).parents[2]
LAYERS = (  # low to high: a module imports from its own package and from lower layers only
    ("io", "errors", "models", "masking", "losses", "difficulty"),
    ("recipe", "distributed"),
    ("methods", "data"),
    ("train",),
    ("weights", "estimate"),
    ("evals", "pictures", "gpu_check"),
    ("tasks", "report"),
    ("export", "papers"),
    ("commands",),
    ("__main__",),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])


@functools.cache
def imports(path: Path) -> set[str]:
    names = set()
    for node in ast.walk(ast.parse(path.read_text())):
        if isinstance(node, ast.Import):
            names |= {alias.name for alias in node.names}
        elif isinstance(node, ast.ImportFrom):
            names |= {node.module, *(f"{node.module}.{alias.name}" for alias in node.names)}
    return names


def importers(module: str) -> set[str]:
    return {
        path.relative_to(ROOT).as_posix()
        for path in FILES
        if any(name == module or name.startswith(module + ".") for name in imports(path))
    }


def test_no_import_goes_upward():
    for path in FILES:
        package = path.relative_to(ROOT).with_suffix("").parts
        if package[0] != "pipeline" or (len(package) == 2 and package[1] == "__init__"):
            continue
        for name in imports(path):
            other = name.split(".")[:2]
            if other[0] == "pipeline" and len(other) == 2 and other[1] not in (package[1], "errors"):
                assert LEVEL[other[1]] < LEVEL[package[1]], f"{path} imports {name}"


def test_few_modules_are_outside_packages():
    loose = {path.stem for path in (ROOT / "pipeline").glob("*.py")} - {"__init__", "__main__"}
    assert loose == {"masking", "losses", "difficulty", "errors"}


def test_only_the_engine_imports_deepspeed():
    assert importers("deepspeed") == {"pipeline/train/engine.py"}


def test_only_the_dali_module_imports_dali():
    assert {name for name in importers("nvidia") if name.startswith("pipeline/")} == {"pipeline/data/dali.py"}


def test_data_prep_never_imports_the_pipeline():
    assert all(name.startswith("pipeline/") for name in importers("pipeline"))


def test_pipeline_imports_only_four_modules_of_data_prep():
    files = {name for name in importers("data_prep") if name.startswith("pipeline/")}
    assert files == {"pipeline/data/reader.py", "pipeline/errors.py", "pipeline/commands/exit_codes.py"}
    modules = {name for file in files for name in imports(ROOT / file) if name.startswith("data_prep")}
    allowed = tuple(f"data_prep.{name}" for name in ("shard_set", "errors", "optional_packages", "standard_output"))
    assert all(name.startswith(allowed) for name in modules)


def test_only_the_command_lines_parse_arguments():
    assert {name.split("/")[0] for name in importers("argparse")} == {"pipeline", "data_prep"}
    files = {name for name in importers("argparse") if name.startswith("pipeline/")}
    assert {name for name in files if not name.startswith("pipeline/commands/")} == {"pipeline/__main__.py"}


@pytest.mark.parametrize("folder", ["methods", "models"])
def test_methods_and_models_do_no_io_and_no_communication(folder):
    forbidden = ("pipeline.train", "pipeline.data", "data_prep", "torch.distributed", "os", "pathlib")
    for path in (ROOT / "pipeline" / folder).glob("*.py"):
        assert not {n for n in imports(path) if n.startswith(forbidden) and n != "operator"}, path


@pytest.mark.parametrize("package", ["pipeline", "data_prep"])
def test_help_imports_no_heavy_library(package):
    code = (
        f"import sys, runpy; sys.argv = ['{package}', '--help']\n"
        f"try: runpy.run_module('{package}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'PIL', 'timm', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "command",
    [
        "pretrain nosuch --data set --run run",
        "pretrain demo_emae --data set --run run --set model.width=x",
        "pretrain demo_emae --data nowhere --run run",
        "pretrain demo_emae --data set --run tests",
        "finetune finetune_tiny --weights random:demo_emae --data nowhere --val nowhere --run run",
        "finetune finetune_tiny --weights W --data D --val V --run run --deepspeed_config nowhere",
    ],
)
def test_early_errors_import_no_heavy_library(command):
    code = (
        "import sys, pipeline.__main__\n"
        f"code = pipeline.__main__.main({command.split()!r})\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'timm'} & sys.modules.keys()\n"
        "assert code == 2 and not heavy, (code, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


@pytest.mark.soak
def test_deepspeed_logs_to_stderr():
    code = "from pipeline.train import engine; engine.deepspeed_logger.warning('now')"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    done = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert done.stdout == b"" and b"now" in done.stderr


@pytest.mark.soak
@pytest.mark.parametrize("module", forkserver.PRELOAD)
def test_a_preloaded_module_can_be_imported_alone(module):
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
