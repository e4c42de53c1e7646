"""Captioned shapes that move, the procedural data of the tiny video model, and their exact evaluator.

Every clip is one shape of models/eval/shapes.py on a plain background, 32 x 32, that moves 8 pixels left,
right, up or down at constant speed: one pixel a frame in 9 frames. The attributes (shape, colour, background,
size, direction) are uniform and independent; each size has one fixed radius, and the middle of the path is
uniform on a 4-pixel grid, as far as the whole path stays inside. A caption names any subset of the five ("a
red circle moving left", "a shape on white"), so the true distribution given a prompt is known exactly.

Letters: B clips, F frames, A = 6 attributes (the five and the quadrant of the path's middle), H W pixels.
"""
from functools import cache
from itertools import product
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor

from models.eval import shapes
from models.data import uniform
from models.eval.shapes import SIZE, border, contrast, features, frechet

DIRECTIONS = {"left": (-1, 0), "right": (1, 0), "up": (0, -1), "down": (0, 1)}  # x, y; y points down
ATTRIBUTES = {name: shapes.ATTRIBUTES[name] for name in shapes.NAMED} | {
    "direction": tuple(DIRECTIONS), "place": shapes.ATTRIBUTES["place"]}
NAMED = tuple(ATTRIBUTES)[:5]
COUNTS = tuple(len(values) for values in ATTRIBUTES.values())
RADIUS = (4.5, 7.0)  # of a small and of a large shape, in pixels
PATH = 8  # pixels
ALONG, ACROSS = (4, 2), (6, 4)  # places of a small and of a large shape along its path and across it
JERK = 0.5  # pixels by which a frame's displacement may differ from the clip's mean one


# ---- the data ----------------------------------------------------------------------------------------------

class Scenes(NamedTuple):
    """What is in B clips: labels (B 5) into ATTRIBUTES, middle of the path (B 2) x and y, radius (B,)."""
    labels: Tensor
    middle: Tensor
    radius: Tensor


def random_scenes(seed: int, indices: range, named: Tensor | None = None) -> Scenes:
    """Scene i depends on (seed, i) alone; `named` (B 5) fixes the attributes that are not -1 there."""
    u = uniform(seed, 0, "clip", [7 * i + column for i in indices for column in range(7)]).view(-1, 7)
    labels = (u[:, :5] * torch.tensor(COUNTS[:5])).long()
    if named is not None:
        labels = torch.where(named >= 0, named, labels)
    size, horizontal = labels[:, 3], labels[:, 4] < 2
    along, across = torch.tensor(ALONG)[size], torch.tensor(ACROSS)[size]
    places = torch.where(horizontal, torch.stack([along, across]), torch.stack([across, along])).T  # B 2
    middle = SIZE / 2 + 2 - 2 * places + 4 * (u[:, 5:] * places).floor()
    return Scenes(labels, middle, torch.tensor(RADIUS)[size])


def draw_clip(scenes: Scenes, frames: int = 9) -> Tensor:
    """Clips (B F 3 H W) in [-1, 1]."""
    step = torch.tensor(list(DIRECTIONS.values()))[scenes.labels[:, 4]]  # B 2
    offset = torch.linspace(-PATH / 2, PATH / 2, frames)
    centre = scenes.middle[:, None] + offset[:, None] * step[:, None]  # B F 2
    still = shapes.Scenes(scenes.labels[:, :4].repeat_interleave(frames, 0), centre.flatten(0, 1),
                          scenes.radius.repeat_interleave(frames))
    return rearrange(shapes.draw(still), "(B F) C H W -> B F C H W", F=frames)


def caption(named: list[int]) -> str:
    """The caption that names these five attributes; -1 leaves one out."""
    moving = f" moving {list(DIRECTIONS)[named[4]]}" if named[4] >= 0 else ""
    return shapes.caption(named[:4]) + moving


@cache
def captions() -> list[str]:
    """Every caption there is, and last the empty prompt; `caption_index` finds one."""
    every = product(*(range(count + 1) for count in COUNTS[:5]))
    return [caption([i - 1 for i in kept]) for kept in every] + [""]


def caption_index(named: Tensor) -> Tensor:
    """Positions in `captions()` of the captions that name these attributes (B 5): (B,)."""
    return shapes.caption_index(named, ATTRIBUTES)


def parse(prompts: list[str]) -> Tensor:
    """What each prompt names: (B 5), -1 where it leaves an attribute free."""
    return shapes.parse(prompts, ATTRIBUTES)


def evaluation_prompts(count: int, repeats: int = 32) -> list[str]:
    """As in models/eval/shapes.py, of 1, 2, 3, 4, 5 attributes in turn."""
    return [caption(named) for named in shapes.evaluation_names(count, repeats, "clip prompt", ATTRIBUTES)]


# ---- the evaluator -----------------------------------------------------------------------------------------

