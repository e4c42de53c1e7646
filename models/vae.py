"""The 2D KL autoencoder of SD3 (16 channels) and of SDXL / SD1.5 (4 channels, 1x1 convs around the latent).

Attribute names are the tensor names of the original single files (`first_stage_model.` stripped). A latent
leaves and enters in the denoiser's units, (z - shift) * scale: shift 0.0609 and scale 1.5305 in SD3, 0 and
0.13025 in SDXL. SDXL's published weights overflow float16: run them in float32 or bfloat16. The file stands
alone: torch and einops.

Shapes: B batch, C channels, Z latent channels, H W image size, h w latent size (H / factor, W / factor).
"""
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import interpolate, pad, scaled_dot_product_attention, silu
from torch.utils.checkpoint import checkpoint as recompute


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int, groups: int):
        super().__init__()
        self.norm1 = nn.GroupNorm(groups, c_in, eps=1e-6)
        self.conv1 = nn.Conv2d(c_in, c_out, 3, padding=1)
        self.norm2 = nn.GroupNorm(groups, c_out, eps=1e-6)
        self.conv2 = nn.Conv2d(c_out, c_out, 3, padding=1)
        self.nin_shortcut = nn.Conv2d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv1(silu(self.norm1(x)))
        h = self.conv2(silu(self.norm2(h)))
        return self.nin_shortcut(x) + h


class Attention(nn.Module):
    """One head over all pixels."""

    def __init__(self, width: int, groups: int):
        super().__init__()
        self.norm = nn.GroupNorm(groups, width, eps=1e-6)
        self.q = nn.Conv2d(width, width, 1)  # 1x1 convs, not Linears: the files store 4-d weights
        self.k = nn.Conv2d(width, width, 1)
        self.v = nn.Conv2d(width, width, 1)
        self.proj_out = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor) -> Tensor:
        n = self.norm(x)
        q, k, v = (rearrange(f(n), "B C h w -> B 1 (h w) C") for f in (self.q, self.k, self.v))
        h = scaled_dot_product_attention(q, k, v)
        return x + self.proj_out(rearrange(h, "B 1 (h w) C -> B C h w", h=x.shape[2]))


class Downsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, stride=2)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(pad(x, (0, 1, 0, 1)))  # right and bottom only, as the weights were trained


class Upsample(nn.Module):
    def __init__(self, width: int):
        super().__init__()
        self.conv = nn.Conv2d(width, width, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        return self.conv(interpolate(x, scale_factor=2.0, mode="nearest"))


class Level(nn.Module):
    """The residual blocks of one resolution. The encoder adds `downsample`, the decoder `upsample`."""

    def __init__(self, c_in: int, c_out: int, num_blocks: int, groups: int):
        super().__init__()
        self.block = nn.ModuleList(ResBlock(c_out if j else c_in, c_out, groups) for j in range(num_blocks))


class Middle(nn.Module):
    def __init__(self, width: int, groups: int):
        super().__init__()
        self.block_1 = ResBlock(width, width, groups)
        self.attn_1 = Attention(width, groups)
        self.block_2 = ResBlock(width, width, groups)


class Encoder(nn.Module):
    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, c_out: int, groups: int):
        super().__init__()
        widths = [ch] + [ch * m for m in ch_mult]
        self.conv_in = nn.Conv2d(3, ch, 3, padding=1)
        self.down = nn.ModuleList()
        for i, m in enumerate(ch_mult):
            level = Level(widths[i], widths[i + 1], num_res_blocks, groups)
            level.downsample = Downsample(ch * m) if i < len(ch_mult) - 1 else nn.Identity()
            self.down.append(level)
        self.mid = Middle(widths[-1], groups)
        self.norm_out = nn.GroupNorm(groups, widths[-1], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[-1], c_out, 3, padding=1)

    def forward(self, x: Tensor) -> Tensor:
        h = self.conv_in(x)
        for level in self.down:
            for layer in (*level.block, level.downsample):
                h = layer(h)
        h = self.mid.block_2(self.mid.attn_1(self.mid.block_1(h)))
        return self.conv_out(silu(self.norm_out(h)))


class Decoder(nn.Module):
    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, c_in: int, groups: int):
        super().__init__()
        widths = [ch * m for m in ch_mult] + [ch * ch_mult[-1]]
        self.conv_in = nn.Conv2d(c_in, widths[-1], 3, padding=1)
        self.mid = Middle(widths[-1], groups)
        self.up = nn.ModuleList()  # index 0 is the image's resolution, so the last one runs first
        for i, m in enumerate(ch_mult):
            level = Level(widths[i + 1], widths[i], num_res_blocks + 1, groups)
            level.upsample = Upsample(ch * m) if i else nn.Identity()
            self.up.append(level)
        self.norm_out = nn.GroupNorm(groups, widths[0], eps=1e-6)
        self.conv_out = nn.Conv2d(widths[0], 3, 3, padding=1)

    def forward(self, z: Tensor, checkpoint: bool = False) -> Tensor:
        layers = [self.mid.block_1, self.mid.attn_1, self.mid.block_2]
        for level in reversed(self.up):
            layers += [*level.block, level.upsample]
        h = self.conv_in(z)
        for layer in layers:
            h = recompute(layer, h, use_reentrant=False) if checkpoint else layer(h)
        return self.conv_out(silu(self.norm_out(h)))


