"""Table 1, Fig. 4 and Fig. 5 of AVDM2 on the embedded tiny-animatediff: `python tests/table_avdm2.py`.

Runs avdm2.py with each row's flags for each seed and prints a table: the figures of models/eval/moving_shapes.py
for the 4-step student, mean and standard deviation over the seeds. For Fig. 5 it first trains a second teacher of
single frames, whose pictures have the tone y = 0.6 x - 0.25. Its student's clips are scored as they are and with that
tone undone. Beside them stand the share of clips in the tone, by their backgrounds, and how far their mean has moved
towards it from GAN + 2D's. What is finished is not run again, what was killed goes on.
"""
import statistics
import sys
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path

import torch
from torch import Tensor

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from models.checkpoint import open_tensors, save_safetensors  # noqa: E402
from models.diffusion import generator_times, teacher_times  # noqa: E402
from models.eval import moving_shapes, shapes  # noqa: E402
from models.job.networks import load_network, load_text, load_vae  # noqa: E402
from models.job.sampling import generate  # noqa: E402
from models.presets import PRESETS  # noqa: E402
from models.tiny.training import denoiser_loss, encode_captions, open_part, open_teacher, train  # noqa: E402
from table4 import cells, finish, kept, options  # noqa: E402

NAME = "tiny-animatediff"
PRESET, FRAMES = PRESETS[NAME], PRESETS["tiny-sd15"]
BASE = "GAN + 2D score matching"
ROWS = {  # what it is -> flags; TONE stands for the second teacher's file
    "GAN only": ["--sdm", "none"],
    "2D score matching only": ["--lambdas", "1", "0"],
    BASE: [],
    "GAN + video score matching": ["--sdm", "video"],
    "GAN + 2D, K = 1": ["--frames-sdm", "1"],
    "GAN + 2D, K = 9": ["--frames-sdm", "9"],
    "GAN + 2D, teacher of another tone": ["--teacher-2d", "TONE"],
    "GAN + 2D, ODE between the steps": ["--rollout", "ode"],
}
TONE = (0.6, -0.25)
TEACHERS = ((PRESET.teacher_steps, PRESET.teacher_cfg), (4, PRESET.teacher_cfg), (4, None))  # steps, guidance
FIGURES = ("accuracy", "direction", "total_variation", "consistency", "frechet", "sharpness")


def train_tone(out: Path) -> None:
    """out/tone.safetensors: tiny-sd15 after 1000 updates on frames in the other tone, in the same layout."""
    if (out / "tone.safetensors").exists():
        return
    net, vae, text = (open_part("tiny-sd15", load) for load in (load_network, load_vae, load_text))
    scenes = moving_shapes.random_scenes(40, range(1024))
    with torch.no_grad():
        pictures = TONE[0] * moving_shapes.draw_clip(scenes).flatten(0, 1) + TONE[1]
        latents = torch.cat([vae.encode(part) for part in pictures.split(512)])
    labels = scenes.labels.repeat_interleave(PRESET.frames, 0)
    preset = PRESET._replace(schedule=FRAMES.schedule)
    loss = denoiser_loss(preset, latents, labels, encode_captions(preset, text))
    net = train("tone", net.requires_grad_(), loss, 1000, 5e-4, out)
    base = open_tensors(FRAMES.ckpt)
    weights = {name: base[name] for name in base}
    weights |= {f"model.diffusion_model.{name}": p.half() for name, p in net.state_dict().items()}
    save_safetensors(out / "tone.safetensors", weights)


def in_tone(clips: Tensor) -> Tensor:
    """Which clips (B T 3 H W) in [-1, 1] have a background of the tone, and not one of the data's: (B,)."""
    ground = shapes.border(clips).mean(1)  # B 3
    known = shapes.palette("background")
    return torch.cdist(ground, TONE[0] * known + TONE[1]).amin(1) < torch.cdist(ground, known).amin(1)


def folder(label: str, seed: int) -> str:
    return f"{label.replace(' ', '_').replace(',', '')}-{seed}"


