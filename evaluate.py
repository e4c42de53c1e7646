"""The papers' metrics of pictures and videos, beside the papers' own figures.

    python sample.py && python evaluate.py                  # the tiny teacher's pictures, exact evaluator
    python evaluate.py --images A B --metrics clip pickscore hpsv2 mps --mps-ckpt MPS_overall_checkpoint.pth
    python evaluate.py --images FOUR_SEEDS --metrics lpips --lpips-ckpt vgg16-397923af.pth vgg.pth
    python evaluate.py --images VIDEOS --metrics fvd clip-video --i3d-ckpt i3d_torchscript.pt --real WEBVID
    python evaluate.py --images VIDEOS --metrics vbench     # or --metrics vbench --vbench-results FOLDER

A picture's prompt is what sample.py has noted in it, else the one of --prompts at its place in the order of
the names. A folder whose files note different models, checkpoints, steps or guidance is refused. Writes
OUT/results.json and OUT/table.md, and each score at once to OUT/scores.jsonl: the same command goes on where
it was stopped. What cannot be read is named and left out.
"""
import argparse
from pathlib import Path

from models.job import parsers
from models.presets import PROMPT_SETS

REAL_VIDEOS = (".mp4", ".avi", ".mkv", ".mov", ".webm")
METRICS = ("clip", "pickscore", "hpsv2", "mps", "lpips", "fvd", "clip-video", "vbench", "shapes")


def parse_args(argv=None):
    parser = parsers.new_parser(__file__, __doc__, argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--images", type=Path, nargs="+", default=[Path("samples")], metavar="FOLDER",
        help="of pictures or videos; each becomes a row of the table")
    add("--metrics", nargs="+", choices=METRICS, default=["shapes"], metavar="METRIC",
        help=f"of {', '.join(METRICS)}; shapes is for the tiny models")
    sets = "; ".join(f"{name} ({what})" for name, what in PROMPT_SETS.items())
    add("--prompts", help=f"file, or a set by name: {sets}")
    add("--out", type=Path, default=Path("runs/evaluate"))
    add("--batch", type=int, default=16, help="pictures or frames per forward")
    add("--device", help="default: cuda, or cpu where there is none")
    for name in ("clip", "pickscore", "hpsv2"):
        add(f"--{name}-ckpt", type=Path, help="file or folder; without it the Hugging Face hub is asked")
    add("--mps-ckpt", type=Path, help="MPS_overall_checkpoint.pth")
    add("--tokenizer", type=Path, help="folder of CLIP's tokenizer; without it the hub is asked")
    add("--clip-backbone", metavar="NAME",
        help="default: ViT-g-14, for clip-video ViT-B-32; also ViT-H-14, ViT-L-14, ViT-B-16")
    add("--clip-pipeline", choices=("plain", "dmd2"), default="plain", help="of the metric clip")
    add("--hpsv2-version", choices=("v2.0", "v2.1"), help="default: v2.0, or what the file's name says")
    add("--mps-threshold", type=float, default=0.3)
    add("--lpips-ckpt", type=Path, nargs="+", metavar="FILE",
        help="torchvision's file and lpips', or one with both")
    add("--lpips-net", choices=("vgg", "alex", "vgg-avgpool"), default="vgg")
    add("--i3d-ckpt", type=Path, help="the published i3d_torchscript.pt, or i3d_pretrained_400.pt")
    add("--real", type=Path, metavar="FOLDER", help="of fvd's real videos, with all folders in it")
    add("--frames", type=int, default=16, help="that fvd takes of each video, from its start")
    add("--stride", type=int, default=4, help="of the frames fvd takes of a real video; 1 of a generated one")
    add("--fvd-resize", choices=("crop", "stretch", "inside"), default="crop",
        help="inside: by the TorchScript file")
    add("--fvd-biased", action="store_true", help="covariances 1/n, as StyleGAN-V, in place of 1/(n-1)")
    add("--vbench-results", type=Path, nargs="+", metavar="PATH",
        help="*_eval_results.json files, or their folder")
    add("--vbench-short", type=Path, metavar="FILE",
        help="VBench's prompt for each line of --prompts, where the videos were sampled with longer ones")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

import json
import sys
from functools import partial

import torch
from torch.nn.functional import avg_pool2d

from models.checkpoint import InputError, replacing, some
from models.eval import metrics, prompt_sets
from models.eval.metrics import Folder, Item, mean, score_items
from models.job import flags
from models.job.folder import check_out, hold
from models.parse import short
from models.pictures import PICTURES, VIDEOS, read_mp4, read_picture, rgb
from models.progress import bar


# ---- metrics: each loads its networks and returns (variant, function from a folder to its figures) ---------

