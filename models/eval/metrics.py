"""Around the metrics of evaluate.py: pictures and videos with their prompts, scores kept item by item, the
papers' own figures, tables. And `quick_scores`, the figures of samples still in memory.
"""
import json
import math
import re
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from types import ModuleType
from typing import NamedTuple

import torch
from torch import Tensor

from models.checkpoint import InputError, replacing, some
from models.parse import parse_json
from models.data import append_jsonl, check_text, lines_of
from models.pictures import PICTURES, VIDEOS, picture, read_text
from models.progress import bar
from models.shards import fingerprint

# What sample.py notes that is one of a folder's samples.
GENERATOR = ("model", "ckpt", "weights", "precision", "steps", "cfg", "shift", "times", "renoise", "null_prompt",
             "no_t5", "vae_ckpt", "text_ckpt", "tokenizers")
# The papers' rows: model -> row -> column -> figure (DMDX Tables 1-3 and 6, AVDM2's table of losses).
PAPER = {
    "sdxl": {
        "SDXL-Base, 50 NFE": dict(clip=35.0309, pickscore=22.2494, hpsv2=27.3743, mps=10.7042, lpips=0.6936),
        "DMD2, 1 step": dict(clip=35.2153, pickscore=22.0978, hpsv2=27.4523, mps=10.6947, lpips=0.6715),
        "DMDX, 1 step": dict(clip=35.2557, pickscore=22.2736, hpsv2=27.7046, mps=11.1978, lpips=0.7156)},
    "sd3-medium": {
        "SD3-Medium, 50 NFE": dict(clip=34.7633, pickscore=22.2961, hpsv2=27.9733, mps=11.3652),
        "ADM, 4 steps": dict(clip=34.9076, pickscore=22.5471, hpsv2=28.4492, mps=11.9543)},
    "sd3.5-large": {
        "SD3.5-Large, 50 NFE": dict(clip=34.9668, pickscore=22.5087, hpsv2=27.9688, mps=11.5826),
        "ADM, 4 steps": dict(clip=34.9730, pickscore=22.8842, hpsv2=27.7331, mps=12.2350)},
    "cogvideox-2b": {
        "CogVideoX-2b": dict(final=80.036, quality=80.801, semantic=76.974),
        "ADM, 8 steps": dict(final=78.584, quality=80.825, semantic=69.621),
        "ADM, 8 steps, longer": dict(final=80.764, quality=83.031, semantic=71.693),
        "ADM with CFG, 8 steps": dict(final=79.865, quality=80.938, semantic=75.569),
        "ADM with CFG, 8 steps, longer": dict(final=81.796, quality=83.008, semantic=76.947)},
    "cogvideox-5b": {
        "CogVideoX-5b": dict(final=81.226, quality=81.785, semantic=78.987),
        "ADM, 8 steps": dict(final=82.067, quality=83.227, semantic=77.423),
        "ADM with CFG, 8 steps": dict(final=80.982, quality=82.165, semantic=76.251)},
    "animatediff": {
        "AVDM2, 2D SDM": {"fvd": 1271.45, "clip-video": 32.01},
        "AVDM2, video SDM": {"fvd": 1273.13, "clip-video": 30.56}},
}
# Column -> title, decimals.
COLUMNS = {
    "clip": ("CLIP score", 4), "pickscore": ("PickScore", 4), "hpsv2": ("HPSv2", 4), "mps": ("MPS", 4),
    "lpips": ("LPIPS diversity", 4), "fvd": ("FVD", 2), "clip-video": ("CLIP score of frames", 2),
    "final": ("VBench final", 3), "quality": ("quality", 3), "semantic": ("semantic", 3),
    "accuracy": ("accuracy", 3), "direction": ("direction", 3), "total_variation": ("total variation", 3),
    "consistency": ("consistency", 3), "frechet": ("Frechet", 3), "sharpness": ("sharpness", 3),
}


