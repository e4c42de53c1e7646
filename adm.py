"""Adversarial Distribution Matching, Algorithm 1 (Sec. 4.1): a many-step teacher becomes an N-step generator.

    python adm.py                                                         # embedded tiny-sd3, two CPU cores
    torchrun --nproc_per_node 8 adm.py --model sd3-medium --prompts FILE  # Table 2; all flags: --help
    torchrun --nproc_per_node 8 adm.py --model sdxl --prompts FILE --init runs/adp-sdxl-000  # Table 1
    torchrun --nproc_per_node 8 adm.py --model cogvideox-2b --prompts FILE                # Table 3

Reads a checkpoint in its original layout and a prompt file; writes runs/adm-MODEL-NNN/ with config.json,
metrics.jsonl, sample grids, the resumable state and the exported generator.

F_phi teacher          f_psi fake score estimator   G_theta generator       D_tau discriminator
z, z_hat, z_f, z_g noises   x_hat_0 generated       x_t diffused to t       s = t - dt
c prompt, c_null unconditional   w guidance scales       tn[n] = t_n, from tn[0] = 0 to tn[N] = T = 1
Shapes: latents B C H W, of videos B T C H W, times and scales B. Comments cite Algorithm 1
("Alg. 1 l. 17") and the equations.
"""
from models.job import parsers


def parse_args(argv=None):
    parser, add = parsers.distillation_parser(__file__, __doc__)
    parsers.add_discriminator_flags(parser, add)
    add("--dt", type=float, default=1 / 64, help="of the PF-ODE step in Alg. 1 l. 20, 21; on DDPM grids rounded")
    add("--r1", type=float, default=0.0, metavar="WEIGHT", help="of a gradient penalty on D_tau, not in the paper")
    add("--normalise", action="store_true",
        help="divide each sample's gradient at x_hat_0 by its mean absolute value; not in the paper")
    add("--detach-fake", action="store_true", help="no gradient through f_psi's prediction in Alg. 1 l. 20")
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import mse_loss

from models.diffusion import (
    Denoiser,
    delta_t,
    dmd_loss,
    generator_times,
    ode_step,
    q,
    random_time,
    solve,
    target,
)
from models.discriminator import hinge
from models.job import flags, networks
from models.job.job import Job
from models.parallel import adamw, init_distributed, set_trainable


