"""MAE: "Masked Autoencoders Are Scalable Vision Learners", He et al., CVPR 2022."""

from pipeline.papers.experiment import Experiment, Row

PAPER = "He et al., CVPR 2022"
DEFAULT = ("train.epochs=800", "method.target.name=pixels")
"""Section 4: ViT-L, 800 epochs, unnormalized pixels."""
UNCHECKED = (
    "The published values were entered without the paper's text at hand; check them against it before you quote them."
)
NOTES = (
    "Batch, optimizer and warm-up are those of vitl16_mae. The linear probe has MAE's settings: base learning rate "
    "0.1, 50 epochs, no held-out samples.",
    UNCHECKED,
)


def _ablation(part: str, title: str, rows: tuple[Row, ...], *notes: str) -> Experiment:
    return Experiment(
        name=f"mae.table1{part}",
        title=title,
        source=f"{PAPER}, Table 1 ({part})",
        columns=("finetune", "linprobe"),
        recipe="vitl16_mae",
        settings=DEFAULT,
        finetune_recipe="finetune_vitl16",
        rows=rows,
        notes=(*NOTES, *notes),
    )


def _row(name: str, finetune: float, linprobe: float, *settings: str) -> Row:
    return Row(name, {"finetune": finetune, "linprobe": linprobe}, settings)


TABLE_1A = _ablation(
    "a",
    "depth of the decoder",
    tuple(
        _row(f"{depth} blocks", finetune, probe, f"model.decoder_depth={depth}")
        for depth, finetune, probe in (
            (1, 84.8, 65.5),
            (2, 84.9, 70.0),
            (4, 84.9, 71.9),
            (8, 84.9, 73.5),
            (12, 84.4, 73.3),
        )
    ),
)
TABLE_1B = _ablation(
    "b",
    "width of the decoder",
    tuple(
        _row(f"{width} channels", finetune, probe, f"model.decoder_width={width}")
        for width, finetune, probe in (
            (128, 84.9, 69.1),
            (256, 84.8, 71.3),
            (512, 84.9, 73.5),
            (768, 84.4, 73.1),
            (1024, 84.3, 73.1),
        )
    ),
)
TABLE_1C = _ablation(
    "c",
    "mask tokens in the encoder",
    (
        _row("encoder with mask tokens", 84.2, 59.6, "method.mae.mask_tokens_in_encoder=true"),
        _row("encoder without mask tokens", 84.9, 73.5),
    ),
)
TABLE_1D = _ablation(
    "d",
    "reconstruction target",
    (
        _row("pixels, not normalized", 84.9, 73.5),
        _row("pixels, normalized", 85.4, 73.9, "method.target.name=normalized_pixels"),
        _row("PCA", 84.6, 72.3, "method.target.name=pca"),
        _row("dVAE tokens", 85.3, 71.6, "method.target.name=tokens", "method.target.tokenizer=tokenizer"),
    ),
    "The tokenizer is a folder `tokenizer` in the working directory, with DALL-E's weights: docs/methods.md.",
    "The components of PCA are fitted to center crops of the first 256 images of the shard set.",
)
TABLE_1E = _ablation(
    "e",
    "data augmentation",
    (
        _row("none", 84.0, 65.7, "data.augmentation=none"),
        _row("crop, fixed size", 84.7, 73.1, "data.augmentation=fixed_size"),
        _row("crop, random size", 84.9, 73.5),
        _row("crop and color jitter", 84.3, 71.9, "data.augmentation=color_jitter"),
    ),
    "The sizes of the crops and the strength of the color jitter are ours: docs/methods.md.",
)
TABLE_1F = _ablation(
    "f",
    "mask sampling",
    (
        _row("random 75 %", 84.9, 73.5),
        _row("block 50 %", 83.9, 72.3, "method.mae.mask_sampling=block", "method.mae.mask_ratio=0.5"),
        _row("block 75 %", 82.8, 63.9, "method.mae.mask_sampling=block"),
        _row("grid 75 %", 84.0, 66.0, "method.mae.mask_sampling=grid"),
    ),
)
TABLE_3 = Experiment(
    name="mae.table3",
    title="fine-tuning on ImageNet-1k",
    source=f"{PAPER}, Table 3",
    columns=("finetune",),
    rows=(
        Row("ViT-B", {"finetune": 83.6}, (), "vitb16_mae", "finetune_vitb16"),
        Row("ViT-L", {"finetune": 85.9}, (), "vitl16_mae", "finetune_vitl16"),
        Row("ViT-H", {"finetune": 86.9}, (), "vith14_mae", "finetune_vith14"),
        Row("ViT-H, fine-tuned at 448 px", {"finetune": 87.8}, (), "vith14_mae", "finetune_vith14_448"),
    ),
    notes=(
        "The value at 448 px was entered without the paper's text at hand; check it before you quote it. The others "
        "are also in Table 3 of Efficient MAE.",
    ),
)
FIGURE_5 = Experiment(
    name="mae.figure5",
    title="mask ratio",
    source=f"{PAPER}, Figure 5",
    columns=("finetune", "linprobe"),
    recipe="vitl16_mae",
    settings=DEFAULT,
    finetune_recipe="finetune_vitl16",
    rows=tuple(
        Row(
            f"{ratio} %",
            {"finetune": 84.9, "linprobe": 73.5} if ratio == 75 else {},
            (f"method.mae.mask_ratio={ratio / 100}",),
        )
        for ratio in (10, 20, 30, 40, 50, 60, 70, 75, 80, 90)
    ),
    notes=(*NOTES, "Only the default's values are in Table 1; the others are drawn in a figure."),
)
FIGURE_7 = Experiment(
    name="mae.figure7",
    title="length of the schedule",
    source=f"{PAPER}, Figure 7",
    columns=("finetune", "linprobe"),
    recipe="vitl16_mae",
    settings=("method.target.name=pixels",),
    finetune_recipe="finetune_vitl16",
    rows=tuple(
        _row(f"{epochs} epochs", finetune, probe, f"train.epochs={epochs}")
        for epochs, finetune, probe in (
            (100, 82.3, 57.3),
            (200, 83.3, 64.4),
            (400, 84.3, 69.7),
            (800, 84.9, 73.5),
            (1600, 85.1, 75.1),
        )
    ),
    notes=NOTES,
)
FIGURE_9 = Experiment(
    name="mae.figure9",
    title="partial fine-tuning",
    source=f"{PAPER}, Figure 9 and Section 4.4",
    columns=("finetune",),
    recipe="vitl16_mae",
    settings=DEFAULT,
    finetune_recipe="finetune_vitl16",
    rows=tuple(
        Row(
            f"{blocks} blocks",
            {"finetune": {0: 73.5, 1: 81.0, 24: 84.9}[blocks]} if blocks in (0, 1, 24) else {},
            (),
            finetune_settings=(f"classifier.trained_blocks={blocks}",),
        )
        for blocks in (0, 1, 2, 4, 6, 12, 18, 24)
    ),
    notes=(
        "0 blocks is the paper's linear probe; here it has the settings of fine-tuning, which the paper tunes for each "
        "row. With 24 blocks, only the embeddings are frozen.",
        UNCHECKED,
    ),
)
EXPERIMENTS = (
    TABLE_1A, TABLE_1B, TABLE_1C, TABLE_1D, TABLE_1E, TABLE_1F, TABLE_3, FIGURE_5, FIGURE_7, FIGURE_9
)  # fmt: skip
