"""Reverse KL (DMD, Eqs. 5, 6) against total variation (ADM, Eqs. 7, 8) in the plane, as in Fig. 4.

    python tests/toy2d.py --seeds 5 --out toy2d.png

The data are six Gaussians of unequal weights: the teacher F_phi is a closed form, the share of every mode is
known. A one-step generator that starts on two of them is trained twice, from the same weights. Both methods
have the same search: the eight pairs of rates in GRID on one seed, the best by TV of shares plus TV of the
plane, then the other seeds.

x_t points B 2, t and s = t - dt times (B,), K components; other letters as in adm.py.
"""
import argparse
import sys
import time
from copy import deepcopy
from pathlib import Path

import numpy as np
import torch
from PIL import Image, ImageDraw
from torch import Tensor, nn
from torch.nn.functional import mse_loss, relu

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
from models.diffusion import Denoiser, delta_t, dmd_loss, ode_step, q, random_time, solve, target

CENTRES = torch.tensor([[0.0, 0.0], [2.0, 0.3], [0.8, 1.9], [-1.6, 1.5], [-1.9, -0.8], [0.4, -1.9]])
WEIGHTS = torch.tensor([0.25, 0.10, 0.20, 0.05, 0.15, 0.25])
STD = 0.35  # the nearest centres are 1.9 apart
CELLS = 11  # of width STD, each way from 0
BATCH, UPDATES = 256, 2500
METHODS = ("dmd", "adm")
GRID = [(theta, ratio * theta) for theta in (2e-4, 6e-4, 2e-3, 6e-3) for ratio in (2, 8)]  # G_theta; f_psi and D_tau
SEARCH_SEED = 1000
NAMES = {"data": "target", "start": "start", "dmd": "reverse KL (DMD)", "adm": "ADM"}
SIDE, REACH = 240, 3.5  # pixels of a panel; it shows [-REACH, REACH] in x and y


class Mixture:
    """Gaussians at `centres` (K 2) on the flow path; `net` is the network that knows them."""

    def __init__(self, centres: Tensor = CENTRES, weights: Tensor = WEIGHTS):
        self.centres, self.weights = centres, weights / weights.sum()

    def sample(self, count: int) -> Tensor:
        return self.centres[self.weights.multinomial(count, replacement=True)] + STD * torch.randn(count, 2)

    def components(self, x_t: Tensor, t: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """(x_t less each component's mean B K 2, their variance B 1, log joint density B K)."""
        var = (1 - t[:, None]) ** 2 * STD ** 2 + t[:, None] ** 2
        diff = x_t[:, None] - (1 - t[:, None, None]) * self.centres.to(x_t)
        log_p = self.weights.to(x_t).log() - diff.square().sum(-1) / (2 * var) - (2 * torch.pi * var).log()
        return diff, var, log_p

    def density(self, x_0: Tensor) -> Tensor:
        return self.components(x_0, torch.zeros(len(x_0)))[2].logsumexp(1).exp()

    def net(self, x_t: Tensor, t: Tensor, c: tuple, taps: tuple = (), lora: tuple = ()) -> Tensor:
        """E[eps - x_0 | x_t], the optimum of Eq. (3)."""
        diff, var, log_p = self.components(x_t, t)
        gain = (t - (1 - t) * STD ** 2)[:, None, None] / var[..., None]
        return (log_p.softmax(1)[..., None] * (gain * diff - self.centres.to(x_t))).sum(1)


def measure(x: Tensor) -> tuple[float, float, float]:
    """Of samples (B 2): 0.5 * sum |share - weight|, a sample going to its nearest component; components that
    hold a quarter of their weight inside 2 STD; and Eq. (12), halved too, over cells of the plane."""
    distance, nearest = torch.cdist(x, CENTRES).min(1)
    share, inside = (k.bincount(minlength=6) / len(x) for k in (nearest, nearest[distance < 2 * STD]))
    column, row = ((x / STD).floor().long().clamp(-CELLS, CELLS - 1) + CELLS).unbind(1)
    cells = (column * 2 * CELLS + row).bincount(minlength=4 * CELLS ** 2) / len(x)
    grid = torch.cartesian_prod(*2 * [(torch.arange(-CELLS, CELLS) + 0.5) * STD])
    mass = Mixture().density(grid) * STD ** 2
    variation, plane = (0.5 * (a - b).abs().sum().item() for a, b in ((share, WEIGHTS), (cells, mass)))
    return variation, (inside >= WEIGHTS / 4).sum().item(), plane


class MLP(nn.Module):
    """Of a point and a time. D_tau is one too: the plane has no pre-trained features for its heads."""

    def __init__(self, outputs: int):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(7, 64), nn.SiLU(), nn.Linear(64, 64), nn.SiLU(),
                                    nn.Linear(64, 64), nn.SiLU(), nn.Linear(64, outputs))

    def forward(self, x_t: Tensor, t: Tensor, c: tuple = (), taps: tuple = (), lora: tuple = ()) -> Tensor:
        waves = [f(k * torch.pi * t[:, None]) for k in (1, 2) for f in (torch.cos, torch.sin)]
        return self.layers(torch.cat([x_t, t[:, None], *waves], 1))


