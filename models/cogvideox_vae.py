"""The 3D causal autoencoder of CogVideoX-2b and -5b (Yang et al. 2024, "CogVideoX").

Attribute names are the tensor names of the published `vae/` folder; `from_sat` renames the original
`3d-vae.pt`. A latent leaves and enters in the denoiser's units, z * scale: 1.15258426 in 2b, 0.7 in 5b.
A clip is worked on whole or in parts along time. Causal convolutions carry two frames from part to part and
lose nothing; group norms take their statistics over one part, so that the parts show in the result.
Letters: B batch, C channels, Z latent channels, F frames, T latent frames, H W frame size, h w latent size;
inside the networks T H W are those of the layer.
"""
import re
from collections.abc import Callable
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import conv3d, interpolate, pad, silu
from torch.utils.checkpoint import checkpoint as recompute

from models.checkpoint import InputError, Tensors


class Part(NamedTuple):
    """Where the frames of one call stand in their clip. Explicit, because a part's length does not tell."""
    first: bool                              # frame 0 is not one of a pair (or of four): time begins with it
    more: bool = False                       # a later call asks for the last frames of this one
    group: dist.ProcessGroup | None = None   # ranks that work on neighbouring parts at the same time:
    left: int | None = None                  # the one with the frames before these,
    right: int | None = None                 # the one with the frames after
    whole: bool = False                      # norms take their statistics over all parts of the group


