"""Pictures and videos from a denoiser: for sample.py, a run's sample grids and its closing comparison."""
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.data import noise, to_uint8
from models.diffusion import Denoiser, solve
from models.parallel import neighbours


@torch.no_grad()
def generate(F: Denoiser, text, vae: nn.Module, prompts: list[str], tn: Tensor, latent_shape: tuple[int, ...],
             seed: int, cfg: float | None = None, batch: int = 8, decode_batch: int = 1,
             sequence: int = 1, context: int = 1) -> Tensor:
    """Images (len(prompts) 3 H W), of a video (len(prompts) F 3 H W), uint8 on every rank's CPU: sample i
    starts from the noise of (seed, i).

    tn: ascending times of the ODE's steps; cfg: guidance scale, None for one evaluation a step. The ranks
    share the work and make equal numbers of forwards, because a sharded network needs all of them at once;
    each `sequence` neighbouring ranks share one sample's tokens, each `context` of them the decoding of its
    frames."""
    device, world, rank = tn.device, dist.get_world_size() // sequence, dist.get_rank() // sequence
    decode = partial(vae.decode, group=neighbours(context)) if context > 1 else vae.decode
    per_rank = -(-len(prompts) // world)
    # The last prompt fills the rest.
    own = [min(i, len(prompts) - 1) for i in range(rank * per_rank, (rank + 1) * per_rank)]
    c_null = text.unconditional() if cfg is not None else None
    images = []
    for start in range(0, per_rank, batch):
        indices = own[start:start + batch]
        z = noise(latent_shape, seed, 0, "sample", indices).to(device)
        w = torch.full((len(indices),), cfg, device=device) if cfg is not None else None
        x_0 = solve(F, z, tn, text.encode([prompts[i] for i in indices]), c_null, w)
        images += [to_uint8(decode(x)).cpu() for x in x_0.split(decode_batch)]
    images = torch.cat(images)
    gathered = [torch.empty_like(images) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, images)
    return torch.cat(gathered[::sequence])[:len(prompts)]
