"""Poisson sampling over privacy units."""

from collections.abc import Iterator, Sequence
from typing import Any


def poisson_batches(n_units: int, sample_rate: float, steps: int, seed: int | None) -> Iterator[list[int]]:
    """``steps`` batches of unit indices; every unit is in each batch independently with ``sample_rate``.

    A batch may be empty; the step must then still add noise and be counted. Amplification by sampling assumes that
    the sample is secret: without a seed it comes from the system's entropy. A seed fixes the data order, for runs that
    are not private; DP noise never comes from it.
    """
    import torch

    from fedmentor_core.privacy.entropy import secret_generator

    generator = secret_generator() if seed is None else torch.Generator().manual_seed(seed)
    for _ in range(steps):
        mask = torch.rand(n_units, generator=generator, dtype=torch.float64) < sample_rate  # fp32 would round the rate
        yield mask.nonzero(as_tuple=True)[0].tolist()


def pick_rows(
    units: Sequence[int], rows_of_unit: Sequence[Sequence[int]], how: str, generator: Any
) -> list[tuple[int, int]]:
    """(position of the unit in the batch, row index) pairs for a batch of units.

    'one' draws one row per unit anew (every row equally likely); 'all' takes every row.
    """
    import torch

    picked: list[tuple[int, int]] = []
    for position, unit in enumerate(units):
        rows = rows_of_unit[unit]
        if how == "one":
            choice = int(torch.randint(len(rows), (1,), generator=generator))
            picked.append((position, rows[choice]))
        else:
            picked.extend((position, row) for row in rows)
    return picked
