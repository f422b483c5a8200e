"""The predicted memory of a client's step beside the measured, and what it predicts for 1.7B on one GPU.

The prediction takes the step on tensors without contents (``fedmentor_core/training/memory.py``). "Counted" are the bytes of
the tensors that the real step makes. "Measured" is what the process grew by at a step, once a step of two short rows has
made the libraries load their code, with an allocator that gives freed memory back at once. "As it runs" is the same with
glibc's own settings, under which it keeps freed pieces for the next step: sooner, and several times as large.
"""

import ctypes
from collections.abc import Mapping, Sequence

from bench_dp_step import adapted, production
from harness import Arm, Finding, Plan, Ratio, Sample, Scale, SkipArmError, Turn, benchmark, median_of

GPU_GB = 24.0
PIECE_BYTES = 8 * 2**20
"""Pieces from this size on go back as soon as they are freed: what ``MALLOC_MMAP_THRESHOLD_`` sets."""
_M_MMAP_THRESHOLD = -3  # of malloc.h
CLIENT = {"size": "1.7B", "tokens": 512, "bfloat16": True}
PLANS = {  # a logical batch of 64 in microbatches
    "8 rows": {"rows": 8, "checkpointed": False},
    "8 rows, no privacy": {"rows": 8, "checkpointed": False, "private": False},
    "16 rows, checkpointed": {"rows": 16, "checkpointed": True},
    "32 rows, checkpointed": {"rows": 32, "checkpointed": True},
}


@benchmark("memory-model", title="predicted and measured memory of a step", minutes=2.0)
def memory_model(scale: Scale) -> Plan:
    """On the CPU in fp32, at a size that fits any machine."""
    step = {"rows": 8 if scale.quick else 16, "tokens": 256, "size": "small" if scale.quick else "medium"}
    arms, ratios = [], []
    for name, options in {"kept": {"checkpointed": False}, "checkpointed": {"checkpointed": True}}.items():
        arms += [
            Arm(f"measured, {name}", measured, {**step, **options}),
            Arm(f"as it runs, {name}", measured, {**step, **options, "kept_back": True}),
            Arm(f"counted, {name}", counted, {**step, **options}),
            Arm(f"predicted, {name}", predicted, {**step, "bfloat16": False, **options}),
        ]
        for what, at_most in (("counted", 1.10), ("measured", 1.25)):
            pair = f"{what}, {name}", f"predicted, {name}"
            ratios.append(Ratio(f"{what} over predicted, {name}", *pair, what="growth_bytes", at_most=at_most))
    notes = [
        "Bytes hardly differ from turn to turn, so there is one.",
        "'growth' is what the step adds to what was held before it: the model, the libraries, Python.",
    ]
    return Plan(arms, ratios, turns=1, fresh=True, notes=notes)


@benchmark("memory-1.7B", title="predicted memory of a 1.7B client at 512 tokens, bfloat16", minutes=1.0)
def large(scale: Scale) -> Plan:
    """No GPU is needed to predict; ``dp-step-1.7B`` measures where there is one."""

    def conclude(samples: Mapping[str, Sequence[Sample]]) -> list[Finding]:
        return [
            Finding(name, median_of(taken, "peak_bytes") / 1e9, "GB", at_most=GPU_GB) for name, taken in samples.items()
        ]

    return Plan([Arm(name, predicted, {**CLIENT, **plan}) for name, plan in PLANS.items()], turns=1, conclude=conclude)


def measured(rows: int, tokens: int, size: str, checkpointed: bool, kept_back: bool = False) -> Turn:
    """The real private step; the harness takes what the process grows by."""
    libc = ctypes.CDLL(None)
    if not hasattr(libc, "mallopt"):
        raise SkipArmError("the C library is not glibc, whose allocator is set here")
    if not kept_back:
        libc.mallopt(_M_MMAP_THRESHOLD, PIECE_BYTES)
    model = adapted(size, "cpu")
    step = {"size": size, "device": "cpu", "private": True, "checkpointed": checkpointed, "model": model}
    production(2, 16, **step)()
    libc.malloc_trim(0)  # what was freed goes back, so that it is not missing from the growth
    return production(rows, tokens, **step)


def counted(rows: int, tokens: int, size: str, checkpointed: bool) -> Turn:
    """The real private step, with every tensor counted from when it is made until it is dropped."""
    from fedmentor_core.training.memory import PeakBytes

    model = adapted(size, "cpu")
    step = production(rows, tokens, size, "cpu", private=True, checkpointed=checkpointed, model=model)

    def turn() -> Sample:
        followed = PeakBytes(*model.parameters(), *model.buffers())
        held = followed.now
        with followed:
            step()
        return Sample(figures={"growth_bytes": followed.peak - held})

    return turn


def predicted(rows: int, tokens: int, size: str, bfloat16: bool, checkpointed: bool, private: bool = True) -> Turn:
    """Predict; ``peak_bytes`` holds the weights, ``growth_bytes`` does not."""
    from fedmentor_core.training.memory import StepShape, predicted_peak_bytes

    shape = StepShape(rows, tokens, tokens // 2, private, bfloat16, checkpointed)

    def turn() -> Sample:
        held, peak = predicted_peak_bytes(adapted(size, "meta", bfloat16=bfloat16), shape)
        return Sample(peak_bytes=peak, figures={"growth_bytes": peak - held})

    return turn
