"""Adversarial Distillation Pre-training (Sec. 4.2): a one-step generator from ODE pairs, where adm.py starts.

    python collect_odes.py && python adp.py                                        # embedded tiny-sdxl
    torchrun --nproc_per_node 8 adp.py --model sdxl --pairs FOLDER --offload       # Table 4, A5
    adp.py --model sdxl --lambdas 1 0  |  --pixel-encoder dinov2  |  --loss mse    # Table 4, A4, A2, A1

Reads a checkpoint in its original layout, the ODE pairs of collect_odes.py and the vision encoder's weights;
writes runs/adp-MODEL-NNN/ as adm.py does; `adm.py --init` goes on from there.

F_phi teacher     G_theta generator, a velocity network on the straight path between the two ends of a pair
D_tau1 latent discriminator on F_phi's features     D_tau2 pixel discriminator on the vision encoder's
x_T, x_0 the ends of a pair, noise and teacher's sample     c its prompt     x_hat_0 generated
t generator time     t_d, z_d time (the paper's t') and noise of D_tau1, on the teacher's schedule
Shapes: latents B C H W, times B; images B 3 and their height and width.
"""
from pathlib import Path

from models.job import parsers


def parse_args(argv=None):
    parser, add = parsers.training_parser(__file__, __doc__)
    parser.set_defaults(model="tiny-sdxl")
    add("--pairs", type=Path, help="folder of collect_odes.py; default runs/odes-MODEL")
    add("--init", type=Path, metavar="RUN", help="start the generator from this run of adp.py, such as of --loss mse")
    add("--lora-rank", type=int, default=0, help="rank of the generator's adapter; 0 trains all weights")
    add("--steps", type=int, help="steps at which the generator is sampled and compared")
    add("--loss", choices=("gan", "mse"), default="gan", help="mse: rectified flow, no discriminator")
    add("--lambdas", type=float, nargs=2, metavar=("LATENT", "PIXEL"), default=(0.85, 0.15),
        help="weights of the two discriminators, Eqs. (9), (10); one of weight 0 is not built")
    add("--pixel-encoder", choices=("sam", "dinov2"), default="sam", help="of the pixel discriminator")
    add("--pixel-ckpt", type=Path, help="weights of the pixel encoder; default: the preset's for sam, else the hub's")
    parsers.add_discriminator_flags(parser, add)
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

from dataclasses import replace

import torch
from torch.nn.functional import mse_loss

