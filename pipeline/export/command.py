"""`python -m pipeline export`: a run's weights as a folder for another library.

Invariant: OUT is whole and checked, or it is not there. The folder is written and checked under another name,
and renamed at last; one that fails its check is removed. Nothing is removed that an export did not write.
"""

import json
import os
import shutil
from collections.abc import Sequence
from pathlib import Path

from safetensors import SafetensorError

from pipeline.errors import UserError, join_names
from pipeline.export.model_card import card, recorded
from pipeline.export.official_file import OFFICIAL, OFFICIAL_VIT
from pipeline.export.onnx_file import ONNX
from pipeline.export.target import Exportable, Target
from pipeline.export.timm_folder import TIMM
from pipeline.export.transformers_folder import HF, HF_MAE
from pipeline.io.atomic import read_json
from pipeline.tasks.finetuned_run import load_finetuned_run
from pipeline.train.checkpoint import fsync_and_hash
from pipeline.weights.run import is_classifier, load_run
from pipeline.weights.vit import Vit

TARGETS = {"timm": TIMM, "hf": HF, "hf-mae": HF_MAE, "official": OFFICIAL, "onnx": ONNX}
OF_CLASSIFIERS = {"timm": TIMM, "official": OFFICIAL_VIT, "onnx": ONNX}
TOLERANCE = 1e-5
"""Largest relative difference of an export's tokens or logits from ours, in fp32."""
ABOUT = "export.json"
"""An export's format, check, and files with their digests; empty while it is being written."""
PARTIAL, OLD = ".partial", ".old.partial"


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
    """Write the newest checkpoint of `run` to the folder `out`; returns a sentence about it.

    target: one of TARGETS. encoder_only: without the decoder, which only `official` can leave out. ema: the
    weights' moving average. overwrite: replace an earlier export that nobody has changed. results: files of
    JSON for the model card. UserError where the format cannot hold the method, or the check fails.
    """
    if encoder_only and target == "hf-mae":
        raise UserError("--encoder-only: hf-mae is the format with the decoder; the encoder alone is hf")
    if out.is_symlink():
        out = out.resolve()
    _check_out(out, overwrite)
    if is_classifier(run):
        chosen, trained = _of_classifiers(target, encoder_only), load_finetuned_run(run, ema)
    else:
        chosen = OFFICIAL_VIT if encoder_only and target == "official" else TARGETS[target]
        trained = load_run(run, ema)
    vit = _vit(trained, target)
    found = recorded(run, trained, chosen, ema, results)
    partial = _cleared(out, PARTIAL)
    try:
        partial.mkdir(parents=True)
        (partial / ABOUT).touch()
        difference = _write(trained, chosen, target, partial)
        (partial / "README.md").write_text(card(found, difference))
        about = {"format": target, "method": vit.origin, "step": trained.step, "ema": ema}
        _publish(partial, out, about | {"difference": difference})
    except (OSError, SafetensorError) as error:
        raise UserError(
            f"{out}: cannot be written: {_reason(error)}; make room or give another place"
        ) from None
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return (
        f"{out}: {vit.origin} after step {trained.step} for {target}, loaded again, outputs "
        f"within {difference:.1e} of ours; its README.md has a line to fill in"
    )


def _check_out(out: Path, overwrite: bool) -> None:
    if not out.name:
        raise UserError(f"{out}: an export makes its folder; give the name of a new one")
    if out.is_dir() and not any(out.iterdir()):
        return
    if not os.path.lexists(out):
        return
    if not (out / ABOUT).is_file():
        raise UserError(f"{out}: is there and is no export; give the name of a new folder")
    if not overwrite:
        raise UserError(f"{out}: holds an export; give another folder, or --overwrite to replace it")
    if changed := _changed(out):
        raise UserError(
            f"{out}: holds what no export wrote, or what was changed since: {join_names(changed)}; --overwrite "
            "would remove it: move it away, or give another folder"
        )


def _changed(out: Path) -> list[str]:
    """What in an export's folder is not as the export wrote it."""
    about = read_json(out / ABOUT)
    written = about.get("files") if isinstance(about, dict) else None
    written = written if isinstance(written, dict) else {}
    found = fsync_and_hash(
        out, [path.name for path in out.iterdir() if path.name in written and path.is_file()]
    )
    there = sorted({path.name for path in out.iterdir()} - {ABOUT})
    return [name for name in there if name not in found or found[name] != written[name]]


def _cleared(out: Path, suffix: str) -> Path:
    """A name beside `out` that is free, now that what a killed export left there is removed. UserError where
    something else has it."""
    path = out.with_name(out.name + suffix)
    if os.path.lexists(path):
        left = path.is_dir() and not path.is_symlink()
        if not left or (any(path.iterdir()) and not (path / ABOUT).is_file()):
            raise UserError(f"{path}: is in the way, and no export left it; move it away")
        shutil.rmtree(path)
    return path


def _of_classifiers(target: str, encoder_only: bool) -> Target:
    if encoder_only:
        raise UserError(
            "--encoder-only: a fine-tuned classifier has no decoder that could be left out; leave the option "
            "out, or export the run that it began with"
        )
    if target not in OF_CLASSIFIERS:
        raise UserError(
            f"--format {target}: transformers' ViTForImageClassification classifies by the class token, a "
            f"fine-tuned classifier by the mean of the patches; take one of {', '.join(OF_CLASSIFIERS)}"
        )
    return OF_CLASSIFIERS[target]


def _vit(trained: Exportable, target: str) -> Vit:
    try:
        return trained.vit
    except UserError as error:
        raise UserError(
            f"--format {target}: {error}; the run's own weights.safetensors has everything"
        ) from None


def _write(trained: Exportable, chosen: Target, name: str, folder: Path) -> float:
    try:
        chosen.write(trained, folder)
    except RuntimeError as error:  # torch's own, of the storage, too
        raise UserError(f"--format {name}: cannot be written: {_reason(error)}; removed") from error
    try:
        difference = chosen.difference(trained, folder)
    except Exception as error:  # whatever a library raises for a file that it does not take
        raise UserError(f"--format {name}: it does not load again ({_reason(error)}); removed") from error
    if not difference <= TOLERANCE:
        raise UserError(
            f"--format {name}: loaded again, its outputs differ from ours by {difference:.1e} of the "
            f"largest, and {TOLERANCE:.0e} is allowed; removed"
        )
    return difference


def _reason(error: Exception) -> str:
    """Its first line."""
    return (str(error).splitlines() or [type(error).__name__])[0]


def _publish(partial: Path, out: Path, about: dict) -> None:
    names = sorted({path.name for path in partial.iterdir()} - {ABOUT})
    about["files"] = fsync_and_hash(partial, names)
    (partial / ABOUT).write_text(json.dumps(about, indent=1) + "\n")
    fsync_and_hash(partial, [ABOUT])
    if out.exists():
        old = _cleared(out, OLD)
        out.rename(old)
        partial.rename(out)
        shutil.rmtree(old)
    else:
        partial.rename(out)
