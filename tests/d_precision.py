"""How much of what D_tau compares is left in bf16: cosines with float32 of its features' difference between x_real
and x_fake, Alg. 1 l. 20, 21, and of its heads' gradient, l. 26. f_psi is the teacher, as at the first update.

    python tests/d_precision.py --model tiny-sd3 --batch-size 32     # all flags of adm.py
    python tests/d_precision.py --model sdxl --batch-size 4 --random-weights

Prints, for each guidance scale of the real score, how far apart the two inputs are, the cosine at each tap, that of
the gradient with a bf16 backbone and heads in float32 or bf16, and the share of pairs that bf16 heads turn round.
"""
import sys
from copy import deepcopy
from pathlib import Path

import torch
from torch.nn.functional import cosine_similarity

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))
import adm  # noqa: E402
from models.diffusion import Denoiser, delta_t, ode_step, q, random_time, solve, teacher_times  # noqa: E402
from models.discriminator import hinge  # noqa: E402
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
    times = teacher_times(10, preset.shift, preset.schedule).to(device)
    x_0 = solve(F_phi, job.noise("z", indices), times, c, job.c_null, job.uniform("w", indices) + args.cfg[0])
    dt = delta_t(preset.schedule)
    t = random_time(preset.schedule, job.uniform("t", indices), low=dt)
    s = (t - dt).clamp_min(0)
    x_t = q(preset.schedule, x_0, t, job.noise("z_g", indices))
    x_fake, _ = ode_step(F_phi, x_t, t, s, c)
    pairs = {w: (ode_step(F_phi, x_t, t, s, c, job.c_null, torch.full_like(t, w))[0], x_fake) for w in (2.0, 7.0)}

    D_tau = networks.new_discriminator(args, preset, F_phi, mesh, device)
    bf16_heads = deepcopy(D_tau).to(torch.bfloat16)

    def features() -> dict[float, list]:
        return {w: [D_tau.features(x, s, c) for x in pair] for w, pair in pairs.items()}

    def compared(heads, maps) -> tuple[torch.Tensor, torch.Tensor]:
        """The gradient of Eq. (8), flat, and each pair's difference of logits (heads B)."""
        with torch.enable_grad():
            real, fake = (heads([h.detach() for h in side]) for side in maps)
            gradient = torch.autograd.grad(hinge(fake, real), list(heads.parameters()))
        return torch.cat([g.float().flatten() for g in gradient]), real - fake

    def cosine(a, b) -> float:
        return cosine_similarity(a, b, dim=-1).mean().item()

    expected = features()
    wanted = {w: compared(D_tau, maps)[0] for w, maps in expected.items()}
    F_phi.net.to(torch.bfloat16)
    for w, maps in features().items():
        there, found = ([(real.float() - fake.float()).flatten(1) for real, fake in zip(*sides)]
                        for sides in (expected[w], maps))
        cosines = [cosine(a, b) for a, b in zip(found, there)]
        (fine, order), (coarse, turned) = (compared(heads, maps) for heads in (D_tau, bf16_heads))
        x_real, _ = pairs[w]
        print(f"{args.model}, guidance {w:g}: inputs differ by {(x_real - x_fake).norm() / x_real.norm():.2%}; cosines "
              + " ".join(f"{value:.2f}" for value in cosines) + f", mean {sum(cosines) / len(cosines):.2f}; gradient, "
              f"heads in float32 {cosine(fine, wanted[w]):.2f}, in bf16 {cosine(coarse, wanted[w]):.2f}, which turns "
              f"{(order.sign() != turned.sign()).float().mean():.0%} of the pairs round")


if __name__ == "__main__":
    main(sys.argv[1:])