# ---- pictures and videos -----------------------------------------------------------------------------------

class Item(NamedTuple):
    path: Path
    prompt: str | None
    model: str | None  # the preset that made it, where the file says so


def in_order(path: Path) -> list:
    """Sort key: numbers in a name by their value, as 1000.png comes after 999.png."""
    return [int(part) if part.isdecimal() else part for part in re.split(r"(\d+)", str(path))]


def read_items(folder: Path, prompts: list[str] | None, broken: dict[str, str]) -> list[Item]:
    """The pictures and videos in a folder, in the order of their names, without sample.py's grid. A prompt is
    what the file notes, else a video's name in VBench's way (if there are no `prompts`, or it is one of them), else
    `prompts` in turn. Files that cannot be opened go into `broken` with the reason. Raises InputError when there
    are none, and when they note different generators."""
    if not folder.is_dir():
        raise InputError(f"{folder}: no such folder of pictures or videos; `python sample.py --out {folder}` "
                         "makes it")
    files = sorted((path for path in folder.iterdir()
                    if path.suffix.lower() in PICTURES + VIDEOS and path.stem != "grid"
                    and not path.name.startswith(".")), key=in_order)  # macOS leaves these beside each
    if not files:
        raise InputError(f"{folder}: no pictures or videos in this folder; expected "
                         f"{', '.join(PICTURES + VIDEOS)}")
    items, noted = [], {}
    for i, path in enumerate(files):
        named = re.fullmatch(r"(.+)-\d+", path.stem) if path.suffix.lower() in VIDEOS else None
        by_name = named and (not prompts or named[1] in prompts)
        prompt = named[1] if by_name else prompts[i % len(prompts)] if prompts else None
        try:
            if not path.is_file():
                raise InputError(f"{path}: no file; expected a picture or a video")
            text = read_text(path)
            # JSON of an MP4 and bytes of a name can hold what no tokenizer takes.
            check_text(text.get("prompt", prompt) or "", str(path))
        except InputError as error:
            broken[str(path)] = str(error)
            continue
        if "workflow" in text or '"class_type"' in text.get("prompt", ""):  # ComfyUI, whose "prompt" is its graph
            text = {}
        for key in (key for key in GENERATOR if key in text or "model" in text):
            first, value = noted.setdefault(key, (path.name, text.get(key, "none")))
            if text.get(key, "none") != value:
                raise InputError(f"{folder}: {first} notes {key} {value}, {path.name} {key} {text.get(key, 'none')}; "
                                 "expected samples of one generator in a folder")
        items.append(Item(path, text.get("prompt", prompt), text.get("model")))
    return items


def doubts(folder: Path, items: list[Item], prompts: list[str] | None) -> list[str]:
    """What to tell of the items of a folder that may not be what is meant. Raises InputError for numbered files of
    which some are missing: --prompts would be given to the wrong ones."""
    bare = [item.path for item in items if item.model is None]
    numbers = [int(path.stem) for path in bare if path.stem.isdecimal()]
    if prompts and numbers and len(numbers) == len(bare) and max(numbers) - min(numbers) + 1 != len(numbers):
        raise InputError(f"{folder}: {len(numbers)} files that note no prompt are numbered {min(numbers)} to "
                         f"{max(numbers)}; expected none to be missing, as --prompts are given to them in order")
    told = []
    if 0 < len(bare) < len(items):
        told.append(f"{len(bare)} of {len(items)} files do not say which model made them")
    others = [item.prompt for item in items if prompts and item.prompt not in prompts]
    if others:
        told.append(f"{len(others)} files note prompts that are not in --prompts, and keep them ({some(others)})")
    return told


