"""The video denoiser of AnimateDiff v2 and v3 (Guo et al. 2023): motion modules inside SD1.5's UNet.

A motion module lets each pixel attend to itself in the other frames of its clip; all other layers see single
frames. Attribute names are those of the two original files, SD1.5's (`model.diffusion_model.` stripped) and
the motion file's: loading needs no key map, and as no name is in both, one state dict holds them. The file
stands alone with models/sdxl_unet.py: torch and einops.

Shapes: B clips, T frames, C latent channels, H W latent size, h w size of a level's map, L text tokens,
D width of a level, N heads.
"""
import math

import torch
from einops import rearrange
from torch import Tensor, nn

from models.sdxl_unet import Attention, FeedForward, ResBlock, SpatialTransformer, UNet, attend
from models.sdxl_unet import config_from_shapes as unet_config

MAX_FRAMES = 32  # positions in the tables of v2 and v3
MAX_BATCH = 65_535  # CUDA's attention kernels take no larger one, and each pixel of each clip is a sample


def positions(frames: int, width: int, device: torch.device | None = None) -> Tensor:
    """Sinusoids of the frames' numbers, sines in the even channels, cosines in the odd ones: (T D)."""
    frequencies = torch.exp(torch.arange(0, width, 2, device=device) * (-math.log(10000) / width))
    angles = torch.arange(frames, device=device)[:, None] * frequencies
    return torch.stack([angles.sin(), angles.cos()], dim=-1).flatten(1)