NEAR = 0.03  # step of the finite difference in --r1's gradient penalty; latents have standard deviation 1


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    preset = flags.resolve(args)
    dt = delta_t(preset.schedule, args.dt)
    job = Job(__file__, args, preset, mesh, device)
    load = partial(networks.load_network, args, preset, mesh, device)

    # All start as the teacher, --init's generator as that run's. Roles share one module where they can.
    base = load(adapters={"generator": args.lora_rank, "fake": args.fake_lora})
    F_phi = Denoiser(base, preset.predicts, preset.schedule)                           # Alg. 1 l. 1
    if args.lora_rank:
        G_theta = replace(F_phi, lora=("generator",))                                  # Alg. 1 l. 3
        G_theta = networks.load_adapter(args, preset, G_theta)
    else:
        G_theta = networks.load_generator(args, preset, mesh, device)                  # Alg. 1 l. 3
    tn = generator_times(args.steps, preset.shift, G_theta.schedule).to(device)        # Alg. 1 l. 2
    if args.fake_lora:
        f_psi = replace(F_phi, lora=("fake",))                                         # Alg. 1 l. 3
    else:
        f_psi = replace(F_phi, net=load(trainable=True))                               # Alg. 1 l. 3
    D_tau = networks.new_discriminator(args, preset, F_phi, mesh, device)              # Alg. 1 l. 3
    psi, theta = networks.trainables(f_psi), networks.trainables(G_theta)
    tau = networks.trainables(D_tau)
    opt_psi, opt_theta = adamw((psi, args.lr_psi)), adamw((theta, args.lr_theta), ema=args.ema)
    opt_tau = adamw((tau, args.lr_tau))
    job.start(psi=(psi, opt_psi), theta=(theta, opt_theta), tau=(tau, opt_tau))
    job.watch(F_phi=F_phi, f_psi=f_psi, G_theta=G_theta, D_tau=D_tau.F_phi)

    gen_iter, global_iter = job.gen_iter, job.global_iter                              # Alg. 1 l. 3
    accumulation = len(job.micro_batches)
    # [choice] Alg. 1 l. 20 does not say whether the gradient passes through f_psi: it does.
    f_step = replace(f_psi, net=torch.no_grad()(f_psi.net)) if args.detach_fake else f_psi

    def guidance(name, indices):  # scales of the real score and of the generator; None: unguided
        # [choice] The generator's is the real score's of the same sample, less the offset.
        w = args.cfg[0] + (args.cfg[1] - args.cfg[0]) * job.uniform(name, indices)
        return w, None if args.generator_cfg_offset is None else w - args.generator_cfg_offset

    while gen_iter < args.max_iter:                                                    # Alg. 1 l. 4
        global_iter += 1                                                               # Alg. 1 l. 5
        log = job.begin(global_iter)
        batch = list(zip(job.micro_batches, job.conditions()))

        # update fake score estimator f_psi                                            # Alg. 1 l. 7
        set_trainable(psi, True)
        for indices, c in batch:
            z = job.noise("z", indices)                                                # Alg. 1 l. 8
            with torch.no_grad():
                _, w_G = guidance("w_f", indices)
                x_0 = solve(G_theta, z, tn, c, job.c_null, w_G)                        # Alg. 1 l. 9
            z_f = job.noise("z_f", indices)                                            # Alg. 1 l. 10
            t_f = random_time(f_psi.schedule, job.uniform("t_f", indices))             # Alg. 1 l. 10
            x_tf = q(f_psi.schedule, x_0, t_f, z_f)
            expected = target(f_psi.predicts, f_psi.schedule, x_0, t_f, z_f)
            loss_psi = mse_loss(f_psi(x_tf, t_f, c), expected)  # [choice] w(t) = 1    # Eq. (2), (3)
            (loss_psi / accumulation).backward()
            log.add(loss_psi=loss_psi)
        log.update("psi", opt_psi)                                                     # Alg. 1 l. 11
        job.phase("fake")
        if global_iter % args.ttur:                                                    # Alg. 1 l. 12
            if job.end(log, gen_iter):
                break
            continue

        # update generator G_theta                                                     # Alg. 1 l. 14
        set_trainable(psi, False)
        n = job.integer("n", args.steps)  # [choice] one for all samples and ranks     # Alg. 1 l. 15
        for indices, c in batch:
            set_trainable(tau, False)
            z_hat = job.noise("z_hat", indices)                                        # Alg. 1 l. 15
            w, w_G = guidance("w", indices)
            with torch.no_grad():
                x_hat_tn = solve(G_theta, z_hat, tn[n:], c, job.c_null, w_G)           # Alg. 1 l. 16
            _, x_hat_0 = ode_step(G_theta, x_hat_tn, tn[n], tn[0], c, job.c_null, w_G)  # Alg. 1 l. 17
            z_g = job.noise("z_g", indices)                                            # Alg. 1 l. 18
            t = random_time(F_phi.schedule, job.uniform("t", indices), low=dt)         # Alg. 1 l. 18
            s = (t - dt).clamp_min(0)  # [choice] t > dt, so that the step stays in [0, T]
            x_t = q(F_phi.schedule, x_hat_0, t, z_g)                                   # Alg. 1 l. 19
            x_fake, x_0_fake = ode_step(f_step, x_t, t, s, c)                          # Alg. 1 l. 20
            with torch.no_grad():
                x_real, x_0_real = ode_step(F_phi, x_t, t, s, c, job.c_null, w)        # Alg. 1 l. 21
            h_fake = D_tau.features(x_fake, s, c)
            loss_theta = -D_tau(h_fake).mean()                                         # Eq. (7)
            if args.normalise:  # not in the paper
                mean = partial(torch.mean, dim=tuple(range(1, x_hat_0.ndim)), keepdim=True)
                x_hat_0.register_hook(lambda g: g / mean(g.abs()).clamp_min(1e-20) / (accumulation * g.numel()))
            x_hat_0.retain_grad()
            (loss_theta / accumulation).backward()
            log.add(loss_theta=loss_theta)
            log.latents(x_hat_0)
            log.gradient(t, accumulation * len(t) * x_hat_0.grad, x_0_fake - x_0_real)
            job.phase("generator")

            # update discriminator D_tau. [differs] Its gradient is taken before l. 22. That step changes
            # neither tau nor x_fake and x_real: the gradient is the same, and x_fake's features serve twice.
            set_trainable(tau, True)
            with torch.no_grad():
                h_real = D_tau.features(x_real, s, c)
            logits_fake, logits_real = D_tau([h.detach() for h in h_fake]), D_tau(h_real)  # Alg. 1 l. 25
            loss_tau = hinge(logits_fake, logits_real)                                 # Eq. (8)
            if args.r1:  # not in the paper
                with torch.no_grad():
                    h_near = D_tau.features(x_real + NEAR * job.noise("r1", indices), s, c)
                slope = (D_tau(h_near) - logits_real).mean(0) / NEAR                   # B
                loss_tau = loss_tau + args.r1 / 2 * slope.square().mean()
            (loss_tau / accumulation).backward()
            job.phase("discriminator")
            del h_fake, h_real  # gigabytes at full size, which the next micro-batch needs
            log.pairs(logits_fake, logits_real)
            log.add(loss_tau=loss_tau, dmd=dmd_loss(x_hat_0, x_0_fake, x_0_real))       # Eq. (6), Fig. 3
        log.update("theta", opt_theta)                                                 # Alg. 1 l. 22
        gen_iter += 1                                                                  # Alg. 1 l. 23
        log.update("tau", opt_tau)                                                     # Alg. 1 l. 26
        job.phase("update")
        if job.end(log, gen_iter):
            break
        job.look(G_theta, tn)
    job.finish(F_phi, G_theta, tn)                                                     # Alg. 1 l. 27


if __name__ == "__main__":
    flags.entry(__file__, main, args)
