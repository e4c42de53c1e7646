"""AVDM2, Algorithm 1: AnimateDiff becomes a 4-step generator by a video GAN and score matching of single frames.

    python avdm2.py                                                # embedded tiny-animatediff, two CPU cores
    torchrun --nproc_per_node 8 avdm2.py --model animatediff --videos FOLDER --prompts OpenVid-1M.csv
    torchrun --nproc_per_node 8 avdm2.py --model animatediff --latents FOLDER --teacher-2d STYLE.safetensors

The paper is "Accelerating Video Diffusion Models via Distribution Matching"; lines, equations and sections are its
own. Its "adversarial distribution matching" is a GAN on real clips and not that of adm.py: here it is called GAN.
Reads the two files of AnimateDiff and captioned videos; writes runs/avdm2-MODEL-NNN/ as adm.py does.

F_phi video teacher eps_phi   F_2d teacher of frames eps_phi2D   f_psi its fake model eps_psi2D
G_theta generator             D_tau discriminator (the paper's D_eta) on F_phi's encoder
x_0 real clip    x_hat_0 generated    z_T, eps noises    c prompt    w guidance scales    _K of K frames
tn[n] = t_n, from tn[0] = 0 to tn[N] = T = 1
Shapes: latents of clips B T C H W, of K frames of each (B K) C H W, times and scales B or (B K).
"""
from pathlib import Path

from models.job import parsers


def parse_args(argv=None):
    parser, add = parsers.training_parser(__file__, __doc__)
    parser.set_defaults(model="tiny-animatediff")
    parsers.add_clip_flags(parser)
    add("--init", type=Path, metavar="RUN", help="start the generator from this run of avdm2.py")
    add("--teacher-2d", type=Path,
        help="SD1.5 file whose UNet scores the frames; text encoder and VAE stay --ckpt's; default: --ckpt")
    add("--steps", type=int, help="N, steps of the generator")
    add("--rollout", choices=("renoise", "ode"), default="renoise",
        help="between the generator's steps: fresh noise, or the ODE")
    add("--sdm", choices=("2d", "video", "none"), default="2d", help="score matching of frames, of clips, or none")
    add("--frames-sdm", type=int, default=4, metavar="K", help="frames of each clip for --sdm 2d")
    add("--lambdas", type=float, nargs=2, metavar=("SDM", "GAN"), help="weights in Eq. (9)")
    add("--cfg", type=float, nargs=1, metavar="W", help="guidance of the score matching's teacher")
    add("--ttur", type=int, default=2, help="updates of the fake model and of D per update of the generator")
    add("--warmup", type=int, metavar="PASSES", help="passes over which the learning rates rise from 0")
    add("--lr-motion", type=float, help="of the generator's motion modules; --lr-theta is its UNet's")
    add("--lr-psi", type=float, help="learning rate of the fake model")
    parsers.add_discriminator_flags(parser, add)
    return parser.parse_args(argv)


if __name__ == "__main__":
    args = parse_args()  # before PyTorch is imported, which takes seconds

from dataclasses import replace
from functools import partial

import torch
from torch.nn.functional import mse_loss, softplus

from models.checkpoint import InputError
from models.diffusion import Denoiser, dmd_loss, generator_times, ode_step, q, random_time, solve, target
from models.discriminator import VideoDiscriminator
from models.job import clips, flags, networks
from models.job.job import Job
from models.job.notes import check_teacher
from models.parallel import adamw, init_distributed, set_trainable

GAN_TIMES = dict(low=0.0, high=0.5)    # [t_gmin, t_gmax], Sec. 5.1
SDM_TIMES = dict(low=0.2, high=0.98)   # [t_min, t_max], Sec. 5.1
ADAMW = dict(betas=(0.9, 0.999), weight_decay=0.01)  # Sec. 5.1


