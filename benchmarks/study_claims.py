"""The study's experiments: which weights are trained, and which claims they test.

Invariant: this file decides what is computed; nothing in it depends on a result, except the learning rates, which are
chosen by trials on held-out training images.
"""

from typing import Literal, NamedTuple

Measure = Literal[
    "finetune", "linprobe", "knn", "disagreement", "miou", "miou_of_training", "box_ap50", "box_ap50_of_training"
]
MEASURES: dict[Measure, str] = {
    "finetune": "fine-tuned, %",
    "linprobe": "linear probe, %",
    "knn": "k-NN, %",
    "disagreement": "disagreement, levels",
    "miou": "mIoU, %",
    "miou_of_training": "mIoU on training images, %",
    "box_ap50": "box AP50, %",
    "box_ap50_of_training": "box AP50 on training images, %",
}


class Weights(NamedTuple):
    """A row: weights and how they are made."""

    name: str
    tuned_as: str = ""
    """Method whose learning rate is used; empty: nothing is trained."""
    settings: tuple[str, ...] = ()
    images: float = 1.0
    """Images to pre-train on, in units of UNIT_STEPS batches."""
    compute_of: str = ""
    """Instead: as many images as cost as many operations as the pre-training of this row."""
    size: Literal["cifar", "photos"] = "cifar"
    """Pre-trained on CIFAR-10 at 32 px, or on photographs at 64 px."""
    weights: str = ""
    """Evaluate these instead of pre-training. For a task: "random"."""
    has_disagreement: bool = False
    task: str = ""
    """Fine-tuning recipe of a dense task, from the weights of demo_emae."""


class Task(NamedTuple):
    """A dense task of E4."""

    variable: str
    """Environment variable that names the data set."""
    builder: str
    """Command of data_prep."""
    splits: tuple[str, str]
    """To train on, and to evaluate on."""
    photographs: str
    """Folder of the images to train on, in the data set."""
    settings: tuple[str, ...]
    """Of fine-tuning: the number of steps, and no augmentation."""
    pretrain_steps: int
    measure: Measure
    cost: float
    """Duration in units of UNIT's pre-training."""


class Claim(NamedTuple):
    text: str
    source: str
    effect: dict[str, float]
    """Factors of the rows; the claim is that the sum is positive."""
    measures: tuple[Measure, ...] = ("finetune",)
    """The claim is supported if it is by each of them."""


class Study(NamedTuple):
    title: str
    design: str
    claims: tuple[Claim, ...]
    more_rows: tuple[str, ...] = ()
    """Rows that are shown, but not needed for a claim."""

    @property
    def rows(self) -> list[str]:
        """Return the names of all rows, in the order of ROWS."""
        used = {*self.more_rows, *(row for claim in self.claims for row in claim.effect)}
        return [name for name in ROWS if name in used]


TASKS = {
    "segment_tiny": Task(
        "ADE_DIR", "ade20k", ("training", "validation"), "images/training",
        ("train.steps=400", "data.flip=false", "segmenter.scale=[1.0,1.0]", "segmenter.cat_max_ratio=1.1",
         "segmenter.photometric=false", "segmenter.dropout=0.0"),
        1200, "miou", 2.3,
    ),
    "detect_tiny": Task(
        "COCO_DIR", "coco", ("train", "val"), "train2017",
        ("train.steps=600", "data.flip=false", "detector.scale=[1.0,1.0]"), 1200, "box_ap50", 5,
    ),
}  # fmt: skip
BATCH = 32
UNIT_STEPS = 2000
"""Steps: about 110 s on a CPU core with MAE at mask ratio 0.75. With a GPU, ten times as many."""
BASE_LRS = ("4e-3", "8e-3", "1.6e-2")
"""Trials of each method."""
TRIAL_SEED = 100
MODEL = (
    f"data.global_batch={BATCH}",
    f"engine.micro_batch={BATCH}",
    "engine.precision=fp32",
    "model.name=vit_tiny",
    "model.patch_size=4",
    "model.width=96",
    "model.depth=4",
    "model.heads=3",
    "model.decoder_width=64",
    "model.decoder_depth=2",
    "model.decoder_heads=4",
    "method.efficient_mae.beta=6.5",  # 26 px at patch 16, in patches of 4
    "train.log_every=20",
    "train.checkpoint_every=1000000",
)
FINETUNING = (
    "data.global_batch=64",
    "engine.micro_batch=64",
    "data.subset_by_class=true",
    "optim.warmup_epochs=0.2",
    "classifier.mixup=0",
    "classifier.cutmix=0",
    "evaluation.every_epochs=null",
    "train.checkpoint_every=1000000",
)
LABELS = 0.2
"""Share of the labels for k-NN and the linear probe."""
FINETUNE_LABELS = {"cifar": (0.1, 4), "photos": (0.4, 1)}
"""Share of the labels for fine-tuning, and epochs: as many steps for both."""
IMAGE_SIZE = {"cifar": 32, "photos": 64}