def split(length: int, chunk: int | None) -> list[int]:
    """Lengths of the published chunks: the remainder joins the first."""
    if chunk is None or length < chunk:
        return [length]
    return [chunk + length % chunk] + [chunk] * (length // chunk - 1)


# ---- layers: (x, frames kept by the part before, part, latent) -> (x, frames kept for the part after) ------

def convolve(conv: nn.Module, x: Tensor, kept: tuple, part: Part) -> tuple[Tensor, tuple]:
    """A convolution over three frames, the present one last: (output, last two frames of the padded input).

    `kept`: the two frames before x (B C T H W); none, where the clip begins, repeats its first frame."""
    tail = kept[0] if kept else x[:, :, :1].repeat(1, 1, 2, 1, 1)
    if part.left is not None:
        dist.recv(tail, group=part.group, group_src=part.left)
    x = torch.cat([tail, x], dim=2)
    if part.more or part.right is not None:  # a copy: a view would keep all of x
        tail = x[:, :, -2:].clone(memory_format=torch.contiguous_format)
    if part.right is not None:
        dist.send(tail, group=part.group, group_dst=part.right)
    return conv(x), (tail,) if part.more else ()


class CausalConv3d(nn.Module):
    """No padding in time: see `convolve`."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, width, padding=(0, width // 2, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


def mean_over(x: Tensor, group: dist.ProcessGroup) -> Tensor:
    """Mean over the last dimension of x (B N L) and over all ranks, whose L may differ or be 0: (B N 1)."""
    total = x.sum(-1, keepdim=True, dtype=torch.float32)
    total = torch.stack([total, torch.full_like(total, x.shape[-1])])
    dist.all_reduce(total, group=group)
    return total[0] / total[1]


def group_norm(norm: nn.GroupNorm, x: Tensor, part: Part) -> Tensor:
    if not part.whole:
        return norm(x)
    n = rearrange(x, "B (N c) T H W -> B N (c T H W)", N=norm.num_groups)
    mean = mean_over(n, part.group)
    # In two passes: the mean of squares minus the square of the mean would lose digits.
    std = (mean_over((n - mean).square(), part.group) + norm.eps).sqrt()
    weight, bias = (rearrange(p, "C -> C 1 1 1") for p in (norm.weight, norm.bias))
    return (((n - mean) / std).view(x.shape) * weight + bias).to(x.dtype)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift are read from the latent at each place."""

    def __init__(self, width: int, groups: int, z_channels: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_y = CausalConv3d(z_channels, width, 1)
        self.conv_b = CausalConv3d(z_channels, width, 1)

    def forward(self, x: Tensor, z: Tensor, part: Part) -> Tensor:
        frames, latents = x.shape[2], z.shape[2]
        each = (frames - 1) // (latents - 1) if part.first and latents > 1 else frames // latents
        # The latent enlarged by "nearest", but after the 1x1 convolutions, and in space by a broadcast only.
        y, b = (rearrange(conv(z).repeat_interleave(each, dim=2)[:, :, -frames:],
                          "B C T h w -> B C T h 1 w 1") for conv in (self.conv_y, self.conv_b))
        n = rearrange(group_norm(self.norm_layer, x, part), "B C T (h i) (w j) -> B C T h i w j",
                      h=z.shape[3], w=z.shape[4])
        return rearrange(torch.addcmul(b, n, y), "B C T h i w j -> B C T (h i) (w j)")


class ResBlock(nn.Module):
    """With `z_channels` one of the decoder, whose norms see the latent."""

    def __init__(self, c_in: int, c_out: int, groups: int, z_channels: int | None):
        super().__init__()

        def norm(width):
            if z_channels is None:
                return nn.GroupNorm(groups, width, eps=1e-6)
            return SpatialNorm(width, groups, z_channels)

        self.norm1 = norm(c_in)
        self.conv1 = CausalConv3d(c_in, c_out, 3)
        self.norm2 = norm(c_out)
        self.conv2 = CausalConv3d(c_out, c_out, 3)
        self.conv_shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, kept: tuple, part: Part, z: Tensor | None = None) -> tuple[Tensor, tuple]:
        at = () if z is None else (z, part)
        h, kept1 = convolve(self.conv1, silu(self.norm1(x, *at)), kept[:1], part)
        h, kept2 = convolve(self.conv2, silu(self.norm2(h, *at)), kept[1:], part)
        return self.conv_shortcut(x) + h, kept1 + kept2


class Downsample(nn.Module):
    """Frames averaged in pairs (`time`), then halved in size."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor, kept: tuple, part: Part) -> tuple[Tensor, tuple]:
        if self.time:
            alone = int(part.first)
            pairs = reduce(x[:, :, alone:], "B C (T two) H W -> B C T H W", "mean", two=2)
            x = torch.cat([x[:, :, :alone], pairs], dim=2)
        x = pad(x, (0, 1, 0, 1))  # right and bottom only, as the weights were trained
        # As a 3D convolution over single frames: no transposed copy.
        return conv3d(x, self.conv.weight[:, :, None], self.conv.bias, stride=(1, 2, 2)), ()


class Upsample(nn.Module):
    """Doubled in size, then each frame twice (`time`)."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, kept: tuple, part: Part, z: Tensor) -> tuple[Tensor, tuple]:
        x = interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        x = conv3d(x, self.conv.weight[:, :, None], self.conv.bias, padding=(0, 1, 1))
        # Twice after the convolution, which works on single frames: the published order does it all twice.
        return (x.repeat_interleave(2, dim=2)[:, :, int(part.first):] if self.time else x), ()


class Blocks(nn.Module):
    """Residual blocks of one resolution or of the middle; the owner adds `downsamplers` or `upsamplers`."""

    def __init__(self, c_in: int, c_out: int, count: int, groups: int, z_channels: int | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, groups, z_channels)
                                     for j in range(count))


def layers(*blocks: Blocks) -> list[nn.Module]:
    return [layer for block in blocks for stack in block.children() for layer in stack]


# ---- encoder and decoder; `tails`: what each layer kept of the part before, brought up to date -------------

