"""VBench (Huang et al. 2024): the videos under its names, its program where installed, its three totals.

The networks behind the 16 dimensions are VBench's own (DINO, CLIP, MUSIQ, AMT, RAFT, GRiT, UMT, Tag2Text,
ViCLIP) and are not rebuilt here: `run` calls its program, `read_results` reads what that has left.
Source of the constants: Vchitect/VBench, scripts/constant.py.
"""
import json
import os
import shutil
import subprocess
from collections import defaultdict
from pathlib import Path

from models.checkpoint import InputError, replacing, some
from models.parse import parse_json

# Dimension -> least and greatest raw value of the normalisation, number of its prompts.
QUALITY = {
    "subject consistency": (0.1462, 1.0, 72), "background consistency": (0.2615, 1.0, 86),
    "temporal flickering": (0.6293, 1.0, 75), "motion smoothness": (0.706, 0.9975, 72),
    "dynamic degree": (0.0, 1.0, 72), "aesthetic quality": (0.0, 1.0, 93), "imaging quality": (0.0, 1.0, 93),
}
SEMANTIC = {
    "object class": (0.0, 1.0, 79), "multiple objects": (0.0, 1.0, 82), "human action": (0.0, 1.0, 100),
    "color": (0.0, 1.0, 85), "spatial relationship": (0.0, 1.0, 84), "scene": (0.0, 0.8222, 86),
    "appearance style": (0.0009, 0.2855, 90), "temporal style": (0.0, 0.364, 100),
    "overall consistency": (0.0, 0.364, 93),
}
DIMENSIONS = QUALITY | SEMANTIC
WEIGHTS = {"dynamic degree": 0.5}  # all others 1
SAMPLES = 5  # videos a prompt


def totals(dimensions: dict[str, float]) -> dict[str, float]:
    """quality, semantic and final in [0, 1] (tables print them x 100) of raw values in [0, 1].

    Only totals whose dimensions are all there: VBench's own script counts an absent one as 0."""
    found = {}
    for name, group in (("quality", QUALITY), ("semantic", SEMANTIC)):
        if all(dimension in dimensions for dimension in group):
            weights = {dimension: WEIGHTS.get(dimension, 1.0) for dimension in group}
            normalised = {dimension: (dimensions[dimension] - least) / (greatest - least)
                          for dimension, (least, greatest, _) in group.items()}  # not clamped
            found[name] = sum(weights[d] * normalised[d] for d in group) / sum(weights.values())
    if len(found) == 2:
        found["final"] = (4 * found["quality"] + found["semantic"]) / 5
    return found


def read_results(paths: list[Path]) -> tuple[dict[str, float], list[str]]:
    """Dimension -> raw value in [0, 1] from `*_eval_results.json` files or folders of them, and sentences on
    what makes the totals incomparable: dimensions that are absent, or rest on another number of videos.

    Raises InputError for damaged files, and for two files that differ in a dimension."""
    files = [file for path in paths for file in
             (sorted(path.rglob("*_eval_results.json")) if path.is_dir() else [path])]
    if not files:
        raise InputError(f"{some(paths)}: no *_eval_results.json in this folder; expected VBench's results")
    values, source, notes = {}, {}, []
    for file in files:
        try:
            content = parse_json(file.read_bytes())
            found = {name.replace("_", " "): (value[0] + 0.0, len(value[1]) if len(value) > 1 else None)
                     for name, value in content.items()}
        except (OSError, ValueError, TypeError, LookupError, AttributeError, OverflowError) as error:
            raise InputError(f"{file}: expected VBench's results, {{dimension: [average, [videos]]}} "
                             f"({type(error).__name__}: {error})") from error
        for name, (value, count) in found.items():
            if name not in DIMENSIONS:
                continue
            if not 0 <= value <= 1:
                raise InputError(f"{file}: {name} is {value:g}; expected a fraction from 0 to 1")
            if values.setdefault(name, value) != value:
                raise InputError(f"{file}: {name} is {value:g}, but {values[name]:g} in {source[name]}; "
                                 "expected the results of one set of videos")
            source[name] = file
            expected = SAMPLES * DIMENSIONS[name][2]
            # Of temporal flickering's videos the static filter keeps some.
            if count is not None and count != expected and name != "temporal flickering":
                notes.append(f"{name} rests on {count} videos, the benchmark on {expected}")
    absent = [name for name in DIMENSIONS if name not in values]
    if absent:
        notes.append(f"{len(absent)} of {len(DIMENSIONS)} dimensions are missing ({some(absent, 16)}): "
                     "no total that needs them is given")
    return values, notes