def _difficulty(ratio: float, flatten: bool, mask: bool) -> tuple[str, ...]:
    """Return Efficient MAE's settings with or without Difficulty-Flatten Loss and decoder masking."""
    options = [f"mask_ratio={ratio}", *([] if flatten else ["gamma=0"]), *([] if mask else ["beta=null"])]
    return ("method.name=efficient_mae", *(f"method.efficient_mae.{option}" for option in options))


def _mae(ratio: float, *more: str) -> tuple[str, ...]:
    return ("method.name=mae", f"method.mae.mask_ratio={ratio}", *more)


def _emae(weight: float) -> tuple[str, ...]:
    return ("method.name=emae", f"method.emae.consistency_weight={weight}")


def _lomar(window: int, num_windows: int, ratio: float = 0.8, decoder: bool = False) -> tuple[str, ...]:
    options = {"window_size": window, "num_windows": num_windows, "mask_ratio": ratio, "decoder": str(decoder).lower()}
    return ("method.name=lomar", *(f"method.lomar.{name}={value}" for name, value in options.items()))


RATIOS = (0.75, 0.85, 0.9)
UNIT = "MAE 0.75"
LONG = "EMAE"
"""Row with four times the compute of UNIT, for comparisons at equal compute."""
UNTRAINED = ("optim.base_lr=1e-12",)  # one step that changes no weight
ROWS = {
    row.name: row
    for row in (
        Weights("raw pixels", weights="pixels:32"),
        Weights("random weights", settings=(*_mae(0.75), *UNTRAINED), images=0),
        Weights("random weights of LoMaR", settings=(*_lomar(4, 4), *UNTRAINED), images=0),
        *(Weights(f"MAE {ratio}", "mae", _mae(ratio), has_disagreement=ratio == 0.75) for ratio in RATIOS),
        *(
            Weights(f"{name} {ratio}", "efficient_mae", _difficulty(ratio, flatten, mask))
            for name, flatten, mask in (("DF", True, False), ("DM", False, True), ("DF and DM", True, True))
            for ratio in RATIOS
        ),
        Weights("EMAE", "emae", _emae(1), has_disagreement=True),
        Weights("EMAE, weight 0.5", "emae", _emae(0.5), has_disagreement=True),
        Weights("EMAE, weight 0", "emae", _emae(0), has_disagreement=True),
        Weights("MAE, compute of EMAE", "mae", _mae(0.75), compute_of=LONG, has_disagreement=True),
        Weights("Efficient MAE, compute of EMAE", "efficient_mae", _difficulty(0.85, True, True), compute_of=LONG),
        Weights("LoMaR, compute of EMAE", "lomar", _lomar(4, 4), compute_of=LONG),
        Weights("LoMaR", "lomar", _lomar(4, 4), compute_of=UNIT),
        Weights("LoMaR, mask ratio 0.5", "lomar", _lomar(4, 4, ratio=0.5), compute_of=UNIT),
        Weights("LoMaR, whole image", "lomar", _lomar(8, 1), compute_of=UNIT),
        Weights("LoMaR with decoder", "lomar", _lomar(4, 4, decoder=True), compute_of=UNIT),
        Weights("LoMaR with decoder, whole image", "lomar", _lomar(8, 1, decoder=True), compute_of=UNIT),
        Weights("MAE, mask tokens in the encoder", "mae", _mae(0.75, "method.mae.mask_tokens_in_encoder=true"),
                compute_of=UNIT),
        Weights("random weights, 64 px", settings=(*_mae(0.75), *UNTRAINED), images=0, size="photos"),
        Weights("random weights of LoMaR, 64 px", settings=(*_lomar(7, 4), *UNTRAINED), images=0, size="photos"),
        Weights("MAE, 64 px", "mae", _mae(0.75), images=0.5, size="photos"),
        Weights("LoMaR, 64 px, windows of 7", "lomar", _lomar(7, 4), compute_of="MAE, 64 px", size="photos"),
        *(
            Weights(f"{task}, {name}", task=task, weights=weights)
            for task in TASKS
            for name, weights in (("random", "random"), ("pre-trained", ""))
        ),
        Weights("LoMaR, 64 px, windows of 4", "lomar", _lomar(4, 12), compute_of="MAE, 64 px", size="photos"),
    )
}  # fmt: skip
METHODS = {"mae": UNIT, "efficient_mae": "DF and DM 0.85", "emae": "EMAE", "lomar": "LoMaR"}
"""Row of each method that the learning rates are tried with, at the compute of UNIT."""