from models.checkpoint import InputError
from models.diffusion import Denoiser, generator_times, q, random_time, target, to_x_0_eps
from models.discriminator import hinge
from models.job import flags, networks
from models.job.job import Job
from models.parallel import adamw, init_distributed, of_main, print0, set_trainable
from models.shards import open_pairs


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    preset = flags.resolve(args, adp=True)
    if min(args.lambdas) < 0 or sum(args.lambdas) == 0:
        raise InputError(f"--lambdas {args.lambdas[0]:g} {args.lambdas[1]:g}: expected >= 0, not both 0")
    if preset.frames and args.loss == "gan" and args.lambdas[1]:
        raise InputError(f"--lambdas {args.lambdas[0]:g} {args.lambdas[1]:g}: the pixel discriminator takes "
                         f"pictures and {args.model} makes videos; expected the second to be 0")
    pairs = None if args.random_weights else of_main(open_pairs(  # a collection may be under way
        args.pairs or Path(f"runs/odes-{args.model}"), args.model, networks.latent_shape(args, preset)))
    if pairs:
        networks.check_pairs(args, preset, pairs)
        args.prompts_digest = pairs.digest()
        if len(pairs) < pairs.total:
            print0(f"note: {pairs}")
    job = Job(__file__, args, preset, mesh, device, pairs.all_prompts() if pairs and args.cache_text else [])
    lambda_1, lambda_2 = args.lambdas if args.loss == "gan" else (0, 0)

    base = networks.load_network(args, preset, mesh, device, adapters={"generator": args.lora_rank})
    F_phi = Denoiser(base, preset.predicts, preset.schedule)
    if args.lora_rank:
        G_theta = networks.load_adapter(args, preset, replace(F_phi, lora=("generator",)))
    else:
        G_theta = networks.load_generator(args, preset, mesh, device)
    # [choice] The teacher's weights, whose epsilon or v is read as the velocity of the pair's straight path from
    # the first update on.                                                              # Sec. 4.2.1
    G_theta = replace(G_theta, predicts="velocity", schedule="flow")
    theta, tau, watched = networks.trainables(G_theta), {}, dict(F_phi=F_phi, G_theta=G_theta)
    if lambda_1:
        D_tau1 = networks.new_discriminator(args, preset, F_phi, mesh, device)
        tau |= {f"latent.{name}": p for name, p in D_tau1.named_parameters()}
        watched |= dict(D_tau1=D_tau1.F_phi)
    if lambda_2:
        D_tau2 = networks.new_pixel_discriminator(args, preset, mesh, device)
        tau |= {f"pixel.{name}": p for name, p in D_tau2.named_parameters()}
    roles = dict(theta=(theta, adamw((theta, args.lr_theta), ema=args.ema)))
    if tau:
        roles |= dict(tau=(tau, adamw((tau, args.lr_tau))))
    job.start(**roles)
    job.watch(**watched)
    tn = generator_times(args.steps, preset.shift, G_theta.schedule).to(device)
    iteration, accumulation, recompute = job.gen_iter, len(job.micro_batches), not args.no_checkpointing

    def batch():  # of each micro-batch: x_T, x_0 and c
        if pairs is None:
            return [(job.noise("x_T", indices), job.noise("x_0", indices), c)
                    for indices, c in zip(job.micro_batches, job.conditions())]
        x_T, x_0, prompts = pairs.read(job.shuffled(sum(job.micro_batches, []), len(pairs)))
        return zip(*(x.to(device).split(args.micro_batch) for x in (x_T, x_0)), job.conditions(prompts))

    def pixel_features(x):  # D_tau2's maps, a few pictures at a time: the graph of a decoder takes gigabytes
        for part in x.split(preset.decode_batch):
            image = job.vae.decode(part, checkpoint=recompute)
            yield D_tau2.features(image, recompute)

    while iteration < args.max_iter:
        iteration += 1
        log = job.begin(iteration)
        for indices, (x_T, x_0, c) in zip(job.micro_batches, batch()):
            # update generator G_theta
            set_trainable(tau, False)
            t = 1 - job.uniform("t", indices) ** 3                                     # Sec. 4.2.1
            x_t = q(G_theta.schedule, x_0, t, x_T)  # linear interpolation of the pair  # Sec. 4.2.1
            v = G_theta(x_t, t, c)
            x_hat_0, _ = to_x_0_eps(G_theta.predicts, G_theta.schedule, v, x_t, t)
            if args.loss == "mse":
                loss_theta = mse_loss(v, target("velocity", "flow", x_0, t, x_T))      # Eq. (3), ablation A1
                (loss_theta / accumulation).backward()
            else:  # both losses are taken back to x, then once through G_theta
                x, loss_theta = x_hat_0.detach().requires_grad_(), 0.0
                if lambda_1:
                    t_d, z_d = random_time(F_phi.schedule, job.uniform("t_d", indices)), job.noise("z_d", indices)
                    h_fake = D_tau1.features(q(F_phi.schedule, x, t_d, z_d), t_d, c)
                    loss = -lambda_1 * D_tau1(h_fake).mean()                           # Eq. (9)
                    loss.backward()
                    loss_theta, h_fake = loss.detach(), [h.detach() for h in h_fake]
                if lambda_2:
                    parts = []
                    for g in pixel_features(x):
                        loss = -lambda_2 * D_tau2(g).mean() * len(g[0]) / len(x)       # Eq. (9)
                        loss.backward()
                        loss_theta = loss_theta + loss.detach()
                        parts.append([h.detach() for h in g])
                        del g, loss  # the graph of this picture, before that of the next
                    g_fake = [torch.cat(maps) for maps in zip(*parts)]
                x_hat_0.backward(x.grad / accumulation)
            log.add(loss_theta=loss_theta)
            log.latents(x_hat_0)
            job.phase("generator")

            # update discriminators D_tau1, D_tau2 on the same samples
            set_trainable(tau, True)
            loss_tau = 0.0
            if lambda_1:
                with torch.no_grad():  # [choice] the fake sample's time and noise
                    h_real = D_tau1.features(q(F_phi.schedule, x_0, t_d, z_d), t_d, c)
                logits_fake, logits_real = D_tau1(h_fake), D_tau1(h_real)
                loss_tau = loss_tau + lambda_1 * hinge(logits_fake, logits_real)       # Eq. (10)
                log.pairs(logits_fake, logits_real)
                del h_fake, h_real  # gigabytes at full size, which the pixels need
            if lambda_2:
                with torch.no_grad():
                    g_real = [torch.cat(maps) for maps in zip(*pixel_features(x_0))]
                logits_fake, logits_real = D_tau2(g_fake), D_tau2(g_real)
                loss_tau = loss_tau + lambda_2 * hinge(logits_fake, logits_real)       # Eq. (10)
                log.add(margin_pixel=(logits_real - logits_fake).mean(1))
                del g_fake, g_real, parts
            if tau:
                (loss_tau / accumulation).backward()
                log.add(loss_tau=loss_tau)
            job.phase("discriminator")
        for role, (_, opt) in roles.items():
            log.update(role, opt)
        job.phase("update")
        if job.end(log, iteration):
            break
        job.look(G_theta, tn)
    job.finish(F_phi, G_theta, tn)


if __name__ == "__main__":
    flags.entry(__file__, main, args)
