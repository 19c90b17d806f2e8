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
from pipeline.export.formats import Exportable, ExportFormat
from pipeline.export.model_card import card_fields, render_card
from pipeline.export.official_file import OFFICIAL, OFFICIAL_VIT
from pipeline.export.onnx_file import ONNX
from pipeline.export.timm_folder import TIMM
from pipeline.export.transformers_folder import HF, HF_BEIT, HF_MAE
from pipeline.recipe.tasks import recipe_kind
from pipeline.tasks.loaded_classifier import LoadedClassifier, load_classifier
from pipeline.train.checkpoint import fsync_and_hash
from pipeline.train.run_directory import RunDirectory
from pipeline.weights.run import LoadedRun, load_run, run_command

FORMATS: dict[str, ExportFormat[LoadedRun]] = {
    "timm": TIMM,
    "hf": HF,
    "hf-mae": HF_MAE,
    "official": OFFICIAL,
    "onnx": ONNX,
}
CLASSIFIER_FORMATS: dict[str, ExportFormat[LoadedClassifier]] = {"timm": TIMM, "official": OFFICIAL_VIT, "onnx": ONNX}
TOLERANCE = 1e-5
"""Largest relative difference of an export's tokens or logits from ours, in fp32."""
SUMMARY = "export.json"
"""Format, verification result, and files with their digests. Empty until the export is verified."""


def export(
    run: Path,
    out: Path,
    format_name: str,
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
        format_name: A key of FORMATS.
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
    if encoder_only and format_name == "hf-mae":
        raise UserError("--encoder-only: hf-mae includes the decoder; use --format hf for the encoder alone")
    if out.is_symlink():
        out = out.resolve()
    _check_out(out, overwrite)
    export_format, loaded = _load(run, format_name, encoder_only, ema)
    try:
        vit = loaded.vit
    except UserError as error:
        raise UserError(f"--format {format_name}: {error}; use the run's own weights.safetensors") from error
    fields = card_fields(run, loaded, export_format, ema, results)
    if vit.is_beit and format_name == "official":
        raise UserError("--format official: the official MAE code has no relative positions as BEiT's; use timm")
    partial, old = (out.with_name(out.name + suffix) for suffix in (".partial", ".old.partial"))
    for leftover in (partial, old):  # of an export that was killed
        _remove_export(leftover)
    try:
        partial.mkdir(parents=True)
        (partial / SUMMARY).touch()
        difference = _write_and_verify(loaded, export_format, format_name, partial)
        (partial / "README.md").write_text(render_card(fields, difference))
        summary = {"format": format_name, "method": vit.origin, "step": loaded.step, "ema": ema}
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
        f"{out}: {vit.origin} after step {loaded.step}, exported for {format_name}; outputs of the reloaded model "
        f"within {difference:.1e} of ours; complete the model card, README.md"
    )


def _load(run: Path, format_name: str, encoder_only: bool, ema: bool) -> tuple[ExportFormat[Any], Exportable]:
    if run_command(run) != "finetune":
        export_format, loaded = FORMATS[format_name], load_run(run, ema)
        if encoder_only and format_name == "official":
            export_format = OFFICIAL_VIT
        if format_name == "hf" and loaded.recipe.method.name == "beit":
            export_format = HF_BEIT
        return export_format, loaded
    if (task := recipe_kind(RunDirectory(run).recipe_file).TASK) != "classification":
        raise UserError(f"{run}: is a run of {task}, which has no export; use weights.safetensors of its checkpoint")
    if encoder_only:
        raise UserError("--encoder-only: a fine-tuned classifier has no decoder; omit the option")
    if format_name not in CLASSIFIER_FORMATS:
        raise UserError(
            f"--format {format_name}: transformers' ViTForImageClassification has no mean pooling; use one of "
            f"{', '.join(CLASSIFIER_FORMATS)}"
        )
    return CLASSIFIER_FORMATS[format_name], load_classifier(run, ema)


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


def _write_and_verify(loaded: Exportable, export_format: ExportFormat[Any], name: str, folder: Path) -> float:
    """Write the format's files and return the largest relative difference of the reloaded model."""
    try:
        export_format.write(loaded, folder)
    except RuntimeError as error:  # torch raises it for storage errors, too
        raise UserError(f"--format {name}: cannot be written: {_first_line(error)}") from error
    try:
        difference = export_format.max_difference(loaded, folder)
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
