"""Pictures and videos from a denoiser: for sample.py, a run's sample grids and its closing comparison."""
import argparse
from collections.abc import Iterator
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.checkpoint import InputError
from models.data import noise
from models.diffusion import Denoiser, solve, teacher_times
from models.job.log import Log
from models.parallel import is_main, neighbours, print0, share_of_rank
from models.pictures import to_uint8
from models.presets import Preset


class NotFinite(InputError):
    """Samples with values that are not finite, as every rank learns at once."""


@torch.no_grad()
def latents(F: Denoiser, text, prompts: list[str], tn: Tensor, latent_shape: tuple[int, ...], seed: int,
            cfg: float | None = None, batch: int = 8, sequence: int = 1, first: int = 0) -> Iterator[Tensor]:
    """Latents (b C h w) of the samples that this rank makes, `batch` at a time; the ranks share the prompts.
    Arguments as `generate`'s."""
    device, mine = tn.device, share_of_rank(len(prompts), sequence)
    c_null = text.unconditional() if cfg is not None else None
    for start in range(0, len(mine), batch):
        indices = mine[start:start + batch]

        def draw(name: str) -> Tensor:
            return noise(latent_shape, seed, 0, name, [first + i for i in indices]).to(device)
        w = torch.full((len(indices),), cfg, device=device) if cfg is not None else None
        c = text.encode([prompts[i] for i in indices])
        yield solve(F, draw("sample"), tn, c, c_null, w, (lambda n: draw(f"sample {n}")) if F.renoise else None)


@torch.no_grad()
def generate(F: Denoiser, text, vae: nn.Module, prompts: list[str], tn: Tensor, latent_shape: tuple[int, ...],
             seed: int, cfg: float | None = None, batch: int = 8, decode_batch: int = 1,
             sequence: int = 1, context: int = 1, first: int = 0) -> Tensor:
    """Images (len(prompts) 3 H W), of a video (len(prompts) F 3 H W), uint8 on every rank's CPU: sample i
    starts from the noise of (seed, first + i).

    tn: ascending times of the steps, along the ODE or as F.renoise says; cfg: guidance scale, None for one
    evaluation a step. The ranks share the work; each `sequence` neighbouring ranks share one sample's tokens,
    each `context` of them the decoding of its frames. Raises NotFinite, on every rank."""
    decode = partial(vae.decode, group=neighbours(context)) if context > 1 else vae.decode
    images, finite = [], torch.ones(1, dtype=torch.int)
    for x_0 in latents(F, text, prompts, tn, latent_shape, seed, cfg, batch, sequence, first):
        for part in x_0.split(decode_batch):
            image = decode(part)
            finite *= int(image.isfinite().all())
            images.append(to_uint8(image).cpu())
    images = torch.cat(images)
    dist.all_reduce(finite, dist.ReduceOp.MIN)
    if not finite:
        raise NotFinite("samples with values that are not finite; expected undamaged weights, weaker --cfg or "
                        "--lora-scale, or --precision fp32")
    if dist.get_world_size() == 1:
        return images  # without a collective, for the reason that `save_state` gives
    gathered = [torch.empty_like(images) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, images)
    return torch.cat(gathered[::sequence])[:len(prompts)]


def deviations(F_phi: Denoiser, text, prompts: list[str], args: argparse.Namespace, preset: Preset,
               latent_shape: tuple[int, ...], device: torch.device) -> list[float]:
    """Of each channel of the teacher's latents for these prompts, at full steps and the middle of --cfg."""
    cfg = sum(args.cfg) / len(args.cfg) if hasattr(args, "cfg") else preset.teacher_cfg
    tn, log = teacher_times(preset.teacher_steps, preset.shift, preset.schedule).to(device), Log()
    for x_0 in latents(F_phi, text, prompts, tn, latent_shape, args.seed, cfg, 2 * args.micro_batch,
                       args.sequence_parallel):
        log.latents(x_0)
    log.close()
    return log.record["x_0_std"]


def note_overlong(text, prompts: list[str]) -> None:
    """Say how many of the first prompts are cut: all of a large file would take minutes."""
    few = prompts[:200]
    if few and is_main() and (cut := text.overlong(few)):
        print0(f"note: {cut} of the first {len(few)} prompts are longer than the text encoders' windows and cut")
