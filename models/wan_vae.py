"""The 3D causal autoencoder of Wan2.1 (Wan Team 2025, "Wan: Open and Advanced Large-Scale Video Generative Models").

Attribute names are the tensor names of the original `Wan2.1_VAE.pth`. A latent leaves and enters in the denoiser's
units, (z - MEAN) / STD. The file stands alone: torch and einops.

A clip is computed whole or, as in the original, in parts along time: encoded four frames at a time, decoded latent by
latent, in memory that does not grow with the clip. Nothing looks ahead, and what layers keep of the past, they give
back with their output for the next call: cutting a clip changes nothing.

Shapes: B batch, C channels, Z latent channels, F frames, T latent frames, H W frame size, h w latent size; inside
the networks T H W are those of the layer.
"""
import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv3d, interpolate, linear, normalize, pad, scaled_dot_product_attention, silu

# Of the 16 channels of z over the original's training data; no file holds them.
MEAN = (-0.7571, -0.7089, -0.9113, 0.1075, -0.1745, 0.9653, -0.1517, 1.5508,
        0.4134, -0.0715, 0.5517, -0.3632, -0.1922, -0.9497, 0.2503, -0.2921)
STD = (2.8184, 1.4541, 2.3275, 2.6558, 1.2196, 1.7708, 2.6052, 2.0743,
       3.2687, 2.1526, 2.8652, 1.5579, 1.6382, 1.1253, 2.8251, 1.9160)


# ---- layers: (x, frames kept of the part before, () where the clip begins) -> (x, frames kept for the next part)

def no_past(x: Tensor) -> Tensor:
    """Two frames of zeros, which stand before a clip's first (B C T H W)."""
    return x.new_zeros(*x.shape[:2], 2, *x.shape[3:])


def convolve(conv: nn.Conv3d, x: Tensor, kept: tuple) -> tuple[Tensor, tuple]:
    """A convolution of each frame and the two before it: (output, the last two frames for the next part)."""
    x = torch.cat([kept[0] if kept else no_past(x), x], dim=2)
    # A copy: a view would keep all of x in memory.
    return conv(x), (x[:, :, -2:].clone(memory_format=torch.contiguous_format),)


def causal(c_in: int, c_out: int) -> nn.Conv3d:
    """Pads in space alone; `convolve` does it in time."""
    return nn.Conv3d(c_in, c_out, 3, padding=(0, 1, 1))


class RMSNorm(nn.Module):
    """Over the channels of each place. `ones`: sizes of 1 behind the channels in gamma's shape, as in the file."""

    def __init__(self, width: int, ones: int = 3):
        super().__init__()
        self.gamma = nn.Parameter(torch.ones(width, *[1] * ones))

    def forward(self, x: Tensor) -> Tensor:
        return normalize(x, dim=1) * (len(self.gamma) ** 0.5 * self.gamma.view(-1, 1, 1, 1))


class ResBlock(nn.Module):
    def __init__(self, c_in: int, c_out: int):
        super().__init__()
        self.residual = nn.Sequential(RMSNorm(c_in), nn.SiLU(), causal(c_in, c_out),
                                      RMSNorm(c_out), nn.SiLU(), nn.Identity(), causal(c_out, c_out))
        self.shortcut = nn.Conv3d(c_in, c_out, 1) if c_in != c_out else nn.Identity()

    def forward(self, x: Tensor, kept: tuple) -> tuple[Tensor, tuple]:
        norm1, _, conv1, norm2, _, _, conv2 = self.residual
        h, kept1 = convolve(conv1, silu(norm1(x)), kept[:1])
        h, kept2 = convolve(conv2, silu(norm2(h)), kept[1:])
        return self.shortcut(x) + h, kept1 + kept2


class Attention(nn.Module):
    """One head, inside each frame."""

    def __init__(self, width: int):
        super().__init__()
        self.norm = RMSNorm(width, ones=2)
        self.to_qkv = nn.Conv2d(width, 3 * width, 1)
        self.proj = nn.Conv2d(width, width, 1)

    def forward(self, x: Tensor, kept: tuple) -> tuple[Tensor, tuple]:
        y = rearrange(self.norm(x), "B C T H W -> (B T) 1 (H W) C")
        q, k, v = linear(y, self.to_qkv.weight.flatten(1), self.to_qkv.bias).chunk(3, dim=-1)
        y = linear(scaled_dot_product_attention(q, k, v), self.proj.weight.flatten(1), self.proj.bias)
        return x + rearrange(y, "(B T) 1 (H W) C -> B C T H W", B=len(x), H=x.shape[3]), ()


