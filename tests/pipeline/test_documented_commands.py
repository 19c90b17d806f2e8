"""The commands in README and docs/ are valid: arguments, recipes, keys and files."""

import re

import pytest

from data_prep.arguments import parse
from pipeline.__main__ import build_parser
from pipeline.papers.commands import plan_experiment
from pipeline.papers.registry import find_experiment
from pipeline.recipe import load_recipe
from pipeline.recipe.linear_probe import load_probe_recipe
from pipeline.recipe.tasks import load_finetune_recipe
from tests.documentation import PAGES, ROOT, TUTORIAL, blocks, commands

OWN_RECIPES = ("my.yaml",)
COMMANDS = [(page, *command) for page in PAGES for command in commands(page)]


def test_the_pages_show_the_main_commands():
    shown = {arguments[0] for _, program, arguments in COMMANDS if program == "pipeline"}
    assert shown >= {"pretrain", "finetune", "knn", "linprobe", "reconstruct", "report", "export", "plan"}
    assert len(commands(TUTORIAL)) > 20


@pytest.mark.parametrize(
    "page, program, arguments", COMMANDS, ids=[f"{page.stem}-{' '.join(args[:2])}" for page, _, args in COMMANDS]
)
def test_a_documented_command_is_valid(page, program, arguments):
    if program == "data_prep":
        parse(arguments)
        return
    args = build_parser().parse_args(arguments)
    if arguments[0] == "finetune":
        size = args.recipe.removeprefix("finetune_")
        weights = "random:demo_emae" if size == "tiny" else f"random:{size}_mae"
        load_finetune_recipe(args.recipe, weights, args.overrides)
    elif arguments[0] == "linprobe":
        load_probe_recipe({"probe": {"weights": args.weights}}, args.overrides)
    elif arguments[0] == "paper" and args.name != "list":
        plan_experiment(find_experiment(args.name), args.overrides)
    elif arguments[0] == "plan" and args.recipe.startswith(("detect_", "segment_")):
        load_finetune_recipe(args.recipe, "W", args.overrides)
    elif "recipe" in args and args.recipe not in OWN_RECIPES:
        load_recipe(args.recipe, args.overrides)


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.stem)
def test_linked_files_exist(page):
    text = page.read_text()
    links = re.findall(r"\]\(([^)#:]+)(?:#[^)]*)?\)", text)
    missing = [link for link in links if not (page.parent / link).exists()]
    scripts = re.findall(r"\b(?:demo|benchmarks|slurm|tests)/[\w/]+\.(?:py|sh|env)\b", text)
    missing += [script for script in scripts if not (ROOT / script).exists()]
    assert not missing


def test_links_to_sections_of_the_tutorial_exist():
    text = TUTORIAL.read_text()
    anchors = {heading.lower().replace(" ", "-") for heading in re.findall(r"^#+ (.*)$", text, re.MULTILINE)}
    assert set(re.findall(r"\]\(#([^)]+)\)", text)) <= anchors


def test_every_block_of_the_tutorial_is_tested():
    text = TUTORIAL.read_text()
    assert {language for language, _ in blocks(text)} == {"bash", "python"}
    assert len(blocks(text)) * 2 == len(re.findall("^```", text, re.MULTILINE))
    assert not re.search(r"^ {4}", re.sub(r"^```.*?^```$", "", text, flags=re.DOTALL | re.MULTILINE), re.MULTILINE)