def _beats(row: str, *others: str, what: str = "") -> tuple[Claim, ...]:
    return tuple(
        Claim(f"{what or row} exceeds {other}", "He et al. 2022", {row: 1, other: -1}, ("knn", "linprobe"))
        for other in others
    )


STEP_SIZES = (224, 448)
"""Image sizes at which E3 compares the time of a step of MAE and LoMaR."""
HAN, LI, CHEN = "Efficient MAE", "EMAE", "LoMaR"
STUDIES = {
    "E0": Study(
        "Every method learns",
        "All methods with the compute of four units, against weights that are not trained and against pixels.",
        (
            *_beats("MAE, compute of EMAE", "random weights", "raw pixels", what="MAE"),
            *_beats("Efficient MAE, compute of EMAE", "random weights", "raw pixels", what="Efficient MAE"),
            *_beats("EMAE", "random weights", "raw pixels"),
            *_beats("LoMaR, compute of EMAE", "random weights of LoMaR", "raw pixels", what="LoMaR"),
        ),
    ),
    "E1": Study(
        "Efficient MAE: mask ratio and difficulty",
        "Mask ratios 0.75, 0.85 and 0.90, with and without Difficulty-Flatten Loss (DF) and decoder masking (DM), on "
        "equally many images.",
        (
            *(
                Claim(f"MAE degrades from mask ratio 0.75 to {ratio}", f"{HAN}, Table 2 and Figure 1",
                      {"MAE 0.75": 1, f"MAE {ratio}": -1})
                for ratio in RATIOS[1:]
            ),
            *(
                Claim(f"MAE is better with {name} at {ratio}", f"{HAN}, Table 4",
                      {f"{name} {ratio}": 1, f"MAE {ratio}": -1})
                for ratio in RATIOS[1:]
                for name in ("DF", "DM", "DF and DM")
            ),
            Claim("DF and DM gain more at 0.9 than at 0.75", f"{HAN}, Section 5.3.1",
                  {"DF and DM 0.9": 1, "MAE 0.9": -1, "DF and DM 0.75": -1, "MAE 0.75": 1}),
        ),
        ("DF 0.75", "DM 0.75"),
    ),
    "E2": Study(
        "EMAE: parallel masks and self-consistency",
        "EMAE and MAE on equally many images, and MAE with EMAE's compute, about four times as many images; the weight "
        "of the consistency loss.",
        (
            Claim("EMAE exceeds MAE on equally many images", f"{LI}, abstract", {"EMAE": 1, UNIT: -1}),
            Claim("EMAE exceeds MAE at equal compute", f"{LI}, abstract", {"EMAE": 1, "MAE, compute of EMAE": -1}),
            Claim("the consistency loss improves EMAE", f"{LI}, abstract", {"EMAE": 1, "EMAE, weight 0": -1}),
            Claim("EMAE agrees more between masks than MAE", f"{LI}, Figures 1 and 4", {UNIT: 1, "EMAE": -1},
                  ("disagreement",)),
            Claim("the consistency loss increases the agreement", f"{LI}, Figures 3 and 4",
                  {"EMAE, weight 0": 1, "EMAE": -1}, ("disagreement",)),
            Claim("half the weight increases the agreement, too", "ours", {"EMAE, weight 0": 1, "EMAE, weight 0.5": -1},
                  ("disagreement",)),
        ),
    ),
    "E3": Study(
        "LoMaR: small windows",
        "At 32 px (8 x 8 patches), what keeps LoMaR from learning: the size of the windows, the mask ratio, or mask "
        "tokens in the encoder, which sees none in the evaluation. At 64 px (16 x 16 patches), pre-training on "
        "photographs and evaluation on CIFAR-10. All at equal compute.",
        (
            Claim("a window of the whole image improves LoMaR", "ours", {"LoMaR, whole image": 1, "LoMaR": -1},
                  ("linprobe",)),
            Claim("mask ratio 0.5 improves LoMaR", "ours", {"LoMaR, mask ratio 0.5": 1, "LoMaR": -1}, ("linprobe",)),
            Claim("a decoder, without mask tokens in the encoder, improves LoMaR", "ours",
                  {"LoMaR with decoder": 1, "LoMaR": -1}, ("linprobe",)),
            Claim("so it does with a window of the whole image", "ours",
                  {"LoMaR with decoder, whole image": 1, "LoMaR, whole image": -1}, ("linprobe",)),
            Claim("mask tokens in the encoder degrade MAE", "He et al. 2022, Table 1 (c)",
                  {UNIT: 1, "MAE, mask tokens in the encoder": -1}, ("linprobe",)),
            *_beats("LoMaR, 64 px, windows of 7", "random weights of LoMaR, 64 px", "raw pixels"),
            *_beats("MAE, 64 px", "random weights, 64 px", "raw pixels"),
            Claim("LoMaR exceeds random weights in fine-tuning at 64 px", f"{CHEN}, abstract",
                  {"LoMaR, 64 px, windows of 7": 1, "random weights of LoMaR, 64 px": -1}),
            Claim("LoMaR exceeds MAE at equal compute at 64 px", f"{CHEN}, abstract and Figure 3",
                  {"LoMaR, 64 px, windows of 7": 1, "MAE, 64 px": -1}),
            Claim("windows of 7 exceed windows of 4 at 64 px", f"{CHEN}, Figure 4",
                  {"LoMaR, 64 px, windows of 7": 1, "LoMaR, 64 px, windows of 4": -1}),
        ),
    ),
    "E4": Study(
        "Transfer to segmentation and detection",
        "Weights of demo_emae, before and after pre-training on the task's photographs, are fine-tuned with "
        "segment_tiny and detect_tiny for equally many steps without augmentation, and evaluated on training images "
        "and on others. The recipes' learning rates were chosen from random weights.",
        tuple(
            Claim(f"pre-training improves {task} on {images}", f"{LI}, abstract",
                  {f"{task}, pre-trained": 1, f"{task}, random": -1}, (f"{TASKS[task].measure}{suffix}",))
            for task in TASKS
            for images, suffix in (("training images", "_of_training"), ("other images", ""))
        ),
    ),
}  # fmt: skip