def lay_out(folder: Path, videos: list[tuple[Path, str]]) -> Path:
    """folder/videos with every MP4 as `{prompt}-{i}.mp4`, i counting a prompt's videos in the order given.
    When these are not the videos of the last call, folder/results and folder/static go too. Raises InputError for
    a prompt that is no file name."""
    counts, names = defaultdict(int), {}
    for path, prompt in videos:
        name = f"{prompt}-{counts[prompt]}.mp4"
        counts[prompt] += 1
        if "/" in name or "\0" in name or len(name.encode()) > 255:
            raise InputError(f"{path}: its prompt, {prompt[:60]!r}..., is no file name, as VBench wants it; "
                             "long prompts are saved under VBench's own: --vbench-short all_dimension.txt")
        names[name] = path.resolve()
    stamp = {name: [str(path), path.stat().st_size, path.stat().st_mtime_ns] for name, path in names.items()}
    record = folder / "videos.json"
    if record.is_file() and record.read_bytes() == json.dumps(stamp).encode():
        return folder / "videos"
    for stale in ("videos", "results", "static"):
        shutil.rmtree(folder / stale, ignore_errors=True)
    (folder / "videos").mkdir(parents=True)
    for name, path in names.items():
        try:
            os.link(path, folder / "videos" / name)
        except OSError:  # another file system
            shutil.copyfile(path, folder / "videos" / name)
    with replacing(record) as temporary:
        temporary.write_text(json.dumps(stamp))
    return folder / "videos"


def run(videos: Path, results: Path) -> list[str]:
    """VBench's program on every dimension that has no result yet: the dimensions that it failed in. Raises
    InputError when it is not installed."""
    program = shutil.which("vbench")
    if program is None:
        raise InputError(f"VBench is not installed (`pip install vbench`, in an environment of its own); its "
                         f"videos lie ready in {videos}: `vbench evaluate --videos_path {videos} --dimension "
                         "NAME` makes the results, which --vbench-results FOLDER reads; temporal_flickering "
                         "takes what `vbench static_filter` leaves of them")
    done = read_results([results])[0] if any(results.rglob("*_eval_results.json")) else {}
    # It starts `python` by that name: the one it is installed with must come first.
    path = os.pathsep.join([str(Path(program).parent), os.environ["PATH"]])

    def call(command: str, source: Path, *flags):
        subprocess.run([program, command, "--videos_path", str(source.resolve()), *map(str, flags)],
                       env=os.environ | {"PATH": path})

    failed, missing, static = [], [name for name in DIMENSIONS if name not in done], results.resolve().parent / "static"
    # Temporal flickering is of static videos alone, and last: the filter reads a network that dynamic degree downloads.
    for name in sorted(missing, key=lambda name: name == "temporal flickering"):
        dimension, source = name.replace(" ", "_"), videos
        if name == "temporal flickering":
            call("static_filter", videos, "--result_path", static)
            source = static / "filtered_videos"
        call("evaluate", source, "--dimension", dimension, "--output_path", results.resolve())
        files = results.rglob("*_eval_results.json")
        if not any(f'"{dimension}"' in file.read_text(errors="replace") for file in files):  # its exit code is always 0
            failed.append(name)
    return failed
