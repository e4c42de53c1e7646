"""MMDiT, the denoiser of SD3 and SD3.5 (Esser et al. 2024, "Scaling Rectified Flow Transformers").

Attribute names are the tensor names of the original single files (`model.diffusion_model.` stripped), so that
loading needs no key map. One class serves SD3-Medium (24 blocks), SD3.5-Medium (query/key norm, and in blocks
0..12 a second attention among the image tokens) and SD3.5-Large (38 blocks, query/key norm).
`config_from_shapes` tells them apart. The file stands alone: torch and einops.

Shapes: B batch, C latent channels, H W latent size, h w = H/patch W/patch, L text tokens, S image tokens,
D width, N heads.
"""
import math

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import gelu, layer_norm, scaled_dot_product_attention


def attend(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
    """Full attention over (B N L D), no mask. Blocks call it as `block.attend`, which may be replaced."""
    return scaled_dot_product_attention(q, k, v)


def modulate(x: Tensor, shift: Tensor, scale: Tensor) -> Tensor:
    """LayerNorm without affine part, then x * (1 + scale) + shift; x (B L D), shift and scale (B 1 D)."""
    return torch.addcmul(shift, layer_norm(x, x.shape[-1:], eps=1e-6), 1 + scale)


def timestep_embedding(t: Tensor) -> Tensor:
    """Sinusoids of t (B,), cosines first: (B 256)."""
    k = torch.arange(128, device=t.device, dtype=t.dtype)
    angles = t[:, None] * torch.exp(-math.log(10000) * k / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1)


class Embedder(nn.Module):
    def __init__(self, inputs: int, width: int):
        super().__init__()
        self.mlp = nn.Sequential(nn.Linear(inputs, width), nn.SiLU(), nn.Linear(width, width))

    def forward(self, x: Tensor) -> Tensor:
        return self.mlp(x)


class PatchEmbed(nn.Module):
    def __init__(self, patch: int, channels: int, width: int):
        super().__init__()
        self.proj = nn.Conv2d(channels, width, kernel_size=patch, stride=patch)

    def forward(self, x: Tensor) -> Tensor:
        return self.proj(x)


class Attention(nn.Module):
    """Projections of one stream around the attention. `reduced`: of the last block's text, which is attended
    to and not computed any further."""

    def __init__(self, width: int, heads: int, qk_norm: bool, reduced: bool = False):
        super().__init__()
        self.heads = heads
        self.qkv = nn.Linear(width, 3 * width)
        if not reduced:
            self.proj = nn.Linear(width, width)
        if qk_norm:
            self.ln_q = nn.RMSNorm(width // heads, eps=1e-6)
            self.ln_k = nn.RMSNorm(width // heads, eps=1e-6)

    def project(self, x: Tensor, lora: tuple) -> list[Tensor]:
        q, k, v = rearrange(self.qkv(x, *lora), "B L (three N D) -> three B N L D", three=3, N=self.heads)
        if hasattr(self, "ln_q"):
            q, k = self.ln_q(q), self.ln_k(k)
        return [q, k, v]


class Mlp(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.fc1 = nn.Linear(width, 4 * width)
        self.fc2 = nn.Linear(4 * width, width)

    def forward(self, x: Tensor, lora: tuple) -> Tensor:
        return self.fc2(gelu(self.fc1(x, *lora), approximate="tanh"), *lora)


class StreamBlock(nn.Module):
    """Weights of one stream, text or image, in a joint block. `chunks`: how many vectors modulate it, three
    (shift, scale, gate) for each attention and for the MLP; the last text needs only shift and scale."""

    def __init__(self, width: int, heads: int, qk_norm: bool, attn2: bool = False, reduced: bool = False):
        super().__init__()
        self.chunks = 2 if reduced else 9 if attn2 else 6
        self.attn = Attention(width, heads, qk_norm, reduced)
        if attn2:
            self.attn2 = Attention(width, heads, qk_norm)
        if not reduced:
            self.mlp = Mlp(width)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, self.chunks * width))

    def modulation(self, c: Tensor) -> tuple[Tensor, ...]:
        return self.adaLN_modulation(c)[:, None].chunk(self.chunks, dim=-1)  # each B 1 D

    def residual(self, x: Tensor, attention: Tensor, m: tuple[Tensor, ...], lora: tuple) -> Tensor:
        """x + gated attention. Then come the second image attention, where there is one, and
        `mlp_residual`."""
        return torch.addcmul(x, m[2], self.attn.proj(attention.contiguous(), *lora))

    def mlp_residual(self, x: Tensor, m: tuple[Tensor, ...], lora: tuple) -> Tensor:
        return torch.addcmul(x, m[5], self.mlp(modulate(x, m[3], m[4]), lora))


class JointBlock(nn.Module):
    """Text and image tokens, which have separate weights, in one common attention. A unit of FSDP and of
    activation checkpointing."""

    def __init__(self, width: int, heads: int, qk_norm: bool, attn2: bool, last: bool):
        super().__init__()
        self.context_block = StreamBlock(width, heads, qk_norm, reduced=last)
        self.x_block = StreamBlock(width, heads, qk_norm, attn2=attn2)
        self.last = last
        self.attend = attend

    def forward(self, x: Tensor, context: Tensor, c: Tensor, lora: tuple) -> tuple[Tensor, Tensor]:
        xb, cb = self.x_block, self.context_block
        # Each: shift, scale, gate of the attention, the same of the MLP, and of the second attention if any.
        mx, mc = xb.modulation(c), cb.modulation(c)
        qkv_x = xb.attn.project(modulate(x, mx[0], mx[1]), lora)
        qkv_c = cb.attn.project(modulate(context, mc[0], mc[1]), lora)
        joint = self.attend(*(torch.cat(p, dim=2) for p in zip(qkv_c, qkv_x)))  # B N L+S D/N, text first
        joint = rearrange(joint, "B N L D -> B L (N D)")
        attention_c, attention_x = joint.split([context.shape[1], x.shape[1]], dim=1)

        x_in, x = x, xb.residual(x, attention_x, mx, lora)
        if hasattr(xb, "attn2"):
            second = self.attend(*xb.attn2.project(modulate(x_in, mx[6], mx[7]), lora))
            x = torch.addcmul(x, mx[8], xb.attn2.proj(rearrange(second, "B N L D -> B L (N D)"), *lora))
        x = xb.mlp_residual(x, mx, lora)
        if not self.last:  # nothing reads the text that leaves the last block
            context = cb.mlp_residual(cb.residual(context, attention_c, mc, lora), mc, lora)
        return x, context


class FinalLayer(nn.Module):
    def __init__(self, width: int, outputs: int):
        super().__init__()
        self.linear = nn.Linear(width, outputs)
        self.adaLN_modulation = nn.Sequential(nn.SiLU(), nn.Linear(width, 2 * width))

    def forward(self, x: Tensor, c: Tensor) -> Tensor:
        shift, scale = self.adaLN_modulation(c)[:, None].chunk(2, dim=-1)
        return self.linear(modulate(x, shift, scale))


class MMDiT(nn.Module):
    """Velocity network of SD3. Build it with `MMDiT(**config_from_shapes(shapes))`."""

    def __init__(self, depth: int, width: int, heads: int, patch: int, in_channels: int, pos_grid: int,
                 context_dim: int, pooled_dim: int, qk_norm: bool, attn2: tuple[int, ...]):
        super().__init__()
        self.patch, self.pos_grid, self.depth = patch, pos_grid, depth
        # The checkpoint stores this table of positions, but it is not trained: no parameter.
        self.register_buffer("pos_embed", torch.zeros(1, pos_grid * pos_grid, width))
        self.x_embedder = PatchEmbed(patch, in_channels, width)
        self.t_embedder = Embedder(256, width)
        self.y_embedder = Embedder(pooled_dim, width)
        self.context_embedder = nn.Linear(context_dim, width)
        self.joint_blocks = nn.ModuleList(
            JointBlock(width, heads, qk_norm, attn2=i in attn2, last=i == depth - 1) for i in range(depth))
        self.final_layer = FinalLayer(width, patch * patch * in_channels)

    def blocks(self) -> list[nn.Module]:
        return list(self.joint_blocks)

    def tap_shapes(self, H: int, W: int) -> dict[int, tuple[int, int, int]]:
        """The discriminator's taps, every block (App. B.1), and their maps' (D, h, w) at latent size H W."""
        return {i: (self.pos_embed.shape[-1], H // self.patch, W // self.patch) for i in range(self.depth)}

    def crop_pos_embed(self, h: int, w: int) -> Tensor:
        """The centred h x w window of the stored position table: (1 S D)."""
        if max(h, w) > self.pos_grid:
            raise ValueError(f"{h} x {w} patches exceed the model's position table of "
                             f"{self.pos_grid} x {self.pos_grid}")
        table = rearrange(self.pos_embed, "1 (H W) D -> H W D", H=self.pos_grid)
        top, left = (self.pos_grid - h) // 2, (self.pos_grid - w) // 2
        return table[top:top + h, left:left + w].reshape(1, h * w, -1)

    def forward(self, x_t: Tensor, t: Tensor, cond: tuple[Tensor, Tensor], taps: tuple[int, ...] = (),
                lora: tuple[str, ...] = ()) -> Tensor | list[Tensor]:
        """Velocity (B C H W) at x_t (B C H W), t (B,) in [0, 1] and cond = (context (B L D_c), pooled (B P)).

        With `taps`, the image maps (B D h w) leaving these blocks instead; nothing after the last one is run.
        `lora`: () for the weights as they are, (name,) to add that adapter. It is an argument and no state of
        the module: activation checkpointing repeats the forward later, when another adapter may be on.
        Raises ValueError for a latent size that is no multiple of the patch or exceeds the position table.
        """
        context, pooled = cond
        dtype = self.context_embedder.weight.dtype
        if x_t.shape[-2] % self.patch or x_t.shape[-1] % self.patch:
            raise ValueError(f"latent {x_t.shape[-2]} x {x_t.shape[-1]} is no multiple of the patch size "
                             f"{self.patch}")
        c = self.t_embedder(timestep_embedding(1000 * t).to(dtype)) + self.y_embedder(pooled.to(dtype))  # B D
        context = self.context_embedder(context.to(dtype))  # B L D
        x = self.x_embedder(x_t.to(dtype))  # B D h w
        h, w = x.shape[-2:]
        # Contiguous once: elementwise results keep their input's strides, and every LayerNorm would copy.
        x = rearrange(x, "B D h w -> B (h w) D").contiguous() + self.crop_pos_embed(h, w).to(dtype)

        maps = []
        for i, block in enumerate(self.joint_blocks[:max(taps) + 1] if taps else self.joint_blocks):
            x, context = block(x, context, c, lora)
            if i in taps:
                maps.append(rearrange(x, "B (h w) D -> B D h w", h=h))
        if taps:
            return maps
        x = self.final_layer(x, c)
        return rearrange(x, "B (h w) (p q C) -> B C (h p) (w q)", h=h, p=self.patch, q=self.patch)


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of MMDiT from the shapes of a checkpoint's tensors (prefix stripped). No shape tells the
    heads: in every published model they are as many as the blocks."""
    width, in_channels, patch, _ = shapes["x_embedder.proj.weight"]
    depth = 1 + max(int(name.split(".")[1]) for name in shapes if name.startswith("joint_blocks."))
    return dict(
        depth=depth, width=width, heads=depth, patch=patch, in_channels=in_channels,
        pos_grid=math.isqrt(shapes["pos_embed"][1]),
        context_dim=shapes["context_embedder.weight"][1],
        pooled_dim=shapes["y_embedder.mlp.0.weight"][1],
        qk_norm="joint_blocks.0.context_block.attn.ln_k.weight" in shapes,
        attn2=tuple(i for i in range(depth) if f"joint_blocks.{i}.x_block.attn2.qkv.weight" in shapes),
    )
