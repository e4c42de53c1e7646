"""The 3D causal autoencoder of CogVideoX-2b and -5b (Yang et al. 2024, "CogVideoX").

Attribute names are the tensor names of the published `vae/` folder. A latent leaves and enters in the
denoiser's units, z * scale: 1.15258426 in 2b, 0.7 in 5b. The file stands alone: torch and einops.

A clip is computed whole or in parts along time. Convolutions over time are causal and keep their last two
frames for the next part: cutting a clip changes nothing for them. Group norms take their statistics over one
part, so a result depends on the cuts; encode and decode make the published ones unless told otherwise.

Shapes: B batch, C channels, Z latent channels, F frames, T latent frames, H W frame size, h w latent size;
inside the networks T H W are those of the layer.
"""
from functools import partial
from typing import NamedTuple

import torch
import torch.distributed as dist
from einops import rearrange, reduce
from torch import Tensor, nn
from torch.nn.functional import conv3d, interpolate, pad, silu
from torch.utils.checkpoint import checkpoint as recompute


class Part(NamedTuple):
    """Where the frames of one call stand in their clip, which their number does not tell."""
    lone: bool                              # the first of them is one latent frame; the others are in fours
    more: bool = False                      # keep the last frames for a later call, which goes on after them
    group: dist.ProcessGroup | None = None  # ranks that compute neighbouring parts at the same time
    left: int | None = None                 # the rank that has the frames before these
    right: int | None = None                # the rank that has the frames after these


def split(length: int, chunk: int | None) -> list[int]:
    """Lengths of the chunks, as published: the remainder joins the first."""
    if chunk is None or length < chunk:
        return [length]
    return [chunk + length % chunk] + [chunk] * (length // chunk - 1)


# ---- layers: (x, frames kept of the part before, part, latent) -> (x, frames kept for the next part) -------

def convolve(conv: nn.Module, x: Tensor, kept: tuple, part: Part) -> tuple[Tensor, tuple]:
    """A convolution of each frame and the two before it: (output, the last two frames for the next part).

    `kept`: the two frames before x (B C T H W), or nothing where the clip begins: its first frame twice."""
    tail = kept[0] if kept else x[:, :, :1].repeat(1, 1, 2, 1, 1)
    if part.left is not None:
        dist.recv(tail, group=part.group, group_src=part.left)
    x = torch.cat([tail, x], dim=2)
    if part.more or part.right is not None:  # a copy: a view would keep all of x in memory
        tail = x[:, :, -2:].clone(memory_format=torch.contiguous_format)
    if part.right is not None:
        dist.send(tail, group=part.group, group_dst=part.right)
    return conv(x), (tail,) if part.more else ()


class CausalConv3d(nn.Module):
    """Pads in space alone; `convolve` does it in time."""

    def __init__(self, c_in: int, c_out: int, width: int):
        super().__init__()
        self.conv = nn.Conv3d(c_in, c_out, width, padding=(0, width // 2, width // 2))

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(x)


class SpatialNorm(nn.Module):
    """GroupNorm whose scale and shift at each place are 1x1 convolutions of the latent there."""

    def __init__(self, width: int, groups: int, z_channels: int):
        super().__init__()
        self.norm_layer = nn.GroupNorm(groups, width, eps=1e-6)
        self.conv_y = CausalConv3d(z_channels, width, 1)
        self.conv_b = CausalConv3d(z_channels, width, 1)

    def forward(self, x: Tensor, z: Tensor, part: Part) -> Tensor:
        frames, latents = x.shape[2], z.shape[2]
        each = (frames - 1) // (latents - 1) if part.lone and latents > 1 else frames // latents
        # The same as enlarging the latent first. Of a lone first frame's copies all but one are cut off.
        y, b = (rearrange(conv(z).repeat_interleave(each, dim=2)[:, :, -frames:],
                          "B C T h w -> B C T h 1 w 1") for conv in (self.conv_y, self.conv_b))
        n = rearrange(self.norm_layer(x), "B C T (h i) (w j) -> B C T h i w j", h=z.shape[3], w=z.shape[4])
        return rearrange(torch.addcmul(b, n, y), "B C T h i w j -> B C T (h i) (w j)")


class ResBlock(nn.Module):
    """`z_channels`: in the decoder, whose norms see the latent; None in the encoder."""

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
    """Averages pairs of frames (if `time`), then halves their size."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor, kept: tuple, part: Part) -> tuple[Tensor, tuple]:
        if self.time:
            lone = int(part.lone)
            pairs = reduce(x[:, :, lone:], "B C (T two) H W -> B C T H W", "mean", two=2)
            x = torch.cat([x[:, :, :lone], pairs], dim=2)
        x = pad(x, (0, 1, 0, 1))  # right and bottom only, as the weights were trained
        # As a 3D convolution of single frames: a 2D one would need a transposed copy.
        return conv3d(x, self.conv.weight[:, :, None], self.conv.bias, stride=(1, 2, 2)), ()


class Upsample(nn.Module):
    """Doubles the size, then repeats each frame (if `time`) but a lone first one."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.time = time
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor, kept: tuple, part: Part, z: Tensor) -> tuple[Tensor, tuple]:
        x = interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        x = conv3d(x, self.conv.weight[:, :, None], self.conv.bias, padding=(0, 1, 1))
        # Published the other way round, with the same result: this convolves each frame only once.
        return (x.repeat_interleave(2, dim=2)[:, :, int(part.lone):] if self.time else x), ()


class Blocks(nn.Module):
    """Residual blocks of one resolution or of the middle. Encoder or decoder may add a resampling."""

    def __init__(self, c_in: int, c_out: int, count: int, groups: int, z_channels: int | None = None):
        super().__init__()
        self.resnets = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, groups, z_channels)
                                     for j in range(count))


