"""The papers' metrics of pictures and videos, beside the papers' own figures.

    python sample.py && python evaluate.py                  # the tiny teacher's pictures, exact evaluator
    python evaluate.py --images A B --metrics clip pickscore hpsv2 mps --mps-ckpt MPS_overall_checkpoint.pth
    python evaluate.py --images FOUR_SEEDS --metrics lpips --lpips-ckpt vgg16-397923af.pth vgg.pth
    python evaluate.py --images VIDEOS --metrics fvd clip-video --i3d-ckpt i3d_torchscript.pt --real WEBVID
    python evaluate.py --images VIDEOS --metrics vbench     # or --metrics vbench --vbench-results FOLDER

A picture's prompt is what sample.py has noted in it, else the one of --prompts at its place in the order of
the names. Writes OUT/results.json and OUT/table.md, and each score at once to OUT/scores.jsonl: the same
command goes on where it was stopped. What cannot be read is named and left out.
"""
import argparse
import json
import sys
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import avg_pool2d
from tqdm import tqdm

from models.eval import fvd, lpips, metrics, moving_shapes, prompt_sets, shapes, vbench
from models.job import flags
from models.checkpoint import InputError, replacing, some
from models.data import read_mp4
from models.eval.metrics import PICTURES, VIDEOS, Item, by_prompt, mean, of_kind, read_picture, score_items
from models.eval.scores import BACKBONES, HPS_FILES, load_scorer

SCORERS = ("clip", "pickscore", "hpsv2", "mps")
METRICS = (*SCORERS, "lpips", "fvd", "clip-video", "vbench", "shapes")


def parse_args(argv=None):
    parser = argparse.ArgumentParser(prog="evaluate.py", description=__doc__,
                                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", default=[Path("samples")], metavar="FOLDER",
        help="of pictures or videos; each becomes a row of the table")
    add("--metrics", nargs="+", choices=METRICS, default=["shapes"], metavar="METRIC",
        help=f"of {', '.join(METRICS)}; shapes is for the tiny models")
    sets = "; ".join(f"{name} ({what})" for name, what in prompt_sets.SETS.items())
    add("--prompts", help=f"file, or a set by name: {sets}")
    add("--out", type=Path, default=Path("runs/evaluate"))
    add("--batch", type=int, default=16, help="pictures or frames per forward")
    add("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    for name in ("clip", "pickscore", "hpsv2"):
        add(f"--{name}-ckpt", type=Path, help="file or folder; without it the Hugging Face hub is asked")
    add("--mps-ckpt", type=Path, help="MPS_overall_checkpoint.pth")
    add("--tokenizer", type=Path, help="folder of CLIP's tokenizer; without it the hub is asked")
    add("--clip-backbone", choices=BACKBONES, help="default: ViT-g-14, for clip-video ViT-B-32")
    add("--clip-pipeline", choices=("plain", "dmd2"), default="plain", help="of the metric clip")
    add("--hpsv2-version", choices=HPS_FILES, default="v2.0")
    add("--mps-threshold", type=float, default=0.3)
    add("--lpips-ckpt", type=Path, nargs="+", metavar="FILE",
        help="torchvision's file and lpips', or one with both")
    add("--lpips-net", choices=lpips.NETS, default="vgg")
    add("--i3d-ckpt", type=Path, help="i3d_torchscript.pt, a program that is run, or i3d_pretrained_400.pt")
    add("--real", type=Path, metavar="FOLDER", help="of fvd's real videos, with all folders in it")
    add("--frames", type=int, default=16, help="that fvd takes of each video, from its start")
    add("--stride", type=int, default=4, help="of the frames fvd takes of a real video; 1 of a generated one")
    add("--fvd-resize", choices=fvd.RESIZE, default="crop", help="inside: by the TorchScript file")
    add("--fvd-biased", action="store_true", help="covariances 1/n, as StyleGAN-V, in place of 1/(n-1)")
    add("--vbench-results", type=Path, nargs="+", metavar="PATH",
        help="*_eval_results.json files, or their folder")
    add("--vbench-short", type=Path, metavar="FILE",
        help="VBench's own prompt for each line of --prompts, where the videos were sampled with longer ones")
    return parser.parse_args(argv)


@dataclass
class Folder:
    """One row of the table. `broken`: file -> why it is left out; `figures`: column -> value."""
    path: Path
    items: list[Item]
    broken: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)
    figures: dict[str, float] = field(default_factory=dict)

    def of(self, suffixes: tuple[str, ...], prompted: bool = True) -> list[Item]:
        return of_kind(self.path, self.items, suffixes, prompted)


def scores_of(args, folder: Folder, head: dict, groups: list, read, compute, batch: int) -> list:
    return score_items(args.out / "scores.jsonl", head, groups, read, compute, batch, folder.broken)


# ---- metrics: each loads its networks and returns (variant, function from a folder to its figures) ---------