@dataclass
class Folder:
    """One row of the table. `log`: scores.jsonl; `broken`: file -> why it is left out; `figures`: column ->
    value."""
    path: Path
    log: Path
    items: list[Item] = field(default_factory=list)
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def of(self, suffixes: tuple[str, ...], prompted: bool = True) -> list[Item]:
        """The pictures or the videos. Raises InputError when there are none, or no prompts."""
        found = [item for item in self.items if item.path.suffix.lower() in suffixes]
        if not found:
            raise InputError(f"{self.path}: none of {', '.join(suffixes)} in this folder that can be read")
        bare = [item.path.name for item in found if item.prompt is None]
        if prompted and bare:
            raise InputError(f"{self.path}: {len(bare)} of {len(found)} files note no prompt ({some(bare)}); "
                             "--prompts FILE gives prompts in the order of the files' names")
        return found


def by_prompt(items: list[Item]) -> list[list[Item]]:
    groups = {}
    for item in items:
        groups.setdefault(item.prompt, []).append(item)
    return list(groups.values())


# ---- scores, kept ------------------------------------------------------------------------------------------

def kept_scores(log: Path) -> dict[str, float | list[float]]:
    """What scores.jsonl holds: the row without its score -> score. Half a line, which a killed run left at
    the end, is cut off."""
    if not log.exists():
        return {}
    data = log.read_bytes()
    if not data.endswith(b"\n"):
        with replacing(log) as temporary:
            temporary.write_bytes(data[:data.rfind(b"\n") + 1])
    kept = {}
    for number, line in lines_of(log):
        try:
            row = parse_json(line)
            score = row.pop("score")
            values = score if isinstance(score, list) else [score]
            if not values or not all(type(value) in (int, float) and abs(value) < 1e300 for value in values):  # finite
                raise ValueError("no number")
            kept[json.dumps(row, sort_keys=True)] = score
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{log}: line {number}: expected a record with a score") from error
    return kept


def weights_of(*paths: Path | None) -> str:
    """Tells the weights of a scorer apart, for scores.jsonl, also after one file has taken another's place."""
    return ", ".join(f"{path} {fingerprint(path)[:16] if path.exists() else ''}" if path else "hub" for path in paths)


def score_items(folder: Folder, head: dict[str, str], groups: list[list[Item]],
                read: Callable[[Path], object], compute: Callable[[list[list], list[str | None]], list],
                batch: int) -> list:
    """Scores of groups of items (a picture, a video, one prompt's pictures), None where there is none.

    `compute` takes what `read` gives of `batch` groups, and their prompts. Each score is one line of
    folder.log, with `head` (metric, variant, weights) and the files' names, sizes and dates: what is there is
    not computed again. What cannot be read or scored goes into folder.broken."""
    kept, broken = kept_scores(folder.log), folder.broken
    rows = [head | dict(prompt=group[0].prompt, files=[str(item.path.resolve()) for item in group],
                        sizes=[item.path.stat().st_size for item in group],
                        dates=[item.path.stat().st_mtime_ns for item in group]) for group in groups]
    keys = [json.dumps(row, sort_keys=True) for row in rows]
    todo = [i for i, key in enumerate(keys) if key not in kept]

    def attempt(item: Item):
        try:
            return read(item.path)
        except InputError as error:
            broken[str(item.path)] = str(error)

    def scores(part: list[int], loaded: list[list]) -> list:
        try:
            return compute(loaded, [groups[i][0].prompt for i in part])
        except InputError as error:
            if len(part) == 1:
                broken[str(groups[part[0]][0].path)] = f"{groups[part[0]][0].path}: {error}"
                return [None]
            return [score for i, one in zip(part, loaded) for score in scores([i], [one])]

    with ThreadPoolExecutor() as pool, bar(total=len(groups), initial=len(groups) - len(todo), unit="item",
                                           label=head["metric"]) as progress:
        for start in range(0, len(todo), batch):
            part = todo[start:start + batch]
            data = pool.map(attempt, [item for i in part for item in groups[i]])
            loaded = {i: [one for _ in groups[i] if (one := next(data)) is not None] for i in part}
            able = [i for i in part if loaded[i]]
            for i, value in zip(able, scores(able, [loaded[i] for i in able]) if able else ()):
                path = groups[i][0].path
                if value is None:
                    continue
                if not all(map(math.isfinite, value if isinstance(value, list) else [value])):
                    broken[str(path)] = f"{path}: {head['metric']} is not finite"
                    continue
                kept[keys[i]] = value
                if len(loaded[i]) == len(groups[i]):  # else the next run tells again what is broken
                    append_jsonl(folder.log, rows[i] | dict(score=value))
            progress.update(len(part))
    return [kept.get(key) for key in keys]