def centres(images: Tensor) -> Tensor:
    """Centroids (B 2), x and y in pixels, of what differs from the colour of the border, of pictures
    (B 3 H W)."""
    off = (images - border(images)[:, :, None, None]).norm(dim=1)  # B H W
    alpha = contrast(off / off.amax((1, 2), keepdim=True).clamp_min(1e-6))
    grid = torch.arange(SIZE) + 0.5
    return torch.stack([(alpha.sum(i) * grid).sum(1) for i in (1, 2)], dim=1) / alpha.sum((1, 2))[:, None]


def read_clip(clips: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Clips (B F 3 H W) as they look: (labels (B A), labels of each frame (B F 4), displacement from frame to
    frame (B F-1 2) in pixels), -1 in the labels where no single shape of the data set is seen.

    A clip shows what most of its frames show. It moves in a direction if its first and last frame are valid
    and their centres lie at least half of PATH apart along it, and across it less than half of that."""
    images = clips.float().clamp(-1, 1).flatten(0, 1)
    seen = torch.cat([shapes.read(part) for part in images.split(512)])[:, :4].unflatten(0, clips.shape[:2])
    centre = torch.cat([centres(part) for part in images.split(512)]).unflatten(0, clips.shape[:2])  # B F 2
    path = centre[:, -1] - centre[:, 0]
    along, axis = path.abs().max(1)
    sign = (path.gather(1, axis[:, None])[:, 0] > 0).long()
    moves = (along >= PATH / 2) & (path.abs().min(1).values < along / 2) & (seen[:, [0, -1], 0] >= 0).all(1)
    direction = torch.where(moves, 2 * axis + sign, -1)
    middle = centre.mean(1)
    place = (middle[:, 0] > SIZE / 2).long() + 2 * (middle[:, 1] > SIZE / 2).long()
    most = seen.mode(dim=1).values  # B 4
    place = torch.where(most[:, 0] >= 0, place, -1)
    return torch.cat([most, direction[:, None], place[:, None]], dim=1), seen, centre.diff(dim=1)


def consistency(seen: Tensor, displacement: Tensor) -> float:
    """Share of adjacent frames that are both valid, show the same four attributes, and whose displacement
    differs from their clip's mean one by less than JERK pixels."""
    same = (seen[:, 1:] == seen[:, :-1]).all(2) & (seen[:, 1:, 0] >= 0)
    steady = (displacement - displacement.mean(1, keepdim=True)).norm(dim=2) < JERK
    return (same & steady).double().mean().item()


def total_variation(labels: Tensor, named: Tensor) -> float:
    """As in models/eval/shapes.py, of clips' labels (B A) and what their prompts name (B 5)."""
    return shapes.total_variation(labels, named, ATTRIBUTES)


def clip_features(clips: Tensor) -> Tensor:
    """(B 96) float64: `shapes.features` of the frames and of half the differences between frames, each
    averaged over the clip."""
    both = [torch.stack([features(clip).mean(0) for clip in x]) for x in (clips, clips.diff(dim=1) / 2)]
    return torch.cat(both, dim=1)


def reference(prompts: list[str], seed: int, repeats: int = 1, frames: int = 9) -> Tensor:
    """Held-out data given the prompts: `repeats` clips of each, free attributes uniform."""
    named = parse(prompts).repeat(repeats, 1)
    return draw_clip(random_scenes(seed, range(len(named)), named), frames)


@cache
def held_out(prompts: tuple[str, ...], frames: int) -> tuple[Tensor, Tensor]:
    """Features of held-out clips and sharpness of their frames."""
    clips = reference(list(prompts), 2, max(1, 1024 // len(prompts)), frames)
    return clip_features(clips), shapes.sharpness(clips.flatten(0, 1))


def evaluate(clips: Tensor, prompts: list[str]) -> dict[str, float]:
    """Figures of clips (B F 3 H W), uint8 or in [-1, 1]. Use `evaluation_prompts`, whose repeats the total
    variation needs.

    accuracy: share of frames that show what the prompt names. direction: share of clips that move in the
    direction named, or in any one if none is. total_variation: over what the prompt leaves free, direction
    and place included. consistency: share of adjacent frames that agree. frechet: to held-out data. sharpness: of
    the frames, in units of the data's."""
    clips = clips / 127.5 - 1 if clips.dtype == torch.uint8 else clips
    named, frames = parse(prompts), clips.shape[1]
    labels, seen, displacement = read_clip(clips)
    their_features, their_sharpness = held_out(tuple(prompts), frames)
    right = ((labels[:, 4] == named[:, 4]) | (named[:, 4] < 0)) & (labels[:, 4] >= 0)
    return dict(accuracy=shapes.accuracy(seen.flatten(0, 1), named[:, :4].repeat_interleave(frames, 0)),
                direction=right.double().mean().item(),
                total_variation=total_variation(labels, named),
                consistency=consistency(seen, displacement),
                frechet=frechet(clip_features(clips), their_features),
                sharpness=(shapes.sharpness(clips.flatten(0, 1)).mean() / their_sharpness.mean()).item())
