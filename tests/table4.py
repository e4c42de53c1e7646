"""The ablations of Tables 4 and 5 on the embedded tiny-sdxl: `python tests/table4.py` (four hours of two cores).

Every method has the same search: on seed 0, short runs over one grid of the generator's rate and of the others'
multiple of it. The best by accuracy less total variation then runs longer with three other seeds; the rates fall to 0
over all of a run. Ablations (A2 to A4, A1 + ..., TTUR) take the rates of the row they change. Prints every trial, then
a table: prompt accuracy, total variation over free attributes, Frechet distance and sharpness of the one-step student,
mean and deviation over the seeds. What is finished is not run again. A2 needs DINOv2's weights: pass --dinov2 FILE.
"""
import argparse
import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable
from concurrent.futures import Future, ThreadPoolExecutor
from functools import partial
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.diffusion import generator_times, teacher_times  # noqa: E402
from models.eval import shapes  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from models.saving import replacing  # noqa: E402
from models.tiny.training import encode_captions, generate, open_teacher  # noqa: E402

ROWS = {  # row of the paper: (what it is, script, flags, run it starts from, row whose rates it takes)
    "A1": ("rectified flow on the pairs (MSE)", "adp.py", ["--loss", "mse"], None, "A1"),
    "A2": ("ADP, DINOv2 instead of SAM", "adp.py", ["--pixel-encoder", "dinov2"], None, "A5"),
    "A3": ("ADP, lambdas 0.7 / 0.3", "adp.py", ["--lambdas", "0.7", "0.3"], None, "A5"),
    "A4": ("ADP, lambdas 1.0 / 0.0", "adp.py", ["--lambdas", "1", "0"], None, "A5"),
    "A5": ("ADP only", "adp.py", [], None, "A5"),
    "B1": ("ADM without ADP", "adm.py", [], None, "B1"),
    "B2": ("DMD without ADP", "dmd.py", [], None, "B2"),
    "B3": ("DMD with ADP", "dmd.py", [], "A5", "B3"),
    "B4": ("DMDX: ADM with ADP, TTUR 1", "adm.py", [], "A5", "B4"),
    "A1 + DMD": ("DMD after A1, not in the paper", "dmd.py", [], "A1", "B3"),
    "A1 + ADM": ("ADM after A1, not in the paper", "adm.py", [], "A1", "B4"),
    "TTUR 4": ("B4 with TTUR 4", "adm.py", ["--ttur", "4"], "A5", "B4"),
    "TTUR 8": ("B4 with TTUR 8", "adm.py", ["--ttur", "8"], "A5", "B4"),
}
NAME = "tiny-sdxl"
# theta's rate, and psi's over it, tau's over twice it. Without ADP the generator predicts epsilon, and
# x_0 = (z - sigma * eps) / alpha_1 moves 15 times as far: the lowest rates are for it.
GRID = [*product((1e-5, 3e-5, 1e-4, 3e-4), (4, 32))]
ALONE = [(theta, 0) for theta in (1e-5, 2e-5, 3e-5, 6e-5, 1e-4, 2e-4, 3e-4, 6e-4)]  # A1 trains nothing else
FIGURES = ("accuracy", "total_variation", "frechet", "sharpness")


def run(script: str, out: Path, *flags, model: str = NAME) -> None:
    """One process with one thread; its log is beside its folder."""
    command = [sys.executable, ROOT / script, "--model", model, "--out", out, *flags]
    path = out.with_name(f"{out.name}.log")  # the name holds a rate, whose point begins no suffix
    with path.open("w") as log:
        code = subprocess.run(list(map(str, command)), stdout=log, stderr=log, cwd=ROOT,
                              env=os.environ | {"OMP_NUM_THREADS": "1"}).returncode
    if code:
        raise SystemExit(f"{out}: {script} ended with {code}, see {path}")
    print(f"{out.name} done", flush=True)


def finish(script: str, out: Path, *flags, model: str = NAME) -> None:
    """`run` a training without its comparison, unless it is finished; what was begun and killed goes on."""
    if not (out / "generator.safetensors").exists():
        run(script, out, "--evaluate", 0, "--resume", *flags, model=model)


def rate_flags(script: str, theta: float, times: int) -> list:
    """All rates of a run, which fall to 0; its last weights count, not their average."""
    rates = dict(theta=theta, psi=times * theta, tau=2 * times * theta)
    trained = {"adm.py": ("theta", "psi", "tau"), "adp.py": ("theta", "tau"), "dmd.py": ("theta", "psi")}[script]
    return ["--lr-decay", 1, "--ema", 0, *(flag for role in trained for flag in (f"--lr-{role}", f"{rates[role]:g}"))]


def choose(label: str, trials: dict[tuple, Future]) -> tuple[float, int]:
    """The rates of the best trial; prints all of them."""
    found = {rates: trial.result() for rates, trial in trials.items()}
    best = max(found, key=lambda rates: found[rates]["accuracy"] - found[rates]["total_variation"])
    for rates, row in found.items():
        print(f"trial: {label}, rates {rates[0]:g} x {rates[1]}: accuracy {row['accuracy']:.3f}, total variation "
              f"{row['total_variation']:.3f}, Frechet {row['frechet']:.3f}" + " <- best" * (rates == best))
    return best


def kept(path: Path, compute: Callable[[], dict]) -> dict:
    """What is in a JSON file, or is computed and put there."""
    if not path.exists():
        with replacing(path) as temporary:
            temporary.write_text(json.dumps(compute()))
    return json.loads(path.read_text())


