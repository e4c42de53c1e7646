"""CogVideoX-2b and -5b, the text-to-video denoiser (Yang et al. 2024, "CogVideoX: Text-to-Video Diffusion
Models with An Expert Transformer").

Attribute names are the tensor names of the published `transformer/` files, so that loading needs no key map.
2b adds fixed sinusoids of its place to each video token, 5b rotates queries and keys by it; otherwise the two
differ only in size. Tables of positions are computed and never stored. The file stands alone: torch, einops.

Shapes: B batch, T latent frames, C latent channels, H W latent size, h w = H/patch W/patch, S text tokens,
V = T h w video tokens (frame by frame, row by row), L = S + V, D width, N heads, E of the time embedding.
"""
import math
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, linear, scaled_dot_product_attention, silu

# ---- positions ---------------------------------------------------------------------------------------------

def timestep_embedding(index: Tensor, width: int) -> Tensor:
    """Sinusoids of a DDPM index (B,), cosines first: (B width) float32."""
    k = torch.arange(width // 2, device=index.device, dtype=torch.float32)
    angles = index[:, None].float() * torch.exp(-math.log(10000) * k / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


@lru_cache(maxsize=4)
def sincos_table(T: int, h: int, w: int, width: int, interpolation: float, dtype: torch.dtype,
                 device: torch.device | str = "cpu") -> Tensor:
    """Fixed sinusoids of the video tokens (V width): a quarter of the features for the frame, three eighths
    for the column, then as many for the row, sines first in each. Columns and rows are divided by
    `interpolation` at every size, as in diffusers; the original release has one table, of 30 x 45 patches."""
    def axis(count: int, features: int, scale: float) -> Tensor:
        rates = 10000 ** (-torch.arange(features // 2, dtype=torch.float64, device="cpu") / (features // 2))
        # Float32 here and float64 below: the original rounds so.
        places = torch.arange(count, dtype=torch.float32, device="cpu") / scale
        angles = places[:, None].double() * rates
        return torch.cat([angles.sin(), angles.cos()], dim=-1).to(device, dtype)
    frame, part = axis(T, width // 4, 1), 3 * width // 8
    column, row = axis(w, part, interpolation), axis(h, part, interpolation)
    axes = frame[:, None, None], column[None, None], row[None, :, None]
    return torch.cat([a.expand(T, h, w, -1) for a in axes], dim=-1).flatten(0, 2)


def fitted_grid(h: int, w: int, grid: tuple[int, int]) -> tuple[Tensor, Tensor]:
    """Row and column coordinates of h x w patches. They are fitted into `grid`, the patches of the training,
    keeping their aspect, and centred, as in diffusers: plain indices when the two grids are equal."""
    H, W = grid
    fit_h, fit_w = (H, round(H / h * w)) if h / w > H / W else (round(W / w * h), W)  # this order decides at .5
    axes = []
    for count, fit, whole in ((h, fit_h, H), (w, fit_w, W)):
        start = round((whole - fit) / 2)
        axes.append(torch.linspace(start, (start + fit) * (count - 1) / count, count, device="cpu"))
    return axes[0], axes[1]


@lru_cache(maxsize=4)
def rotary_table(S: int, T: int, h: int, w: int, head_dim: int, grid: tuple[int, int],
                 device: torch.device | str = "cpu") -> Tensor:
    """Unit complex numbers that rotate the pairs of a head's features, (L head_dim/2): a quarter for the
    frame, three eighths for the row, then as many for the column. Those of text are 1: no rotation."""
    def axis(places: Tensor, features: int) -> Tensor:
        return places[:, None] * (1 / 10000 ** (torch.arange(0, features, 2, device="cpu") / features))
    rows, columns = fitted_grid(h, w, grid)
    frame = axis(torch.arange(T, dtype=torch.float32, device="cpu"), head_dim // 4)[:, None, None]
    row, column = axis(rows, 3 * head_dim // 8)[None, :, None], axis(columns, 3 * head_dim // 8)[None, None]
    angles = torch.cat([a.expand(T, h, w, -1) for a in (frame, row, column)], dim=-1).flatten(0, 2)
    angles = torch.cat([torch.zeros(S, head_dim // 2, device="cpu"), angles])
    return torch.complex(angles.cos(), angles.sin()).to(device)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B L N D/N) with its adjacent pairs of features rotated by `rotary` (1 L 1 D/2N), in float32."""
    pairs = torch.view_as_complex(x.float().unflatten(-1, (-1, 2)))
    return torch.view_as_real(pairs * rotary).flatten(-2).to(x.dtype)


# ---- network -----------------------------------------------------------------------------------------------

def attend(q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
    """Full attention over (B N L D/N), no mask. Sequence parallelism replaces `block.attend`, `net.cut` and
    `net.join`: a rank then holds part of the tokens, and `total` still is L, the number of all."""
    return scaled_dot_product_attention(q, k, v)


def whole(x: Tensor, first: int, total: int) -> Tensor:
    """`net.cut` and `net.join` without sequence parallelism: x (B n ...), the tokens from `first` on of a
    sequence of `total`, stays whole. With it `cut` keeps this rank's tokens and `join` gathers all again."""
    return x


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int, text_dim: int):
        super().__init__()
        self.patch = patch
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)
        self.text_proj = nn.Linear(text_dim, width)

    def forward(self, x: Tensor) -> Tensor:
        # A convolution of disjoint patches is a Linear on each of them, and that leaves tokens.
        x = rearrange(x, "B T C (h p) (w q) -> B (T h w) (C p q)", p=self.patch, q=self.patch)
        return linear(x, self.proj.weight.flatten(1), self.proj.bias)  # B V D


class TimeEmbedding(nn.Module):
    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.linear_1 = nn.Linear(width, time_dim)
        self.linear_2 = nn.Linear(time_dim, time_dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.linear_2(silu(self.linear_1(x)))  # B E


class ExpertNorm(nn.Module):
    """LayerNorm, and modulations for text and for video: the only weights of a block that the two do not
    share."""

    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 6 * width)
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, text: Tensor, video: Tensor, c: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The modulated tokens (B L D), text first, and the gates (B 1 D) of text and of video."""
        m = self.linear(c)[:, None].chunk(6, dim=-1)  # shift, scale, gate of video, then of text
        x = torch.cat([torch.addcmul(m[3], self.norm(text), 1 + m[4]),
                       torch.addcmul(m[0], self.norm(video), 1 + m[1])], dim=1)
        return x, m[5], m[2]


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q, self.to_k, self.to_v = (nn.Linear(width, width) for _ in range(3))
        self.norm_q, self.norm_k = (nn.LayerNorm(width // heads, eps=1e-6) for _ in range(2))
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def project(self, x: Tensor, rotary: Tensor | None, lora: tuple) -> list[Tensor]:
        q, k, v = (f(x, *lora).unflatten(-1, (self.heads, -1)) for f in (self.to_q, self.to_k, self.to_v))
        q, k = self.norm_q(q), self.norm_k(k)  # B L N D/N
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return [y.transpose(1, 2) for y in (q, k, v)]

    def out(self, heads: Tensor, lora: tuple) -> Tensor:
        return self.to_out[0](rearrange(heads, "B N L D -> B L (N D)"), *lora)


class GELU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, inner)

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        return gelu(self.proj(x, *lora), approximate="tanh")


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GELU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        return self.net[2](self.net[0](x, lora), *lora)


class Block(nn.Module):
    """One FSDP and checkpointing unit: text and video tokens share all weights but the modulations."""

    def __init__(self, width: int, heads: int, time_dim: int):
        super().__init__()
        self.norm1 = ExpertNorm(width, time_dim)
        self.attn1 = Attention(width, heads)
        self.norm2 = ExpertNorm(width, time_dim)
        self.ff = FeedForward(width)
        self.attend = attend

    def forward(self, video: Tensor, text: Tensor, c: Tensor, rotary: Tensor | None, total: int,
                lora: tuple) -> tuple[Tensor, Tensor]:
        sizes = [text.shape[1], video.shape[1]]  # under sequence parallelism either can be 0
        x, gate_text, gate_video = self.norm1(text, video, c)
        x = self.attn1.out(self.attend(*self.attn1.project(x, rotary, lora), total), lora)
        x_text, x_video = x.split(sizes, dim=1)
        text, video = torch.addcmul(text, gate_text, x_text), torch.addcmul(video, gate_video, x_video)
        x, gate_text, gate_video = self.norm2(text, video, c)
        x_text, x_video = self.ff(x, lora).split(sizes, dim=1)
        return torch.addcmul(video, gate_video, x_video), torch.addcmul(text, gate_text, x_text)


class FinalNorm(nn.Module):
    def __init__(self, width: int, time_dim: int):
        super().__init__()
        self.linear = nn.Linear(time_dim, 2 * width)
        # diffusers, where the published files are from, has this eps; the original has 1e-6.  # [choice]
        self.norm = nn.LayerNorm(width, eps=1e-5)

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.linear(c)[:, None].chunk(2, dim=-1)
        return torch.addcmul(shift, self.norm(x), 1 + scale)


class CogVideoX(nn.Module):
    """Network of v = alpha * eps - sigma * x_0. Build it with `CogVideoX(**config_from_shapes(shapes))`.

    `rotary`: rotary positions as in 5b, else sinusoids as in 2b; None decides by the width, since the names
    in the two files are the same. `grid`: rows and columns of patches in training (480 x 720 pixels), for
    rotary positions. `interpolation`: divisor of the sinusoids' rows and columns.
    """

    def __init__(self, depth: int, heads: int, head_dim: int, in_channels: int, text_dim: int, time_dim: int,
                 patch: int = 2, rotary: bool | None = None, grid: tuple[int, int] = (30, 45),
                 interpolation: float = 1.875):
        super().__init__()
        width = heads * head_dim
        self.depth, self.heads, self.head_dim, self.width = depth, heads, head_dim, width
        self.patch, self.grid, self.interpolation = patch, tuple(grid), interpolation
        self.rotary = width == 3072 if rotary is None else rotary
        self.cut = self.join = whole
        self.patch_embed = PatchEmbed(patch, in_channels, width, text_dim)
        self.time_embedding = TimeEmbedding(width, time_dim)
        self.transformer_blocks = nn.ModuleList(Block(width, heads, time_dim) for _ in range(depth))
        self.norm_final = nn.LayerNorm(width, eps=1e-5)
        self.norm_out = FinalNorm(width, time_dim)
        self.proj_out = nn.Linear(width, patch * patch * in_channels)

    def blocks(self) -> list[nn.Module]:
        return list(self.transformer_blocks)

    def tap_shapes(self, T: int, C: int, H: int, W: int) -> dict[int, tuple[int, int, int, int]]:
        """The discriminator's taps, every third block (App. B.2), and their maps' (D, T, h, w) for latents
        (T C H W)."""
        return {i: (self.width, T, H // self.patch, W // self.patch) for i in range(2, self.depth, 3)}

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor | None], taps: tuple[int, ...] = (),
                lora: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """v (B T C H W) at x_t (B T C H W), t (B,) in [0, 1] and cond = (context (B S D_text), not used).

        With `taps`, the video maps (B D T h w) leaving these blocks instead; nothing after the last one is
        run. `lora`: () for the weights as they are, (name,) to add that adapter. It is an argument and no
        state of the module: activation checkpointing repeats the forward later, when another adapter may be
        on. Raises ValueError for a latent size that is no multiple of the patch.
        """
        context, dtype = cond[0], self.proj_out.weight.dtype
        T, (H, W) = x_t.shape[1], x_t.shape[-2:]
        if H % self.patch or W % self.patch:
            raise ValueError(f"latent {H} x {W} is no multiple of the patch size {self.patch}")
        # t = i/1000 is the DDPM index i - 1. No DDPM trains on t = 0: it gets the smallest index.
        index = ((1000 * t.float()).round() - 1).clamp_min(0)
        c = silu(self.time_embedding(timestep_embedding(index, self.width).to(dtype)))  # B E
        text = self.patch_embed.text_proj(context.to(dtype))  # B S D
        video = self.patch_embed(x_t.to(dtype))  # B V D
        S, h, w, rotary = text.shape[1], H // self.patch, W // self.patch, None
        total = S + video.shape[1]
        if self.rotary:
            rotary = rotary_table(S, T, h, w, self.head_dim, self.grid, x_t.device)[None, :, None]
            rotary = self.cut(rotary, 0, total)
        else:
            video = video + sincos_table(T, h, w, self.width, self.interpolation, dtype, x_t.device)
        text, video = self.cut(text, 0, total), self.cut(video, S, total)

        maps, depth = [], max(taps) + 1 if taps else self.depth
        for i, block in enumerate(self.transformer_blocks[:depth]):
            video, text = block(video, text, c, rotary, total, lora)
            if i in taps:
                maps.append(rearrange(self.join(video, S, total), "B (T h w) D -> B D T h w", h=h, w=w))
        if taps:
            return maps
        x = self.join(self.proj_out(self.norm_out(self.norm_final(video), c)), S, total)
        return rearrange(x, "B (T h w) (C p q) -> B T C (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of CogVideoX from the shapes of a checkpoint's tensors (published names). They do not tell
    rotary, grid and interpolation."""
    width, in_channels, patch, _ = shapes["patch_embed.proj.weight"]
    head_dim, = shapes["transformer_blocks.0.attn1.norm_q.weight"]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("transformer_blocks.")}
    return dict(
        depth=len(blocks), heads=width // head_dim, head_dim=head_dim, in_channels=in_channels, patch=patch,
        text_dim=shapes["patch_embed.text_proj.weight"][1],
        time_dim=shapes["time_embedding.linear_1.weight"][0],
    )
