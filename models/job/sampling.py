"""Pictures and videos from a denoiser: for sample.py, a run's sample grids and its closing comparison."""
from functools import partial

import torch
import torch.distributed as dist
from torch import Tensor, nn

from models.data import noise
from models.diffusion import Denoiser, solve
from models.parallel import neighbours, share_of_rank
from models.pictures import to_uint8


@torch.no_grad()
def generate(F: Denoiser, text, vae: nn.Module, prompts: list[str], tn: Tensor, latent_shape: tuple[int, ...],
             seed: int, cfg: float | None = None, batch: int = 8, decode_batch: int = 1,
             sequence: int = 1, context: int = 1, first: int = 0) -> Tensor:
    """Images (len(prompts) 3 H W), of a video (len(prompts) F 3 H W), uint8 on every rank's CPU: sample i
    starts from the noise of (seed, first + i).

    tn: ascending times of the steps, along the ODE or as F.renoise says; cfg: guidance scale, None for one evaluation a step. The ranks
    share the work; each `sequence` neighbouring ranks share one sample's tokens, each `context` of them the
    decoding of its frames."""
    device, mine = tn.device, share_of_rank(len(prompts), sequence)
    decode = partial(vae.decode, group=neighbours(context)) if context > 1 else vae.decode
    c_null = text.unconditional() if cfg is not None else None
    images = []
    for start in range(0, len(mine), batch):
        indices = mine[start:start + batch]
        z = noise(latent_shape, seed, 0, "sample", [first + i for i in indices]).to(device)
        w = torch.full((len(indices),), cfg, device=device) if cfg is not None else None
        def fresh(n: int) -> Tensor:
            return noise(latent_shape, seed, 0, f"sample {n}", [first + i for i in indices]).to(device)

        x_0 = solve(F, z, tn, text.encode([prompts[i] for i in indices]), c_null, w,
                    fresh if F.renoise else None)
        images += [to_uint8(decode(x)).cpu() for x in x_0.split(decode_batch)]
    images = torch.cat(images)
    gathered = [torch.empty_like(images) for _ in range(dist.get_world_size())]
    dist.all_gather(gathered, images)
    return torch.cat(gathered[::sequence])[:len(prompts)]
