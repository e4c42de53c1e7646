"""ADM at 4 steps, where the paper uses it, on the embedded tiny-sd3: `python tests/table_adm.py`
(75 minutes of a core).

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

from models.job.log import average  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from table4 import FIGURES, cells, choose, figures, finish, options, rate_flags  # noqa: E402

NAME, N = "tiny-sd3", 4
PRESET = PRESETS[NAME]
METHODS = {
    "DMD": ("dmd.py", []),
    "ADM": ("adm.py", []),
    "ADM, --normalise": ("adm.py", ["--normalise"]),
    "ADM, --r1 2": ("adm.py", ["--r1", 2]),
    "ADM, --normalise --r1 2": ("adm.py", ["--normalise", "--r1", 2]),
}
GRID = [*product((2e-5, 5e-5, 1e-4, 2e-4), (4, 16))]  # theta's rate, and psi's over it, tau's over twice it


def distil(args, method: str, theta: float, times: int, seed: int, updates: int) -> dict:
    """Figures and diagnostics of one run."""
    script, flags = METHODS[method]
    word = "".join(c for c in method if c.isalnum() or c == "-")
    out = args.out / f"{word}-{theta:g}-{times}-{updates}-{seed}"
    flags = [*flags, *rate_flags(script, theta, times)]
    finish(script, out, "--steps", N, "--batch-size", 16, "--max-iter", updates, "--seed", seed, *flags, model=NAME)
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()][-100:]
    result = figures(out / "generator.safetensors", args.samples, N, None, NAME, N)
    if told := average(rows, "told_apart"):  # DMD has no D
        result |= dict(cos_dmd=average(rows, "cos_dmd")[0], told_apart=sum(told) / len(told))
    return result


def main():
    parser = options(__doc__, "runs/table_adm", 512)
    parser.add_argument("--methods", type=int, nargs="+", default=[*range(len(METHODS))], help="numbers, from 0")
    parser.add_argument("--updates", type=int, nargs=2, default=(200, 600), help="of a trial, of a row's run")
    args = parser.parse_args()
    args.out, methods = args.out.resolve(), [list(METHODS)[i] for i in args.methods]
    args.out.mkdir(parents=True, exist_ok=True)
    short, long = args.updates
    with ThreadPoolExecutor(args.jobs) as pool:
        trials = {method: {rates: pool.submit(distil, args, method, *rates, 0, short) for rates in GRID}
                  for method in methods}
        best, runs = {}, {}
        for method in methods:
            best[method] = choose(method, trials[method])
            runs[method] = [pool.submit(distil, args, method, *best[method], seed, long)
                            for seed in range(1, 1 + args.seeds)]
        print("\n| row | rates | accuracy | total variation | Frechet | sharpness | cosine with DMD | told apart |\n|"
              + "---|" * 8)
        for steps, cfg in ((PRESET.teacher_steps, PRESET.teacher_cfg), (N, PRESET.teacher_cfg), (N, None)):
            label = f"teacher, {steps} steps" + (f", guidance {cfg:g}" if cfg else "")
            print(f"| {label} | | {cells([figures(PRESET.ckpt, args.samples, steps, cfg, NAME, N, args.out)], FIGURES)}"
                  " | | |")
        for method in methods:
            rows = [job.result() for job in runs[method]]
            text = cells(rows, (*FIGURES, "cos_dmd", "told_apart"))
            print(f"| {method} | {best[method][0]:g}, x {best[method][1]} | {text} |", flush=True)


if __name__ == "__main__":
    main()