class Encoder(nn.Module):
    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, c_out: int, groups: int, time_levels: int):
        super().__init__()
        self.conv_in = CausalConv3d(3, ch[0], 3)
        self.down_blocks = nn.ModuleList()
        for i, width in enumerate(ch):
            level = Blocks(ch[max(i - 1, 0)], width, num_res_blocks, groups)
            if i < len(ch) - 1:
                level.downsamplers = nn.ModuleList([Downsample(width, time=i < time_levels)])
            self.down_blocks.append(level)
        self.mid_block = Blocks(ch[-1], ch[-1], 2, groups)
        self.norm_out = nn.GroupNorm(groups, ch[-1], eps=1e-6)
        self.conv_out = CausalConv3d(ch[-1], c_out, 3)

    def forward(self, x: Tensor, part: Part, tails: dict) -> Tensor:
        h, tails[self.conv_in] = convolve(self.conv_in, x, tails.pop(self.conv_in, ()), part)
        for layer in layers(*self.down_blocks, self.mid_block):
            h, tails[layer] = layer(h, tails.pop(layer, ()), part)
        h = silu(self.norm_out(h))
        h, tails[self.conv_out] = convolve(self.conv_out, h, tails.pop(self.conv_out, ()), part)
        return h


class Decoder(nn.Module):
    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, c_in: int, groups: int, time_levels: int):
        super().__init__()
        ch = ch[::-1]
        self.conv_in = CausalConv3d(c_in, ch[0], 3)
        self.mid_block = Blocks(ch[0], ch[0], 2, groups, c_in)
        self.up_blocks = nn.ModuleList()
        for i, width in enumerate(ch):
            level = Blocks(ch[max(i - 1, 0)], width, num_res_blocks + 1, groups, c_in)
            if i < len(ch) - 1:
                level.upsamplers = nn.ModuleList([Upsample(width, time=i < time_levels)])
            self.up_blocks.append(level)
        self.norm_out = SpatialNorm(ch[-1], groups, c_in)
        self.conv_out = CausalConv3d(ch[-1], 3, 3)

    def forward(self, z: Tensor, part: Part, tails: dict, checkpoint: bool = False) -> Tensor:
        h, tails[self.conv_in] = convolve(self.conv_in, z, tails.pop(self.conv_in, ()), part)
        for layer in layers(self.mid_block, *self.up_blocks):
            run = partial(recompute, layer, use_reentrant=False) if checkpoint else layer
            h, tails[layer] = run(h, tails.pop(layer, ()), part, z)
        h = silu(self.norm_out(h, z, part))
        h, tails[self.conv_out] = convolve(self.conv_out, h, tails.pop(self.conv_out, ()), part)
        return h


# ---- tiles -------------------------------------------------------------------------------------------------

def join(tiles: list[Tensor], overlap: int, dim: int) -> Tensor:
    """Neighbours along `dim`, each faded linearly into the next over their common `overlap`."""
    joined = tiles[0]
    for tile in tiles[1:]:
        shape = [-1 if i == dim else 1 for i in range(tile.ndim)]
        weight = (torch.arange(overlap, device=tile.device, dtype=tile.dtype) / overlap).view(shape)
        before, under = joined.tensor_split([joined.shape[dim] - overlap], dim)
        over, after = tile.tensor_split([overlap], dim)
        joined = torch.cat([before, under + (over - under) * weight, after], dim)
    return joined


def tiled(decode: Callable[[Tensor], Tensor], z: Tensor, size: tuple[int, int], factor: int) -> Tensor:
    """Decode tiles of `size` latents that overlap by a sixth of their height and a fifth of their width."""
    high, wide = size
    up, left = high - high * 5 // 6, wide - wide * 4 // 5
    rows = []
    for top in range(0, max(z.shape[3] - up, 1), high - up):
        row = [decode(z[:, :, :, top:top + high, start:start + wide])
               for start in range(0, max(z.shape[4] - left, 1), wide - left)]
        rows.append(join(row, left * factor, 4))
    return join(rows, up * factor, 3)


# ---- the autoencoder ---------------------------------------------------------------------------------------