def scorer(kind: str, args, **options):
    ckpt = getattr(args, f"{kind}_ckpt")
    try:
        score = load_scorer(kind, ckpt, args.tokenizer, args.device, **options)
    except InputError as error:  # whose flags are those of one scorer
        words = str(error).replace("--ckpt", f"--{kind}-ckpt").replace("--backbone", "--clip-backbone")
        raise InputError(words) from error
    return score, dict(variant=score.describe, weights=str(ckpt or "hub"))


def picture_score(kind: str, args):
    options = {"clip": dict(backbone=args.clip_backbone or "ViT-g-14", pipeline=args.clip_pipeline),
               "hpsv2": dict(version=args.hpsv2_version), "mps": dict(threshold=args.mps_threshold)}
    score, head = scorer(kind, args, **options.get(kind, {}))

    def compute(pictures: list[list], prompts: list[str]) -> list[float]:
        return score([picture for picture, in pictures], prompts).tolist()

    def measure(folder: Folder) -> dict[str, float]:
        groups, row = [[item] for item in folder.of(PICTURES)], head | {"metric": kind}
        return {kind: mean(scores_of(args, folder, row, groups, read_picture, compute, args.batch))}

    return score.describe, measure


def clip_video(args):
    score, head = scorer("clip", args, backbone=args.clip_backbone or "ViT-B-32")

    def compute(videos: list[list], prompts: list[str]) -> list[float]:
        return [metrics.quick_scores(video[None], [prompt], ["clip"], {"clip": score}, args.batch)["clip"]
                for (video,), prompt in zip(videos, prompts)]

    def measure(folder: Folder) -> dict[str, float]:
        groups, row = [[item] for item in folder.of(VIDEOS)], head | {"metric": "clip-video"}
        return {"clip-video": mean(scores_of(args, folder, row, groups, read_mp4, compute, 1))}

    return score.describe, measure


def diversity(args):
    net = lpips.load_lpips(args.lpips_net, args.lpips_ckpt, args.device)
    head = dict(metric="lpips", variant=f"{args.lpips_net}, 512 x 512", weights=some(args.lpips_ckpt))

    def compute(groups: list[list], _) -> list[float]:
        if min(map(len, groups)) < 2:
            raise InputError("one picture of its prompt; diversity needs two")
        return [lpips.diversity(net, pictures, args.batch) for pictures in groups]

    def measure(folder: Folder) -> dict[str, float]:
        groups = by_prompt(folder.of(PICTURES))
        counts = sorted({len(group) for group in groups})
        if counts != [4]:
            folder.notes.append(f"LPIPS diversity of {some(counts)} pictures a prompt; the paper's is of 4")
        return {"lpips": mean(scores_of(args, folder, head, groups, read_picture, compute, 1))}

    return head["variant"], measure


