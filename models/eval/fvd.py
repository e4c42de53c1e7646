"""FVD (Unterthiner et al. 2018): Frechet distance of two sets of videos in the 400 logits of I3D.

I3D (Carreira & Zisserman 2017, RGB, Kinetics-400) comes as the TorchScript file that StyleGAN-V published,
which is run as it is, or as the plain weights of VideoGPT, TATS and cd-fvd. Videos are uint8 (B F 3 H W).
"""
import math
import zipfile
from collections.abc import Callable
from hashlib import sha256
from io import BytesIO
from pathlib import Path

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import avg_pool3d, interpolate, max_pool3d, pad

from models.checkpoint import InputError, load, open_tensors

SOURCES = ("i3d_torchscript.pt (https://www.dropbox.com/s/ge9e5ujwgetktms/i3d_torchscript.pt?dl=1) or i3d_"
           "pretrained_400.pt (https://github.com/songweige/TATS/raw/main/tats/fvd/i3d_pretrained_400.pt)")
# A TorchScript file is a program: only the published one, of this SHA-256 and size in bytes, is run.
PROGRAM = "bec6519f66ea534e953026b4ae2c65553c17bf105611c746d904657e5860a5e2"
PROGRAM_SIZE = 51_235_320
MIN_FRAMES = 10
SIDE = 224  # pixels of what I3D sees
# Channels of each Inception block: 1x1 | 1x1, 3x3 | 1x1, 3x3 | pool, 1x1.
MIXED = {
    "3b": (64, 96, 128, 16, 32, 32), "3c": (128, 128, 192, 32, 96, 64),
    "4b": (192, 96, 208, 16, 48, 64), "4c": (160, 112, 224, 24, 64, 64), "4d": (128, 128, 256, 24, 64, 64),
    "4e": (112, 144, 288, 32, 64, 64), "4f": (256, 160, 320, 32, 128, 128),
    "5b": (256, 160, 320, 32, 128, 128), "5c": (384, 192, 384, 48, 128, 128),
}


# ---- the distance ------------------------------------------------------------------------------------------

def frechet_distance(a: Tensor, b: Tensor, biased: bool = False) -> float:
    """|mean difference|^2 + tr(A) + tr(B) - 2 tr (A B)^1/2 of features a (n D) and b (m D), in float64.

    Covariances are 1/(n-1), as in common_metrics_on_video_quality, or 1/n for `biased`, as in StyleGAN-V and
    cd-fvd. The last trace is the sum of the singular values of the centred a b^T: no square root of a matrix,
    which is inexact with fewer samples than dimensions. Raises InputError for fewer than 2 samples."""
    if min(len(a), len(b)) < 2:
        raise InputError(f"a Frechet distance of {len(a)} and {len(b)} videos; expected at least 2 of each")
    shift = a.double().mean(0) - b.double().mean(0)
    roots = []
    for x in (a.double(), b.double()):
        x = (x - x.mean(0)) / math.sqrt(len(x) if biased else len(x) - 1)
        # R has the same R^T R, in D rows.
        roots.append(torch.linalg.qr(x, mode="r").R if len(x) > x.shape[1] else x)
    cross = torch.linalg.svdvals(roots[0] @ roots[1].T).sum()
    distance = shift.square().sum() + roots[0].square().sum() + roots[1].square().sum() - 2 * cross
    return max(distance.item(), 0.0)


# ---- the network -------------------------------------------------------------------------------------------