def distil(args, label: str, seed: int, plain: Future | None = None) -> dict:
    """Figures of a row's run of one seed. plain: the run of BASE, where that is at work too."""
    out = args.out / folder(label, seed)
    flags = [args.out / "tone.safetensors" if flag == "TONE" else flag for flag in ROWS[label]]
    finish("avdm2.py", out, *flags, "--seed", seed, *args.flags, model=NAME)
    base = None
    if "TONE" in ROWS[label]:
        plain.result() if plain else distil(args, BASE, seed)
        base = out.with_name(folder(BASE, seed)) / "generator.safetensors"
    return figures(args, out / "generator.safetensors", 4, base=base)


def sample(args, ckpt: Path | None, steps: int, cfg: float | None = None) -> Tensor:
    """Clips B T 3 H W in [-1, 1] of the generator in a file, or of the teacher, the same noise and prompts for all."""
    F, vae, text = open_teacher(NAME, ckpt)
    F = replace(F, renoise=bool(ckpt) and open_tensors(ckpt).metadata.get("dmdx.rollout") == "renoise")
    tn = (generator_times if steps < 20 else teacher_times)(steps, PRESET.shift, F.schedule)
    prompts, shape = moving_shapes.evaluation_prompts(args.samples), (PRESET.frames, 4, 8, 8)
    return generate(F, text, vae, prompts, tn, shape, 0, cfg, batch=16) / 127.5 - 1


def figures(args, ckpt: Path | None, steps: int, cfg: float | None = None, base: Path | None = None) -> dict:
    """Exact figures of `sample`'s clips; with `base`, a generator without it, what they have of the tone too."""
    def compute() -> dict:
        clips, prompts = sample(args, ckpt, steps, cfg), moving_shapes.evaluation_prompts(args.samples)
        result = moving_shapes.evaluate(clips, prompts)
        if base:
            mean = sample(args, base, steps, cfg).mean()
            moved = (mean - clips.mean()) / (mean - TONE[0] * mean - TONE[1])
            result |= dict(undone=moving_shapes.evaluate((clips - TONE[1]) / TONE[0], prompts), moved=moved.item(),
                           tone=in_tone(clips).double().mean().item())
        return result
    name = f"{'tone' if base else 'figures'}_{steps}_{cfg}_{args.samples}.json"
    return kept((ckpt.parent if ckpt else args.out) / name, compute)


def line(label: str, rows: list[dict]) -> str:
    return f"| {label} | {cells(rows, FIGURES)} |"


def main():
    parser = options(__doc__, "runs/table_avdm2", 512)
    parser.add_argument("--rows", type=int, nargs="+", default=[*range(len(ROWS))], help="numbers, from 0")
    parser.add_argument("flags", nargs="*", help="for every run, behind --, as -- --max-iter 10")
    args = parser.parse_args()
    args.out, labels = args.out.resolve(), [list(ROWS)[i] for i in args.rows]
    args.out.mkdir(parents=True, exist_ok=True)
    if any("TONE" in ROWS[label] for label in labels):
        train_tone(args.out)
    torch.set_num_threads(1)  # to each of the pool's, as the runs have
    with ThreadPoolExecutor(args.jobs) as pool:
        teachers = [pool.submit(figures, args, None, steps, cfg) for steps, cfg in TEACHERS]
        runs = {}
        for seed in range(args.seeds):
            for label in labels:
                runs[label, seed] = pool.submit(distil, args, label, seed, runs.get((BASE, seed)))

    print(f"\n| row | {' | '.join(FIGURES)} |\n|{'---|' * (1 + len(FIGURES))}")
    for (steps, cfg), result in zip(TEACHERS, teachers):
        print(line(f"teacher, {steps} steps" + (f", guidance {cfg:g}" if cfg else ""), [result.result()]))
    for label in labels:
        rows = [runs[label, seed].result() for seed in range(args.seeds)]
        if "TONE" in ROWS[label]:
            tone, moved = (100 * statistics.mean(row[key] for row in rows) for key in ("tone", "moved"))
            label += f": {tone:.0f} % in it, the mean {moved:.0f} % of the way"
        print(line(label, rows), flush=True)
        if "undone" in rows[0]:
            print(line("the same, its tone undone", [row["undone"] for row in rows]), flush=True)


if __name__ == "__main__":
    main()
