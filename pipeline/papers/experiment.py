"""An experiment: the rows of a paper's table or figure, with settings and published values."""

from typing import Literal, NamedTuple

from pipeline.recipe.loading import MUTUALLY_EXCLUSIVE

Step = Literal["pretrain", "finetune", "linprobe", "knn"]
Computed = Literal["patches", "neighbors", "gmacs", "memory", "compute"]
ColumnName = Computed | Literal["loss", "finetune", "linprobe", "knn"]


class Column(NamedTuple):
    title: str
    step: Step | None
    """The command that measures it; None: it is computed from the recipe."""
    digits: int


COLUMNS: dict[ColumnName, Column] = {
    "patches": Column("decoded patches", None, 0),
    "neighbors": Column("masked patches with a visible neighbor, %", None, 0),
    "gmacs": Column("10^9 multiply-adds", None, 1),
    "memory": Column("memory, GiB", None, 1),
    "compute": Column("training, 10^18 FLOPs", None, 1),
    "loss": Column("pre-training loss", "pretrain", 3),
    "finetune": Column("fine-tuned top-1, %", "finetune", 1),
    "linprobe": Column("linear probe top-1, %", "linprobe", 1),
    "knn": Column("k-NN top-1, %", "knn", 1),
}


class Features(NamedTuple):
    """Frozen features that `linprobe` and `knn` evaluate. The defaults of both are MAE's."""

    pool: Literal["class_token", "mean"] = "class_token"
    labels: float | None = None
    """Class-balanced share of the labels; None: all."""
    image_size: int | None = None
    """None: as trained."""
    resize: int | None = None
    """Shorter side in pixels before the center crop; None: as MAE."""

    @property
    def options(self) -> tuple[str, ...]:
        """Return the options of the commands that differ from the defaults."""
        return tuple(
            word
            for name, value in self._asdict().items()
            if value != self._field_defaults[name]
            for word in (f"--{name.replace('_', '-')}", str(value))
        )


class Row(NamedTuple):
    name: str
    published: dict[ColumnName, float]
    """Values that the paper gives."""
    settings: tuple[str, ...] = ()
    """Overrides of the pre-training recipe, in addition to the experiment's."""
    recipe: str | None = None
    """Pre-training recipe instead of the experiment's."""
    finetune_recipe: str | None = None
    """Fine-tuning recipe instead of the experiment's."""
    finetune_settings: tuple[str, ...] = ()
    weights: str = ""
    """Evaluate these weights, for example pixels:32, instead of pre-training."""
    encoder_only: bool = False
    """Compute the cost of the encoder on whole images."""


class Experiment(NamedTuple):
    name: str
    """Paper and table, for example "efficient_mae.table7"."""
    title: str
    source: str
    columns: tuple[ColumnName, ...]
    rows: tuple[Row, ...]
    recipe: str = ""
    """Pre-training recipe."""
    settings: tuple[str, ...] = ()
    """Overrides of the pre-training recipe."""
    finetune_recipe: str = ""
    probe_epochs: int = 50
    probe_lrs: tuple[float, ...] = (0.1,)
    """Base learning rates of the linear probe; of several, the best on held-out training samples counts."""
    center_crops: bool = False
    """Train the linear probe on features of center crops, extracted once."""
    features: Features = Features()
    notes: tuple[str, ...] = ()
    """Deviations from the paper, and remarks on its numbers."""
    plot: Literal["cost"] | None = None
    profile: tuple[float, ...] = ()
    """Figure 2 of Efficient MAE: mask ratios of a histogram of difficulties, drawn instead of a table of rows. The one
    row trains the model whose errors are used."""

    @property
    def steps(self) -> list[Step]:
        """Return the commands that each row needs, in order."""
        needed = {COLUMNS[column].step for column in self.columns} - {None}
        steps: list[Step] = ["pretrain"] if needed or self.profile else []
        for step in ("finetune", "linprobe", "knn"):
            if step in needed:
                steps.append(step)
        return steps

    def varied_keys(self, step: Step) -> set[str]:
        """Return the keys that distinguish the rows' commands of one kind, and those that would replace these keys."""
        settings = {
            "pretrain": [row.settings for row in self.rows],
            "finetune": [row.finetune_settings for row in self.rows],
        }
        keys = {setting.partition("=")[0] for row in settings.get(step, []) for setting in row}
        return keys | {other for pair in MUTUALLY_EXCLUSIVE for key, other in (pair, pair[::-1]) if key in keys}
