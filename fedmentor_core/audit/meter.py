"""What every optimizer step really stepped with, seen through torch's own step hook: no change to the code under audit.

In a private run that is the noised gradient of ``privacy/engine.py``,

    G = ( S + N(0, sigma^2 C^2 I) ) / (q N),      S the clipped sum of the batch's units, ||S|| <= |batch| C.
"""

import threading
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, Self


@dataclass(frozen=True, slots=True)
class SeenStep:
    """One optimizer step: the L2 norm and length of the gradient it stepped with, and how many units were drawn."""

    norm: float
    n_coordinates: int
    n_drawn: int


class StepMeter:
    """While entered, notes each optimizer step of the entering thread.

    Args:
        keep: also keep the gradients themselves (CPU, fp32, one flat vector per step).
        add: also keep the sum of all gradients (``total``).
        drawn: the number of units drawn so far.
    """

    def __init__(self, *, keep: bool = False, add: bool = False, drawn: Callable[[], int] = lambda: 0) -> None:
        """Sees nothing until entered."""
        self.steps: list[SeenStep] = []
        self.gradients: list[Any] = []
        self.total: Any = None
        self._keep = keep
        self._add = add
        self._drawn = drawn

    def __enter__(self) -> Self:
        from torch.optim.optimizer import register_optimizer_step_pre_hook

        self._thread = threading.get_ident()
        self._drawn_before = self._drawn()
        self._handle = register_optimizer_step_pre_hook(self._see)
        return self

    def __exit__(self, *_: object) -> None:
        self._handle.remove()

    def _see(self, optimizer: Any, *_: object) -> None:
        import torch
        from opacus.optimizers import DPOptimizer

        if isinstance(optimizer, DPOptimizer) or threading.get_ident() != self._thread:
            return  # the wrapper around the optimizer that steps; another thread's work
        parts = [
            parameter.grad.detach().float().flatten()
            for group in optimizer.param_groups
            for parameter in group["params"]
            if parameter.grad is not None
        ]
        gradient = torch.cat(parts) if parts else torch.zeros(0)
        drawn = self._drawn()
        self.steps.append(SeenStep(float(gradient.double().norm()), gradient.numel(), drawn - self._drawn_before))
        self._drawn_before = drawn
        if self._add:
            self.total = gradient.clone() if self.total is None else self.total.add_(gradient)
        if self._keep:
            self.gradients.append(gradient.to("cpu", copy=True))