class Downsample(nn.Module):
    """Halves the size, then (if `time`) the frames: the clip's first stays alone and as it is."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width, 3, stride=2))
        self.time_conv = nn.Conv3d(width, width, (3, 1, 1), stride=(2, 1, 1)) if time else None

    def forward(self, x: Tensor, kept: tuple) -> tuple[Tensor, tuple]:
        conv = self.resample[1]
        x = pad(x, (0, 1, 0, 1))  # right and bottom only, as the weights were trained
        # As a 3D convolution of single frames: a 2D one would need a transposed copy.
        x = conv3d(x, conv.weight[:, :, None], conv.bias, stride=(1, 2, 2))
        if self.time_conv is None:
            return x, ()
        y = x[:, :, :int(not kept)]
        x = torch.cat([*kept, x], dim=2)
        if x.shape[2] > 1:
            y = torch.cat([y, self.time_conv(x)], dim=2)
        return y, (x[:, :, -1:].clone(memory_format=torch.contiguous_format),)


class Upsample(nn.Module):
    """Makes two of each frame but the clip's first (if `time`), then doubles the size and halves the channels."""

    def __init__(self, width: int, time: bool):
        super().__init__()
        self.resample = nn.Sequential(nn.Identity(), nn.Conv2d(width, width // 2, 3, padding=1))
        self.time_conv = nn.Conv3d(width, 2 * width, (3, 1, 1)) if time else None

    def forward(self, x: Tensor, kept: tuple) -> tuple[Tensor, tuple]:
        if self.time_conv is not None:
            y, x = x.tensor_split([int(not kept)], dim=2)
            kept = kept or (no_past(x),)  # of the others: they never see the clip's first frame
            if x.shape[2]:
                x, kept = convolve(self.time_conv, x, kept)
                y = torch.cat([y, rearrange(x, "B (two C) T H W -> B C (T two) H W", two=2)], dim=2)
            x = y
        x = interpolate(x, scale_factor=(1.0, 2.0, 2.0), mode="nearest")
        conv = self.resample[1]
        return conv3d(x, conv.weight[:, :, None], conv.bias, padding=(0, 1, 1)), kept


# ---- encoder and decoder; `tails`: layer -> the frames it keeps from one part to the next ------------------

def run(net: nn.Module, layers: list[nn.Module], x: Tensor, tails: dict) -> Tensor:
    """The first convolution of encoder or decoder, its layers, its head."""
    h, tails[net.conv1] = convolve(net.conv1, x, tails.pop(net.conv1, ()))
    for layer in layers:
        h, tails[layer] = layer(h, tails.pop(layer, ()))
    norm, _, conv = net.head
    h, tails[conv] = convolve(conv, silu(norm(h)), tails.pop(conv, ()))
    return h


def middle(width: int) -> nn.Sequential:
    return nn.Sequential(ResBlock(width, width), Attention(width), ResBlock(width, width))


class Encoder(nn.Module):
    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, c_out: int, time: tuple[bool, ...]):
        super().__init__()
        self.conv1 = causal(3, ch[0])
        self.downsamples = nn.Sequential()
        for i, width in enumerate(ch):
            for j in range(num_res_blocks):
                self.downsamples.append(ResBlock(width if j else ch[max(i - 1, 0)], width))
            if i < len(ch) - 1:
                self.downsamples.append(Downsample(width, time[i]))
        self.middle = middle(ch[-1])
        self.head = nn.Sequential(RMSNorm(ch[-1]), nn.SiLU(), causal(ch[-1], c_out))

    def forward(self, x: Tensor, tails: dict) -> Tensor:
        return run(self, [*self.downsamples, *self.middle], x, tails)


class Decoder(nn.Module):
    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, c_in: int, time: tuple[bool, ...]):
        super().__init__()
        ch, time = ch[::-1], time[::-1]
        self.conv1 = causal(c_in, ch[0])
        self.middle = middle(ch[0])
        self.upsamples = nn.Sequential()
        for i, width in enumerate(ch):
            for j in range(num_res_blocks + 1):
                before = ch[i - 1] // 2 if i else width
                self.upsamples.append(ResBlock(width if j else before, width))
            if i < len(ch) - 1:
                self.upsamples.append(Upsample(width, time[i]))
        self.head = nn.Sequential(RMSNorm(ch[-1]), nn.SiLU(), causal(ch[-1], 3))

    def forward(self, z: Tensor, tails: dict) -> Tensor:
        return run(self, [*self.middle, *self.upsamples], z, tails)


# ---- the autoencoder ---------------------------------------------------------------------------------------

