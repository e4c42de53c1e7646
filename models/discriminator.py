"""D_tau: trainable heads on the features of a frozen backbone (Secs. 4.1, 4.2, Apps. B.1, B.2).

`VideoDiscriminator` is AVDM2's (Sec. 4.2 of that paper), one logit per clip.

The backbone of the latent discriminator is the teacher's network itself, not a copy. That of ADP's pixel
discriminator D_tau2 is a vision encoder, SAM or DINOv2. Both are held in objects that are no nn.Module, so
that parameters(), state_dict() and FSDP see only the heads. The file stands alone: torch.

    taps = F_phi.net.tap_shapes(H, W)
    D_tau = Discriminator(F_phi, tuple(taps), list(taps.values()))
    h_fake, h_real = D_tau.features(x_fake, s, c), D_tau.features(x_real, s, c)
    loss_theta = -D_tau(h_fake).mean()                                                   # Eq. (7)
    loss_tau = hinge(D_tau([h.detach() for h in h_fake]), D_tau(h_real))                 # Eq. (8)

Shapes: B batch, D width of a map, T its frames, h w its size, H W an image's or a latent's size.
"""
import torch
from torch import Tensor, nn
from torch.nn.functional import relu


def hinge(logits_fake: Tensor, logits_real: Tensor) -> Tensor:
    """Eqs. (8), (10): taken of each logit, then the mean over heads and batch."""  # [choice]
    return relu(1 + logits_fake).mean() + relu(1 - logits_real).mean()


def shrink_count(side: int) -> int:
    """How many times a head halves a map whose shorter side is `side`: until it is <= 8, and twice in any case that
    leaves 2 x 2. At 1 x 1 GroupNorm sees a few channels of one pixel and erases their differences."""  # [choice]
    count = 0
    while side > 8 or (count < 2 and side >= 4):
        side, count = side // 2, count + 1
    return count


class Head2d(nn.Module):
    """n x [4x4 conv stride 2, GroupNorm 32, SiLU], 1x1 conv to one channel (App. B.1): (B D h w) -> (B,), the
    mean of the map, in float32: real and fake logits differ by less than the steps of bfloat16."""

    def __init__(self, channels: int, short_side: int, width: int):
        super().__init__()
        layers = []
        for i in range(shrink_count(short_side)):
            layers += [nn.Conv2d(width if i else channels, width, 4, stride=2, padding=1),
                       nn.GroupNorm(32, width), nn.SiLU()]
        self.shrink = nn.Sequential(*layers)
        self.logit = nn.Conv2d(width if layers else channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.shrink(x.to(self.logit.weight.dtype))).float().mean((1, 2, 3))


def shrink_3d(channels: int, width: int) -> list[nn.Module]:
    """3x3x3 conv, GroupNorm 32, SiLU, 3x3 conv stride 2 in each frame, GroupNorm 32, SiLU."""
    return [nn.Conv3d(channels, width, 3, padding=1), nn.GroupNorm(32, width), nn.SiLU(),
            nn.Conv3d(width, width, (1, 3, 3), stride=(1, 2, 2), padding=(0, 1, 1)),
            nn.GroupNorm(32, width), nn.SiLU()]


class Head3d(nn.Module):
    """n x [3x3x3 conv, GroupNorm 32, SiLU, 3x3 conv stride 2 in each frame, GroupNorm 32, SiLU], 1x1x1 conv
    to one channel (App. B.2): (B D T h w) -> (B,). The number of frames stays. The paper names one norm
    a block; here one follows each convolution."""  # [choice]

    def __init__(self, channels: int, short_side: int, width: int):
        super().__init__()
        layers = []
        for i in range(shrink_count(short_side)):
            layers += shrink_3d(width if i else channels, width)
        self.shrink = nn.Sequential(*layers)
        self.logit = nn.Conv3d(width if layers else channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.shrink(x.to(self.logit.weight.dtype))).float().mean((1, 2, 3, 4))


