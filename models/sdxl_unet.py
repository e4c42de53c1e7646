"""The UNet denoiser of SDXL (Podell et al. 2023), which is also that of Stable Diffusion 1.5.

Attribute names are the tensor names of the original single files (`model.diffusion_model.` stripped), so that
loading needs no key map. SDXL has 64 channels per head, Linears around its transformer blocks and a vector
condition; SD1.5 has 8 heads at every width, 1x1 convolutions and no vector. `config_from_shapes` tells them
apart. The file stands alone: torch and einops.

Shapes: B batch, C latent channels, H W latent size, h w size of a level's map, S = h w image tokens, L text
tokens, D width of a level, E width of the embedding, N heads.
"""
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, gelu, interpolate, scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention of q (B N S D) to k and v (B N L D), no mask. Blocks call it as `block.attend`, which
    may be replaced."""
    return scaled_dot_product_attention(q, k, v)


def timestep_embedding(index: Tensor, width: int) -> Tensor:
    """Sinusoids of a DDPM index (B,), cosines first: (B width)."""
    k = torch.arange(width // 2, device=index.device, dtype=index.dtype)
    angles = index[:, None] * torch.exp(-math.log(10000) * k / (width // 2))
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


def embedder(inputs: int, width: int) -> nn.Sequential:
    return nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))


class ResBlock(nn.Module):
    """A unit of FSDP and of activation checkpointing."""

    def __init__(self, c_in: int, c_out: int, emb_width: int, groups: int):
        super().__init__()
        # No casts: of a half-precision map GroupNorm computes in float32 and rounds only its result.
        self.in_layers = nn.Sequential(
            nn.GroupNorm(groups, c_in), nn.SiLU(), nn.Conv2d(c_in, c_out, 3, padding=1))
        self.emb_layers = nn.Sequential(nn.SiLU(), nn.Linear(emb_width, c_out))
        self.out_layers = nn.Sequential(  # Identity keeps the place of a dropout, 0 in every published model
            nn.GroupNorm(groups, c_out), nn.SiLU(), nn.Identity(), nn.Conv2d(c_out, c_out, 3, padding=1))
        self.skip_connection = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, emb: Tensor) -> Tensor:
        h = self.in_layers(x) + self.emb_layers(emb)[:, :, None, None]
        return self.skip_connection(x) + self.out_layers(h)


class Attention(nn.Module):
    """The projections before and after an attention, which the block itself computes."""

    def __init__(self, width: int, context_width: int, heads: int):
        super().__init__()
        self.heads = heads
        self.to_q = nn.Linear(width, width, bias=False)
        self.to_k = nn.Linear(context_width, width, bias=False)
        self.to_v = nn.Linear(context_width, width, bias=False)
        self.to_out = nn.ModuleList([nn.Linear(width, width)])

    def project(self, x: Tensor, context: Tensor, lora: tuple) -> list[Tensor]:
        pairs = ((self.to_q, x), (self.to_k, context), (self.to_v, context))
        return [rearrange(f(y, *lora), "B S (N D) -> B N S D", N=self.heads) for f, y in pairs]

    def out(self, heads: Tensor, lora: tuple) -> Tensor:
        return self.to_out[0](rearrange(heads, "B N S D -> B S (N D)"), *lora)


class GEGLU(nn.Module):
    def __init__(self, width: int, inner: int):
        super().__init__()
        self.proj = nn.Linear(width, 2 * inner)

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        value, gate = self.proj(x, *lora).chunk(2, dim=-1)
        return value * gelu(gate)


class FeedForward(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.net = nn.ModuleList([GEGLU(width, 4 * width), nn.Identity(), nn.Linear(4 * width, width)])

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        return self.net[2](self.net[0](x, lora), *lora)


class BasicTransformerBlock(nn.Module):
    """Attention among the image tokens, attention to the text, feed-forward. A unit of FSDP and of activation
    checkpointing."""

    def __init__(self, width: int, context_dim: int, heads: int):
        super().__init__()
        self.attn1 = Attention(width, width, heads)
        self.attn2 = Attention(width, context_dim, heads)
        self.ff = FeedForward(width)
        self.norm1, self.norm2, self.norm3 = (nn.LayerNorm(width) for _ in range(3))
        self.attend = attend

    def forward(self, x: Tensor, context: Tensor, lora: tuple) -> Tensor:
        n = self.norm1(x)
        x = x + self.attn1.out(self.attend(*self.attn1.project(n, n, lora)), lora)
        x = x + self.attn2.out(self.attend(*self.attn2.project(self.norm2(x), context, lora)), lora)
        return x + self.ff(self.norm3(x), lora)


class SpatialTransformer(nn.Module):
    """`depth` transformer blocks on a map's pixels, and a residual connection around all of them."""

    def __init__(self, width: int, context_dim: int, heads: int, depth: int, linear: bool, groups: int):
        super().__init__()
        self.linear = linear
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)  # the ResBlocks' is 1e-5
        self.proj_in = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)
        self.transformer_blocks = nn.ModuleList(
            BasicTransformerBlock(width, context_dim, heads) for _ in range(depth))
        self.proj_out = nn.Linear(width, width) if linear else nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, context: Tensor, lora: tuple) -> Tensor:
        h = self.norm(x) if self.linear else self.proj_in(self.norm(x))
        # Contiguous once: elementwise results keep their input's strides, and every LayerNorm would copy.
        h = rearrange(h, "B D h w -> B (h w) D").contiguous()
        if self.linear:
            h = self.proj_in(h, *lora)
        for block in self.transformer_blocks:
            h = block(h, context, lora)
        if self.linear:
            h = self.proj_out(h, *lora)
        h = rearrange(h, "B (h w) D -> B D h w", h=x.shape[2])
        return x + (h if self.linear else self.proj_out(h))  # x first: the sum keeps its memory format


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.op = nn.Conv2d(width, width, 3, stride=2, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.op(x)


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class UNet(nn.Module):
    """Noise prediction network. Build it with `UNet(**config_from_shapes(shapes))`; SD1.5 also needs heads=8.

    Level l has width model_channels * channel_mult[l] and `depth[l]` transformer blocks behind each ResBlock.
    `heads`: how many at every width; None: as many as `head_dim` channels each make. `vector_dim`: size of
    the vector condition, None for none. `linear`: Linears around the transformer blocks, else 1x1
    convolutions. `groups` of every GroupNorm: 32 in every published file.
    """

    def __init__(self, model_channels: int, channel_mult: tuple[int, ...], num_res_blocks: int,
                 depth: tuple[int, ...], middle_depth: int, context_dim: int, in_channels: int = 4,
                 vector_dim: int | None = None, linear: bool = True, head_dim: int = 64,
                 heads: int | None = None, groups: int = 32):
        super().__init__()
        self.model_channels = model_channels
        self.widths = [model_channels * m for m in channel_mult]
        emb_width = 4 * model_channels
        self.time_embed = embedder(model_channels, emb_width)
        if vector_dim is not None:
            self.label_emb = nn.Sequential(embedder(vector_dim, emb_width))

        def transformer(width: int, depth: int) -> list[nn.Module]:
            count = heads or width // head_dim
            return [SpatialTransformer(width, context_dim, count, depth, linear, groups)] if depth else []

        def block(c_in: int, level: int) -> nn.ModuleList:
            res = ResBlock(c_in, self.widths[level], emb_width, groups)
            return nn.ModuleList([res, *transformer(self.widths[level], depth[level])])

        self.tapped = {}  # tap -> the last ResBlock of a level; a plain dict registers no module twice
        self.after = {}  # layer -> module that acts on its map when x_t is frames of clips (AnimateDiff)
        c = model_channels
        self.input_blocks = nn.ModuleList([nn.ModuleList([nn.Conv2d(in_channels, c, 3, padding=1)])])
        skips = [c]
        for level, width in enumerate(self.widths):
            for _ in range(num_res_blocks):
                self.input_blocks.append(block(c, level))
                c = width
                skips.append(c)
            self.tapped[f"down.{level}"] = self.input_blocks[-1][0]
            if level < len(self.widths) - 1:
                self.input_blocks.append(nn.ModuleList([Downsample(c)]))
                skips.append(c)
        first, last = (ResBlock(c, c, emb_width, groups) for _ in range(2))
        self.middle_block = nn.ModuleList([first, *transformer(c, middle_depth), last])
        self.tapped["mid"] = last
        self.output_blocks = nn.ModuleList()
        for i, level in enumerate(reversed(range(len(self.widths)))):
            for _ in range(num_res_blocks + 1):
                self.output_blocks.append(block(c + skips.pop(), level))
                c = self.widths[level]
            self.tapped[f"up.{i}"] = self.output_blocks[-1][0]
            if level:
                self.output_blocks[-1].append(Upsample(c))
        self.out = nn.Sequential(
            nn.GroupNorm(groups, c), nn.SiLU(), nn.Conv2d(c, in_channels, 3, padding=1))

    def blocks(self) -> list[nn.Module]:
        return [m for m in self.modules() if isinstance(m, (ResBlock, BasicTransformerBlock))]

    def tap_shapes(self, H: int, W: int) -> dict[str, tuple[int, int, int]]:
        """The discriminator's taps in network order, and their maps' (D, h, w) at latent size H W: the last
        ResBlock of each level (App. B.1), before its transformer and its resampling."""  # [choice]
        n = len(self.widths)
        levels = [*range(n), n - 1, *reversed(range(n))]
        return {key: (self.widths[i], H >> i, W >> i) for key, i in zip(self.tapped, levels)}

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor | None], taps: tuple[str, ...] = (),
                lora: tuple[str, ...] = (), frames: int = 0) -> Tensor | list[Tensor]:
        """Noise (B C H W), float32, at x_t (B C H W), t (B,) in [0, 1] and cond = (context (B L D_c), vector (B P)).

        With `taps`, the maps (B D h w) of these keys of `tap_shapes` instead, in network order; nothing after
        the last one is run. A network without vector condition ignores the vector. `lora`: () for the
        weights as they are, (name,) to add that adapter. It is an argument and no state of the module:
        activation checkpointing repeats the forward later, when another adapter may be on. `frames`: that
        many consecutive samples are one clip, and the modules in `after` act on its maps; 0 for pictures.
        Raises ValueError for a latent size that the levels cannot halve.
        """
        context, vector = cond
        dtype = self.time_embed[0].weight.dtype
        factor = 2 ** (len(self.widths) - 1)
        if x_t.shape[-2] % factor or x_t.shape[-1] % factor:
            raise ValueError(f"latent {x_t.shape[-2]} x {x_t.shape[-1]} is no multiple of {factor}, the "
                             "downsampling of the lowest level")
        # t = i/1000 is the DDPM index i - 1. No DDPM trains on t = 0: it gets the smallest index.
        index = (1000 * t.float() - 1).clamp_min(0)
        emb = self.time_embed(timestep_embedding(index, self.model_channels).to(dtype))  # B E
        if hasattr(self, "label_emb"):
            emb = emb + self.label_emb(vector.to(dtype))
        x, context = x_t.to(dtype), context.to(dtype)

        wanted, maps, skips = {self.tapped[key] for key in taps}, [], []
        stages = [*self.input_blocks, self.middle_block, *self.output_blocks]
        for i, stage in enumerate(stages):
            if i > len(self.input_blocks):
                x = torch.cat([x, skips.pop()], dim=1)
            for layer in stage:
                if isinstance(layer, ResBlock):
                    x = layer(x, emb)
                elif isinstance(layer, SpatialTransformer):
                    x = layer(x, context, lora)
                else:
                    x = layer(x)
                if frames and layer in self.after:
                    x = self.after[layer](x, frames, lora)
                if layer in wanted:
                    maps.append(x)
                    if len(maps) == len(wanted):
                        return maps
            if i < len(self.input_blocks):
                skips.append(x)
        norm, act, conv = self.out
        # In float32, also under bf16: at t = 1 a rounding of eps is 15 (SDXL) or 25 times as large in x_0.
        return conv2d(act(norm(x)).float(), conv.weight.float(), conv.bias.float(), padding=1)


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of UNet from the shapes of a checkpoint's tensors (prefix stripped). They do not tell
    head_dim, heads and groups."""
    model_channels, in_channels, _, _ = shapes["input_blocks.0.0.weight"]
    blocks = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("input_blocks."))
    levels = 1 + sum(f"input_blocks.{i}.0.op.weight" in shapes for i in range(blocks))
    first = [f"input_blocks.{1 + level * (blocks // levels)}" for level in range(levels)]

    def depth(transformer: str) -> int:
        return sum(name.startswith(f"{transformer}.transformer_blocks.") and name.endswith(".norm1.weight")
                   for name in shapes)
    return dict(
        model_channels=model_channels,
        channel_mult=tuple(shapes[f"{block}.0.out_layers.3.weight"][0] // model_channels for block in first),
        num_res_blocks=blocks // levels - 1,
        depth=tuple(depth(f"{block}.1") for block in first),
        middle_depth=depth("middle_block.1"),
        context_dim=shapes["middle_block.1.transformer_blocks.0.attn2.to_k.weight"][1],
        in_channels=in_channels,
        vector_dim=shapes["label_emb.0.0.weight"][1] if "label_emb.0.0.weight" in shapes else None,
        linear=len(shapes["middle_block.1.proj_in.weight"]) == 2,
    )