class AutoencoderKL(nn.Module):
    """Image (B 3 H W) in [-1, 1] <-> latent (B Z h w).

    Build it with `AutoencoderKL(**config_from_shapes(shapes), shift=0.0609, scale=1.5305)`.
    `quant`: there are 1x1 convolutions around the latent. `groups` is 32 in every published file.
    """

    def __init__(self, ch: int, ch_mult: tuple[int, ...], num_res_blocks: int, z_channels: int, shift: float,
                 scale: float, quant: bool = False, groups: int = 32):
        super().__init__()
        self.shift, self.scale, self.factor = shift, scale, 2 ** (len(ch_mult) - 1)
        self.encoder = Encoder(ch, ch_mult, num_res_blocks, 2 * z_channels, groups)
        self.decoder = Decoder(ch, ch_mult, num_res_blocks, z_channels, groups)
        self.quant_conv = nn.Conv2d(2 * z_channels, 2 * z_channels, 1) if quant else nn.Identity()
        self.post_quant_conv = nn.Conv2d(z_channels, z_channels, 1) if quant else nn.Identity()

    def moments(self, image: Tensor) -> tuple[Tensor, Tensor]:
        """Mean and log-variance (clamped to [-30, 20]) of z, before shift and scale: each (B Z h w). Raises
        ValueError for a size that is no multiple of `factor`."""
        if image.shape[-2] % self.factor or image.shape[-1] % self.factor:
            raise ValueError(f"image size {tuple(image.shape[-2:])} is not a multiple of {self.factor}")
        mean, logvar = self.quant_conv(self.encoder(image)).chunk(2, dim=1)
        return mean, logvar.clamp(-30.0, 20.0)

    def encode(self, image: Tensor, eps: Tensor | None = None) -> Tensor:
        """Latent (B Z h w) in the denoiser's units: from the mean, or from the sample mean + std * eps."""
        mean, logvar = self.moments(image)
        z = mean if eps is None else mean + torch.exp(0.5 * logvar) * eps
        return (z - self.shift) * self.scale

    def decode(self, latent: Tensor, checkpoint: bool = False) -> Tensor:
        """Image (B 3 H W) in about [-1, 1], not clamped, in the weights' dtype; `checkpoint` recomputes
        activations in backward."""
        z = (latent / self.scale + self.shift).to(self.decoder.conv_in.weight.dtype)
        return self.decoder(self.post_quant_conv(z), checkpoint)


class FramesVAE(AutoencoderKL):
    """The same of videos (B T 3 H W) <-> (B T Z h w), AT_ONCE of their frames at a time, or of pictures."""
    AT_ONCE = 4  # at 512 x 512 pixels each costs a gigabyte

    def moments(self, video: Tensor) -> tuple[Tensor, Tensor]:
        frames = super().moments
        parts = [frames(part) for part in video.flatten(0, -4).split(self.AT_ONCE)]
        return tuple(torch.cat(part).unflatten(0, video.shape[:-3]) for part in zip(*parts))

    def decode(self, latent: Tensor, checkpoint: bool = False) -> Tensor:
        frames = super().decode
        parts = [frames(part, checkpoint) for part in latent.flatten(0, -4).split(self.AT_ONCE)]
        return torch.cat(parts).unflatten(0, latent.shape[:-3])


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of AutoencoderKL from the shapes of a checkpoint's tensors (prefix stripped). They do not
    tell shift, scale and groups. Raises ValueError where the names are not those of the original layout."""
    if "encoder.down.0.block.0.conv1.weight" not in shapes or "decoder.conv_in.weight" not in shapes:
        raise ValueError("no VAE in the original layout: expected encoder.down.0.block.0.conv1.weight, ..., "
                         f"found {', '.join(sorted(shapes)[:3]) or 'nothing'}")
    ch = shapes["encoder.conv_in.weight"][0]
    first = {name.split(".")[2]: shape[0] for name, shape in shapes.items()
             if name.startswith("encoder.down.") and name.endswith(".block.0.conv1.weight")}
    return dict(
        ch=ch,
        ch_mult=tuple(first[str(i)] // ch for i in range(len(first))),
        num_res_blocks=sum(f"encoder.down.0.block.{j}.conv1.weight" in shapes for j in range(100)),
        z_channels=shapes["decoder.conv_in.weight"][1],
        quant="quant_conv.weight" in shapes,
    )
