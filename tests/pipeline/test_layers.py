"""Import rules: the layers of `pipeline`, and which module may import what. See docs/architecture.md."""

import ast
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
    ("evals", "pictures"),
    ("tasks", "report"),
    ("export",),
    ("commands",),
    ("__main__",),
)
LEVEL = {name: level for level, layer in enumerate(LAYERS) for name in layer}
FILES = sorted([*(ROOT / "pipeline").rglob("*.py"), *(ROOT / "data_prep").rglob("*.py")])


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


def test_in_the_pipeline_only_the_loader_imports_dali():
    assert {name for name in importers("nvidia") if name.startswith("pipeline/")} == {"pipeline/data/dali.py"}


def test_data_prep_never_imports_the_pipeline():
    assert all(name.startswith("pipeline/") for name in importers("pipeline"))


def test_pipeline_imports_only_shard_sets_and_errors_of_data_prep():
    users = {name for name in importers("data_prep") if name.startswith("pipeline/")}
    assert users == {"pipeline/data/reader.py", "pipeline/errors.py"}
    used = {name for user in users for name in imports(ROOT / user) if name.startswith("data_prep")}
    assert all(name.startswith(("data_prep.shard_set", "data_prep.errors")) for name in used)


def test_only_the_command_lines_parse_arguments():
    assert {name.split("/")[0] for name in importers("argparse")} == {"pipeline", "data_prep"}
    users = {name for name in importers("argparse") if name.startswith("pipeline/")}
    assert {name for name in users if not name.startswith("pipeline/commands/")} == {"pipeline/__main__.py"}


@pytest.mark.parametrize("folder", ["methods", "models"])
def test_methods_know_no_files_no_ranks_and_no_engine(folder):
    strangers = ("pipeline.train", "pipeline.data", "data_prep", "torch.distributed", "os", "pathlib")
    for path in (ROOT / "pipeline" / folder).glob("*.py"):
        assert not {n for n in imports(path) if n.startswith(strangers) and n != "operator"}, path


@pytest.mark.parametrize("package", ["pipeline", "data_prep"])
def test_help_waits_for_no_heavy_import(package):
    code = (
        f"import sys, runpy; sys.argv = ['{package}', '--help']\n"
        f"try: runpy.run_module('{package}', run_name='__main__')\n"
        "except SystemExit: pass\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'PIL', 'timm', 'pydantic'} & sys.modules.keys()\n"
        "assert not heavy, heavy"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True)


@pytest.mark.parametrize(
    "mistake",
    [
        "pretrain nosuch --data set --run run",
        "pretrain demo_emae --data set --run run --set model.width=x",
        "pretrain demo_emae --data nowhere --run run",
        "pretrain demo_emae --data set --run tests",
        "finetune finetune_tiny --weights random:demo_emae --data nowhere --val nowhere --run run",
        "finetune finetune_tiny --weights W --data D --val V --run run --deepspeed_config nowhere",
    ],
)
def test_a_mistake_in_recipe_data_or_run_waits_for_no_heavy_import(mistake):
    code = (
        "import sys, pipeline.__main__\n"
        f"code = pipeline.__main__.main({mistake.split()!r})\n"
        "heavy = {'torch', 'deepspeed', 'nvidia', 'timm'} & sys.modules.keys()\n"
        "assert code == 2 and not heavy, (code, heavy)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, cwd=ROOT)


def test_what_deepspeed_says_leaves_standard_output_to_results():
    code = "from pipeline.train import engine; engine.logger.warning('now')"
    environment = {name: value for name, value in os.environ.items() if name != "DS_ACCELERATOR"}
    found = subprocess.run([sys.executable, "-c", code], env=environment, check=True, capture_output=True)
    assert found.stdout == b"" and b"now" in found.stderr


@pytest.mark.soak
@pytest.mark.parametrize("module", forkserver.PRELOAD)
def test_a_module_that_tests_preload_imports_alone(module):
    subprocess.run([sys.executable, "-c", f"import {module}"], check=True, capture_output=True)
