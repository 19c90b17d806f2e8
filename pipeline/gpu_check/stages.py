"""Checks 6 and 7: every ZeRO stage trains like plain PyTorch, and a skipped step changes no bit.

The rank processes run `stage_ranks.py`. Nothing else here imports torch.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict

from pipeline.gpu_check.check import Context, Finding, judge, largest_difference
from pipeline.gpu_check.child import call

FP32_BOUND, BF16_BOUND = 1e-4, 2e-2
"""Largest relative difference of a loss from plain PyTorch's in fp32."""
TIMEOUT_S = 600.0
STAGES = ((0, "none"), (1, "none"), (2, "none"), (2, "optimizer"), (3, "none"), (3, "optimizer"))
"""ZeRO stage and engine.offload; ZeRO 3 last (stage_ranks.py)."""


def check_stages(context: Context) -> Finding:
    """Check 6: losses of ZeRO 0 to 3, with and without offload, in fp32 and bf16, on one rank and on several."""
    precisions, steps = (["fp32", "bf16"], 20) if context.on_gpu else (["fp32"], 4)
    losses: dict[str, Sequence[float]] = {}
    for ranks in sorted({1, context.gpus}):
        arguments = {"context": asdict(context), "precisions": precisions, "stages": STAGES, "steps": steps}
        trained = call(
            "pipeline.gpu_check.stage_ranks:train_on_stages",
            arguments,
            device=context.device,
            timeout_s=TIMEOUT_S,
            ranks=ranks,
        )
        losses |= {f"{name}, {ranks} rank{'s' * (ranks > 1)}": values for name, values in trained.items()}
    return judge_losses(losses, "PyTorch, 1 rank")


def judge_losses(losses: Mapping[str, Sequence[float]], reference: str) -> Finding:
    """Compare the losses of engines, by "precision, ...", with those of one of the entries."""
    errors = {
        name: largest_difference(values, losses[reference])
        for name, values in losses.items()
        if not name.startswith("PyTorch")
    }
    texts, bounds, passed = [], [], True
    for precision, bound in {"fp32": FP32_BOUND, "bf16": BF16_BOUND}.items():
        of_precision = {name: error for name, error in errors.items() if name.startswith(precision)}
        if of_precision:
            worst = max(of_precision, key=of_precision.__getitem__)
            texts.append(f"{len(of_precision)} engines in {precision}: at most {of_precision[worst]:.1e} ({worst})")
            bounds.append(f"{precision} {bound:.0e}")
            passed = passed and of_precision[worst] <= bound
    return Finding("; ".join(texts), f"{', '.join(bounds)} of PyTorch's losses", judge(passed))


def check_skipped_step(context: Context) -> Finding:
    """Check 7: steps with a NaN loss or a loss spike leave weights and optimizer state unchanged at every stage."""
    problems: dict[str, str] = {}
    for ranks in sorted({1, context.gpus}) if context.on_gpu else [1]:
        for precision in ("bf16", "fp32") if context.on_gpu else ("fp32",):
            arguments = {"context": asdict(context), "precision": precision, "stages": STAGES}
            found = call(
                "pipeline.gpu_check.stage_ranks:skip_on_stages",
                arguments,
                device=context.device,
                timeout_s=TIMEOUT_S,
                ranks=ranks,
            )
            problems |= {f"{precision}, {name}, {ranks} ranks": text for name, text in found.items()}
    return judge_skips(problems)


def judge_skips(problems: Mapping[str, str]) -> Finding:
    """Judge what was wrong with the state of each engine; empty texts: nothing."""
    wrong = [f"{name}: {text}" for name, text in problems.items() if text]
    value = "; ".join(wrong) if wrong else f"{len(problems)} engines: no bit changed"
    return Finding(value, "weights and optimizer state equal to the bit", judge(not wrong))