class WanVAE(nn.Module):
    """Video (B F 3 H W) in [-1, 1] <-> latent (B T Z h w), F = time_factor * (T - 1) + 1.

    Build it with `WanVAE(**config_from_shapes(shapes))`. `time`: which of the halvings in size halve the frames too.
    """

    def __init__(self, ch: tuple[int, ...], num_res_blocks: int, z_channels: int, time: tuple[bool, ...],
                 mean: tuple[float, ...] = MEAN, std: tuple[float, ...] = STD):
        super().__init__()
        self.mean, self.std, self.factor, self.time_factor = mean, std, 2 ** len(time), 2 ** sum(time)
        self.encoder = Encoder(ch, num_res_blocks, 2 * z_channels, time)
        self.conv1 = nn.Conv3d(2 * z_channels, 2 * z_channels, 1)
        self.conv2 = nn.Conv3d(z_channels, z_channels, 1)
        self.decoder = Decoder(ch, num_res_blocks, z_channels, time)

    def statistics(self, like: Tensor) -> list[Tensor]:
        """Mean and deviation of z's channels, each (Z 1 1)."""
        return [like.new_tensor(values).view(-1, 1, 1) for values in (self.mean, self.std)]

    def moments(self, video: Tensor, chunk: int | None = 4) -> tuple[Tensor, Tensor]:
        """Mean and log-variance of z, each (B T Z h w).

        The first frame alone, then `chunk` frames at a time; None: the whole clip. Raises ValueError for frames or
        a size that have no latent, of which the original drops what is over."""
        frames, height, width = video.shape[1], *video.shape[3:]
        if (frames - 1) % self.time_factor:
            raise ValueError(f"{frames} frames; expected {self.time_factor}k+1, such as {self.time_factor + 1} or "
                             f"{2 * self.time_factor + 1}")
        if height % self.factor or width % self.factor:
            raise ValueError(f"video size {(height, width)} is not a multiple of {self.factor}")
        if chunk is not None and (chunk < 1 or chunk % self.time_factor):
            raise ValueError(f"chunk {chunk} is not a multiple of {self.time_factor} frames")
        x, tails = rearrange(video, "B F C H W -> B C F H W").to(self.conv1.weight.dtype), {}
        parts = [x] if chunk is None or frames == 1 else [x[:, :, :1], *x[:, :, 1:].split(chunk, dim=2)]
        z = self.conv1(torch.cat([self.encoder(part, tails) for part in parts], dim=2))
        return tuple(rearrange(z, "B (two C) T h w -> two B T C h w", two=2))

    def encode(self, video: Tensor, chunk: int | None = 4) -> Tensor:
        """Latent (B T Z h w) in the denoiser's units: always the mean, as in the original."""
        z = self.moments(video, chunk)[0]
        mean, std = self.statistics(z)
        return (z - mean) / std

    def decode(self, latent: Tensor, chunk: int | None = 1) -> Tensor:
        """Video (B F 3 H W) in about [-1, 1], not clamped, in the weights' dtype. `chunk` latent frames at a time;
        None: the whole clip."""
        mean, std = self.statistics(latent)
        z, tails = rearrange(latent * std + mean, "B T C h w -> B C T h w").to(self.conv2.weight.dtype), {}
        z = self.conv2(z)
        done = [self.decoder(part, tails) for part in z.split(chunk or z.shape[2], dim=2)]
        return rearrange(torch.cat(done, dim=2), "B C F H W -> B F C H W")


def config_from_shapes(shapes: dict[str, tuple[int, ...]]) -> dict:
    """Arguments of WanVAE from the shapes of a checkpoint's tensors. Raises ValueError where the names are not the
    original ones."""
    first, block = "encoder.conv1.weight", "encoder.downsamples.{}.residual.6.weight"
    if first not in shapes or "conv2.weight" not in shapes or block.format(0) not in shapes:
        raise ValueError(f"no Wan VAE: expected {first}, {block.format(0)}, ..., "
                         f"found {', '.join(sorted(shapes)[:3]) or 'nothing'}")
    down = [i for i in range(100) if f"encoder.downsamples.{i}.resample.1.weight" in shapes]
    return dict(
        ch=tuple(shapes[block.format(i - 1)][0] for i in down) + (shapes["encoder.middle.0.residual.6.weight"][0],),
        num_res_blocks=sum(block.format(i) in shapes for i in range(down[0] if down else 100)),
        z_channels=shapes["conv2.weight"][0],
        time=tuple(f"encoder.downsamples.{i}.time_conv.weight" in shapes for i in down),
    )