def adamw(net: nn.Module, lr: float) -> torch.optim.AdamW:  # App. B.5; fused takes half the time at this size
    return torch.optim.AdamW(net.parameters(), lr=lr, betas=(0.0, 0.99), weight_decay=0.0, fused=True)


def descend(loss: Tensor, opt: torch.optim.AdamW, left: float) -> None:
    """One update; the rate falls to 0 over the second half. left: fraction of the updates to come."""
    opt.param_groups[0]["lr"] = opt.defaults["lr"] * min(1, 2 * left)
    loss.backward(inputs=opt.param_groups[0]["params"])  # of no other network that the loss passes through
    opt.step()
    opt.zero_grad()


def generate(G_theta: Denoiser, count: int) -> Tensor:
    """Alg. 1 l. 14-17 with N = 1."""
    return ode_step(G_theta, torch.randn(count, 2), torch.tensor(1.0), torch.tensor(0.0), ())[1]


def fake_loss(f_psi: Denoiser, x_0: Tensor) -> Tensor:
    t_f, z_f = random_time("flow", torch.rand(len(x_0))), torch.randn_like(x_0)
    return mse_loss(f_psi(q("flow", x_0, t_f, z_f), t_f, ()), target("velocity", "flow", x_0, t_f, z_f))


def start(part: Mixture, updates: int = 500) -> tuple[Denoiser, Denoiser]:
    """(G_theta regressed to pairs of a teacher that knows `part` alone, f_psi regressed to G_theta)."""
    G_theta, f_psi = Denoiser(MLP(2)), Denoiser(MLP(2))
    opt_theta, opt_psi = adamw(G_theta.net, 2e-3), adamw(f_psi.net, 2e-3)
    z = torch.randn(4096, 2)
    velocity = z - solve(Denoiser(part.net), z, torch.linspace(0, 1, 33), ())
    for i in range(updates):
        pick = torch.randint(len(z), (BATCH,))
        loss = mse_loss(G_theta(z[pick], torch.ones(BATCH), ()), velocity[pick])
        descend(loss, opt_theta, 1 - i / updates)
    for i in range(updates):
        descend(fake_loss(f_psi, generate(G_theta, BATCH).detach()), opt_psi, 1 - i / updates)
    return G_theta, f_psi


def distil(method: str, G_theta: Denoiser, f_psi: Denoiser, updates: int, rates: tuple[float, float]) -> Denoiser:
    """Alg. 1 with N = 1 and TTUR 1; "dmd" has Eq. (6) in the place of Eqs. (7), (8). Trains copies."""
    F_phi, G_theta, f_psi, D_tau = Denoiser(Mixture().net), deepcopy(G_theta), deepcopy(f_psi), MLP(1)
    lr_theta, lr_others = rates
    opt_theta, opt_psi, opt_tau = adamw(G_theta.net, lr_theta), adamw(f_psi.net, lr_others), adamw(D_tau, lr_others)
    dt = delta_t("flow")
    for i in range(updates):
        left = 1 - i / updates
        descend(fake_loss(f_psi, generate(G_theta, BATCH).detach()), opt_psi, left)    # Eq. (3)
        x_hat_0 = generate(G_theta, BATCH)
        t = random_time("flow", torch.rand(BATCH), low=dt)
        s = (t - dt).clamp_min(0)
        x_t = q("flow", x_hat_0, t, torch.randn(BATCH, 2))
        x_fake, x_0_fake = ode_step(f_psi, x_t, t, s, ())
        with torch.no_grad():
            x_real, x_0_real = ode_step(F_phi, x_t, t, s, ())
        if method == "dmd":
            descend(dmd_loss(x_hat_0, x_0_fake, x_0_real), opt_theta, left)            # Eqs. (5), (6)
            continue
        descend(-D_tau(x_fake, s).mean(), opt_theta, left)                             # Eq. (7)
        logits_fake, logits_real = D_tau(x_fake.detach(), s), D_tau(x_real, s)
        loss_tau = relu(1 + logits_fake).mean() + relu(1 - logits_real).mean()         # Eq. (8)
        descend(loss_tau, opt_tau, left)
    return G_theta