def attend_in_parts(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention among the T frames of each sample: (S N T D), S of any size."""
    parts = [attend(*part) for part in zip(*(x.split(MAX_BATCH) for x in (q, k, v)))]
    return torch.cat(parts) if len(parts) > 1 else parts[0]


class TemporalTransformerBlock(nn.Module):
    """Two attentions among the frames and a feed-forward; the text plays no part."""

    def __init__(self, width: int, heads: int):
        super().__init__()
        self.attention_blocks = nn.ModuleList(Attention(width, width, heads) for _ in range(2))
        self.norms = nn.ModuleList(nn.LayerNorm(width) for _ in range(2))
        self.ff = FeedForward(width)
        self.ff_norm = nn.LayerNorm(width)

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        pe = positions(*x.shape[1:], x.device).to(x.dtype)
        for norm, attention in zip(self.norms, self.attention_blocks):
            n = norm(x) + pe  # in both attentions, and in the values too
            x = x + attention.out(attend_in_parts(*attention.project(n, n, lora)), lora)
        return x + self.ff(self.ff_norm(x), lora)


class TemporalTransformer(nn.Module):
    """One transformer block on the frames of each pixel, and a residual around it."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # of each frame: diffusers pools the clip's
        self.proj_in = nn.Linear(width, width)
        self.transformer_blocks = nn.ModuleList([TemporalTransformerBlock(width, heads)])
        self.proj_out = nn.Linear(width, width)
        for p in self.proj_out.parameters():  # training starts from the UNet as it is
            nn.init.zeros_(p)

    def forward(self, x: Tensor, frames: int, lora: tuple) -> Tensor:
        h = rearrange(self.norm(x), "(B T) D h w -> (B h w) T D", T=frames).contiguous()
        h = self.transformer_blocks[0](self.proj_in(h, *lora), lora)
        h = self.proj_out(h, *lora)
        return x + rearrange(h, "(B h w) T D -> (B T) D h w", h=x.shape[2], w=x.shape[3])


class MotionModule(nn.Module):
    """One FSDP and checkpointing unit; at its start the identity."""

    def __init__(self, width: int, heads: int, groups: int):
        super().__init__()
        self.temporal_transformer = TemporalTransformer(width, heads, groups)

    def forward(self, x: Tensor, frames: int, lora: tuple = ()) -> Tensor:
        """A map (B T) D h w of clips of T = `frames` frames -> the same shape."""
        return self.temporal_transformer(x, frames, lora)


class AnimateDiff(UNet):
    """Noise prediction network of clips and of pictures. Build it with
    `AnimateDiff(**config_from_shapes(shapes))`.

    Its own arguments are `motion_mid`: a motion module in the middle too, as in v2 and not in v3, and
    `motion_heads`, the heads of every motion module. The others are UNet's, with SD1.5's values.
    """

    def __init__(self, model_channels: int, channel_mult: tuple[int, ...], num_res_blocks: int,
                 depth: tuple[int, ...], middle_depth: int, context_dim: int, in_channels: int = 4,
                 vector_dim: int | None = None, linear: bool = False, heads: int = 8, groups: int = 32,
                 motion_mid: bool = True, motion_heads: int = 8):
        super().__init__(model_channels, channel_mult, num_res_blocks, depth, middle_depth, context_dim,
                         in_channels, vector_dim, linear, heads=heads, groups=groups)

        def block(width: int, count: int) -> nn.ModuleDict:
            modules = nn.ModuleList(MotionModule(width, motion_heads, groups) for _ in range(count))
            return nn.ModuleDict({"motion_modules": modules})

        self.down_blocks = nn.ModuleList(block(width, num_res_blocks) for width in self.widths)
        self.up_blocks = nn.ModuleList(block(width, num_res_blocks + 1) for width in reversed(self.widths))
        # A motion module acts behind each ResBlock or, where there is one, behind the transformer after it;
        # what follows, the skip or a resampling, gets its result.
        last = {stage[0]: [layer for layer in stage if isinstance(layer, (ResBlock, SpatialTransformer))][-1]
                for stage in (*self.input_blocks, *self.output_blocks) if isinstance(stage[0], ResBlock)}
        modules = [m for block in (*self.down_blocks, *self.up_blocks) for m in block.motion_modules]
        self.after = dict(zip(last.values(), modules))
        if motion_mid:
            self.mid_block = block(self.widths[-1], 1)
            self.after[self.middle_block[-2]] = self.mid_block.motion_modules[0]
        # Taps of UNet that a motion module follows move behind it: else D would see no motion.
        self.tapped = {key: last.get(layer, layer) for key, layer in self.tapped.items()}

    def blocks(self) -> list[nn.Module]:
        return [*super().blocks(), *(m for m in self.modules() if isinstance(m, MotionModule))]

    def tap_shapes(self, T: int, C: int, H: int, W: int) -> dict[str, tuple[int, int, int, int]]:
        """The discriminator's taps in network order, and their maps' (D, T, h, w) for latents (T C H W): the
        last motion module of the third and second level from below, and the last middle ResBlock. The
        largest maps mean least and cost most."""  # [choice]
        low = len(self.widths) - 1
        shapes = {i: (self.widths[i], T, H >> i, W >> i) for i in range(max(low - 2, 0), low + 1)}
        return {f"down.{i}" if i < low else "mid": shape for i, shape in shapes.items()}

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor | None], taps: tuple[str, ...] = (),
                lora: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """Noise (B T C H W) at clips x_t (B T C H W), t (B,) in [0, 1] and cond = (context (B L D_c),
        unused), the same for all frames of a clip. Of pictures x_t (B C H W) it is exactly UNet's.

        With `taps`, the maps (B D T h w), of pictures (B D h w), at these keys of `tapped` instead; `lora` as
        in UNet. Raises ValueError for a latent size that the levels cannot halve, and for more frames than
        the motion modules were trained with.
        """
        if x_t.ndim == 4:
            return super().forward(x_t, t, cond, taps, lora)
        T = x_t.shape[1]
        if T > MAX_FRAMES:
            raise ValueError(f"{T} frames; the motion modules know the positions of {MAX_FRAMES} at most")
        cond = tuple(y if y is None else y.repeat_interleave(T, dim=0) for y in cond)
        out = super().forward(x_t.flatten(0, 1), t.repeat_interleave(T), cond, taps, lora, frames=T)
        if taps:
            return [rearrange(m, "(B T) D h w -> B D T h w", T=T) for m in out]
        return out.unflatten(0, x_t.shape[:2])


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of AnimateDiff, but heads, groups and motion_heads, from the shapes of the tensors of both
    files."""
    return unet_config(shapes) | dict(motion_mid=any(name.startswith("mid_block.") for name in shapes))
