"""How much of what D_tau compares is left in bf16: cosines of its features' difference between x_real and x_fake,
Alg. 1 l. 20, 21, computed in bf16 and in float32. f_psi is the teacher, as at the first update.

    python tests/d_precision.py --model tiny-sd3 --batch-size 32     # all flags of adm.py
    python tests/d_precision.py --model sdxl --batch-size 4 --random-weights

Prints, for each guidance scale of the real score, how far apart the two inputs are and the cosine at each tap.
"""
import sys
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adm  # noqa: E402
from models.diffusion import Denoiser, delta_t, ode_step, q, random_time, solve, teacher_times  # noqa: E402
from models.job import flags, networks  # noqa: E402
from models.job.job import Job  # noqa: E402
from models.parallel import init_distributed  # noqa: E402


@torch.no_grad()
def main(argv: list[str]) -> None:
    device, mesh = init_distributed()
    args = adm.parse_args(["--precision", "fp32", *argv])
    preset = flags.resolve(args)
    args.micro_batch = args.batch_size
    job = Job("adm", args, preset, mesh, device)
    job.begin(1)
    indices, (c,) = job.micro_batches[0], job.conditions()
    F_phi = Denoiser(networks.load_network(args, preset, mesh, device), preset.predicts, preset.schedule)
    taps = tuple(F_phi.net.tap_shapes(*(job.latent_shape if preset.frames else job.latent_shape[-2:])))
    times = teacher_times(10, preset.shift, preset.schedule).to(device)
    x_0 = solve(F_phi, job.noise("z", indices), times, c, job.c_null, job.uniform("w", indices) + args.cfg[0])
    dt = delta_t(preset.schedule)
    t = random_time(preset.schedule, job.uniform("t", indices), low=dt)
    s = (t - dt).clamp_min(0)
    x_t = q(preset.schedule, x_0, t, job.noise("z_g", indices))
    x_fake, _ = ode_step(F_phi, x_t, t, s, c)
    pairs = {w: (ode_step(F_phi, x_t, t, s, c, job.c_null, torch.full_like(t, w))[0], x_fake) for w in (2.0, 7.0)}

    def directions() -> dict[float, list[torch.Tensor]]:
        return {w: [(real.float() - fake.float()).flatten(1) for real, fake in zip(
            *(F_phi.net(x, s, c, taps=taps) for x in pair))] for w, pair in pairs.items()}
    expected = directions()
    F_phi.net.to(torch.bfloat16)
    for w, found in directions().items():
        cosines = [cosine_similarity(a, b).mean().item() for a, b in zip(found, expected[w])]
        x_real, _ = pairs[w]
        print(f"{args.model}, guidance {w:g}: inputs differ by {(x_real - x_fake).norm() / x_real.norm():.2%}; cosines "
              + " ".join(f"{cosine:.2f}" for cosine in cosines) + f", mean {sum(cosines) / len(cosines):.2f}")


if __name__ == "__main__":
    main(sys.argv[1:])
