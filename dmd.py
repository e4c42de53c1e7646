"""Distribution Matching Distillation with TTUR, the baseline of Table 4: Algorithm 1 without its D_tau.

    python dmd.py                                                         # embedded tiny-sd3, two CPU cores
    torchrun --nproc_per_node 8 dmd.py --model sdxl --prompts FILE        # Table 4, B2; --init RUN: B3

`diff adm.py dmd.py` is Sec. 4.1.3: the generator follows the difference of the two scores (reverse KL, Eqs.
(4)-(6)) instead of a learned distance between the two distributions.

F_phi teacher          f_psi fake score estimator   G_theta generator
z, z_hat, z_f, z_g noises   x_hat_0 generated       x_t diffused to t
c prompt, c_null unconditional   w guidance scales       tn[n] = t_n, from tn[0] = 0 to tn[N] = T = 1
Shapes: latents B C H W, of videos B T C H W, times and scales B. Comments cite Algorithm 1
("Alg. 1 l. 17") and the equations.
"""
from models.job import parsers


def parse_args(argv=None):
    parser, _ = parsers.distillation_parser(__file__, __doc__)
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import mse_loss

from models.diffusion import (
    Denoiser,
    dmd_loss,
    generator_times,
    ode_step,
    q,
    random_time,
    solve,
    target,
)
from models.job import flags, networks
from models.job.job import Job
from models.parallel import adamw, init_distributed, set_trainable


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    preset = flags.resolve(args)
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
    psi, theta = networks.trainables(f_psi), networks.trainables(G_theta)
    opt_psi, opt_theta = adamw((psi, args.lr_psi)), adamw((theta, args.lr_theta), ema=args.ema)
    job.start(psi=(psi, opt_psi), theta=(theta, opt_theta))
    job.watch(F_phi=F_phi, f_psi=f_psi, G_theta=G_theta)

    gen_iter, global_iter = job.gen_iter, job.global_iter                              # Alg. 1 l. 3
    accumulation = len(job.micro_batches)

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
            z_hat = job.noise("z_hat", indices)                                        # Alg. 1 l. 15
            w, w_G = guidance("w", indices)
            with torch.no_grad():
                x_hat_tn = solve(G_theta, z_hat, tn[n:], c, job.c_null, w_G)           # Alg. 1 l. 16
            _, x_hat_0 = ode_step(G_theta, x_hat_tn, tn[n], tn[0], c, job.c_null, w_G)  # Alg. 1 l. 17
            z_g = job.noise("z_g", indices)                                            # Alg. 1 l. 18
            t = random_time(F_phi.schedule, job.uniform("t", indices))                 # Alg. 1 l. 18
            x_t = q(F_phi.schedule, x_hat_0, t, z_g)                                   # Alg. 1 l. 19
            with torch.no_grad():
                _, x_0_fake = ode_step(f_psi, x_t, t, tn[0], c)
                _, x_0_real = ode_step(F_phi, x_t, t, tn[0], c, job.c_null, w)
            loss_theta = dmd_loss(x_hat_0, x_0_fake, x_0_real)                         # Eqs. (5), (6)
            x_hat_0.retain_grad()
            (loss_theta / accumulation).backward()
            log.add(loss_theta=loss_theta)
            log.latents(x_hat_0)
            log.gradient(t, accumulation * len(t) * x_hat_0.grad, x_0_fake - x_0_real)
            job.phase("generator")
        log.update("theta", opt_theta)                                                 # Alg. 1 l. 22
        gen_iter += 1                                                                  # Alg. 1 l. 23
        job.phase("update")
        if job.end(log, gen_iter):
            break
        job.look(G_theta, tn)
    job.finish(F_phi, G_theta, tn)                                                     # Alg. 1 l. 27


if __name__ == "__main__":
    flags.entry(__file__, main, args)