class Discriminator(nn.Module):
    """Latent discriminator D_tau, in ADP D_tau1: a head on each tapped block of the teacher.

    `F_phi`: has the teacher's network as F_phi.net and is no nn.Module, such as a Denoiser. `map_shapes`:
    (D, h, w) of each tap, or (D, T, h, w) for videos. `width` of the heads.
    """

    def __init__(self, F_phi, taps: tuple, map_shapes: list[tuple[int, ...]], width: int = 256):
        super().__init__()
        self.F_phi = F_phi
        self.taps = taps
        self.heads = nn.ModuleList((Head3d if len(shape) == 4 else Head2d)(shape[0], min(shape[-2:]), width)
                                   for shape in map_shapes)

    def blocks(self) -> list[nn.Module]:
        return list(self.heads)

    def features(self, x: Tensor, t: Tensor, c: tuple) -> list[Tensor]:
        """The teacher's maps (B D h w), of videos (B D T h w), at the taps. Gradients reach x. Adapters that
        share F_phi's weights are off."""  # [choice]
        return self.F_phi.net(x, t, c, taps=self.taps)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (heads B), float32: one of each head and sample."""  # [choice]
        return torch.stack([head(h) for head, h in zip(self.heads, features)])


class Branch3d(nn.Module):
    """A map (B D T h w) -> (B width T h' w'), `count` times halved; with none, one 3x3x3 conv, GroupNorm, SiLU."""

    def __init__(self, channels: int, count: int, width: int):
        super().__init__()
        layers = [] if count else shrink_3d(channels, width)[:3]
        for i in range(count):
            layers += shrink_3d(width if i else channels, width)
        self.layers = nn.Sequential(*layers)

    def forward(self, x: Tensor) -> Tensor:
        return self.layers(x.to(self.layers[0].weight.dtype))


class VideoDiscriminator(nn.Module):
    """AVDM2's discriminator: the maps of three scales, shrunk to the size of the smallest, one 3x3x3 conv on
    all of them, and the mean over space and time. Arguments as Discriminator's."""  # [choice]

    def __init__(self, F_phi, taps: tuple, map_shapes: list[tuple[int, ...]], width: int = 256):
        super().__init__()
        self.F_phi = F_phi
        self.taps = taps
        smallest = min(min(shape[-2:]) for shape in map_shapes)
        counts = [(min(shape[-2:]) // smallest).bit_length() - 1 for shape in map_shapes]
        self.branches = nn.ModuleList(Branch3d(shape[0], count, width)
                                      for shape, count in zip(map_shapes, counts))
        self.final = nn.Conv3d(len(counts) * width, 1, 3, padding=1)

    def blocks(self) -> list[nn.Module]:
        return [*self.branches, self.final]

    features = Discriminator.features

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (1 B), float32."""
        maps = torch.cat([branch(h) for branch, h in zip(self.branches, features)], dim=1)
        return self.final(maps).float().mean((1, 2, 3, 4))[None]


class PixelDiscriminator(nn.Module):
    """D_tau2 of ADP (Eqs. 9, 10): a head on each map of a vision encoder, which sees no time and no prompt.

    `encoder`: has `map_shapes` and `features` as models/vision.py's VisionEncoder, and is no nn.Module.
    """

    def __init__(self, encoder, width: int = 256):
        super().__init__()
        self.encoder = encoder
        self.heads = nn.ModuleList(Head2d(D, min(h, w), width) for D, h, w in encoder.map_shapes)

    def features(self, image: Tensor, checkpoint: bool = False) -> list[Tensor]:
        """The encoder's maps (B D h w) of images (B 3 H W) in [-1, 1]. Gradients reach the image;
        `checkpoint` recomputes the encoder's activations in backward."""
        return self.encoder.features(image, checkpoint)

    blocks, forward = Discriminator.blocks, Discriminator.forward
