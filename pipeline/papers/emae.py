"""EMAE: "Efficient Masked Autoencoders with Self-Consistency", Li et al., IEEE TPAMI 2024. Only its abstracts were
available."""

from pipeline.papers.experiment import Experiment, Row

PAPER = "Li et al., IEEE TPAMI 2024"
NOTE = "The paper's tables were not available: no value is published here."
ABSTRACT = Experiment(
    name="emae.abstract",
    title="EMAE with part of MAE's compute",
    source=f"{PAPER}, abstracts of versions 1 and 2",
    columns=("compute", "finetune"),
    rows=(
        Row("EMAE, ViT-B, 300 epochs", {}, (), "vitb16_emae", "finetune_vitb16"),
        Row("MAE, ViT-B, 1600 epochs", {"finetune": 83.6}, (), "vitb16_mae", "finetune_vitb16"),
        Row("EMAE, ViT-L, 50 epochs", {}, (), "vitl16_emae", "finetune_vitl16"),
        Row("MAE, ViT-L, 1600 epochs", {"finetune": 85.9}, (), "vitl16_mae", "finetune_vitl16"),
    ),
    notes=(
        "Version 1: 300 epochs of ViT-B exceed MAE's 1600. Version 2: best performance on ViT-L with 13 % of MAE's "
        "time. MAE's values are those in Table 3 of Efficient MAE.",
    ),
)
CONSISTENCY = Experiment(
    name="emae.consistency",
    title="self-consistency loss",
    source=f"{PAPER}, abstract",
    columns=("loss", "finetune"),
    recipe="vitb16_emae",
    finetune_recipe="finetune_vitb16",
    rows=(
        Row("without", {}, ("method.emae.consistency_weight=0",)),
        Row("mean over the overlap", {}, ("method.emae.consistency_mean=overlap",)),
        Row("mean over all patches", {}, ("method.emae.consistency_mean=all",)),
    ),
    notes=(NOTE, "The losses of the rows have different terms."),
)
PARTS = Experiment(
    name="emae.parts",
    title="number of parts K, mask ratio 1 - 1/K",
    source=f"{PAPER}, abstract",
    columns=("compute", "finetune"),
    recipe="vitb16_emae",
    finetune_recipe="finetune_vitb16",
    rows=tuple(Row(f"K = {parts}", {}, (f"method.emae.num_parts={parts}",)) for parts in (2, 4, 7)),
    notes=(NOTE,),
)
EXPERIMENTS = ABSTRACT, CONSISTENCY, PARTS
