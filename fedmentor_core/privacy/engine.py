r"""DP-SGD on the adapter's parameters: our per-row gradients (``row_gradients.py``), Opacus' clipping and noise.

One step on a Poisson-sampled batch of units U (Abadi et al. 2016, arXiv 1607.00133):

    g_u   = gradient of unit u's loss over ALL trainable adapter tensors together
    G     = ( sum_{u in U} g_u * min(1, C / ||g_u||) + N(0, sigma^2 C^2 I) ) / (q N)

Guarantees:
    * Adding or removing one unit changes the clipped sum by at most C in L2 (one joint clip; all rows of a unit are
      folded into one gradient first; a non-finite gradient contributes zero).
    * The denominator is the expected batch q N, never the realised one.
    * An empty batch still adds noise and is a step like any other.
    * Microbatches change memory, not the mechanism: noise is added once, after the last.
    * Noise comes from the system's entropy, the generator's whole state drawn anew at every step, in Opacus' secure
      mode (each number is the sum of four Gaussians, against floating-point attacks: Holohan and Braghin 2021, arXiv
      2107.10138), for the whole adapter at once; never from a study's seed, except in tests, and then the run is
      marked not private.
"""

from collections.abc import Iterable
from typing import Any

from fedmentor_core.errors import FedMentorError
from fedmentor_core.privacy.entropy import reseed_from_entropy, secret_generator


def private_model(model: Any) -> Any:
    """Wrap ``model`` so that a backward pass leaves one gradient per row on each trained parameter.

    Raises:
        FedMentorError: the model couples samples (BatchNorm), or trains something other than linear layers' weights.
    """
    import torch

    from fedmentor_core.privacy.row_gradients import RowGradients

    coupled = sorted(
        {type(m).__name__ for m in model.modules() if isinstance(m, torch.nn.modules.batchnorm._BatchNorm)}
    )
    if coupled:
        raise FedMentorError(f"the backbone has {coupled}, which mixes samples; per-sample clipping is impossible.")
    return RowGradients(model)


def make_private_optimizer(
    optimizer: Any,
    *,
    noise_multiplier: float,
    clip_norm: float,
    expected_units: float,
    device: str,
    noise_seed: int | None = None,
) -> Any:
    """Opacus' ``DPOptimizer`` with unit folding and entropy handling.

    Args:
        optimizer: any torch optimizer over the trainable adapter parameters.
        noise_multiplier: sigma; the noise on the clipped sum has standard deviation sigma * clip_norm.
        clip_norm: C, L2, over all adapter tensors jointly.
        expected_units: q * N, the denominator.
        device: where the parameters are.
        noise_seed: tests only.
    """
    import torch
    from opacus.optimizers import DPOptimizer

    class UnitOptimizer(DPOptimizer):  # type: ignore[misc]
        """Clips whole units, over the whole adapter: Opacus is shown one tensor, all trained ones end to end.

        An adapter has hundreds of small tensors, and at a small step the calls for each would cost more than the
        arithmetic. One vector has one norm, one draw of noise and one division.
        """

        def __init__(self, inner: Any, **options: Any) -> None:
            self._tensors = [p for group in inner.param_groups for p in group["params"] if p.requires_grad]
            self._sizes = [tensor.numel() for tensor in self._tensors]
            # It has the shape that Opacus asks for and carries its attributes, and no numbers of its own.
            self._adapter: Any = torch.zeros((), device=device).expand(sum(self._sizes))
            super().__init__(inner, **options)

        @property
        def params(self) -> list[Any]:
            """What Opacus clips and noises: one vector."""
            return [self._adapter]

        def fold(self, unit_of_row: Any, n_units: int) -> None:
            """Gather the gradients of a microbatch, one vector per unit; drop the non-finite and what has no unit.

            Args:
                unit_of_row: (rows,) unit of each row; ``n_units`` marks a filler row.
                n_units: number of units.

            Raises:
                FedMentorError: a parameter has no gradient, or not one per row.
            """
            in_order = torch.arange(len(unit_of_row), device=unit_of_row.device).clamp_(max=n_units)
            one_row_each = torch.equal(unit_of_row, in_order)
            made = torch.empty if one_row_each else torch.zeros
            units: Any = made((n_units + 1, sum(self._sizes)), device=device)  # the last takes filler rows
            for tensor, columns in zip(self._tensors, units.split(self._sizes, dim=1), strict=True):
                rows = tensor.grad_sample
                if rows is None or len(rows) != len(unit_of_row):
                    raise FedMentorError(
                        "a trained tensor has no gradient per row: its module does not see one row of the batch at a "
                        "time. Correct adapter.target_modules. Nothing was released."
                    )
                tensor.grad_sample = None
                if one_row_each:
                    columns[:n_units] = rows[:n_units].flatten(1)
                else:
                    columns.index_add_(0, unit_of_row, rows.flatten(1).float())
            units = units[:n_units]
            # The norm of a row that holds NaN or infinity is neither; a finite row whose norm overflows is dropped too.
            finite = units.norm(dim=1).isfinite()
            if not bool(finite.all()):
                units[~finite] = 0.0
            self._adapter.grad_sample = units

        def fold_empty(self) -> None:
            """The gradient of an empty batch: no unit, to which ``step`` still adds noise."""
            self._adapter.grad_sample = torch.zeros((0, sum(self._sizes)), device=device)

        def add_noise(self) -> None:
            if noise_seed is None:
                reseed_from_entropy(self.generator)
            super().add_noise()

        def scale_grad(self) -> None:
            """Divide, and hand each trained tensor its part."""
            super().scale_grad()
            for tensor, part in zip(self._tensors, self._adapter.grad.split(self._sizes), strict=True):
                tensor.grad = part.view_as(tensor)
            self._adapter.grad = None

    generator = secret_generator(device) if noise_seed is None else torch.Generator(device).manual_seed(noise_seed)
    return UnitOptimizer(
        optimizer,
        noise_multiplier=noise_multiplier,
        max_grad_norm=clip_norm,
        expected_batch_size=expected_units,
        loss_reduction="mean",
        generator=generator,
        secure_mode=True,
    )


def private_step(optimizer: Any, microbatches: Iterable[tuple[Any, Any, int]], *, losses_of: Any) -> None:
    """One DP-SGD step.

    Args:
        optimizer: from ``make_private_optimizer``.
        microbatches: (batch, unit_of_row (rows,), n_units) with every unit's rows in one microbatch; may be empty.
        losses_of: batch -> (rows,) losses already divided by the number of rows of their unit.
    """
    pending = list(microbatches)
    if not pending:
        optimizer.fold_empty()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        return
    for position, (batch, unit_of_row, n_units) in enumerate(pending):
        losses_of(batch).sum().backward()
        optimizer.fold(unit_of_row, n_units)
        optimizer.signal_skip_step(position < len(pending) - 1)
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
