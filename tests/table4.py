"""The ablations of Tables 4 and 5 on the embedded tiny-sdxl: `python tests/table4.py` (an hour on two cores).

Runs collect_odes.py, adp.py, adm.py and dmd.py with each row's flags for each seed and prints a table: prompt
accuracy, total variation over free attributes and Frechet distance of the one-step student, mean and standard
deviation over the seeds. What is finished is not run again. A2 needs DINOv2's weights: pass --dinov2 FILE.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.checkpoint import open_tensors  # noqa: E402
from models.diffusion import generator_times, teacher_times  # noqa: E402
from models.eval import shapes  # noqa: E402
from models.job.notes import parametrisation  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from models.tiny.training import encode_captions, generate, open_teacher  # noqa: E402

ROWS = {  # row of the paper: (what it is, script, flags, run it starts from)
    "A1": ("rectified flow on the pairs (MSE)", "adp.py", ["--loss", "mse"], None),
    "A2": ("ADP, DINOv2 instead of SAM", "adp.py", ["--pixel-encoder", "dinov2"], None),
    "A3": ("ADP, lambdas 0.7 / 0.3", "adp.py", ["--lambdas", "0.7", "0.3"], None),
    "A4": ("ADP, lambdas 1.0 / 0.0", "adp.py", ["--lambdas", "1", "0"], None),
    "A5": ("ADP only", "adp.py", [], None),
    # Without ADP the generator predicts epsilon, and x_0 = (z - sigma * eps) / alpha_1 moves 15 times as far.
    "B1": ("ADM without ADP", "adm.py", ["--lr-theta", "1e-5"], None),
    "B2": ("DMD without ADP", "dmd.py", ["--lr-theta", "1e-5"], None),
    "B3": ("DMD with ADP", "dmd.py", [], "A5"),
    "B4": ("DMDX: ADM with ADP, TTUR 1", "adm.py", [], "A5"),
    "TTUR 4": ("B4 with TTUR 4", "adm.py", ["--ttur", "4"], "A5"),
    "TTUR 8": ("B4 with TTUR 8", "adm.py", ["--ttur", "8"], "A5"),
}
FIGURES = ("accuracy", "total_variation", "frechet", "sharpness")


def run(script: str, out: Path, *flags, model: str = "tiny-sdxl") -> None:
    """One process with one thread; its log is beside its folder."""
    command = [sys.executable, ROOT / script, "--model", model, "--out", out, *flags]
    with out.with_suffix(".log").open("w") as log:
        code = subprocess.run(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"{out}: {script} ended with {code}, see {out.with_suffix('.log')}")
    print(f"{out.name} done", flush=True)


def finish(script: str, out: Path, *flags, model: str = "tiny-sdxl") -> None:
    """`run` a training without its comparison, unless it is finished; what was begun and killed goes on."""
    if not (out / "generator.safetensors").exists():
        run(script, out, "--evaluate", 0, "--resume", *flags, model=model)


def train(args, name: str, seed: int) -> None:
    """A row's run of one seed."""
    _, script, flags, first = ROWS[name]
    flags = [*flags, "--seed", seed]
    flags += ["--pairs", args.out / "odes"] if script == "adp.py" else []
    flags += ["--init", args.out / f"{first}-{seed}"] if first else []
    flags += ["--pixel-ckpt", args.dinov2] if name == "A2" else []
    finish(script, args.out / f"{name.replace(' ', '')}-{seed}", *flags)


def figures(ckpt: Path, samples: int, steps: int = 1, cfg: float | None = None, model: str = "tiny-sdxl",
            few: int = 1) -> dict:
    """Exact figures of the denoiser in a file, the same noise and prompts for all. `few`: a generator's steps."""
    preset = PRESETS[model]
    F, vae, text = open_teacher(model, ckpt)
    F = replace(F, **parametrisation(open_tensors(ckpt).metadata))
    tn = (generator_times if steps == few else teacher_times)(steps, preset.shift, F.schedule)
    prompts, table = shapes.evaluation_prompts(samples), encode_captions(preset, text)
    return shapes.evaluate(generate(preset, F, vae, table, prompts, tn, cfg), prompts)


def seconds(out: Path) -> float:
    """Per update of the generator, its share of fake updates included; the median iteration of each kind."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    full = statistics.median(row["seconds"] for row in rows if "loss_theta" in row)
    fake = [row["seconds"] for row in rows if "loss_theta" not in row]
    return full + (statistics.median(fake) * len(fake) / (len(rows) - len(fake)) if fake else 0)


def cells(rows: list[dict], names: tuple[str, ...]) -> str:
    """Mean and deviation of each figure, as cells of a table."""
    texts = []
    for name in names:
        values = [row[name] for row in rows]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.3f}{spread}")
    return " | ".join(texts)


def line(label: str, rows: list[dict], note: str = "") -> str:
    return f"| {label} | {cells(rows, FIGURES)} | {note} |"


def options(doc: str, out: str, samples: int) -> argparse.ArgumentParser:
    """The flags of a table's script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    return parser


def main():
    parser = options(__doc__, "runs/table4", 1024)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--dinov2", type=Path, help="its weights, for A2")
    args = parser.parse_args()
    args.out, seeds = args.out.resolve(), range(args.seeds)
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in args.rows if name != "A2" or args.dinov2]
    if any(ROWS[name][3] == "A5" for name in names) and "A5" not in names:
        names.insert(0, "A5")
    run("collect_odes.py", args.out / "odes")
    waves = [name for name in names if not ROWS[name][3]], [name for name in names if ROWS[name][3]]
    with ThreadPoolExecutor(args.jobs) as pool:
        for wave in waves:  # what others start from comes first
            list(pool.map(lambda job: train(args, *job), [(name, seed) for seed in seeds for name in wave]))

    print("\n| row | accuracy | total variation | Frechet | sharpness | s per update, relative |\n|---|---|---|---|---|---|")
    teacher = PRESETS["tiny-sdxl"]
    for steps, cfg in ((teacher.teacher_steps, teacher.teacher_cfg), (1, teacher.teacher_cfg), (1, None)):
        label = f"teacher, {steps} step{'s' * (steps > 1)}" + (f", guidance {cfg:g}" if cfg else "")
        print(line(label, [figures(teacher.ckpt, args.samples, steps, cfg)]))
    base = args.out / "B4-0"
    for name in names:
        runs = [args.out / f"{name.replace(' ', '')}-{seed}" for seed in seeds]
        relative = f"{seconds(runs[0]) / seconds(base):.2f}" if base.exists() and ROWS[name][3] else ""
        students = [figures(out / "generator.safetensors", args.samples) for out in runs]
        print(line(f"{name} {ROWS[name][0]}", students, relative), flush=True)


if __name__ == "__main__":
    main()