def layers(*blocks: Blocks) -> list[nn.Module]:
    """Their residual blocks and resamplings in the order in which they run."""
    return [layer for block in blocks for stack in block.children() for layer in stack]


# ---- encoder and decoder; `tails`: layer -> the frames it keeps from one part to the next ------------------

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


# ---- the autoencoder ---------------------------------------------------------------------------------------

class CogVideoXVAE(nn.Module):
    """Video (B F 3 H W) in [-1, 1] <-> latent (B T Z h w), F = time_factor * (T - 1) + 1.

    Build it with `CogVideoXVAE(**config_from_shapes(shapes), scale=1.15258426)`. `groups` is 32 in the
    published files. `time_levels`: how many of the halvings in size halve the frames too.
    """

    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, z_channels: int, scale: float,
                 groups: int = 32, time_levels: int = 2):
        super().__init__()
        self.scale, self.factor, self.time_factor = scale, 2 ** (len(ch) - 1), 2 ** time_levels
        self.encoder = Encoder(ch, num_res_blocks, 2 * z_channels, groups, time_levels)
        self.decoder = Decoder(ch, num_res_blocks, z_channels, groups, time_levels)

    def moments(self, video: Tensor, chunk: int | None = 8) -> tuple[Tensor, Tensor]:  # [choice]
        """Mean and log-variance (clamped to [-30, 20]) of z, before scale: each (B T Z h w).

        `chunk` frames at a time (published: 8), the first chunk taking the remainder; None: the whole clip,
        as in the original's training. Raises ValueError for frames or a size that have no latent."""
        frames, height, width = video.shape[1], *video.shape[3:]
        if (frames - 1) % self.time_factor:
            raise ValueError(f"{frames} frames; expected {self.time_factor}k+1, such as "
                             f"{self.time_factor + 1} or {2 * self.time_factor + 1} (published clips: 8k+1)")
        if height % self.factor or width % self.factor:
            raise ValueError(f"video size {(height, width)} is not a multiple of {self.factor}")
        if chunk is not None and (chunk < 1 or chunk % self.time_factor):
            raise ValueError(f"chunk {chunk} is not a multiple of {self.time_factor} frames")
        x = rearrange(video, "B F C H W -> B C F H W").to(self.encoder.conv_in.conv.weight.dtype)
        tails, parts = {}, x.split(split(frames, chunk), dim=2)
        done = [self.encoder(part, Part(lone=i == 0, more=i < len(parts) - 1), tails)
                for i, part in enumerate(parts)]
        mean, logvar = rearrange(torch.cat(done, dim=2), "B C T h w -> B T C h w").chunk(2, dim=2)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, video: Tensor, eps: Tensor | None = None, chunk: int | None = 8) -> Tensor:
        """Latent (B T Z h w) in the denoiser's units: the mean, or the sample mean + std * eps."""
        mean, logvar = self.moments(video, chunk)
        z = mean if eps is None else mean + torch.exp(0.5 * logvar) * eps
        return z * self.scale

    def decode(self, latent: Tensor, chunk: int | None = 2, checkpoint: bool = False,  # [choice]
               group: dist.ProcessGroup | None = None) -> Tensor:
        """Video (B F 3 H W) in about [-1, 1], not clamped, in the weights' dtype. As published, an even T
        has no lone first frame: F = time_factor * T.

        `chunk` latent frames at a time (published: 2), the first chunk taking the remainder; None: the whole
        clip. `checkpoint` recomputes activations in backward. `group`: ranks that call with the same latent
        and share the work. Each decodes a chunk while its neighbours decode theirs, and all get the whole
        video, without gradient: ValueError under grad mode.
        """
        if group is not None and torch.is_grad_enabled():
            raise ValueError("decoding over several ranks has no gradient: call it under torch.no_grad()")
        z = (latent / self.scale).to(self.decoder.conv_in.conv.weight.dtype)
        z = rearrange(z, "B T C h w -> B C T h w")
        lone = z.shape[2] % 2 == 1
        rank, ranks = (0, 1) if group is None else (dist.get_rank(group), dist.get_world_size(group))
        parts, tails, done = z.split(split(z.shape[2], chunk), dim=2), {}, {}
        for start in range(0, len(parts), ranks):  # rounds of one part per rank
            i, end = start + rank, min(start + ranks, len(parts))
            more = end < len(parts) and rank in (0, ranks - 1)  # a next round begins where the last rank ends
            if i < end:
                part = Part(lone and i == 0, more, group, left=rank - 1 if rank else None,
                            right=rank + 1 if i + 1 < end else None)
                done[i] = self.decoder(parts[i], part, tails, checkpoint)
            if more and ranks > 1:  # rank 0, which begins it, overwrites the frames that it kept itself
                for tail in (tail for kept in tails.values() for tail in kept):
                    if rank:
                        dist.send(tail, group=group, group_dst=0)
                    else:
                        dist.recv(tail, group=group, group_src=ranks - 1)
        for i in range(len(parts) if ranks > 1 else 0):
            if i not in done:
                frames = self.time_factor * parts[i].shape[2] - (self.time_factor - 1) * (lone and i == 0)
                done[i] = z.new_empty(len(z), 3, frames, *(self.factor * s for s in z.shape[3:]))
            done[i] = done[i].contiguous()
            dist.broadcast(done[i], group=group, group_src=i % ranks)
        return rearrange(torch.cat([done[i] for i in range(len(parts))], dim=2), "B C F H W -> B F C H W")


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of CogVideoXVAE from the shapes of a checkpoint's tensors. They do not tell scale, groups and
    time_levels. Raises ValueError where the names are not the published ones."""
    first = "encoder.down_blocks.{}.resnets.{}.conv1.conv.weight"
    if first.format(0, 0) not in shapes or "decoder.conv_in.conv.weight" not in shapes:
        raise ValueError(f"no CogVideoX VAE: expected {first.format(0, 0)}, ..., "
                         f"found {', '.join(sorted(shapes)[:3]) or 'nothing'}")
    return dict(
        ch=tuple(shapes[first.format(i, 0)][0] for i in range(100) if first.format(i, 0) in shapes),
        num_res_blocks=sum(first.format(0, j) in shapes for j in range(100)),
        z_channels=shapes["decoder.conv_in.conv.weight"][1],
    )
