"""What the training of every tiny teacher shares: the optimisation, the denoisers' loss, samples and figures.

Letters: B pictures or clips, Z h w latent, L tokens, D width.
"""
import copy
import math
import re
import time
from collections.abc import Callable
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.nn.functional import l1_loss, mse_loss

from models.checkpoint import open_tensors, replacing
from models.data import noise
from models.diffusion import Denoiser, alpha_sigma, generator_times, q, random_time, solve, target, teacher_times
from models.eval.metrics import procedural
from models.job import flags, networks, parsers
from models.job.notes import parametrisation
from models.parallel import init_distributed
from models.pictures import film_strip, save_rows
from models.presets import PRESETS, Preset
from models.text import Cond

FOLDER = Path(__file__).parent
BATCH = 64  # of a denoiser's training


def open_part(name: str, load: Callable, ckpt: Path | None = None) -> nn.Module:
    """A network of a tiny model's files, of the committed ones or of `ckpt`, a generator's too, on the CPU in
    float32. `load`: `load_network`, `load_text` or `load_vae` of models/job/networks.py."""
    _, mesh = init_distributed()
    args = parsers.model_parser(__file__, "").parse_args(["--model", name, "--precision", "fp32"])
    args.ckpt, cpu = ckpt, torch.device("cpu")
    preset = flags.resolve_model(args)._replace(**notes_of(ckpt))
    return load(args, preset, cpu) if load is networks.load_vae else load(args, preset, mesh, cpu)


def notes_of(ckpt: Path | None) -> dict[str, str]:
    """What an exported generator's network predicts and on which schedule; {} of a teacher."""
    return parametrisation(open_tensors(ckpt).metadata) if ckpt else {}


def open_teacher(name: str, ckpt: Path | None = None) -> tuple[Denoiser, nn.Module, nn.Module]:
    """Denoiser, autoencoder and text encoders of a tiny model's files or of an exported generator's."""
    loads = networks.load_network, networks.load_vae, networks.load_text
    net, vae, text = (open_part(name, load, ckpt) for load in loads)
    preset = PRESETS[name]._replace(**notes_of(ckpt))
    return Denoiser(net, preset.predicts, preset.schedule), vae, text


def train(name: str, net: nn.Module, loss_at: Callable, steps: int, lr: float, out: Path,
          stop: int | None = None, look: Callable | None = None, muon: str = r"(joint|transformer)_blocks\.",
          muon_lr: float | None = None) -> nn.Module:
    """Warm-up and cosine decay on `loss_at(net, step)`: Muon at `muon_lr`, by default `lr`, for the matrices and
    kernels whose names match `muon`, by default those of a transformer's blocks, which learn faster by it, AdamW
    for all else that requires its gradient. Returns the moving average of the weights.

    Batches depend on the step alone, all else is in out/<name>.pt: a killed run goes on as if never stopped.
    `stop` ends early; `look(average, step)` is called now and then to show samples."""
    average = copy.deepcopy(net).requires_grad_(False)
    trained = {path: p for path, p in net.named_parameters() if p.requires_grad}
    matrices = [p for path, p in trained.items() if re.match(muon, path) and p.ndim > 1]
    flat = [nn.Parameter(p.detach().flatten(1)) for p in matrices]  # the same memory; Muon takes no kernels
    others = [p for p in trained.values() if all(p is not matrix for matrix in matrices)]
    opts = {"adamw": torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99))}
    if matrices:
        opts["muon"] = torch.optim.Muon(flat, lr=muon_lr or lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    rates = {key: opt.param_groups[0]["lr"] for key, opt in opts.items()}
    kept, path, first = dict(net=net, average=average, **opts), out / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, map_location="cpu", weights_only=True)
        first = state.pop("step")
        for key, value in state.items():
            kept[key].load_state_dict(value)
    clock, total = time.time(), 0.0
    for step in range(first, min(steps, stop or steps)):
        loss = loss_at(net, step)
        net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for view, p in zip(flat, matrices):
            view.grad = p.grad.flatten(1)
        for key, opt in opts.items():
            opt.param_groups[0]["lr"] = rates[key] * min(1, (step + 1) / 200) * decay
            opt.step()
        for a, p in zip(average.parameters(), net.parameters()):
            a.lerp_(p.detach(), 1 - min(0.999, (step + 1) / (step + 10)))
        total += loss.item()
        done = step + 1
        if done % 100 == 0:
            print(f"{name} {done}/{steps} loss {total / 100:.5f} {(time.time() - clock) / 100:.3f} s/it",
                  flush=True)
            clock, total = time.time(), 0.0
        if done % 500 == 0 or done in (steps, stop):
            with replacing(path) as temporary:
                state = {key: value.state_dict() for key, value in kept.items()}
                torch.save(state | dict(step=done), temporary)
        if look and (done % 1000 == 0 or done == steps):
            look(average, done)
    return average


def reconstruction_loss(moments: Callable, decode: Callable, x: Tensor, step: int, kl_weight: float,
                        noise: float = 0.0) -> Tensor:
    """Reconstruction of x and KL; the decoder sees the posterior's sample with `noise` standard deviations of
    the latent on top. L1 alone would long miss the small shapes."""
    mean, logvar = moments(x)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
    all_but_channels = [i for i in range(mean.ndim) if i != mean.ndim - 3]
    std = torch.exp(0.5 * logvar) + noise * mean.std(all_but_channels, keepdim=True)
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    decoded = decode(mean + std * eps)
    return mse_loss(decoded, x) + 0.1 * l1_loss(decoded, x) + kl_weight * kl


