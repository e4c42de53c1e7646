"""D_tau: trainable heads on the features of a frozen latent diffusion backbone (Sec. 4.1, App. B.1).

The backbone is the teacher's module itself, never a copy. It is held as the Denoiser F_phi, which is no
nn.Module: parameters(), state_dict() and FSDP see the heads alone. One logit per head and sample: the spatial
mean of the head's map. Shapes: B batch, D width of a map, h w its size.
"""
import torch
from torch import Tensor, nn

from models.diffusion import Denoiser


def shrink_count(side: int) -> int:
    """How many halvings a 2D head makes: until the short side is <= 8, and two at least where 2 x 2 are left.

    A last map of 1 x 1 would leave GroupNorm a few channels of one pixel, whose differences it erases."""  # [choice]
    count = 0
    while side > 8 or (count < 2 and side >= 4):
        side, count = side // 2, count + 1
    return count


class Head2d(nn.Module):
    """n x [4x4 conv stride 2, GroupNorm 32, SiLU], 1x1 conv to one channel (App. B.1): (B D h w) -> (B,)."""

    def __init__(self, channels: int, short_side: int, width: int):
        super().__init__()
        layers = []
        for i in range(shrink_count(short_side)):
            layers += [nn.Conv2d(width if i else channels, width, 4, stride=2, padding=1),
                       nn.GroupNorm(32, width), nn.SiLU()]
        self.shrink = nn.Sequential(*layers)
        self.logit = nn.Conv2d(width if layers else channels, 1, 1)

    def forward(self, x: Tensor) -> Tensor:
        return self.logit(self.shrink(x.to(self.logit.weight.dtype))).mean((1, 2, 3))


class Discriminator(nn.Module):
    """Latent discriminator: a head on each tapped block of F_phi. `map_shapes`: (D, h, w) of each tap; width:
    of the heads."""

    def __init__(self, F_phi: Denoiser, taps: tuple[int, ...], map_shapes: list[tuple[int, int, int]],
                 width: int = 256):
        super().__init__()
        self.F_phi = F_phi
        self.taps = taps
        self.heads = nn.ModuleList(Head2d(D, min(h, w), width) for D, h, w in map_shapes)

    def blocks(self) -> list[nn.Module]:
        return list(self.heads)

    def features(self, x: Tensor, t: Tensor, c: tuple) -> list[Tensor]:
        """F_phi's maps (B D h w) at the taps, without any adapter; gradients reach x."""
        return self.F_phi.net(x, t, c, taps=self.taps)

    def forward(self, features: list[Tensor]) -> Tensor:
        """Logits (heads B), float32."""
        return torch.stack([head(h).float() for head, h in zip(self.heads, features)])