def main(args):
    device, mesh = init_distributed(args.shard_ranks)
    preset = flags.resolve(args)
    if not preset.base_2d:
        raise InputError(f"--model {args.model}: expected one with a teacher of single frames, such as animatediff")
    used = args.lambdas[1:] if args.sdm == "none" else args.lambdas  # without SDM only the GAN's counts
    if min(args.lambdas) < 0 or not any(used):
        raise InputError(f"--lambdas {args.lambdas[0]:g} {args.lambdas[1]:g} --sdm {args.sdm}: expected weights >= 0, "
                         "not all 0")
    if args.sdm == "2d" and args.frames_sdm > args.frames:
        raise InputError(f"--frames-sdm {args.frames_sdm}: expected at most the clip's {args.frames} frames")
    if args.teacher_2d and args.sdm != "2d":
        raise InputError(f"--teacher-2d {args.teacher_2d} --sdm {args.sdm}: expected --sdm 2d, which has such a "
                         "teacher")
    source = clips.open_source(args, preset)
    args_2d, preset_2d = networks.frame_model(args, preset)
    if args.sdm == "2d" and not args.random_weights:  # wrong files are refused before any is loaded
        for files in ((args, preset), (args_2d, preset_2d)):
            check_teacher(networks.open_denoiser(*files))
    job = Job(__file__, args, preset, mesh, device, clips.captions_of(source, None if args.cache_text else 200))
    real = clips.open_clips(job, source)
    load = partial(networks.load_network, args, preset, mesh, device)
    load_2d = partial(networks.load_network, args_2d, preset_2d, mesh, device)

    F_phi = Denoiser(load(), preset.predicts, preset.schedule)
    G_theta = networks.load_generator(args, preset, mesh, device)                      # Alg. 1 l. 1
    G_theta = replace(G_theta, renoise=args.rollout == "renoise")  # [choice] fresh noise, as DMD2's rollout
    D_tau = networks.new_discriminator(args, preset, F_phi, mesh, device, VideoDiscriminator)  # Alg. 1 l. 1
    F_sdm, psi = F_phi, {}
    if args.sdm == "2d":  # given pictures, F_phi's network is its UNet without motion
        F_sdm = Denoiser(load_2d() if args.teacher_2d else F_phi.net, preset_2d.predicts, preset_2d.schedule)
        f_psi = Denoiser(load_2d(trainable=True), F_sdm.predicts, F_sdm.schedule)      # Alg. 1 l. 1
    elif args.sdm == "video":
        f_psi = replace(F_phi, net=load(trainable=True))
    theta, tau = networks.trainables(G_theta), networks.trainables(D_tau)
    motion = {name: p for name, p in theta.items() if "motion_modules." in name}
    unet = {name: p for name, p in theta.items() if name not in motion}
    opt_theta = adamw((unet, args.lr_theta), (motion, args.lr_motion), ema=args.ema, **ADAMW)
    opt_tau = adamw((tau, args.lr_tau), **ADAMW)
    roles = dict(theta=(theta, opt_theta), tau=(tau, opt_tau))
    watched = dict(F_phi=F_phi, G_theta=G_theta, D_tau=D_tau.F_phi)
    if args.sdm != "none":
        psi = networks.trainables(f_psi)
        opt_psi = adamw((psi, args.lr_psi), **ADAMW)
        roles |= dict(psi=(psi, opt_psi))
        watched |= dict(f_psi=f_psi)
    if args.sdm == "2d":  # first: a shared module counts for the first role
        watched = dict(F_2d=F_sdm) | watched
    job.start(**roles)
    job.watch(**watched)
    tn = generator_times(args.steps, preset.shift, G_theta.schedule).to(device)
    gen_iter, global_iter, accumulation = job.gen_iter, job.global_iter, len(job.micro_batches)
    lambda_sdm, lambda_gan = args.lambdas

    def pick(name, indices, *values):  # --sdm 2d: the values at K frames of each clip, drawn without replacement
        if args.sdm == "video":
            return values
        T, K = job.latent_shape[0], args.frames_sdm
        u = job.uniform(name, [T * i + frame for i in indices for frame in range(T)]).view(-1, T)
        frames, clip = u.argsort(1)[:, :K].flatten(), torch.arange(len(u), device=device).repeat_interleave(K)
        return [x[clip, frames] if x.ndim == 5 else x[clip] for x in values]

    def pair(F, limits, name, indices):  # times on F's schedule, and noise
        return random_time(F.schedule, job.uniform(f"t_{name}", indices), **limits), job.noise(name, indices)

    while gen_iter < args.max_iter:                                                    # Alg. 1 l. 2, 18
        global_iter += 1
        log, turn = job.begin(global_iter), global_iter % args.ttur == 0               # Sec. 4.3
        n, warm = job.integer("n", args.steps), min(1.0, global_iter / args.warmup)
        for indices in job.micro_batches:
            x_0, c = real(indices)  # [choice] the generated clip has the real one's prompt
            z_T = job.noise("z_T", indices)                                            # Alg. 1 l. 3
            renoise = (lambda k: job.noise(f"z_{k}", indices)) if G_theta.renoise else None
            with torch.no_grad():
                x_tn = solve(G_theta, z_T, tn[n:], c, renoise=renoise)                 # Alg. 1 l. 4
            with torch.set_grad_enabled(turn):
                _, x_hat_0 = ode_step(G_theta, x_tn, tn[n], tn[0], c)                  # Alg. 1 l. 4
            job.phase("rollout")

            # update generator G_theta: both losses are differentiated to x, their sum once through its network
            if turn:
                set_trainable(tau, False)
                set_trainable(psi, False)
                x = x_hat_0.detach().requires_grad_()
                t, eps = pair(F_phi, GAN_TIMES, "eps", indices)                        # Alg. 1 l. 5
                x_t = q(F_phi.schedule, x, t, eps)                                     # Alg. 1 l. 6
                # [differs] Eq. (7) with its sign turned: as printed, G_theta would make D reject its clips.
                loss_gan = softplus(-D_tau(D_tau.features(x_t, t, c))).mean()          # Alg. 1 l. 7, Eq. (7)
                grad_gan, = torch.autograd.grad(lambda_gan * loss_gan, x)
                loss_theta, grad_sdm = lambda_gan * loss_gan, torch.zeros_like(x)
                job.phase("GAN")
                if psi:
                    t, eps = pair(F_sdm, SDM_TIMES, "eps_sdm", indices)                # Alg. 1 l. 8
                    x_K, eps, t, *c_K = pick("K", indices, x, eps, t, *c)              # Alg. 1 l. 8
                    x_t = q(F_sdm.schedule, x_K, t, eps)                               # Alg. 1 l. 9
                    with torch.no_grad():
                        w = torch.full_like(t, args.cfg[0])
                        _, x_0_fake = ode_step(f_psi, x_t, t, tn[0], c_K)
                        _, x_0_real = ode_step(F_sdm, x_t, t, tn[0], c_K, job.c_null, w)
                    # [choice] Eq. (8)'s norm is each frame's, also with --sdm video
                    per_frame = [y.flatten(0, -4) for y in (x_K, x_0_fake, x_0_real)]
                    loss_sdm = dmd_loss(*per_frame)                                    # Alg. 1 l. 10, Eq. (8)
                    grad_sdm, = torch.autograd.grad(lambda_sdm * loss_sdm, x)
                    loss_theta = loss_theta + lambda_sdm * loss_sdm
                    log.add(sdm=loss_sdm)
                    job.phase("SDM")
                x_hat_0.backward((grad_gan + grad_sdm) / accumulation)                 # Alg. 1 l. 11, Eq. (9)
                norms = [grad.flatten(1).norm(dim=1).sum() for grad in (grad_gan, grad_sdm)]  # losses are means
                log.add(loss_theta=loss_theta, gan=loss_gan, grad_gan=norms[0], grad_sdm=norms[1])
                job.phase("generator")
            x_hat_0 = x_hat_0.detach()
            log.latents(x_hat_0)

            # update fake model f_psi. [differs] l. 14 names the teacher phi_2D, which is frozen. Its gradient and D's
            # are taken before theta's step of l. 11: in Algorithm 1, too, both see x_hat_0 from before it.
            if psi:
                set_trainable(psi, True)
                t, eps = pair(f_psi, SDM_TIMES, "eps_psi", indices)                    # Alg. 1 l. 12
                x_K, eps, t, *c_K = pick("K_psi", indices, x_hat_0, eps, t, *c)  # [choice] other frames than l. 8's
                x_t = q(f_psi.schedule, x_K, t, eps)                                   # Alg. 1 l. 13
                loss_psi = mse_loss(f_psi(x_t, t, c_K), target(f_psi.predicts, f_psi.schedule, x_K, t, eps))  # Eq. (2)
                (loss_psi / accumulation).backward()                                   # Alg. 1 l. 14
                log.add(loss_psi=loss_psi)
                job.phase("fake")

            # update discriminator D_tau. [differs] l. 17 cites Eq. (5); the loss of D is Eq. (6).
            set_trainable(tau, True)
            t, eps = pair(F_phi, GAN_TIMES, "eps_tau", indices)  # [choice] the same for both clips  # Alg. 1 l. 15
            with torch.no_grad():
                h_fake = D_tau.features(q(F_phi.schedule, x_hat_0, t, eps), t, c)      # Alg. 1 l. 16
                h_real = D_tau.features(q(F_phi.schedule, x_0, t, eps), t, c)          # Alg. 1 l. 16
            logits_fake, logits_real = D_tau(h_fake), D_tau(h_real)
            loss_tau = softplus(logits_fake).mean() + softplus(-logits_real).mean()    # Alg. 1 l. 17, Eq. (6)
            (loss_tau / accumulation).backward()
            log.pairs(logits_fake, logits_real)
            log.add(loss_tau=loss_tau)
            job.phase("discriminator")
        if turn:
            log.update("theta", opt_theta, warm)                                       # Alg. 1 l. 11
            gen_iter += 1
        if psi:
            log.update("psi", opt_psi, warm)                                           # Alg. 1 l. 14
        log.update("tau", opt_tau, warm)                                               # Alg. 1 l. 17
        job.phase("update")
        if job.end(log, gen_iter):
            break
        if turn:
            job.look(G_theta, tn)
    job.finish(F_phi, G_theta, tn)                                                     # Alg. 1 l. 19


if __name__ == "__main__":
    flags.entry(__file__, main, args)