def identity_convs(Z: int) -> dict[str, Tensor]:
    """The 1x1 convolutions around the latent of SDXL's and SD1.5's VAE, as identities."""
    widths = {"quant_conv": 2 * Z, "post_quant_conv": Z}
    return ({f"{name}.weight": torch.eye(width)[:, :, None, None] for name, width in widths.items()}
            | {f"{name}.bias": torch.zeros(width) for name, width in widths.items()})


def encode_captions(preset: Preset, text: nn.Module) -> Cond:
    """Conditions of the data's `captions()`, the last of them guidance's unconditional."""
    known, null = text.encode(procedural(preset.data).captions()[:-1]), text.unconditional()
    return Cond(*(torch.cat(pair) for pair in zip(known, null)))


def image_times(schedule: str, batch: int, g: torch.Generator) -> Tensor:
    """Training times t (B,): of flow logit-normal, as outlines form at 0.3 to 0.8; else uniform."""
    if schedule == "flow":
        return torch.sigmoid(0.4 + torch.randn(batch, generator=g))
    return random_time(schedule, torch.rand(batch, generator=g))


def snr_times(schedule: str, mean: float, batch: int, g: torch.Generator) -> Tensor:
    """Training times t (B,) of a DDPM schedule, whose signal-to-noise ratio is that of logit-normal flow
    times around sigmoid(mean)."""
    flow = torch.sigmoid(mean + torch.randn(batch, generator=g))
    grid = torch.arange(1, 1001) / 1000
    alpha, sigma = alpha_sigma(schedule, grid, grid)
    return grid[torch.searchsorted(sigma / (alpha + sigma), flow).clamp_max(999)]


def denoiser_loss(preset: Preset, latents: Tensor, labels: Tensor, table: Cond,
                  share: float = 0.7, times: Callable | None = None, batch: int = BATCH,
                  power: float = 0.0) -> Callable:
    """Eq. (2) or (3) with prompt dropout, each attribute named at probability `share`, on the device of
    `latents`. `table`: of `encode_captions`. `times(step, g)`: t (B,), by default `image_times`. `power`: each
    sample's loss is weighted by alpha^-power; of epsilon a plain mean hardly counts where little is seen of x_0."""
    index = procedural(preset.data).caption_index

    def loss_at(net: nn.Module, step: int) -> Tensor:
        g = torch.Generator().manual_seed(step)
        i = torch.randint(len(latents), (batch,), generator=g)
        named = torch.where(torch.rand(batch, labels.shape[1], generator=g) < share, labels[i], -1)
        prompt = torch.where(torch.rand(batch, generator=g) < 0.1, len(table.context) - 1, index(named))
        t = times(step, g) if times else image_times(preset.schedule, batch, g)
        x_0, eps = latents[i], torch.randn(batch, *latents.shape[1:], generator=g)
        t, eps = t.to(x_0.device), eps.to(x_0.device)
        prediction = net(q(preset.schedule, x_0, t, eps), t, (table.context[prompt], table.pooled[prompt]))
        error = (prediction - target(preset.predicts, preset.schedule, x_0, t, eps)).square().flatten(1).mean(1)
        return (alpha_sigma(preset.schedule, t, t)[0] ** -power * error).mean()
    return loss_at


@torch.no_grad()
def generate(preset: Preset, F: Denoiser, vae: nn.Module, table: Cond, prompts: list[str], tn: Tensor,
             cfg: float | None) -> Tensor:
    """Pictures (B 3 H W) or clips (B F 3 H W) for prompts among the captions; number i starts from the noise
    of index i."""
    data, samples = procedural(preset.data), []
    for start in range(0, len(prompts), 64):
        index = data.caption_index(data.parse(prompts[start:start + 64]))
        z = noise(networks.latent_shape(preset, preset), 0, 0, "sample",
                  list(range(start, start + len(index)))).to(tn.device)
        c, null = Cond(table.context[index], table.pooled[index]), Cond(table.context[-1:], table.pooled[-1:])
        w = None if cfg is None else torch.full((len(index),), cfg, device=tn.device)
        samples.append(vae.decode(solve(F, z, tn, c, null, w)).cpu())
    return torch.cat(samples)


def report(path: Path, preset: Preset, F: Denoiser, vae: nn.Module, table: Cond, settings: list[tuple],
           count: int) -> None:
    """Print the figures of the data and of the teacher at each (steps, guidance), save samples of each."""
    data, rows = procedural(preset.data), []
    prompts = data.evaluation_prompts(count)
    for setting in (None, *settings):
        label, samples = "data", data.reference(prompts, seed=3)
        if setting:
            steps, cfg = setting
            label = f"teacher, {steps} step{'s' * (steps > 1)}" + (f", guidance {cfg:g}" if cfg else "")
            tn = (teacher_times if steps >= 20 else generator_times)(steps, preset.shift, preset.schedule)
            samples = generate(preset, F, vae, table, prompts, tn.to(table.context.device), cfg)
        figures = data.evaluate(samples, prompts)
        print(f"{label:30}" + "".join(f"  {name} {value:.4f}" for name, value in figures.items()), flush=True)
        rows.append((label, film_strip(samples[:4], 5) if preset.frames else samples[:16]))
    save_rows(path, rows, least=64)