def start_on_two(seed: int) -> tuple[Denoiser, Denoiser]:
    torch.manual_seed(seed)
    two = torch.randperm(len(WEIGHTS))[:2]
    return start(Mixture(CENTRES[two], WEIGHTS[two]))


def search(method: str, updates: int) -> tuple[float, float]:
    """The best rates of GRID on SEARCH_SEED; prints every trial."""
    generators, scores = start_on_two(SEARCH_SEED), []
    for rates in GRID:
        torch.manual_seed(SEARCH_SEED)
        variation, modes, plane = measure(generate(distil(method, *generators, updates, rates), 8192))
        scores.append(variation + plane)
        print(f"{method} rates {rates[0]:g} {rates[1]:g}: TV of shares {variation:.3f}, {modes} modes, TV of the "
              f"plane {plane:.3f}", flush=True)
    return GRID[min(range(len(GRID)), key=scores.__getitem__)]


def experiment(seed: int, updates: int, rates: dict[str, tuple], count: int = 8192) -> dict[str, Tensor]:
    """Samples (B 2) of the data, of the generator at the start and after either training."""
    G_theta, f_psi = start_on_two(seed)
    generators = {"start": G_theta}
    generators |= {method: distil(method, G_theta, f_psi, updates, rates[method]) for method in METHODS}
    samples = {name: generate(G, count).detach() for name, G in generators.items()}
    return {"data": Mixture().sample(count)} | samples


def panel(x: Tensor) -> np.ndarray:
    """Samples and contours of the data's density, SIDE SIDE 3."""
    axis = (torch.arange(SIDE) + 0.5) * 2 * REACH / SIDE - REACH
    grid = torch.cartesian_prod(-axis, axis).flip(1)  # rows from the top
    density = Mixture().density(grid).view(SIDE, SIDE).numpy()
    level = np.searchsorted([0.005, 0.05, 0.2, 0.4], density)
    picture = np.full((SIDE, SIDE, 3), 255, np.uint8)
    pixels = (x * torch.tensor([1, -1]) / REACH + 1) * SIDE / 2
    column, row = pixels.clamp(0, SIDE - 1).long().T.numpy()
    picture[row, column] = 60, 110, 200
    picture[(level != np.roll(level, 1, 0)) | (level != np.roll(level, 1, 1))] = 190, 60, 40
    return picture


def draw(rows: list[dict[str, Tensor]]) -> Image.Image:
    """A row for each seed, a column for each source of samples."""
    picture = Image.new("RGB", (len(NAMES) * SIDE, 16 + len(rows) * (SIDE + 16)), "white")
    for column, (name, title) in enumerate(NAMES.items()):
        ImageDraw.Draw(picture).text((column * SIDE + 6, 2), title, fill="black")
        for i, row in enumerate(rows):
            top = 16 + i * (SIDE + 16)
            picture.paste(Image.fromarray(panel(row[name][:2000])), (column * SIDE, top))
            text = "shares {:.3f}, {} modes, plane {:.3f}".format(*measure(row[name]))
            ImageDraw.Draw(picture).text((column * SIDE + 6, top + SIDE), text, fill="black")
    return picture


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--seeds", type=int, default=5)
    parser.add_argument("--updates", type=int, default=UPDATES, help="of the generator, in each training")
    parser.add_argument("--out", type=Path, default="toy2d.png")
    args = parser.parse_args()
    rows, rates = [], {method: search(method, args.updates) for method in METHODS}
    for seed in range(args.seeds):
        rows.append(experiment(seed, args.updates, rates))
        print(f"seed {seed} done, {time.process_time():.0f} s of CPU", flush=True)
    print(f"{'mean +- std over seeds':22}{'TV of shares':>18}{'modes of 6':>18}{'TV of the plane':>18}")
    for name, title in NAMES.items():
        table = np.array([measure(row[name]) for row in rows])  # seeds, measures
        figures = [f"{mean:.3f} +- {std:.3f}" for mean, std in zip(table.mean(0), table.std(0))]
        print(f"{title:22}" + "".join(f"{figure:>18}" for figure in figures))
    draw(rows).save(args.out)
