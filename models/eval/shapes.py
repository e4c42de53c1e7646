"""Captioned shapes, the procedural data of the tiny models, and the exact evaluator for them.

Every picture is one anti-aliased shape on a plain background, 32 x 32. Its attributes (shape, colour,
background, size) are uniform and independent; each size has one fixed radius, and the place is uniform on a
4-pixel grid. A caption names any subset of the four ("a red circle", "a shape on white"), so the true
distribution given a prompt is known exactly: uniform over whatever the prompt leaves open.

Letters: B pictures, A = 5 attributes (the four and the quadrant of the place), H W pixels, D features.
"""
import math
import re
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import conv2d

from models.data import uniform
from models.eval.fvd import frechet_distance

SIZE = 32  # pixels
ATTRIBUTES = {
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "background": ("white", "gray", "black", "pink"),
    "size": ("small", "large"),
    "place": ("top left", "top right", "bottom left", "bottom right"),  # read off pictures, not in captions
}
NAMED = tuple(ATTRIBUTES)[:4]
COUNTS = tuple(len(values) for values in ATTRIBUTES.values())
RGB = {"red": (215, 35, 40), "orange": (240, 135, 30), "yellow": (245, 220, 50), "green": (40, 160, 60),
       "blue": (45, 75, 215), "purple": (140, 50, 175),
       "white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0), "pink": (250, 185, 200)}
RADIUS = (4.5, 8.25)  # of a small and of a large shape, in pixels
PLACES = (4, 2)  # of a small and of a large shape along each axis, 4 pixels apart
AREA = (math.pi, 3.24, 2.03, 2.708, math.pi * (1.05 ** 2 - 0.6 ** 2))  # of each shape at radius 1


# ---- the data ----------------------------------------------------------------------------------------------

class Scenes(NamedTuple):
    """What is in B pictures: labels (B 4) into ATTRIBUTES, centre (B 2) x and y in pixels, radius (B,)."""
    labels: Tensor
    centre: Tensor
    radius: Tensor


def random_scenes(seed: int, indices: range, named: Tensor | None = None) -> Scenes:
    """Scene i depends on (seed, i) alone; `named` (B 4) fixes the attributes that are not -1 there."""
    u = uniform(seed, 0, "scene", [6 * i + column for i in indices for column in range(6)]).view(-1, 6)
    labels = (u[:, :4] * torch.tensor(COUNTS[:4])).long()
    if named is not None:
        labels = torch.where(named >= 0, named, labels)
    radius, places = torch.tensor(RADIUS)[labels[:, 3]], torch.tensor(PLACES)[labels[:, 3], None]
    centre = SIZE / 2 + 2 - 2 * places + 4 * (u[:, 4:] * places).floor()
    return Scenes(labels, centre, radius)


def coverage(centre: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel each of the five shapes covers, by its signed distance: (B 5 H W) in [0, 1]."""
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    distance = (x * x + y * y).sqrt()
    box = torch.maximum(x.abs(), y.abs())
    bars = [torch.maximum(x.abs() - a * r, y.abs() - b * r) for a, b in ((1.1, 0.37), (0.37, 1.1))]
    shapes = [
        distance - r,
        box - 0.9 * r,
        torch.maximum(y - 0.625 * r, (math.sqrt(3) * x.abs() - y) / 2 - 0.625 * r),  # centroid in the centre
        torch.minimum(*bars),
        torch.maximum(distance - 1.05 * r, 0.6 * r - distance),
    ]
    return (0.5 - torch.stack(torch.broadcast_tensors(*shapes), dim=1)).clamp(0, 1)


def palette(attribute: str) -> Tensor:
    """RGB of an attribute's values in [-1, 1]: (values 3)."""
    return torch.tensor([RGB[value] for value in ATTRIBUTES[attribute]]) / 127.5 - 1


def draw(scenes: Scenes) -> Tensor:
    """Pictures (B 3 H W) in [-1, 1]."""
    shape, colour, background, _ = scenes.labels.unbind(1)
    alpha = coverage(scenes.centre, scenes.radius)[torch.arange(len(shape)), shape][:, None]  # B 1 H W
    colour, background = palette("colour")[colour], palette("background")[background]
    return background[:, :, None, None] + alpha * (colour - background)[:, :, None, None]


def caption(named: list[int]) -> str:
    """The caption that names these four attributes; -1 leaves one out."""
    shape, colour, background, size = (ATTRIBUTES[a][i] if i >= 0 else "" for a, i in zip(NAMED, named))
    words = ["an" if colour == "orange" and not size else "a", size, colour, shape or "shape",
             background and f"on {background}"]
    return " ".join(word for word in words if word)


@cache
def captions() -> list[str]:
    """Every caption there is, and last the empty prompt that guidance needs; `caption_index` finds one."""
    every = product(*(range(count + 1) for count in COUNTS[:4]))
    return [caption([i - 1 for i in kept]) for kept in every] + [""]


# `attributes` below: a table like ATTRIBUTES, whose last entry, the place, no caption names.

def caption_index(named: Tensor, attributes: dict = ATTRIBUTES) -> Tensor:
    """Positions in `captions()` of the captions that name these attributes (B A-1): (B,)."""
    index = torch.zeros(len(named), dtype=torch.long)
    for values, value in zip(attributes.values(), named.unbind(1)):
        index = index * (len(values) + 1) + value + 1
    return index


def parse(prompts: list[str], attributes: dict = ATTRIBUTES) -> Tensor:
    """What each prompt names: (B A-1), -1 where it leaves an attribute free."""
    words = [set(re.findall("[a-z]+", prompt.lower())) for prompt in prompts]
    return torch.tensor([[max((i for i, value in enumerate(values) if value in said), default=-1)
                          for values in list(attributes.values())[:-1]] for said in words])


def evaluation_prompts(count: int, repeats: int = 32) -> list[str]:
    """`count` prompts, each distinct one `repeats` times: the coverage of its free attributes can be counted.
    They name 1, 2, 3, 4 attributes in turn; the order is such that any leading part is balanced too."""
    return [caption(named) for named in evaluation_names(count, repeats, "prompt", ATTRIBUTES)]


def evaluation_names(count: int, repeats: int, purpose: str, attributes: dict) -> list[list[int]]:
    """What each evaluation prompt names, drawn for a `purpose` (models/data.py). Of each kind there are no
    more distinct ones than prompts that name one attribute."""
    counts = [len(values) for values in attributes.values()][:-1]
    found, tries, n = [], iter(range(10 ** 6)), len(counts)
    while len(found) < min(max(1, count // repeats), n * sum(counts)):
        u = uniform(1, next(tries), purpose, range(2 * n))
        kept = u[n:].argsort()[:len(found) % n + 1]
        named = [int(u[a] * counts[a]) if a in kept else -1 for a in range(n)]
        if named not in found:
            found.append(named)
    return [found[i % len(found)] for i in range(count)]


# ---- the evaluator -----------------------------------------------------------------------------------------

def contrast(alpha: Tensor) -> Tensor:
    """Coverage with a harder edge, so that a decoder's faint noise is no part of a shape."""
    return ((alpha - 0.2) / 0.6).clamp(0, 1)


def border(images: Tensor) -> Tensor:
    """The colour around pictures (... 3 H W), the median of their outermost pixels: (... 3)."""
    ring = torch.ones(images.shape[-2:], dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    return images[..., ring].median(dim=-1).values


def read(images: Tensor) -> Tensor:
    """Attributes read off pictures (B 3 H W): (B A), all -1 where one shows no single shape of the data set.

    Background: the one next to the `border`. Colour: the one whose mixture with the background explains the
    picture best, which also gives each pixel's coverage. Shape: the template of the same area and centroid
    with the best IoU. Size: that template's radius."""
    images = images.float().clamp(-1, 1)
    off = (border(images)[:, None] - palette("background")).norm(dim=2)
    valid = off.min(1).values < 0.35
    background = off.argmin(1)

    rest = images - palette("background")[background][:, :, None, None]
    step = palette("colour")[None] - palette("background")[background][:, None]  # B K 3
    alpha = torch.einsum("bchw,bkc->bkhw", rest, step) / step.square().sum(2)[:, :, None, None]
    alpha = alpha.clamp(0, 1)
    error = (rest[:, None] - alpha[:, :, None] * step[:, :, :, None, None]).square().sum((2, 3, 4))  # B K
    colour = error.argmin(1)
    every = torch.arange(len(images))
    valid &= error[every, colour] < 0.2 * rest.square().sum((1, 2, 3))

    alpha = contrast(alpha[every, colour])  # B H W
    area = alpha.sum((1, 2)).clamp_min(1e-6)
    grid = torch.arange(SIZE) + 0.5
    centre = torch.stack([(alpha.sum(i) * grid).sum(1) for i in (1, 2)], dim=1) / area[:, None]  # B 2
    radius = (area[:, None] / torch.tensor(AREA)).sqrt()  # B 5
    templates = torch.stack([coverage(centre, radius[:, s])[:, s] for s in range(5)], dim=1)
    templates = contrast(templates)  # B 5 H W
    shared = torch.minimum(templates, alpha[:, None]).sum((2, 3))
    overlap = shared / torch.maximum(templates, alpha[:, None]).sum((2, 3))
    shape = overlap.argmax(1)
    radius = radius[every, shape]
    valid &= (overlap.max(1).values > 0.8) & (radius > RADIUS[0] - 1) & (radius < RADIUS[1] + 1)

    size = (radius > sum(RADIUS) / 2).long()
    place = (centre[:, 0] > SIZE / 2).long() + 2 * (centre[:, 1] > SIZE / 2).long()
    return torch.where(valid[:, None], torch.stack([shape, colour, background, size, place], dim=1), -1)


def accuracy(labels: Tensor, named: Tensor) -> float:
    """Share of pictures that are valid and show all that their prompt names; labels (B A), named (B 4)."""
    right = ((labels[:, :4] == named) | (named < 0)).all(1) & (labels[:, 0] >= 0)
    return right.double().mean().item()


def total_variation(labels: Tensor, named: Tensor, attributes: dict = ATTRIBUTES) -> float:
    """Mean over distinct prompts and the attributes each leaves free, the place always, of
    0.5 * sum |share - 1/K|; labels (B A), named (B A-1). What is invalid is one more outcome, of probability
    0. n pictures of a perfect sampler give about 0.4 * sqrt((K - 1) / n), not 0."""
    distances = []
    for prompt in named.unique(dim=0):
        mine = labels[(named == prompt).all(1)]
        for values, name, label in zip(attributes.values(), [*prompt, -1], mine.unbind(1)):
            if name < 0:
                share = torch.bincount(label + 1, minlength=len(values) + 1).double() / len(mine)
                distances.append(0.5 * (share[1:] - 1 / len(values)).abs().sum() + 0.5 * share[0])
    return torch.stack(distances).mean().item()


def features(images: Tensor) -> Tensor:
    """(B 48) float64: a picture's mean and, for sharpness, standard deviation of 24 random filters with ReLU.

    The filters (seed 0) are the feature space: changing them changes every Frechet distance reported."""
    weight = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / math.sqrt(75)
    maps = conv2d(images.float().clamp(-1, 1), weight).relu().flatten(2)  # B 24 pixels
    return torch.cat([maps.mean(2), maps.std(2)], dim=1).double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Frechet distance of features a (n D) and b (m D), per feature and in units of b's per-feature
    variance."""
    scale = b.std(0).clamp_min(1e-12)
    return frechet_distance(a / scale, b / scale) / a.shape[1]


def reference(prompts: list[str], seed: int, repeats: int = 1) -> Tensor:
    """Held-out data given the prompts: `repeats` pictures of each, free attributes uniform."""
    named = parse(prompts).repeat(repeats, 1)
    return draw(random_scenes(seed, range(len(named)), named))


def sharpness(images: Tensor) -> Tensor:
    """(B,) float64: the mean size of the Laplacian of pictures (B 3 H W) in [-1, 1], which blur lowers."""
    x = images.float().clamp(-1, 1)
    middle, sides = x[..., 1:-1, 1:-1], x[..., :-2, 1:-1] + x[..., 2:, 1:-1] + x[..., 1:-1, :-2] + x[..., 1:-1, 2:]
    return (4 * middle - sides).abs().double().mean((1, 2, 3))


@cache
def held_out(prompts: tuple[str, ...]) -> tuple[Tensor, Tensor]:
    """Features and sharpness of held-out data."""
    images = reference(list(prompts), seed=2, repeats=max(1, 4096 // len(prompts)))
    return features(images), sharpness(images)


def evaluate(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """Prompt accuracy, total variation over free attributes, Frechet distance to held-out data, and sharpness in
    units of the data's, of pictures (B 3 H W), uint8 or in [-1, 1]. Use `evaluation_prompts`, whose repeats the
    total variation needs."""
    images = images / 127.5 - 1 if images.dtype == torch.uint8 else images
    labels, named = read(images), parse(prompts)
    their_features, their_sharpness = held_out(tuple(prompts))
    return dict(accuracy=accuracy(labels, named), total_variation=total_variation(labels, named),
                frechet=frechet(features(images), their_features),
                sharpness=(sharpness(images).mean() / their_sharpness.mean()).item())