def video_distance(args):
    real = sorted(args.real.rglob("*.mp4"), key=metrics.in_order) if args.real else []
    if not real:
        raise InputError(f"{args.real or '--real FOLDER'}: expected real videos (.mp4) to compare with")
    features = fvd.load_i3d(args.i3d_ckpt, args.fvd_resize, args.device)
    variant = f"{args.i3d_ckpt.name}, {args.fvd_resize}, {args.frames} frames"

    def compute(videos: list[list], _) -> list[list[float]]:
        videos = [video for video, in videos]
        if min(map(len, videos)) < args.frames:
            raise InputError(f"{len(videos[0])} frames; --frames asks for {args.frames}")
        if len({video.shape for video in videos}) == 1:
            return features(torch.stack(videos)).tolist()
        return [features(video[None])[0].tolist() for video in videos]

    def logits(folder: Folder, items: list[Item], stride: int) -> torch.Tensor:
        head = dict(metric="fvd", variant=f"{variant}, stride {stride}", weights=str(args.i3d_ckpt))
        read = partial(read_mp4, frames=args.frames, stride=stride)
        rows = scores_of(args, folder, head, [[item] for item in items], read, compute, -(-args.batch // 4))
        return torch.tensor([row for row in rows if row is not None], dtype=torch.float64)

    def measure(folder: Folder) -> dict[str, float]:
        a = logits(folder, folder.of(VIDEOS, prompted=False), 1)
        b = logits(folder, [Item(path, None, None) for path in real], args.stride)
        folder.notes.append(f"FVD of {len(a)} videos against {len(b)} real ones: it falls as they get more, "
                            "so it is comparable at equal numbers only")
        return {"fvd": fvd.frechet_distance(a, b, args.fvd_biased)}

    return f"{variant}, real stride {args.stride}, 1/{'n' if args.fvd_biased else '(n-1)'}", measure


def video_bench(args):
    short = {}
    if args.vbench_short:
        long, own = (prompt_sets.prompt_set(path) for path in (args.prompts or "vbench", args.vbench_short))
        if len(long) != len(own):
            raise InputError(f"{args.vbench_short}: {len(own)} prompts, and {len(long)} in --prompts; "
                             "expected one for each")
        short = dict(zip(long, own))

    def name_of(item: Item) -> str:
        if short and item.prompt not in short:
            raise InputError(f"{item.path}: its prompt is not in --prompts: {item.prompt[:60]!r}")
        return short.get(item.prompt, item.prompt)

    def measure(folder: Folder) -> dict[str, float]:
        results = args.vbench_results
        if not results:
            root = args.out / "vbench" / "_".join(folder.path.resolve().parts[1:])
            videos = vbench.lay_out(root, [(item.path, name_of(item)) for item in folder.of(VIDEOS)])
            results = [root / "results"]
            failed = vbench.run(videos, results[0])
            folder.notes += [f"VBench failed in {some(failed, 16)}"] * bool(failed)  # it says why itself
        values, notes = vbench.read_results(results)
        folder.notes += notes
        return {name: 100 * value for name, value in (values | vbench.totals(values)).items()}

    return "", measure


def exact(args):
    def measure(folder: Folder) -> dict[str, float]:
        videos = any(item.path.suffix.lower() in VIDEOS for item in folder.items)
        samples, prompts = [], []
        for item in tqdm(folder.of(VIDEOS if videos else PICTURES), desc="shapes", unit="item"):
            try:
                sample = read_mp4(item.path) if videos else metrics.pixels(read_picture(item.path))
                if videos and sample.shape[2:] == (4 * shapes.SIZE, 4 * shapes.SIZE):  # sample.py enlarges
                    sample = avg_pool2d(sample.float(), 4).round().byte()
                samples.append(sample)
                prompts.append(item.prompt)
            except InputError as error:
                folder.broken[str(item.path)] = str(error)
        sizes = {" x ".join(map(str, sample.shape)) for sample in samples}
        if len(samples) < 2 or len(sizes) > 1 or samples[0].shape[-2:] != (shapes.SIZE, shapes.SIZE):
            raise InputError(f"{folder.path}: {len(samples)} samples of {some(sizes)}; the exact evaluator "
                             f"takes the tiny models' {shapes.SIZE} x {shapes.SIZE}, two at least")
        if len(prompts) < 8 * len(set(prompts)):
            folder.notes.append("total variation and Frechet distance need many samples of each prompt: "
                                f"`python sample.py --prompts {'moving-' * videos}shapes`")
        return (moving_shapes if videos else shapes).evaluate(torch.stack(samples), prompts)

    return "", measure


MAKERS = {kind: partial(picture_score, kind) for kind in SCORERS}
MAKERS |= {"lpips": diversity, "fvd": video_distance, "clip-video": clip_video, "vbench": video_bench,
           "shapes": exact}


# ---- the table ---------------------------------------------------------------------------------------------

def main(args):
    flags.at_least_1(args, ("batch", "frames", "stride"))
    if args.vbench_results and len(args.images) > 1:
        raise InputError("--vbench-results are those of one set of videos; expected one folder of --images")
    prompts = prompt_sets.prompt_set(args.prompts) if args.prompts else None
    folders, problems, variants = [], [], {}
    for path in args.images:
        if args.vbench_results and args.metrics == ["vbench"]:
            folders.append(Folder(args.vbench_results[0], []))  # the videos may lie elsewhere
            continue
        try:
            broken = {}
            folders.append(Folder(path, metrics.read_items(path, prompts, broken), broken))
        except InputError as error:
            problems.append(str(error))
    args.out.mkdir(parents=True, exist_ok=True)
    for metric in args.metrics if folders else ():
        try:
            variant, measure = MAKERS[metric](args)
        except InputError as error:
            problems.append(f"{metric}: {error}")
            continue
        for folder in folders:
            try:
                figures = measure(folder)
                folder.figures |= figures
                variants |= dict.fromkeys(figures, variant)
            except InputError as error:
                problems.append(f"{metric}: {error}")
        measure = None  # one metric's networks at a time in memory
    report(args, folders, variants)
    if problems:
        raise InputError("\nevaluate.py: ".join(problems))


def report(args, folders: list[Folder], variants: dict[str, str]) -> None:
    broken = {name: reason for folder in folders for name, reason in folder.broken.items()}
    for line in [f"{folder.path}: {note}" for folder in folders for note in folder.notes] + \
            [f"left out: {reason}" for reason in broken.values()]:
        print(line, file=sys.stderr)
    if not variants:
        return
    paper = metrics.paper_rows({item.model for folder in folders for item in folder.items}, list(variants))
    counts = {folder.path: sum(str(item.path) not in broken for item in folder.items) for folder in folders}
    rows = {f"{folder.path}, {counts[folder.path]} samples": folder.figures
            for folder in folders if folder.figures}
    text = metrics.table(paper | rows, variants)
    results = dict(rows={str(folder.path): folder.figures for folder in folders}, variants=variants,
                   paper=paper, samples={str(path): count for path, count in counts.items()}, broken=broken,
                   notes={str(folder.path): folder.notes for folder in folders}, args=vars(args))
    for name, content in (("results.json", json.dumps(results, indent=1, default=str)), ("table.md", text)):
        with replacing(args.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8")
    print(text + f"{args.out / 'results.json'}, {args.out / 'table.md'}")


if __name__ == "__main__":
    flags.entry("evaluate.py", parse_args, main)
