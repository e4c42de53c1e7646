"""One iteration's scalars, and one line about the last hundred of them."""
import math
from collections import defaultdict

import torch
from torch import Tensor
from torch.nn.functional import cosine_similarity, one_hot
from tqdm import tqdm

from models.checkpoint import some
from models.parallel import is_main, mean_over_ranks, update


class Log:
    """One iteration's scalars: means over the micro-batches and ranks, in `record` when closed. `rate`: the
    share of their learning rates at which its updates step."""

    def __init__(self, rate: float = 1.0):
        self.values, self.record, self.rate = defaultdict(list), {}, rate

    def add(self, **values: Tensor) -> None:
        for name, value in values.items():
            self.values[name].append(value.detach())

    def latents(self, x_hat_0: Tensor) -> None:
        """Mean and deviation of each channel of generated latents (B C H W) or (B T C H W)."""
        x = x_hat_0.detach().movedim(-3, 0).flatten(1)  # C, the rest
        self.add(x_0_mean=x.mean(1), x_0_square=x.square().mean(1))

    def pairs(self, logits_fake: Tensor, logits_real: Tensor) -> None:
        """Of logits (heads B): how far apart each head has the pairs, and the share that it has the right way."""
        apart = (logits_real - logits_fake).detach()
        self.add(margin=apart.mean(1), told_apart=(apart > 0).float().mean(1))

    def gradient(self, t: Tensor, grad: Tensor, direction: Tensor) -> None:
        """Of the loss's gradient at x_hat_0 (B ...): its length, and its cosine with x_0_fake - x_0_real, Eq. (5)'s
        direction. Each over all samples, then over those with t (B,) in each third of [0, 1]."""
        grad, direction = grad.detach().flatten(1), direction.detach().flatten(1)
        third = one_hot((3 * t).long().clamp_max(2), 3).to(grad.dtype)
        groups = torch.cat([torch.ones_like(third[:, :1]), third], dim=1)  # B 4
        for name, value in (("cos_dmd", cosine_similarity(grad, direction)), ("grad_x_0", grad.norm(dim=1))):
            self.add(**{name: torch.stack([value @ groups, groups.sum(0)])})

    def mean(self, name: str) -> Tensor:
        return torch.stack(self.values[name]).mean(0)

    def update(self, role: str, opt: torch.optim.Optimizer, warmup: float = 1.0) -> None:
        """Step, at `warmup` and `rate` times the learning rate, on the gradients that the iteration's loss_ROLE
        has left; record that loss and their norm."""
        loss, norm = update(opt, self.mean(f"loss_{role}"), warmup * self.rate)
        self.record |= {f"loss_{role}": loss, f"grad_norm_{role}": norm}

    def close(self, **values) -> None:
        """Take the mean of everything over the ranks; vectors (margins, channels) stay lists. Of `gradient`'s
        sums and counts it takes the quotient, None where no sample was."""
        names = [name for name in self.values if not name.startswith("loss_")]  # `update` has recorded those
        means = [self.mean(name) for name in names]
        flat = iter(mean_over_ranks([v for m in means for v in m.flatten()]) if means else [])
        for name, m in zip(names, means):
            numbers = [next(flat) for _ in m.flatten()]
            if m.ndim == 2:
                half = len(numbers) // 2
                numbers = [total / count if count else None for total, count in zip(numbers[:half], numbers[half:])]
            self.record[name] = numbers if m.ndim else numbers[0]
        if "x_0_square" in self.record:
            pairs = zip(self.record.pop("x_0_square"), self.record["x_0_mean"])
            self.record["x_0_std"] = [math.sqrt(max(0.0, square - mean ** 2)) for square, mean in pairs]
        self.record = values | self.record
        wrong = self.not_finite()
        if wrong and is_main():
            tqdm.write(f"iteration {values.get('global_iter')}: {some(wrong, 6)} not finite, so that update is "
                       f"skipped; {values.get('skipped')} iterations with such until now")

    def not_finite(self) -> list[str]:
        """The losses and norms for which `update` has skipped its step."""
        return [key for key, value in self.record.items()
                if key.startswith(("loss_", "grad_norm_")) and not math.isfinite(value)]


def average(records: list[dict], name: str) -> list[float]:
    """Of a vector's entries over the iterations; nan for one that none of them has."""
    columns = [[value for value in column if value is not None]
               for column in zip(*(record[name] for record in records if name in record))]
    return [sum(column) / len(column) if column else math.nan for column in columns]


def health(history, teacher_std: list[float] | None = None) -> str:
    """One line about the last iterations: what a person would look for in the curves. `teacher_std`: the
    deviation of each channel of the teacher's latents."""
    records, figures = list(history), ""
    last, late = records[-1], len(records) >= 50
    worries = [f"{key.removeprefix('grad_norm_')} has no gradient" for key in last
               if key.startswith("grad_norm_") and all(record[key] == 0 for record in records)]
    if "margin" in last:  # there is a discriminator
        margins, apart = average(records, "margin"), average(records, "told_apart")
        margin, loss = sum(margins) / len(margins), sum(record["loss_tau"] for record in records) / len(records)
        told = sum(apart) / len(apart)
        figures = f"margin {margin:+.4f} told apart {told:.2f} loss_tau {loss:.3f} "
        if late and (abs(margin) < 1e-4 or told < 0.52):
            worries.append("D cannot tell fake from real")
        if late and loss < 0.01:
            worries.append("D has won: its loss is 0")
    if "grad_x_0" in last:
        figures += f"gradient {average(records, 'grad_x_0')[0]:.2g} "
    if "cos_dmd" in last:
        cosine, *thirds = average(records, "cos_dmd")
        figures += f"cos {cosine:+.2f} ({' '.join(f'{value:+.2f}' for value in thirds)}) "
        if late and cosine < 0:
            worries.append("the generator's gradient points away from DMD's direction")
    means, stds = average(records, "x_0_mean"), average(records, "x_0_std")
    before, after = average(records[:10], "x_0_std"), average(records[-10:], "x_0_std")
    drifts = [b / max(a, 1e-12) for a, b in zip(before, after)]
    worries += [f"channel {i} of x_0: its deviation changed {drift:.2f}-fold over {len(records)} iterations"
                for i, drift in enumerate(drifts) if not 0.67 < drift < 1.5][:1]
    if teacher_std:
        ratios = [student / max(teacher, 1e-12) for student, teacher in zip(stds, teacher_std)]
        figures += f"deviation / teacher's {min(ratios):.2f} to {max(ratios):.2f} "
        worries += [f"channel {i} of x_0 has {ratio:.2f} times the teacher's deviation"
                    for i, ratio in enumerate(ratios) if not 0.8 < ratio < 1.25][:1]
    return (f"{figures}x_0 {sum(means) / len(means):+.3f} +- {sum(stds) / len(stds):.3f} "
            f"health: {'; '.join(worries or ['good'])}")
