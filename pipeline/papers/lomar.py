"""LoMaR: "Local Masked Reconstruction for Efficient Self-Supervised Learning on High-Resolution Images", Chen et al.,
WACV 2025. Its tables were not available; the numbers are the abstract's."""

from pipeline.papers.experiment import Experiment, Row

PAPER = "Chen et al., WACV 2025"
ABSTRACT = Experiment(
    name="lomar.abstract",
    title="ViT-B, 1600 epochs, fine-tuned at 224 and 384 px",
    source=f"{PAPER}, abstract",
    columns=("gmacs", "finetune"),
    rows=(
        Row("LoMaR", {"finetune": 84.1}, (), "vitb16_lomar", "finetune_vitb16"),
        Row("MAE", {"finetune": 83.6}, (), "vitb16_mae", "finetune_vitb16"),
        Row("LoMaR, fine-tuned at 384 px", {"finetune": 85.4}, (), "vitb16_lomar", "finetune_vitb16_384"),
        Row("MAE, fine-tuned at 384 px", {"finetune": 84.8}, (), "vitb16_mae", "finetune_vitb16_384"),
    ),
    notes=(
        "The abstract states neither the model nor the epochs; ViT-B and 1600 epochs are those of the released code. "
        "MAE's values follow from the stated differences, 0.5 and 0.6.",
        "The settings of fine-tuning at 384 px are those at 224 px; published ones were not found.",
    ),
)
HIGH_RESOLUTION = Experiment(
    name="lomar.high_resolution",
    title="pre-training at 448 px, ViT-B",
    source=f"{PAPER}, abstract",
    columns=("gmacs", "compute", "finetune"),
    rows=(
        Row("MAE", {}, (), "vitb16_mae_448", "finetune_vitb16"),
        Row("LoMaR", {}, (), "vitb16_lomar_448", "finetune_vitb16"),
    ),
    notes=(
        "The abstract: LoMaR is 3.1 x faster than MAE, with 0.2 % higher accuracy. docs/benchmarks.md has the time of "
        "a step. The size of the images in fine-tuning is not stated; here it is 224 px.",
    ),
)
FIGURE_4 = Experiment(
    name="lomar.figure4",
    title="LoMaR's encoder and MAE's encoder-decoder, by size of the windows",
    source=f"{PAPER}, Figure 4",
    columns=("gmacs", "finetune"),
    recipe="vitb16_lomar",
    settings=("train.epochs=400", "optim.warmup_epochs=20"),
    finetune_recipe="finetune_vitb16",
    rows=tuple(
        Row(
            f"{name}, {size} x {size} patches",
            {},
            (f"method.lomar.window_size={size}", f"method.lomar.decoder={decoder}"),
        )
        for name, decoder in (("encoder", "false"), ("encoder-decoder", "true"))
        for size in (14, 11, 9, 7, 5)
    ),
    notes=(
        "The values are drawn in a figure that was not available. Sizes between 14 and 5 and the 400 epochs (the "
        "code's) are ours, and so is the use of absolute positions with MAE's decoder.",
    ),
)
WINDOWS = Experiment(
    name="lomar.windows",
    title="windows of every image, or shared as in the released code",
    source=f"{PAPER}, Figure 2 and released code",
    columns=("finetune",),
    recipe="vitb16_lomar",
    settings=("train.epochs=400", "optim.warmup_epochs=20"),
    finetune_recipe="finetune_vitb16",
    rows=(
        Row("per image", {}, ("method.lomar.windows=per_image",)),
        Row("as released", {}, ("method.lomar.windows=as_released",)),
    ),
)
BEIT = Experiment(
    name="lomar.beit",
    title="LoMaR inside BEiT, ViT-B",
    source=f"{PAPER}, abstract",
    columns=("gmacs", "finetune"),
    rows=(
        Row("BEiT", {"finetune": 83.2}, (), "vitb16_beit", "finetune_vitb16"),
        Row("LoMaR inside BEiT", {}, (), "vitb16_lomar_beit", "finetune_vitb16"),
    ),
    notes=(
        "The tokenizer is a folder `tokenizer` in the working directory, or the one that --set method.target.tokenizer "
        "names; docs/methods.md. Its cost is not counted.",
        "The abstract (arXiv, version 3): 5.0 x faster than BEiT and 0.8 % higher accuracy, pre-trained at 384 px. "
        "83.2 is from BEiT's paper (Table 1), with other settings of fine-tuning; ours are MAE's.",
    ),
)
EXPERIMENTS = ABSTRACT, HIGH_RESOLUTION, FIGURE_4, WINDOWS, BEIT
