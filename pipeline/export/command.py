"""`python -m pipeline export`: write a run's weights as a folder for another library.

Invariant: OUT is complete and verified, or absent. The folder is written and verified under a temporary name,
then renamed. Only directories that an export wrote are replaced or removed.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError

from pipeline.errors import UserError
from pipeline.export.model_card import card_fields, render_card
from pipeline.export.official_file import OFFICIAL, OFFICIAL_VIT
from pipeline.export.onnx_file import ONNX
from pipeline.export.target import Exportable, Target
from pipeline.export.timm_folder import TIMM
from pipeline.export.transformers_folder import HF, HF_BEIT, HF_MAE
from pipeline.recipe.tasks import recipe_kind
from pipeline.tasks.loaded_classifier import LoadedClassifier, load_classifier
from pipeline.train.checkpoint import fsync_and_hash
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.run import LoadedRun, load_run, run_command

TARGETS: dict[str, Target[LoadedRun]] = {"timm": TIMM, "hf": HF, "hf-mae": HF_MAE, "official": OFFICIAL, "onnx": ONNX}
CLASSIFIER_TARGETS: dict[str, Target[LoadedClassifier]] = {"timm": TIMM, "official": OFFICIAL_VIT, "onnx": ONNX}
TOLERANCE = 1e-5
"""Largest relative difference of an export's tokens or logits from ours, in fp32."""
SUMMARY = "export.json"
"""Format, verification result, and files with their digests. Empty until the export is verified."""


def export(
    run: Path,
    out: Path,
    target: str,
    *,
    encoder_only: bool = False,
    ema: bool = False,
    overwrite: bool = False,
    results: Sequence[Path] = (),
) -> str:
    """Export the newest checkpoint of a run to a new folder.

    Args:
        run: Run directory of a pre-training or fine-tuning.
        out: Folder to create.
        target: A key of TARGETS.
        encoder_only: Leave the decoder out; only for `official`.
        ema: Export the moving average of the weights.
        overwrite: Replace `out` if an export wrote it.
        results: JSON files to quote in the model card.

    Returns:
        A sentence for the user.

    Raises:
        UserError: If the format cannot represent the model, `out` exists or cannot be written, or the
            verification fails.
    """
    if encoder_only and target == "hf-mae":
        raise UserError("--encoder-only: hf-mae includes the decoder; use --format hf for the encoder alone")
    if out.is_symlink():
        out = out.resolve()
    _check_out(out, overwrite)
    chosen, loaded = _load(run, target, encoder_only, ema)
    try:
        vit = loaded.vit
    except UserError as error:
        raise UserError(f"--format {target}: {error}; use the run's own weights.safetensors") from error
    fields = card_fields(run, loaded, chosen, ema, results)
    if vit.is_beit and target == "official":
        raise UserError("--format official: the official MAE code has no relative positions as BEiT's; use timm")
    partial, old = (out.with_name(out.name + suffix) for suffix in (".partial", ".old.partial"))
    for leftover in (partial, old):  # of an export that was killed
        _remove_export(leftover)
    try:
        partial.mkdir(parents=True)
        (partial / SUMMARY).touch()
        difference = _write_and_verify(loaded, chosen, target, partial)
        (partial / "README.md").write_text(render_card(fields, difference))
        summary = {"format": target, "method": vit.origin, "step": loaded.step, "ema": ema}
        _finalize(partial, summary | {"difference": difference})
        if out.exists():
            out.rename(old)
        partial.rename(out)
        shutil.rmtree(old, ignore_errors=True)
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out}: cannot be written: {_first_line(error)}; free some space or choose another directory"
        ) from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        f"{out}: {vit.origin} after step {loaded.step}, exported for {target}; outputs of the reloaded model "
        f"within {difference:.1e} of ours; complete the model card, README.md"
    )


def _load(run: Path, target: str, encoder_only: bool, ema: bool) -> tuple[Target[Any], Exportable]:
    if run_command(run) != "finetune":
        chosen, loaded = TARGETS[target], load_run(run, ema)
        if encoder_only and target == "official":
            chosen = OFFICIAL_VIT
        if target == "hf" and loaded.recipe.method.name == "beit":
            chosen = HF_BEIT
        return chosen, loaded
    if (task := recipe_kind(RunDirectory(run).recipe_file).TASK) != "classification":
        raise UserError(f"{run}: is a run of {task}, which has no export; use weights.safetensors of its checkpoint")
    if encoder_only:
        raise UserError("--encoder-only: a fine-tuned classifier has no decoder; omit the option")
    if target not in CLASSIFIER_TARGETS:
        raise UserError(
            f"--format {target}: transformers' ViTForImageClassification has no mean pooling; use one of "
            f"{', '.join(CLASSIFIER_TARGETS)}"
        )
    return CLASSIFIER_TARGETS[target], load_classifier(run, ema)


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.name:
        raise UserError(f"{out}: give the name of a new directory")
    if not os.path.lexists(out) or _is_empty(out):
        return
    if not (out / SUMMARY).is_file():
        raise UserError(f"{out}: already exists and is not an export; choose a new directory")
    if not overwrite:
        raise UserError(f"{out}: already exists; choose a new directory, or pass --overwrite")


def _is_empty(path: Path) -> bool:
    return path.is_dir() and not any(path.iterdir())


def _remove_export(path: Path) -> None:
    """Remove a directory that an export wrote, perhaps partially; refuse to remove anything else."""
    if os.path.lexists(path):
        if path.is_symlink() or not (_is_empty(path) or (path / SUMMARY).is_file()):
            raise UserError(
                f"{path}: export needs this name for its temporary directory, but no export wrote it; move it"
            )
        shutil.rmtree(path)


def _write_and_verify(loaded: Exportable, chosen: Target[Any], name: str, folder: Path) -> float:
    """Write the format's files and return the largest relative difference of the reloaded model."""
    try:
        chosen.write(loaded, folder)
    except RuntimeError as error:  # torch raises it for storage errors, too
        raise UserError(f"--format {name}: cannot be written: {_first_line(error)}") from error
    try:
        difference = chosen.max_difference(loaded, folder)
    except Exception as error:  # libraries raise any type for a file that they cannot load
        raise UserError(f"--format {name}: the export cannot be reloaded: {_first_line(error)}") from error
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format {name}: outputs of the reloaded model differ by {difference:.1e}, more than "
            f"{TOLERANCE:.0e}; the export was removed"
        )
    return difference


def _first_line(error: Exception) -> str:
    return (str(error).splitlines() or [type(error).__name__])[0]


def _finalize(partial: Path, summary: dict) -> None:
    """Write the summary and force all files to the disk."""
    names = sorted({path.name for path in partial.iterdir()} - {SUMMARY})
    summary["files"] = fsync_and_hash(partial, names)
    (partial / SUMMARY).write_text(json.dumps(summary, indent=1) + "\n")
    fsync_and_hash(partial, [SUMMARY])
