"""Wan2.1-T2V-1.3B and -14B, the text-to-video denoiser (Wan Team 2025, "Wan: Open and Advanced Large-Scale
Video Generative Models").

Attribute names are the tensor names of the original files, so that loading needs no key map. Video tokens attend
to each other, rotated by their place, then to the text. The two sizes differ in numbers only. The file stands
alone: torch, einops.

As in the original, these are float32 whatever the weights are: time and its modulations, all norms, the rotation,
the tokens between the layers, the head and the output. The other linear layers and the attention compute in the
weights' dtype.

Shapes: B batch, T latent frames, C latent channels, H W latent size, h w = H/patch W/patch, S text tokens,
L = T h w video tokens (frame by frame, row by row), D width, N heads.
"""
from functools import lru_cache

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import layer_norm, linear, pad, rms_norm, scaled_dot_product_attention, silu

# ---- time and places ---------------------------------------------------------------------------------------

def timestep_embedding(time: Tensor, width: int) -> Tensor:
    """Sinusoids of 1000 t (B,), cosines first: (B width) float32, computed in float64 as in the original."""
    k = torch.arange(width // 2, device=time.device, dtype=torch.float64)
    angles = time[:, None].double() * 10000 ** (-k / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1).float()


@lru_cache(maxsize=4)
def rotary_table(T: int, h: int, w: int, head_dim: int, device: torch.device | str = "cpu") -> Tensor:
    """Unit complex numbers that rotate the pairs of a head's features, (L head_dim/2): for row and column a third
    of the pairs each, rounded down, for the frame the others, which come first: 22, 21, 21 of 64."""
    def axis(count: int, pairs: int) -> Tensor:
        rates = 10000 ** (-torch.arange(pairs, dtype=torch.float64, device="cpu") / pairs)
        return torch.arange(count, dtype=torch.float64, device="cpu")[:, None] * rates
    third = head_dim // 6
    frame, row, column = axis(T, head_dim // 2 - 2 * third), axis(h, third), axis(w, third)
    axes = frame[:, None, None], row[None, :, None], column[None, None]
    angles = torch.cat([a.expand(T, h, w, -1) for a in axes], dim=-1).flatten(0, 2)
    return torch.polar(torch.ones_like(angles), angles).to(device, torch.complex64)


def rotate(x: Tensor, rotary: Tensor) -> Tensor:
    """x (B L N D/N) float32 with its adjacent pairs of features rotated by `rotary` (1 L 1 D/2N)."""
    return torch.view_as_real(torch.view_as_complex(x.unflatten(-1, (-1, 2))) * rotary).flatten(-2)


# ---- network -----------------------------------------------------------------------------------------------

def attend(q: Tensor, k: Tensor, v: Tensor, total: int) -> Tensor:
    """Full attention over (B N L D/N), no mask. Sequence parallelism replaces `block.attend`, `net.cut` and
    `net.join`: a rank then holds part of the video tokens, and `total` still is L, the number of all."""
    return scaled_dot_product_attention(q, k, v)


def whole(x: Tensor, first: int, total: int) -> Tensor:
    """`net.cut` and `net.join` without sequence parallelism: x (B n ...), the tokens from `first` on of a
    sequence of `total`, stays whole. With it `cut` keeps this rank's tokens and `join` gathers all again."""
    return x


def in_float32(layer: nn.Linear, x: Tensor) -> Tensor:
    return linear(x.float(), layer.weight.float(), layer.bias.float())


def modulated(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without parameters, then scale and shift (B 1 D), all float32."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


class Attention(nn.Module):
    def __init__(self, width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.q, self.k, self.v, self.o = (nn.Linear(width, width) for _ in range(4))
        self.norm_q, self.norm_k = (nn.RMSNorm(width, eps=1e-6) for _ in range(2))  # of all heads together

    def project(self, x: Tensor, context: Tensor, rotary: Tensor | None, lora: tuple) -> list[Tensor]:
        """Queries of x (B n D), keys and values of the context: (B N n D/N) each."""
        v = self.v(context, *lora)
        q, k = (rms_norm(layer(y, *lora).float(), y.shape[-1:], norm.weight.float(), norm.eps)
                for layer, norm, y in ((self.q, self.norm_q, x), (self.k, self.norm_k, context)))
        q, k, v = (y.unflatten(-1, (self.heads, -1)) for y in (q, k, v))
        if rotary is not None:
            q, k = rotate(q, rotary), rotate(k, rotary)
        return [y.to(v.dtype).transpose(1, 2) for y in (q, k, v)]

    def out(self, heads: Tensor, lora: tuple) -> Tensor:
        return self.o(rearrange(heads, "B N L D -> B L (N D)"), *lora)


class Block(nn.Module):
    """One FSDP and checkpointing unit."""

    def __init__(self, width: int, heads: int, ffn_dim: int):
        super().__init__()
        self.self_attn = Attention(width, heads)
        self.norm3 = nn.LayerNorm(width, eps=1e-6)
        self.cross_attn = Attention(width, heads)
        self.ffn = nn.Sequential(nn.Linear(width, ffn_dim), nn.GELU(approximate="tanh"), nn.Linear(ffn_dim, width))
        self.modulation = nn.Parameter(torch.randn(1, 6, width) / width ** 0.5)
        self.attend = attend

    def forward(self, x: Tensor, text: Tensor, e0: Tensor, rotary: Tensor, total: int, lora: tuple) -> Tensor:
        """x (B L D) float32, text (B S D), e0 (B 6 D) float32."""
        dtype = text.dtype
        shift, scale, gate, shift2, scale2, gate2 = (self.modulation.float() + e0).split(1, dim=1)  # B 1 D
        y = modulated(x, shift, scale).to(dtype)
        heads = self.attend(*self.self_attn.project(y, y, rotary, lora), total)
        x = torch.addcmul(x, gate, self.self_attn.out(heads, lora).float())
        y = layer_norm(x, x.shape[-1:], self.norm3.weight.float(), self.norm3.bias.float(), self.norm3.eps).to(dtype)
        # Every rank of a sequence-parallel group has the whole text.
        heads = scaled_dot_product_attention(*self.cross_attn.project(y, text, None, lora))
        x = x + self.cross_attn.out(heads, lora)
        y = modulated(x, shift2, scale2).to(dtype)
        y = self.ffn[2](self.ffn[1](self.ffn[0](y, *lora)), *lora)
        return torch.addcmul(x, gate2, y.float())


class Head(nn.Module):
    def __init__(self, width: int, features: int):
        super().__init__()
        self.head = nn.Linear(width, features)
        self.modulation = nn.Parameter(torch.randn(1, 2, width) / width ** 0.5)

    def forward(self, x: Tensor, e: Tensor) -> Tensor:
        """x (B L D), e (B D) float32 -> (B L features) float32."""
        shift, scale = (self.modulation.float() + e[:, None]).split(1, dim=1)
        return in_float32(self.head, modulated(x, shift, scale))


class Blocks(nn.ModuleList):
    """The list of blocks under the original's name; calling it, `net.blocks()`, gives them as other networks do."""

    def forward(self) -> list[nn.Module]:
        return list(self)


class Wan(nn.Module):
    """Network of the velocity noise - x_0 on the straight path. Build it with `Wan(**config_from_shapes(shapes))`.

    `text_len`: text tokens there always are; a shorter context is filled with zeros, which the video attends to.
    """

    def __init__(self, depth: int, width: int, heads: int, ffn_dim: int, freq_dim: int, text_dim: int,
                 in_channels: int = 16, patch: int = 2, text_len: int = 512):
        super().__init__()
        self.depth, self.heads, self.head_dim, self.width = depth, heads, width // heads, width
        self.freq_dim, self.patch, self.text_len = freq_dim, patch, text_len
        self.cut = self.join = whole
        kernel = (1, patch, patch)
        self.patch_embedding = nn.Conv3d(in_channels, width, kernel_size=kernel, stride=kernel)
        self.text_embedding = nn.Sequential(nn.Linear(text_dim, width), nn.GELU(approximate="tanh"),
                                            nn.Linear(width, width))
        self.time_embedding = nn.Sequential(nn.Linear(freq_dim, width), nn.SiLU(), nn.Linear(width, width))
        self.time_projection = nn.Sequential(nn.SiLU(), nn.Linear(width, 6 * width))
        self.blocks = Blocks(Block(width, heads, ffn_dim) for _ in range(depth))
        self.head = Head(width, patch * patch * in_channels)

    def tap_shapes(self, T: int, C: int, H: int, W: int) -> dict[int, tuple[int, int, int, int]]:
        """The discriminator's taps, every third block as of CogVideoX (App. B.2), and their maps' (D, T, h, w) for
        latents (T C H W)."""  # [choice]
        return {i: (self.width, T, H // self.patch, W // self.patch) for i in range(2, self.depth, 3)}

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor | None], taps: tuple[int, ...] = (),
                lora: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """v (B T C H W), float32, at x_t (B T C H W), t (B,) in [0, 1] and cond = (context (B S D_text), not used).

        With `taps`, the video maps (B D T h w) leaving these blocks instead, in the weights' dtype; nothing after
        the last one is run. `lora`: () for the weights as they are, (name,) to add that adapter. It is an argument
        and no state of the module: activation checkpointing repeats the forward later, when another adapter may be
        on. Raises ValueError for a latent size that is no multiple of the patch, of which the original drops what
        is over, and for a context of more than `text_len` tokens.
        """
        context, dtype = cond[0], self.patch_embedding.weight.dtype
        T, (H, W) = x_t.shape[1], x_t.shape[-2:]
        if H % self.patch or W % self.patch:
            raise ValueError(f"latent {H} x {W} is no multiple of the patch size {self.patch}")
        if context.shape[1] > self.text_len:
            raise ValueError(f"{context.shape[1]} text tokens; expected at most {self.text_len}")
        time = timestep_embedding(1000 * t.float(), self.freq_dim)
        e = in_float32(self.time_embedding[2], silu(in_float32(self.time_embedding[0], time)))  # B D
        e0 = in_float32(self.time_projection[1], silu(e)).unflatten(-1, (6, -1))  # B 6 D
        text = self.text_embedding(pad(context.to(dtype), (0, 0, 0, self.text_len - context.shape[1])))  # B S D
        # A convolution of disjoint patches is a Linear on each of them, and that leaves tokens.
        x = rearrange(x_t.to(dtype), "B T C (h p) (w q) -> B (T h w) (C p q)", p=self.patch, q=self.patch)
        x = linear(x, self.patch_embedding.weight.flatten(1), self.patch_embedding.bias).float()  # B L D
        h, w, total = H // self.patch, W // self.patch, x.shape[1]
        rotary = self.cut(rotary_table(T, h, w, self.head_dim, x_t.device)[None, :, None], 0, total)
        x = self.cut(x, 0, total)

        maps, depth = [], max(taps) + 1 if taps else self.depth
        for i, block in enumerate(self.blocks()[:depth]):
            x = block(x, text, e0, rotary, total, lora)
            if i in taps:
                maps.append(rearrange(self.join(x.to(dtype), 0, total), "B (T h w) D -> B D T h w", h=h, w=w))
        if taps:
            return maps
        x = self.join(self.head(x, e), 0, total)
        return rearrange(x, "B (T h w) (p q C) -> B T C (h p) (w q)", h=h, w=w, p=self.patch, q=self.patch)


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of Wan from the shapes of a checkpoint's tensors (original names). They do not tell the heads, which
    are 128 wide in every release, and text_len."""
    width, in_channels, _, patch, _ = shapes["patch_embedding.weight"]
    blocks = {name.split(".")[1] for name in shapes if name.startswith("blocks.")}
    return dict(
        depth=len(blocks), width=width, heads=width // 128, in_channels=in_channels, patch=patch,
        ffn_dim=shapes["blocks.0.ffn.0.weight"][0], freq_dim=shapes["time_embedding.0.weight"][1],
        text_dim=shapes["text_embedding.0.weight"][1],
    )
