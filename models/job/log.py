"""One iteration's scalars, and one line about the last hundred of them."""
import math
from collections import defaultdict

import torch
from torch import Tensor

from models.parallel import mean_over_ranks, update


class Log:
    """One iteration's scalars: means over the micro-batches and ranks, in `record` when closed."""

    def __init__(self):
        self.values, self.record = defaultdict(list), {}

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.values[name].append(value.detach())

    def mean(self, name: str) -> Tensor:
        return torch.stack(self.values[name]).mean(0)

    def update(self, role: str, opt: torch.optim.Optimizer, warmup: float = 1.0) -> None:
        """Step, at `warmup` times the learning rate, on the gradients that the iteration's loss_ROLE has
        left; record that loss and their norm."""
        loss, norm = update(opt, self.mean(f"loss_{role}"), warmup)
        self.record |= {f"loss_{role}": loss, f"grad_norm_{role}": norm}

    def close(self, **values) -> None:
        """Take the mean of everything over the ranks; vectors (the margins) stay lists."""
        names = [name for name in self.values if not name.startswith("loss_")]  # `update` has recorded those
        means = [self.mean(name) for name in names]
        flat = iter(mean_over_ranks([v for m in means for v in m.flatten()]) if means else [])
        for name, m in zip(names, means):
            self.record[name] = [next(flat) for _ in m] if m.ndim else next(flat)
        self.record = values | self.record

    def finite(self) -> bool:
        return all(math.isfinite(v) for k, v in self.record.items() if k.startswith(("loss_", "grad_norm_")))


def health(history) -> str:
    """One line about the last iterations: what a person would look for in the curves."""
    records, figures = list(history), ""
    first, last = records[0], records[-1]
    drift = last["x_0_std"] / max(first["x_0_std"], 1e-12)
    worries = [f"{key.removeprefix('grad_norm_')} has no gradient" for key in last
               if key.startswith("grad_norm_") and all(record[key] == 0 for record in records)]
    if "margin" in last:  # there is a discriminator
        margin = sum(sum(record["margin"]) / len(record["margin"]) for record in records) / len(records)
        loss = sum(record["loss_tau"] for record in records) / len(records)
        figures = f"margin {margin:+.4f} loss_tau {loss:.3f} "
        if len(records) >= 50:
            worries += ["D cannot tell fake from real"] * (abs(margin) < 1e-4)
            worries += ["D has won: its loss is 0"] * (loss < 0.01)
    if not 0.67 < drift < 1.5:
        worries += [f"x_0's deviation changed {drift:.2f}-fold over {len(records)} iterations"]
    return (f"{figures}x_0 {last['x_0_mean']:+.3f} +- {last['x_0_std']:.3f} "
            f"health: {'; '.join(worries or ['good'])}")
