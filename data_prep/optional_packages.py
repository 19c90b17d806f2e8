"""Packages of which setup.py's extras install some: what to install if one is missing.

Invariant: no message advises the name "shardmae" of a package index, because it is not published.
"""

from importlib.metadata import PackageNotFoundError, version

from data_prep.errors import UserError

DALI = {"cuda13": "nvidia-dali-cuda130", "cuda12": "nvidia-dali-cuda120"}
"""DALI's packages by extra. Both have the same files, so exactly one must be installed."""
EXTRAS = {
    "aiohttp": "http",
    "faster_coco_eval": "dense",
    "onnx": "export",
    "onnxruntime": "export",
    "onnxscript": "export",
    "pyarrow": "parquet",
    "transformers": "export",
    "wandb": "wandb",
}
"""Extra of each other optional package."""
_CHOOSE_DALI = (
    "in the checkout: pip install -e '.[cuda13]', or '.[cuda12]' if the driver supports CUDA 12 only (`nvidia-smi` "
    "shows the version; without a GPU, either)"
)


def missing_package_error(module: str) -> UserError | None:
    """Return the error for an optional package that cannot be imported; None for any other module."""
    package = module.partition(".")[0]
    if package == "nvidia":
        return _several_dali_error() or UserError(f"DALI (nvidia.dali) is not installed; {_CHOOSE_DALI}")
    if package not in EXTRAS:
        return None
    extra = EXTRAS[package]
    return UserError(
        f"{package} is not installed; pip install {package}, or in the checkout: pip install -e '.[{extra}]'"
    )


def check_one_dali() -> None:
    """Raise UserError if both DALI packages are installed."""
    if error := _several_dali_error():
        raise error


def _several_dali_error() -> UserError | None:
    installed = [package for package in DALI.values() if _is_installed(package)]
    if len(installed) < 2:
        return None
    names = " and ".join(installed)
    return UserError(f"{names} are both installed; pip uninstall {' '.join(installed)}, then {_CHOOSE_DALI}")


def _is_installed(package: str) -> bool:
    try:
        version(package)
    except PackageNotFoundError:
        return False
    return True