class CogVideoXVAE(nn.Module):
    """Video (B F 3 H W) in [-1, 1] <-> latent (B T Z h w), F = time_factor * (T - 1) + 1.

    Build it with `CogVideoXVAE(**config_from_shapes(shapes), scale=1.15258426)`. What shapes do not tell:
    `groups` of the norms and `time_levels`, how many of the halvings in size halve the frames too.
    """

    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, z_channels: int, scale: float,
                 groups: int = 32, time_levels: int = 2):
        super().__init__()
        self.scale, self.z_channels = scale, z_channels
        self.factor, self.time_factor = 2 ** (len(ch) - 1), 2 ** time_levels
        self.encoder = Encoder(ch, num_res_blocks, 2 * z_channels, groups, time_levels)
        self.decoder = Decoder(ch, num_res_blocks, z_channels, groups, time_levels)

    def moments(self, video: Tensor, chunk: int | None = None) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]) of z, before scale: each (B T Z h w).

        `chunk` frames at a time, the first chunk taking the remainder; None, as the weights were trained: the
        whole clip. Raises ValueError for a number of frames or a size that has no latent."""
        frames, height, width = video.shape[1], *video.shape[3:]
        if (frames - 1) % self.time_factor:
            raise ValueError(f"{frames} frames; expected {self.time_factor}k+1, such as "
                             f"{self.time_factor + 1} or {2 * self.time_factor + 1} (published clips: 8k+1)")
        if height % self.factor or width % self.factor:
            raise ValueError(f"video size {(height, width)} is not a multiple of {self.factor}")
        if chunk is not None and (chunk < 1 or chunk % self.time_factor):
            raise ValueError(f"chunk {chunk} is not a multiple of {self.time_factor} frames")
        x = rearrange(video, "B F C H W -> B C F H W").to(self.encoder.conv_in.conv.weight.dtype)
        tails, done, parts = {}, [], x.split(split(frames, chunk), dim=2)
        for i, x in enumerate(parts):
            done.append(self.encoder(x, Part(first=i == 0, more=i < len(parts) - 1), tails))
        mean, logvar = rearrange(torch.cat(done, dim=2), "B C T h w -> B T C h w").chunk(2, dim=2)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, video: Tensor, eps: Tensor | None = None, chunk: int | None = None) -> Tensor:
        """Latent (B T Z h w) in the denoiser's units: from the mean, or from the sample mean + std * eps."""
        mean, logvar = self.moments(video, chunk)
        z = mean if eps is None else mean + torch.exp(0.5 * logvar) * eps
        return z * self.scale

    def decode(self, latent: Tensor, chunk: int | None = 2, checkpoint: bool = False,
               tiles: tuple[int, int] | None = None, group: dist.ProcessGroup | None = None,
               first: bool | None = None) -> Tensor:
        """Video (B F 3 H W) in about [-1, 1], not clamped, in the weights' dtype.

        `chunk` latents at a time (published: 2), the first chunk taking the remainder; None: the whole clip.
        `first`: the first latent stands for one frame and not for `time_factor`. By default it does when
        their number is odd, which is the published rule: 2 latents are 8 frames, and 5 with first=True.
        `checkpoint` recomputes activations in backward. `tiles` (height, width in latents; published: half of
        the picture, 30 x 45) bounds memory further; the norms of a tile see only that tile.
        `group`: every rank of it calls with the same latent and gets the whole video; no gradient, ValueError
        under grad mode. At any time each rank has one chunk, or its share of the whole clip, and its
        neighbours the next ones: all work at once. A clip of fewer parts leaves the last ranks idle.
        """
        if group is not None and torch.is_grad_enabled():
            raise ValueError("decoding over several ranks has no gradient: call it under torch.no_grad()")
        z = (latent / self.scale).to(self.decoder.conv_in.conv.weight.dtype)
        z = rearrange(z, "B T C h w -> B C T h w")
        first = z.shape[2] % 2 == 1 if first is None else first
        run = partial(self.decode_parts, first=first, chunk=chunk, checkpoint=checkpoint, group=group)
        video = run(z) if tiles is None else tiled(run, z, tiles, self.factor)
        return rearrange(video, "B C F H W -> B F C H W")

    def decode_parts(self, z: Tensor, first: bool, chunk: int | None, checkpoint: bool,
                     group: dist.ProcessGroup | None) -> Tensor:
        """Latent z (B Z T h w) to video (B 3 F H W), in rounds of as many parts as there are ranks."""
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        whole = chunk is None and ranks > 1
        latents = z.shape[2]
        parts = z.tensor_split(min(ranks, latents), 2) if whole else z.split(split(latents, chunk), 2)
        tails, done = {}, {}
        for start in range(0, len(parts), ranks):
            i, end = start + rank, min(start + ranks, len(parts))
            more = end < len(parts) and rank in (0, ranks - 1)  # the next round begins where this one ends
            if i < end:
                part = Part(first and i == 0, more, group, left=rank - 1 if rank else None,
                            right=rank + 1 if i + 1 < end else None, whole=whole)
                done[i] = self.decoder(parts[i], part, tails, checkpoint)
            elif whole:  # the statistics are collectives: this rank adds nothing to any of them
                for norm in (m for m in self.decoder.modules() if isinstance(m, nn.GroupNorm)):
                    for _ in range(2):
                        mean_over(z.new_empty(z.shape[0], norm.num_groups, 0), group)
            if more and ranks > 1:
                for tail in (tail for kept in tails.values() for tail in kept):
                    if rank:
                        dist.send(tail, group=group, group_dst=0)
                    else:
                        dist.recv(tail, group=group, group_src=ranks - 1)
        for i in range(len(parts) if ranks > 1 else 0):
            if i not in done:
                frames = self.time_factor * parts[i].shape[2] - (self.time_factor - 1) * (first and i == 0)
                done[i] = z.new_empty(z.shape[0], 3, frames, *(self.factor * s for s in z.shape[3:]))
            done[i] = done[i].contiguous()
            dist.broadcast(done[i], group=group, group_src=i % ranks)
        return torch.cat([done[i] for i in range(len(parts))], dim=2)