def figures(ckpt: Path, samples: int, steps: int = 1, cfg: float | None = None, model: str = NAME, few: int = 1,
            out: Path | None = None) -> dict:
    """Exact figures of the denoiser in a file, the same noise and prompts for all, kept in `out`, by default the
    file's folder. `few`: a generator's steps."""
    def compute() -> dict:
        preset = PRESETS[model]
        F, vae, text = open_teacher(model, ckpt)
        tn = (generator_times if steps == few else teacher_times)(steps, preset.shift, F.schedule)
        prompts, table = shapes.evaluation_prompts(samples), encode_captions(preset, text)
        return shapes.evaluate(generate(preset, F, vae, table, prompts, tn, cfg), prompts)
    return kept((out or ckpt.parent) / f"figures_{steps}_{cfg}_{samples}.json", compute)


def seconds(out: Path) -> float:
    """Per update of the generator, its share of fake updates included; the median iteration of each kind."""
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    full = statistics.median(row["seconds"] for row in rows if "loss_theta" in row)
    fake = [row["seconds"] for row in rows if "loss_theta" not in row]
    return full + (statistics.median(fake) * len(fake) / (len(rows) - len(fake)) if fake else 0)


def cells(rows: list[dict], names: tuple[str, ...]) -> str:
    """Mean and deviation of each figure, as cells of a table; of one that no row has, an empty cell."""
    texts = []
    for name in names:
        values = [row[name] for row in rows if name in row]
        spread = f" ± {statistics.stdev(values):.3f}" if len(values) > 1 else ""
        texts.append(f"{statistics.mean(values):.3f}{spread}" if values else "")
    return " | ".join(texts)


def options(doc: str, out: str, samples: int) -> argparse.ArgumentParser:
    """The flags of a table's script."""
    parser = argparse.ArgumentParser(description=doc, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(out))
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--samples", type=int, default=samples)
    parser.add_argument("--jobs", type=int, default=os.cpu_count(), help="runs at a time, one thread each")
    return parser


def run_of(args, name: str, rates: tuple[float, int], seed: int, updates: int) -> Path:
    """A row's run, finished: its folder."""
    _, script, flags, first, _ = ROWS[name]
    out = args.out / f"{name.replace(' ', '')}-{rates[0]:g}-{rates[1]}-{updates}-{seed}"
    flags = [*flags, *rate_flags(script, *rates), "--max-iter", updates, "--seed", seed]
    flags += ["--pairs", args.out / "odes"] if script == "adp.py" else []
    flags += ["--init", run_of(args, first, args.best[first], seed, args.updates[1])] if first else []
    flags += ["--pixel-ckpt", args.dinov2] if name == "A2" else []
    finish(script, out, *flags)
    return out


def main():
    parser = options(__doc__, "runs/table4", 1024)
    parser.add_argument("--rows", nargs="+", choices=ROWS, default=[*ROWS])
    parser.add_argument("--dinov2", type=Path, help="its weights, for A2")
    parser.add_argument("--updates", type=int, nargs=2, default=(300, 1200), help="of a trial, of a row's run")
    args = parser.parse_args()
    args.out, args.best, runs = args.out.resolve(), {}, {}
    args.out.mkdir(parents=True, exist_ok=True)
    names = [name for name in args.rows if name != "A2" or args.dinov2]
    run("collect_odes.py", args.out / "odes", "--count", 4096)  # a row's 19,200 samples pass over them 5 times

    def long_run(name, seed):
        return run_of(args, name, args.best[ROWS[name][4]], seed, args.updates[1])

    def trial(name, rates):
        return figures(run_of(args, name, rates, 0, args.updates[0]) / "generator.safetensors", args.samples)

    with ThreadPoolExecutor(args.jobs) as pool:
        for wave in ("A1", "A5", "B1", "B2"), ("B3", "B4"):  # the second starts from runs of A5
            searched = [name for name in wave if any(name in ROWS[row][3:] for row in names)]
            trials = {name: {rates: pool.submit(trial, name, rates) for rates in (ALONE if name == "A1" else GRID)}
                      for name in searched}
            args.best |= {name: choose(name, trials[name]) for name in searched}
            for first in sorted({ROWS[name][3] for name in names} & {*searched}):  # once, before what starts from it
                list(pool.map(partial(long_run, first), range(1 + args.seeds)))
            for name in names:
                if ROWS[name][4] in searched:
                    runs[name] = [pool.submit(long_run, name, seed) for seed in range(1, 1 + args.seeds)]
    runs = {name: [job.result() for job in runs[name]] for name in names}

    print("\n| row | rates | accuracy | total variation | Frechet | sharpness | time per update, of B4's |\n|" + "---|" * 7)
    teacher = PRESETS[NAME]
    for steps, cfg in ((teacher.teacher_steps, teacher.teacher_cfg), (1, teacher.teacher_cfg), (1, None)):
        label = f"teacher, {steps} step{'s' * (steps > 1)}" + (f", guidance {cfg:g}" if cfg else "")
        print(f"| {label} | | {cells([figures(teacher.ckpt, args.samples, steps, cfg, out=args.out)], FIGURES)} | |")
    for name in names:
        theta, times = args.best[ROWS[name][4]]
        time = f"{seconds(runs[name][0]) / seconds(runs['B4'][0]):.2f}" if ROWS[name][3] and "B4" in runs else ""
        students = [figures(out / "generator.safetensors", args.samples) for out in runs[name]]
        print(f"| {name} {ROWS[name][0]} | {theta:g}, x {times} | {cells(students, FIGURES)} | {time} |", flush=True)


if __name__ == "__main__":
    main()
