"""ADM at 4 steps, where the paper uses it, on the embedded tiny-sd3: `python tests/table_adm.py` (3 hours of a core).

Each method has the same search: on seed 0, short runs over one grid of the generator's rate and of the others'
multiple of it. The best by accuracy less total variation then runs longer with three other seeds. Prints every trial,
the table of means and deviations, and what metrics.jsonl says of the discriminator. What is finished is not run again.
"""
import json
import sys
from concurrent.futures import ThreadPoolExecutor
from itertools import product
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

import table4  # noqa: E402
from models.job.log import average  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from table4 import FIGURES, cells, finish, options  # noqa: E402

NAME, N = "tiny-sd3", 4
PRESET = PRESETS[NAME]
METHODS = {
    "DMD": ("dmd.py", []),
    "ADM": ("adm.py", []),
    "ADM, --normalise": ("adm.py", ["--normalise"]),
    "ADM, --r1 2": ("adm.py", ["--r1", 2]),
    "ADM, --normalise --r1 2": ("adm.py", ["--normalise", "--r1", 2]),
}
THETAS, TIMES = (2e-5, 5e-5, 1e-4, 2e-4), (4, 16)  # the fake model's rate is TIMES of the generator's, D's twice that


def figures(out: Path, ckpt: Path, samples: int, steps: int = N, cfg: float | None = None) -> dict:
    """table4.py's of a run's generator, or of the teacher, kept in a file in `out`."""
    cached = out / f"figures_{steps}_{cfg}_{samples}.json"
    if not cached.exists():
        cached.write_text(json.dumps(table4.figures(ckpt, samples, steps, cfg, NAME, N)))
    return json.loads(cached.read_text())


def distil(args, method: str, theta: float, times: int, seed: int, updates: int) -> dict:
    """Figures and diagnostics of one run."""
    script, flags = METHODS[method]
    word = "".join(c for c in method if c.isalnum() or c == "-")
    out = args.out / f"{word}-{theta:g}-{times}-{updates}-{seed}"
    rates = ["--lr-theta", theta, "--lr-psi", times * theta]
    rates += ["--lr-tau", 2 * times * theta] if script == "adm.py" else []
    finish(script, out, "--steps", N, "--lr-decay", 1, "--max-iter", updates, "--seed", seed, *rates, *flags, model=NAME)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-100:]
    told = average(rows, "told_apart") if "told_apart" in rows[-1] else []
    return figures(out, out / "generator.safetensors", args.samples) | dict(
        cos_dmd=average(rows, "cos_dmd")[0], told_apart=sum(told) / len(told) if told else float("nan"))


def main():
    parser = options(__doc__, "runs/table_adm", 512)
    parser.add_argument("--methods", type=int, nargs="+", default=[*range(len(METHODS))], help="numbers, from 0")
    parser.add_argument("--updates", type=int, nargs=2, default=(200, 600), help="of a trial, of a row's run")
    args = parser.parse_args()
    args.out, methods = args.out.resolve(), [list(METHODS)[i] for i in args.methods]
    args.out.mkdir(parents=True, exist_ok=True)
    short, long = args.updates
    grid = [*product(THETAS, TIMES)]
    with ThreadPoolExecutor(args.jobs) as pool:
        trials = {(method, *rates): pool.submit(distil, args, method, *rates, 0, short)
                  for method in methods for rates in grid}
        best, runs = {}, {}
        for method in methods:
            found = {rates: trials[method, *rates].result() for rates in grid}
            best[method] = max(found, key=lambda rates: found[rates]["accuracy"] - found[rates]["total_variation"])
            for rates, row in found.items():
                print(f"trial: {method}, rates {rates[0]:g} x {rates[1]}: accuracy {row['accuracy']:.3f}, total variation "
                      f"{row['total_variation']:.3f}, Frechet {row['frechet']:.3f}" + " <- best" * (rates == best[method]))
            runs[method] = [pool.submit(distil, args, method, *best[method], seed, long)
                            for seed in range(1, 1 + args.seeds)]
        print("\n| row | rates | accuracy | total variation | Frechet | sharpness | cosine with DMD | D told apart |\n|"
              + "---|" * 8)
        for steps, cfg in ((PRESET.teacher_steps, PRESET.teacher_cfg), (N, PRESET.teacher_cfg), (N, None)):
            label = f"teacher, {steps} steps" + (f", guidance {cfg:g}" if cfg else "")
            print(f"| {label} | | {cells([figures(args.out, PRESET.ckpt, args.samples, steps, cfg)], FIGURES)} | | |")
        for method in methods:
            rows = [job.result() for job in runs[method]]
            text = cells(rows, (*FIGURES, "cos_dmd", "told_apart")).replace("nan ± nan", "")  # DMD has no D
            print(f"| {method} | {best[method][0]:g}, x {best[method][1]} | {text} |", flush=True)


if __name__ == "__main__":
    main()