def mean(scores: list[float | None]) -> float:
    """Raises InputError when not one item could be scored."""
    there = [score for score in scores if score is not None]
    if not there:
        raise InputError("not one of the files could be scored")
    return math.fsum(there) / len(there)


# ---- tables ------------------------------------------------------------------------------------------------

def paper_rows(models: set[str | None], columns: list[str]) -> dict[str, dict[str, float]]:
    """The papers' rows of these models, or else of the first model that has one of the columns."""
    shared = {model: {row: {column: value for column, value in figures.items() if column in columns}
                      for row, figures in rows.items()} for model, rows in PAPER.items()}
    able = [model for model, rows in shared.items() if any(rows.values())]
    return {f"{row} (paper)": figures for model in [model for model in able if model in models] or able[:1]
            for row, figures in shared[model].items() if figures}


def table(rows: dict[str, dict[str, float]], variants: dict[str, str]) -> str:
    """A markdown table that also reads well as text; `variants`: column -> what stands in its head."""
    columns = [column for column in COLUMNS if any(column in figures for figures in rows.values())]
    cells = [["", *(COLUMNS[column][0] + (f" ({variants[column]})" if variants.get(column) else "")
                    for column in columns)]]
    for name, figures in rows.items():
        cells.append([name, *(f"{figures[column]:.{COLUMNS[column][1]}f}" if column in figures else "-"
                              for column in columns)])
    widths = [max(len(row[k]) for row in cells) for k in range(len(cells[0]))]
    cells.insert(1, ["-" * width for width in widths])
    return "\n".join("| " + " | ".join(cell.ljust(width) for cell, width in zip(row, widths)) + " |"
                     for row in cells) + "\n"


# ---- in memory ---------------------------------------------------------------------------------------------

def procedural(name: str) -> ModuleType:
    """What draws a tiny model's data and captions and reads its samples exactly. `name`: a preset's
    `data`."""
    from models.eval import moving_shapes, shapes  # which a full-size run never needs
    return {"shapes": shapes, "moving_shapes": moving_shapes}[name]


def quick_scores(images: Tensor, prompts: list[str], metrics: list[str], scorers: dict[str, Callable],
                 batch: int = 16, device: torch.device | None = None) -> dict[str, float]:
    """Figures of images (B 3 H W) or videos (B F 3 H W), uint8: of "shapes" the exact evaluator's, of other
    metrics the mean of `scorers[metric]` (models/eval/scores.py) over the images or over all frames. `device`:
    where each scorer's network, which is on the CPU, is only while it scores."""
    figures = {}
    for metric in metrics:
        if metric == "shapes":
            figures |= procedural("moving_shapes" if images.ndim == 5 else "shapes").evaluate(images, prompts)
            continue
        frames = images.flatten(0, -4)
        repeated = [prompt for prompt in prompts for _ in range(len(frames) // len(prompts))]
        scorer = scorers[metric]
        if device:
            scorer.net.to(device)
        parts = [scorer([picture(frame) for frame in frames[i:i + batch]], repeated[i:i + batch])
                 for i in range(0, len(frames), batch)]
        if device:
            scorer.net.to("cpu")
        figures[metric] = mean([score for part in parts for score in part.tolist()])
    return figures
