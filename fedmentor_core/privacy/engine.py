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
      mode (sums of Gaussians against floating-point attacks, Holohan and Braghin 2021); never from a study's seed,
      except in tests, and then the run is marked not private.
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
        """Clips whole units: the rows of a unit are summed before the norm is taken."""

        def fold(self, unit_of_row: Any, n_units: int) -> None:
            """Turn per-row gradients into per-unit ones; drop the non-finite and what belongs to no unit.

            Args:
                unit_of_row: (rows,) unit of each row; ``n_units`` marks a filler row.
                n_units: number of units.

            Raises:
                FedMentorError: a parameter has no gradient, or not one per row.
            """
            in_order = torch.arange(len(unit_of_row), device=unit_of_row.device).clamp_(max=n_units)
            one_row_each = torch.equal(unit_of_row, in_order)
            for parameter in self.params:
                rows = parameter.grad_sample
                if rows is None or len(rows) != len(unit_of_row):
                    raise FedMentorError(
                        "a trained tensor has no gradient per row: its module does not see one row of the batch at a "
                        "time. Correct adapter.target_modules. Nothing was released."
                    )
                if one_row_each:
                    parameter.grad_sample = rows[:n_units].float()
                    continue
                units = torch.zeros((n_units + 1, *rows.shape[1:]), device=rows.device, dtype=torch.float32)
                parameter.grad_sample = units.index_add_(0, unit_of_row, rows.float())[:n_units]
            # The sum of a row that holds NaN or infinity is neither; a finite row whose sum overflows is dropped too.
            finite = torch.stack([g.flatten(1).sum(dim=1).isfinite() for g in self.grad_samples]).all(dim=0)
            if not bool(finite.all()):
                for parameter in self.params:
                    parameter.grad_sample[~finite] = 0.0

        def fold_empty(self) -> None:
            """The gradient of an empty batch: zero rows, to which ``step`` still adds noise."""
            for parameter in self.params:
                parameter.grad_sample = torch.zeros((0, *parameter.shape), device=parameter.device)

        def add_noise(self) -> None:
            if noise_seed is None:
                reseed_from_entropy(self.generator)
            super().add_noise()

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