def scored(kind: str, args):
    """The CLIP score, PickScore, HPSv2 or MPS of pictures; of "clip-video" the CLIP score of all frames."""
    from models.eval.scores import load_scorer
    video, name = kind == "clip-video", kind.removesuffix("-video")
    options = {"clip": dict(backbone=args.clip_backbone or "ViT-g-14", pipeline=args.clip_pipeline),
               "clip-video": dict(backbone=args.clip_backbone or "ViT-B-32"),
               "hpsv2": dict(version=args.hpsv2_version), "mps": dict(threshold=args.mps_threshold)}
    ckpt = getattr(args, f"{name}_ckpt")
    score = load_scorer(name, ckpt, args.tokenizer, args.device, **options.get(kind, {}))
    weights = metrics.weights_of(*([ckpt, args.tokenizer] if args.tokenizer else [ckpt]))
    head = dict(metric=kind, variant=score.describe, weights=weights)
    suffixes, read, batch = (VIDEOS, read_mp4, 1) if video else (PICTURES, read_picture, args.batch)

    def compute(loaded: list[list], prompts: list[str]) -> list[float]:
        if not video:
            return score([picture for picture, in loaded], prompts).tolist()
        return [metrics.quick_scores(clip[None], [prompt], ["clip"], {"clip": score}, args.batch)["clip"]
                for (clip,), prompt in zip(loaded, prompts)]

    def measure(folder: Folder) -> dict[str, float]:
        groups = [[item] for item in folder.of(suffixes)]
        return {kind: mean(score_items(folder, head, groups, read, compute, batch))}

    return score.describe, measure


def diversity(args):
    from models.eval import lpips
    net = lpips.load_lpips(args.lpips_net, args.lpips_ckpt, args.device)
    head = dict(metric="lpips", variant=f"{args.lpips_net}, 512 x 512", weights=metrics.weights_of(*args.lpips_ckpt))

    def compute(groups: list[list], _) -> list[float]:
        return [lpips.diversity(net, pictures, args.batch) for pictures in groups]

    def measure(folder: Folder) -> dict[str, float]:
        groups = metrics.by_prompt(folder.of(PICTURES))
        counts = sorted({len(group) for group in groups})
        if counts != [4]:
            folder.notes.append(f"LPIPS diversity of {some(counts)} pictures a prompt; the paper's is of 4")
        return {"lpips": mean(score_items(folder, head, groups, read_picture, compute, 1))}

    return head["variant"], measure