def same(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    """Zeros around (B C F H W) as TensorFlow's SAME: the odd one goes to the end."""
    total = [max(k - (size % s or s), 0) for size, k, s in zip(x.shape[2:], kernel, stride)]
    return pad(x, [side for p in reversed(total) for side in (p // 2, p - p // 2)])


def pool(x: Tensor, kernel: tuple[int, ...], stride: tuple[int, ...]) -> Tensor:
    return max_pool3d(same(x, kernel, stride), kernel, stride)


class Unit(nn.Module):
    """Convolution, batch norm, ReLU."""

    def __init__(self, inputs: int, outputs: int, size: int = 1, stride: int = 1):
        super().__init__()
        self.conv3d = nn.Conv3d(inputs, outputs, size, stride, bias=False)
        self.bn = nn.BatchNorm3d(outputs, eps=1e-5)

    def forward(self, x: Tensor) -> Tensor:
        return self.bn(self.conv3d(same(x, self.conv3d.kernel_size, self.conv3d.stride))).relu()


class Mixed(nn.Module):
    def __init__(self, inputs: int, widths: tuple[int, ...]):
        super().__init__()
        self.b0 = Unit(inputs, widths[0])
        self.b1a, self.b1b = Unit(inputs, widths[1]), Unit(widths[1], widths[2], 3)
        self.b2a, self.b2b = Unit(inputs, widths[3]), Unit(widths[3], widths[4], 3)
        self.b3b = Unit(inputs, widths[5])

    def forward(self, x: Tensor) -> Tensor:
        return torch.cat([self.b0(x), self.b1b(self.b1a(x)), self.b2b(self.b2a(x)),
                          self.b3b(pool(x, (3, 3, 3), (1, 1, 1)))], dim=1)


class I3D(nn.Module):
    """Videos (B 3 F 224 224) in [-1, 1] -> logits (B 400)."""

    def __init__(self):
        super().__init__()
        self.Conv3d_1a_7x7 = Unit(3, 64, 7, 2)
        self.Conv3d_2b_1x1 = Unit(64, 64)
        self.Conv3d_2c_3x3 = Unit(64, 192, 3)
        width = 192
        for name, widths in MIXED.items():
            self.add_module(f"Mixed_{name}", Mixed(width, widths))
            width = widths[0] + widths[2] + widths[4] + widths[5]
        self.logits = nn.ModuleDict({"conv3d": nn.Conv3d(width, 400, 1)})

    def forward(self, x: Tensor) -> Tensor:
        x = pool(self.Conv3d_1a_7x7(x), (1, 3, 3), (1, 2, 2))
        x = pool(self.Conv3d_2c_3x3(self.Conv3d_2b_1x1(x)), (1, 3, 3), (1, 2, 2))
        for name in MIXED:
            if name == "4b":
                x = pool(x, (3, 3, 3), (2, 2, 2))
            if name == "5b":
                x = pool(x, (2, 2, 2), (2, 2, 2))
            x = getattr(self, f"Mixed_{name}")(x)  # B C f h w
        x = self.logits["conv3d"](avg_pool3d(x, (2, 7, 7), stride=1))  # B 400 f 1 1
        return x.mean((2, 3, 4))


# ---- features ----------------------------------------------------------------------------------------------

def pixels(videos: Tensor, resize: str = "crop") -> Tensor:
    """uint8 (B F 3 H W) -> (B 3 F 224 224) in [-1, 1], bilinear without antialiasing. `resize`: "crop" the
    short side, then the middle, as common_metrics_on_video_quality; "stretch" both sides, as cd-fvd."""
    B, F, _, H, W = videos.shape
    x = rearrange(videos, "B F C H W -> (B F) C H W").float() / 255
    scale = SIDE / min(H, W)
    target = (SIDE, SIDE) if resize == "stretch" else \
        tuple(SIDE if side == min(H, W) else math.ceil(side * scale) for side in (H, W))
    x = interpolate(x, target, mode="bilinear", align_corners=False)
    top, left = ((side - SIDE) // 2 for side in target)
    x = x[:, :, top:top + SIDE, left:left + SIDE]
    return rearrange(2 * x - 1, "(B F) C H W -> B C F H W", B=B)


def load_i3d(path: str | Path | None, resize: str = "crop", device="cpu") -> Callable[[Tensor], Tensor]:
    """A function from videos uint8 (B F 3 H W) to logits (B 400), float32 on the CPU. `resize`: as in
    `pixels`, or "inside" the TorchScript file, as StyleGAN-V. Raises InputError, also for another program
    than the published one."""
    if path is None:
        raise InputError(f"FVD needs {SOURCES}; pass the file as --i3d-ckpt FILE")
    script = is_script(Path(path))
    if resize == "inside" and not script:
        raise InputError(f"{path}: plain weights do not resize; expected i3d_torchscript.pt, or --fvd-resize "
                         "crop or stretch")
    if script:
        with open(path, "rb") as file:
            program = file.read(PROGRAM_SIZE + 1)  # what is checked is what is run
        if sha256(program).hexdigest() != PROGRAM:
            raise InputError(f"{path}: a TorchScript program, which would be run, and not the published one or "
                             f"damaged; expected {SOURCES}")
        net = torch.jit.load(BytesIO(program), map_location=device).eval()
    else:
        tensors = open_tensors(path)
        with torch.device("meta"):
            net = I3D().eval()
        load(net, tensors)
        net = net.to(device)

    @torch.no_grad()
    def features(videos: Tensor) -> Tensor:
        if videos.shape[1] < MIN_FRAMES:
            raise InputError(f"a video of {videos.shape[1]} frames; I3D needs at least {MIN_FRAMES}")
        videos = videos.to(device)
        inside = resize == "inside"
        x = rearrange(videos, "B F C H W -> B C F H W").float() if inside else pixels(videos, resize)
        options = dict(rescale=inside, resize=inside, return_features=True) if script else {}
        return net(x, **options).float().cpu()

    return features


def is_script(path: Path) -> bool:
    """Whether a file holds a TorchScript program: a zip with code inside."""
    try:
        with zipfile.ZipFile(path) as file:
            return any("/code/" in name for name in file.namelist())
    except (zipfile.BadZipFile, OSError):
        return False