# ---- checkpoints -------------------------------------------------------------------------------------------

def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Constructor arguments but scale, groups and time_levels from the shapes of a checkpoint.

    Raises InputError where the names are not the published ones (`from_sat` gives the original's these)."""
    first = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    if first.format(0, 0) not in shapes or "decoder.conv_in.conv.weight" not in shapes:
        raise InputError(f"no CogVideoX VAE: expected {first.format(0, 0)}, ..., "
                         f"found {', '.join(sorted(shapes)[:3]) or 'nothing'}")
    levels = sum(first.format(i, 0) in shapes for i in range(100))
    return dict(
        ch=tuple(shapes[first.format(i, 0)][0] for i in range(levels)),
        num_res_blocks=sum(first.format(0, j) in shapes for j in range(100)),
        z_channels=shapes["decoder.conv_in.conv.weight"][1],
    )


SAT_NAMES = (
    (r"^encoder\.down\.", "encoder.down_blocks."),
    (r"\.mid\.block_1\.", ".mid_block.resnets.0."),
    (r"\.mid\.block_2\.", ".mid_block.resnets.1."),
    (r"\.block\.", ".resnets."),
    (r"\.nin_shortcut\.", ".conv_shortcut."),
    (r"\.(down|up)sample\.", r".\1samplers.0."),
)


def from_sat(tensors: Tensors) -> Tensors:
    """The original `vae/3d-vae.pt` (SwissArmyTransformer) under the published names, without the `loss.` of
    its training. A published file passes unchanged."""
    last = max((int(name.split(".")[2]) for name in tensors if name.startswith("decoder.up.")), default=0)

    def published(name: str) -> str:
        # The original counts the decoder's levels from the video, the published names from the latent.
        name = re.sub(r"^decoder\.up\.(\d+)", lambda m: f"decoder.up_blocks.{last - int(m[1])}", name)
        for pattern, replacement in SAT_NAMES:
            name = re.sub(pattern, replacement, name)
        return name

    source = {published(name): name for name in tensors if not name.startswith("loss.")}
    return Tensors(tensors.path, {name: tensors.shapes[old] for name, old in source.items()},
                   lambda name, rows: tensors.read(source[name], rows), tensors.metadata, tensors.prefix)