def video_distance(args):
    from models.eval import fvd
    real = sorted((path for path in args.real.rglob("*") if path.suffix.lower() in REAL_VIDEOS),
                  key=metrics.in_order) if args.real else []
    if not real:
        raise InputError(f"{args.real or '--real FOLDER'}: expected real videos ({', '.join(REAL_VIDEOS)}) to compare "
                         "with")
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
        head = dict(metric="fvd", variant=f"{variant}, stride {stride}", weights=metrics.weights_of(args.i3d_ckpt))
        read = partial(read_mp4, frames=args.frames, stride=stride)
        found = score_items(folder, head, [[item] for item in items], read, compute, -(-args.batch // 4))
        return torch.tensor([one for one in found if one is not None], dtype=torch.float64)

    def measure(folder: Folder) -> dict[str, float]:
        folder.broken |= {str(path): f"{path}: no file" for path in real if not path.is_file()}
        a = logits(folder, folder.of(VIDEOS, prompted=False), 1)
        b = logits(folder, [Item(path, None, None) for path in real if path.is_file()], args.stride)
        folder.notes.append(f"FVD of {len(a)} videos against {len(b)} real ones: it falls as they get more, "
                            "so it is comparable at equal numbers only")
        return {"fvd": fvd.frechet_distance(a, b, args.fvd_biased)}

    return f"{variant}, real stride {args.stride}, 1/{'n' if args.fvd_biased else '(n-1)'}", measure


def video_bench(args):
    from models.eval import vbench
    names = {}  # prompt of a video -> VBench's own, which its file is called after
    if args.vbench_short:
        prompts = prompt_sets.prompt_set("vbench" if args.prompts is None else args.prompts)
        own = prompt_sets.prompt_set(args.vbench_short)
        if len(prompts) != len(own):
            raise InputError(f"{args.vbench_short}: {len(own)} prompts, and {len(prompts)} in --prompts; "
                             "expected one for each")
        names = dict(zip(prompts, own))

    def name_of(item: Item) -> str:
        if names and item.prompt not in names:
            raise InputError(f"{item.path}: its prompt is not in --prompts: {item.prompt[:60]!r}")
        return names.get(item.prompt, item.prompt)

    def measure(folder: Folder) -> dict[str, float]:
        results = args.vbench_results
        if not results:
            root = args.out / "vbench" / "_".join(folder.path.resolve().parts[1:])
            videos = vbench.lay_out(root, [(item.path, name_of(item)) for item in folder.of(VIDEOS)])
            results = [root / "results"]
            failed = vbench.run(videos, results[0])
            if failed:  # it says why itself
                folder.notes.append(f"VBench failed in {some(failed, 16)}")
        values, notes = vbench.read_results(results)
        folder.notes += notes
        return {name: 100 * value for name, value in (values | vbench.totals(values)).items()}

    return "", measure


def exact(args):
    from models.eval import shapes

    def measure(folder: Folder) -> dict[str, float]:
        video = any(item.path.suffix.lower() in VIDEOS for item in folder.items)
        samples, prompts, items = [], [], folder.of(VIDEOS if video else PICTURES)
        for item in bar(items, label="shapes", unit="item"):
            try:
                sample = read_mp4(item.path) if video else rgb(read_picture(item.path))
            except InputError as error:
                folder.broken[str(item.path)] = str(error)
                continue
            if video and sample.shape[2:] == (4 * shapes.SIZE, 4 * shapes.SIZE):  # sample.py enlarges
                sample = avg_pool2d(sample.float(), 4).round().byte()
            if sample.shape[-2:] != (shapes.SIZE, shapes.SIZE) or samples and sample.shape != samples[0].shape:
                sizes = {" x ".join(map(str, x.shape)) for x in (*samples[:1], sample)}
                raise InputError(f"{folder.path}: {len(items)} samples of {some(sorted(sizes))}; the exact evaluator "
                                 f"takes the tiny models' {shapes.SIZE} x {shapes.SIZE}, all alike")
            if video and len(sample) < 2:
                raise InputError(f"{item.path}: a video of one frame; the exact evaluator takes two at least")
            samples.append(sample)
            prompts.append(item.prompt)
        if len(samples) < 2:
            raise InputError(f"{folder.path}: {len(samples)} samples; the exact evaluator takes two at least")
        if len(prompts) < 8 * len(set(prompts)):
            folder.notes.append("total variation and Frechet distance need many samples of each prompt: "
                                f"`python sample.py --prompts {'moving-' * video}shapes`")
        return metrics.quick_scores(torch.stack(samples), prompts, ["shapes"], {})

    return "", measure


LOADERS = {"lpips": diversity, "fvd": video_distance, "vbench": video_bench, "shapes": exact}


# ---- the table ---------------------------------------------------------------------------------------------

def main(args):
    args.device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    flags.check_numbers(args)
    if args.frames < 1:
        raise InputError(f"--frames {args.frames}: expected at least 1")
    check_out(args.out)
    try:
        torch.zeros(1, device=args.device).item()
    except Exception as error:  # of a device that torch does not know, or that is not there
        raise InputError(f"--device {args.device}: {short(error)}; expected cpu, or cuda where there is one") from error
    if args.vbench_results and len(args.images) > 1:
        raise InputError("--vbench-results are those of one set of videos; expected one folder of --images")
    prompts = prompt_sets.prompt_set(args.prompts) if args.prompts is not None else None
    unfinished = {path.resolve() for path in args.images if (path / "lock").exists()}
    hold(args.out)
    folders, problems, variants = [], [], {}
    elsewhere = args.metrics == ["vbench"] and args.vbench_results  # no need of the videos
    for path in args.vbench_results[:1] if elsewhere else args.images:
        folder = Folder(path, args.out / "scores.jsonl")
        try:
            folder.items = [] if elsewhere else metrics.read_items(path, prompts, folder.broken)
            folder.notes += metrics.doubts(path, folder.items, prompts)
            if path.resolve() in unfinished:
                folder.notes.append("sample.py is at work there or was stopped before its end: samples may be missing")
            folders.append(folder)
        except InputError as error:
            problems.append(str(error))
    for metric in args.metrics if folders else ():
        try:
            variant, measure = LOADERS.get(metric, partial(scored, metric))(args)
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
    if args.out.resolve() not in unfinished:  # a lock would say that of a folder of samples
        (args.out / "lock").unlink(missing_ok=True)
    if problems:
        raise InputError("\nevaluate.py: ".join(problems))


def report(args, folders: list[Folder], variants: dict[str, str]) -> None:
    broken = {name: reason for folder in folders for name, reason in folder.broken.items()}
    told = [f"{folder.path}: {note}\n" for folder in folders for note in folder.notes]
    sys.stderr.write("".join(told + [f"left out: {reason}\n" for reason in broken.values()]))
    if not variants:
        return
    paper = metrics.paper_rows({item.model for folder in folders for item in folder.items}, list(variants))
    counts = {folder.path: sum(str(item.path) not in broken for item in folder.items) for folder in folders}
    rows = {f"{folder.path}, {counts[folder.path]} samples": folder.figures for folder in folders if folder.figures}
    text = metrics.table(paper | rows, variants)
    results = dict(rows={str(folder.path): folder.figures for folder in folders}, variants=variants,
                   paper=paper, samples={str(path): count for path, count in counts.items()}, broken=broken,
                   notes={str(folder.path): folder.notes for folder in folders}, args=vars(args))
    for name, content in (("results.json", json.dumps(results, indent=1, default=str)), ("table.md", text)):
        with replacing(args.out / name) as temporary:
            temporary.write_text(content, encoding="utf-8", errors="backslashreplace")  # a folder's name
    print(text + f"{args.out / 'results.json'}, {args.out / 'table.md'}")


if __name__ == "__main__":
    flags.entry("evaluate.py", main, args)
