"""Distribution Matching Distillation with TTUR, the baseline of Table 4: Algorithm 1 without its D_tau.

    python dmd.py                                                         # embedded tiny-sd3, two CPU cores
    torchrun --nproc_per_node 8 dmd.py --model sdxl --prompts FILE        # Table 4, B2; --init RUN: B3

`diff adm.py dmd.py` is Sec. 4.1.3: the generator follows the difference of the two scores (reverse KL, Eqs.
(4)-(6)) instead of a learned distance between the two distributions.

F_phi teacher          f_psi fake score estimator   G_theta generator
z, z_hat, z_f, z_g noises   x_hat_0 generated       x_t diffused to t
c prompt, c_null empty       w guidance scales       tn[n] = t_n, from tn[0] = 0 to tn[N] = T = 1
Shapes: latents B C H W, of videos B T C H W, times and scales B. Comments cite Algorithm 1
("Alg. 1 l. 17") and the equations.
"""
from dataclasses import replace
from functools import partial
from pathlib import Path

import torch
from torch.nn.functional import mse_loss

from models.job import flags, networks
from models.job.job import Job, count_evaluations
from models.data import noise, uniform
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
from models.parallel import adamw, init_distributed, set_trainable, update


def parse_args(argv=None):
    parser = flags.training_parser("dmd", __doc__)
    add = parser.add_argument
    add("--prompts", type=Path, help=".txt, .jsonl, .csv or .tsv")
    add("--init", type=Path, metavar="RUN", help="start the generator from this run of adp.py")
    add("--steps", type=int, help="N, steps of the generator")
    add("--ttur", type=int, default=1, help="updates of the fake model per update of the generator")
    add("--cfg", type=float, nargs=2, metavar=("LOW", "HIGH"), help="range of the real score's guidance")
    add("--generator-cfg-offset", type=float, metavar="X",
        help="guide the generator too, at the real score's scale less X (Table 3, w/ CFG: 2)")
    add("--lora-rank", type=int, help="rank of the generator's adapter; 0 trains all weights")
    add("--fake-lora", type=int, nargs="?", const=64, default=0, metavar="RANK",
        help="the fake model is an adapter too (rank 64): with --lora-rank all networks share one base")
    add("--lr-theta", type=float, help="learning rate of the generator")
    add("--lr-psi", type=float, help="learning rate of the fake model")
    return parser.parse_args(argv)


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    row = flags.resolve(args)
    job = Job("dmd", args, row, mesh, device)
    load = partial(networks.load_network, args, row, mesh, device)

    # Everything starts as the teacher. Adapters share its module, never a copy of it.
    adapters = {"generator": args.lora_rank, "fake": args.fake_lora}
    base = load(adapters={name: rank for name, rank in adapters.items() if rank})
    F_phi = Denoiser(base, row.predicts, row.schedule)                                 # Alg. 1 l. 1
    if args.lora_rank:                                                                 # Alg. 1 l. 3
        G_theta = replace(F_phi, lora=("generator",))
    else:
        G_theta = networks.load_generator(args, row, mesh, device)
    tn = generator_times(args.steps, row.shift, G_theta.schedule).to(device)           # Alg. 1 l. 2
    if args.fake_lora:
        f_psi = replace(F_phi, lora=("fake",))
    else:
        f_psi = replace(F_phi, net=load(trainable=True))
    psi, theta = networks.trainables(f_psi), networks.trainables(G_theta)
    opt_psi, opt_theta = adamw(psi, args.lr_psi), adamw(theta, args.lr_theta)
    job.start(psi=(psi, opt_psi), theta=(theta, opt_theta))
    if args.profile:
        count_evaluations(dict(F_phi=F_phi, f_psi=f_psi, G_theta=G_theta), job.evaluations)

    gen_iter, global_iter = job.gen_iter, job.global_iter                              # Alg. 1 l. 3
    accumulation = len(job.micro_batches)

    def draw(name, indices):  # standard normal latents, a function of (seed, global_iter, name, index)
        return noise(job.latent_shape, args.seed, global_iter, name, indices).to(device)

    def draw_u(name, indices):  # U[0, 1), likewise
        return uniform(args.seed, global_iter, name, indices).to(device)

    def guidance(name, indices):  # scales of the real score; c_null and scales of the generator, if any
        w = args.cfg[0] + (args.cfg[1] - args.cfg[0]) * draw_u(name, indices)
        return w, () if args.generator_cfg_offset is None else (job.c_null, w - args.generator_cfg_offset)

    while gen_iter < args.max_iter:                                                    # Alg. 1 l. 4
        global_iter += 1                                                               # Alg. 1 l. 5
        log = job.begin(global_iter)
        batch = [(indices, job.conditions(indices)) for indices in job.micro_batches]

        # update fake score estimator f_psi                                            # Alg. 1 l. 7
        set_trainable(psi, True)
        for indices, c in batch:
            z = draw("z", indices)                                                     # Alg. 1 l. 8
            with torch.no_grad():
                _, guided = guidance("w_f", indices)
                x_0 = solve(G_theta, z, tn, c, *guided)                                # Alg. 1 l. 9
            z_f = draw("z_f", indices)                                                 # Alg. 1 l. 10
            t_f = random_time(f_psi.schedule, draw_u("t_f", indices))                  # Alg. 1 l. 10
            x_tf = q(f_psi.schedule, x_0, t_f, z_f)
            expected = target(f_psi.predicts, f_psi.schedule, x_0, t_f, z_f)
            loss_psi = mse_loss(f_psi(x_tf, t_f, c), expected)                         # Eq. (2), (3)
            (loss_psi / accumulation).backward()
            log.add(loss_psi=loss_psi)
        log.update("psi", *update(opt_psi, log.mean("loss_psi")))                      # Alg. 1 l. 11
        job.phase("fake")
        if global_iter % args.ttur:                                                    # Alg. 1 l. 12
            if job.end(log, gen_iter):
                break
            continue

        # update generator G_theta                                                     # Alg. 1 l. 14
        set_trainable(psi, False)
        n = 1 + int(args.steps * uniform(args.seed, global_iter, "n", [0]))  # on all ranks  # Alg. 1 l. 15
        for indices, c in batch:
            z_hat = draw("z_hat", indices)                                             # Alg. 1 l. 15
            w, guided = guidance("w", indices)
            with torch.no_grad():
                x_hat_tn = solve(G_theta, z_hat, tn[n:], c, *guided)                   # Alg. 1 l. 16
            _, x_hat_0 = ode_step(G_theta, x_hat_tn, tn[n], tn[0], c, *guided)         # Alg. 1 l. 17
            z_g = draw("z_g", indices)                                                 # Alg. 1 l. 18
            t = random_time(F_phi.schedule, draw_u("t", indices))                      # Alg. 1 l. 18
            x_t = q(F_phi.schedule, x_hat_0, t, z_g)                                   # Alg. 1 l. 19
            with torch.no_grad():  # both to the end of the ODE, t_0 = 0
                x_0_fake, _ = ode_step(f_psi, x_t, t, tn[0], c)
                x_0_real, _ = ode_step(F_phi, x_t, t, tn[0], c, job.c_null, w)
            loss_theta = dmd_loss(x_hat_0, x_0_fake, x_0_real)                         # Eqs. (5), (6)
            (loss_theta / accumulation).backward()
            job.phase("generator")
            log.add(loss_theta=loss_theta, x_0_mean=x_hat_0.mean(), x_0_std=x_hat_0.flatten(1).std(1).mean())
        log.update("theta", *update(opt_theta, log.mean("loss_theta")))                # Alg. 1 l. 22
        gen_iter += 1                                                                  # Alg. 1 l. 23
        job.phase("update")
        if job.end(log, gen_iter):
            break
        job.look(G_theta, tn)
    job.finish(F_phi, G_theta, tn)                                                     # Alg. 1 l. 27


if __name__ == "__main__":
    flags.entry("dmd.py", parse_args, main)
