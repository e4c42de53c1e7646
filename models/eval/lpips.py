"""LPIPS (Zhang et al. 2018, version 0.1) and the diversity of a prompt's pictures that is measured with it.

The trunk is torchvision's AlexNet or VGG16 up to its last tap, under torchvision's names; the learnt weights
of the channels are those of the lpips package, under its names. Images are (B 3 H W) in [0, 1].
"""
from itertools import combinations
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import avg_pool2d, max_pool2d

from models.checkpoint import InputError, Tensors, load, open_tensors, some
from models.pictures import rgb

# Per network: the convolutions (index in torchvision's `features`, stride, padding) from tap to tap, the pool
# (size, stride) between two such groups, and before which groups it stands.
GROUPS = {
    "alex": ([[(0, 4, 2)], [(3, 1, 2)], [(6, 1, 1)], [(8, 1, 1)], [(10, 1, 1)]], (3, 2), (1, 2)),
    "vgg": ([[(i, 1, 1) for i in group]
             for group in ((0, 2), (5, 7), (10, 12, 14), (17, 19, 21), (24, 26, 28))], (2, 2), (1, 2, 3, 4)),
}
FILES = {  # name and public source
    "alex": (("alexnet-owt-7be5be79.pth", "https://download.pytorch.org/models/alexnet-owt-7be5be79.pth"),
             ("alex.pth", "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/alex.pth")),
    "vgg": (("vgg16-397923af.pth", "https://download.pytorch.org/models/vgg16-397923af.pth"),
            ("vgg.pth", "https://github.com/richzhang/PerceptualSimilarity, lpips/weights/v0.1/vgg.pth")),
}


class LPIPS(nn.Module):
    """`shapes` gives the widths: tensor name -> shape. `average`: average instead of max pooling."""

    def __init__(self, net: str, shapes: dict[str, tuple], average: bool):
        super().__init__()
        self.groups, self.pool, self.pooled = GROUPS[net]
        self.average = average
        self.features = nn.ModuleDict()
        for k, group in enumerate(self.groups):
            for i, stride, padding in group:
                width, inputs, size, _ = shapes[f"features.{i}.weight"]
                self.features[str(i)] = nn.Conv2d(inputs, width, size, stride, padding)
            # The lpips package has a dropout before the convolution, hence the 1.
            line = nn.ModuleDict({"1": nn.Conv2d(width, 1, 1, bias=False)})
            self.add_module(f"lin{k}", nn.ModuleDict({"model": line}))

    def taps(self, images: Tensor) -> list[Tensor]:
        """Five maps (B C h w), each pixel's channels of length 1."""
        x = (images - images.new_tensor([0.485, 0.456, 0.406])[:, None, None])
        x, maps = x / images.new_tensor([0.229, 0.224, 0.225])[:, None, None], []
        for k, group in enumerate(self.groups):
            if k in self.pooled:
                x = (avg_pool2d if self.average else max_pool2d)(x, *self.pool)
            for i, _, _ in group:
                x = self.features[str(i)](x).relu()
            maps.append(x / (x.square().sum(1, keepdim=True).sqrt() + 1e-10))
        return maps

    def compare(self, a: list[Tensor], b: list[Tensor]) -> Tensor:
        """Distance at each tap between the `taps` of two batches: (B 5)."""
        layers = [getattr(self, f"lin{k}")["model"]["1"]((x - y).square()).mean((1, 2, 3))
                  for k, (x, y) in enumerate(zip(a, b))]
        return torch.stack(layers, dim=1)

    def forward(self, x: Tensor, y: Tensor) -> Tensor:
        """LPIPS of B pairs: (B,)."""
        return self.compare(self.taps(x), self.taps(y)).sum(1)


def load_lpips(net: str = "vgg", files: list[Path] | None = None, device="cpu") -> LPIPS:
    """`net`: "vgg", "alex", or "vgg-avgpool", piq's replace_pooling=True. `files`: torchvision's and lpips'
    file, or one with both, as the lpips package itself saves its whole network. Raises InputError."""
    trunk = net.removesuffix("-avgpool")
    if not files:
        two = " and ".join(f"{name} ({url})" for name, url in FILES[trunk])
        raise InputError(f"LPIPS needs two files, {two}; pass both as --lpips-ckpt FILE FILE")
    tensors = [open_tensors(file) for file in files]
    shapes = {name: shape for part in tensors for name, shape in part.shapes.items()}
    convolutions = [i for group in GROUPS[trunk][0] for i, _, _ in group]
    places = {}  # our name -> (file, its name)
    for part in tensors:
        for name in part:
            ours = plain(name)
            if ours.startswith("lin") or ours.startswith("features.") and ours.split(".")[1].isdigit():
                places[ours] = (part, name)
    expected = [f"features.{i}.{kind}" for i in convolutions for kind in ("weight", "bias")]
    expected += [f"lin{k}.model.1.weight" for k in range(5)]
    joined = Tensors(Path(" + ".join(str(part.path) for part in tensors)),
                     {ours: shapes[name] for ours, (_, name) in places.items()},
                     lambda ours, rows: places[ours][0].read(places[ours][1], rows))
    absent = [name for name in expected if name not in joined]
    if absent:
        raise InputError(f"{joined.path}: {len(absent)} tensors of {net}'s LPIPS are missing "
                         f"({some(absent)}); expected {FILES[trunk][0][0]} and {FILES[trunk][1][0]}")
    with torch.device("meta"):
        lpips = LPIPS(trunk, joined.shapes, net.endswith("-avgpool"))
    load(lpips, joined)
    return lpips.requires_grad_(False).to(device)


def plain(name: str) -> str:
    """`net.slice2.3.weight` and `lins.0.model.1.weight` of the lpips package by the files' own names."""
    first, second, *rest = [*name.split("."), ""]
    if first == "net" and second.startswith("slice"):
        return ".".join(["features", *rest[:-1]])
    return f"lin{second}.{'.'.join(rest[:-1])}" if first == "lins" and rest else name


def resized(image: Image.Image) -> Tensor:
    """A picture for `diversity`: RGB, 512 x 512 whatever its shape, LANCZOS, in [0, 1]: (3 512 512)."""
    return rgb(image.convert("RGB").resize((512, 512), Image.Resampling.LANCZOS)) / 255


@torch.no_grad()
def diversity(lpips: LPIPS, images: list[Image.Image], batch: int = 4) -> float:
    """Mean LPIPS over all pairs of one prompt's pictures, as DMD2's compute_diversity_score: 512 x 512. Raises
    InputError for one picture."""
    if len(images) < 2:
        raise InputError("one picture of its prompt; diversity needs two")
    device = next(lpips.parameters()).device
    pixels = torch.stack([resized(image) for image in images])
    maps = [lpips.taps(part.to(device)) for part in pixels.split(batch)]
    maps = [torch.cat(layer) for layer in zip(*maps)]
    distances = [lpips.compare([x[i:i + 1] for x in maps], [x[j:j + 1] for x in maps]).sum()
                 for i, j in combinations(range(len(images)), 2)]
    return torch.stack(distances).mean().item()
