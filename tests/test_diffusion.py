"""Diffusion core against closed forms (Gaussian, mixture) and the original sampler."""
import numpy as np
import pytest
import torch
from conftest import GOLDEN, golden, read_golden
from test_animatediff import build as build_golden_animatediff
from test_animatediff import clip
from test_cogvideox import load_case as load_golden_dit
from test_mmdit import load_golden_net
from test_sdxl_unet import load as load_golden_unet

from models.diffusion import (
    Denoiser,
    alpha_sigma,
    alphas_cumprod,
    ddpm_table,
    delta_t,
    dmd_loss,
    generator_times,
    ode_step,
    q,
    random_time,
    solve,
    target,
    teacher_times,
    to_x_0_eps,
)

PATHS = [("velocity", "flow"), ("epsilon", "sdxl"), ("v", "sdxl"), ("epsilon", "animatediff"),
         ("v", "cogvideox-2b"), ("v", "cogvideox-5b")]
CENTRES = torch.tensor([[-2.0, 0.5], [1.0, -1.0], [1.5, 2.0]], dtype=torch.float64)
WEIGHTS, STD = [0.2, 0.5, 0.3], 0.3


def mixture_x_0(schedule, x, t):
    """E[x_0 | x_t] for a Gaussian mixture with standard deviation STD: what a perfect network knows."""
    alpha, sigma = alpha_sigma(schedule, t, x)
    var = alpha ** 2 * STD ** 2 + sigma ** 2  # of x_t inside a component, B 1
    diff = x[:, None] - alpha[..., None] * CENTRES  # B K 2
    log_w = torch.log(torch.tensor(WEIGHTS, dtype=x.dtype)) - diff.square().sum(-1) / (2 * var)
    posterior = CENTRES + (alpha * STD ** 2 / var)[..., None] * diff
    return (log_w.softmax(-1)[..., None] * posterior).sum(1)


def exact_network(predicts, schedule, x_0_of):
    """A `net` that predicts the posterior mean's eps, velocity or v exactly."""
    def net(x, t, c, lora=()):
        x_0 = x_0_of(schedule, x, t)
        alpha, sigma = alpha_sigma(schedule, t, x)
        return target(predicts, schedule, x_0, t, (x - alpha * x_0) / sigma)
    return Denoiser(net, predicts, schedule)


@pytest.mark.parametrize("schedule", ["flow", "sdxl", "animatediff", "cogvideox-2b", "cogvideox-5b"])
def test_eq1_coefficients(schedule):
    t = torch.arange(0, 1001) / 1000
    alpha, sigma = (a.flatten() for a in alpha_sigma(schedule, t, torch.zeros(1001, 1)))
    assert (alpha[0], sigma[0]) == (1, 0)
    assert ((alpha / sigma)[1:].diff() < 0).all()  # Eq. (1): the signal-to-noise ratio falls
    # Straight path, variance preserving.
    kept = alpha + sigma if schedule == "flow" else alpha ** 2 + sigma ** 2
    torch.testing.assert_close(kept, torch.ones(1001))


def test_sdxl_table_ends():
    # betas are squares of a line from sqrt(0.00085) to sqrt(0.012): abar[0] = 1 - 0.00085, and the published
    # abar[999] = 0.00466.
    alpha, _ = ddpm_table("sdxl")
    assert alpha[1].item() ** 2 == pytest.approx(1 - 0.00085, abs=1e-6)
    assert alpha[1000].item() ** 2 == pytest.approx(0.00466, abs=1e-5)


@pytest.mark.parametrize("predicts, schedule", PATHS)
def test_prediction_converts_back(predicts, schedule):
    x_0, eps, t = torch.randn(3, 2, 4, 4), torch.randn(3, 2, 4, 4), torch.tensor([0.004, 0.5, 1.0])
    x_t = q(schedule, x_0, t, eps)
    x_0_hat, eps_hat = to_x_0_eps(predicts, schedule, target(predicts, schedule, x_0, t, eps), x_t, t)
    # 1e-5: float32 rounding, enlarged 15 or 25 times where epsilon divides by alpha_T = 0.068 or 0.040; flow
    # has sigma = 1, alpha = 0 at t = 1.
    torch.testing.assert_close(x_0_hat, x_0, atol=1e-5, rtol=0)
    torch.testing.assert_close(eps_hat, eps, atol=1e-5, rtol=0)


@pytest.mark.parametrize("predicts, schedule", PATHS)
def test_one_step_is_exact_for_a_single_point(predicts, schedule):
    point = torch.tensor([[0.7, -1.3]], dtype=torch.float64)
    F = exact_network(predicts, schedule, lambda schedule, x, t: point.expand_as(x))
    eps, t, s = torch.randn(5, 2, dtype=torch.float64), torch.tensor(0.9), torch.tensor(0.3)
    x_s, x_0 = ode_step(F, q(schedule, point.expand(5, 2), t.expand(5), eps), t, s, ())
    # 1e-6: the tables are float32.
    torch.testing.assert_close(x_0, point.expand(5, 2), atol=1e-6, rtol=0)
    torch.testing.assert_close(x_s, q(schedule, point.expand(5, 2), s.expand(5), eps), atol=1e-6, rtol=0)


# Not 2b's: its ratio alpha / sigma leaves 0 so steeply that 200 steps are not yet in the first-order regime.
@pytest.mark.parametrize("predicts, schedule", [path for path in PATHS if path[1] != "cogvideox-2b"])
def test_solver_converges_to_the_gaussian_solution_at_first_order(predicts, schedule):
    # For N(m, STD^2) the PF-ODE carries x_1 to m + (x_1 - alpha_1 m) * STD / std(x_1): quantiles are kept.
    m = torch.tensor([[0.7, -1.3]], dtype=torch.float64)

    def posterior(schedule, x, t):
        alpha, sigma = alpha_sigma(schedule, t, x)
        return m + alpha * STD ** 2 / (alpha ** 2 * STD ** 2 + sigma ** 2) * (x - alpha * m)
    F = exact_network(predicts, schedule, posterior)
    x_1 = torch.randn(16, 2, dtype=torch.float64)
    alpha, sigma = alpha_sigma(schedule, torch.ones(1), x_1)
    exact = m + (x_1 - alpha * m) * STD / (alpha ** 2 * STD ** 2 + sigma ** 2).sqrt()
    errors = [(solve(F, x_1, torch.linspace(0, 1, n + 1), ()) - exact).abs().max().item()
              for n in (50, 100, 200)]
    assert errors[2] < STD / 6  # 200 steps; only rules out a common offset, the factors below are the test
    # Halving the step halves the error of a first-order method (2.0 up to second-order terms).
    assert 1.5 < errors[0] / errors[1] < 2.5 and 1.5 < errors[1] / errors[2] < 2.5


def test_solver_reproduces_the_mixture():
    F = exact_network("velocity", "flow", mixture_x_0)
    x = solve(F, torch.randn(4096, 2, dtype=torch.float64), torch.linspace(0, 1, 101), ())
    share = torch.cdist(x, CENTRES).argmin(1).bincount(minlength=3) / len(x)
    # Binomial standard error at 4096 samples: at most 0.008; six of them, and modes are over 6 STD apart.
    torch.testing.assert_close(share, torch.tensor(WEIGHTS), atol=0.05, rtol=0)
    spread = torch.stack([(x[torch.cdist(x, CENTRES).argmin(1) == k] - CENTRES[k]).std() for k in range(3)])
    # 3 % of step error, 2 % of sampling.
    torch.testing.assert_close(spread, torch.full((3,), STD, dtype=x.dtype), atol=0.03, rtol=0)


@pytest.mark.parametrize("predicts, schedule", PATHS)
def test_optimum_of_eq2_and_eq3_is_the_true_score(predicts, schedule):
    # Least squares over samples of (x_0, eps) near one x_t gives the conditional mean of the target: the
    # posterior mean network.
    t = torch.tensor([0.6], dtype=torch.float64)
    n = 400_000
    centre = torch.multinomial(torch.tensor(WEIGHTS), n, replacement=True)
    x_0 = CENTRES[centre] + STD * torch.randn(n, 2, dtype=torch.float64)
    eps = torch.randn(n, 2, dtype=torch.float64)
    x_t = q(schedule, x_0, t, eps)
    y = target(predicts, schedule, x_0, t, eps)
    at = torch.tensor([[0.2, 0.1]], dtype=torch.float64)
    near = (x_t - at).norm(dim=1) < 0.15
    assert near.sum() > 2000
    estimate = y[near].mean(0)
    exact = exact_network(predicts, schedule, mixture_x_0)(at, t, ())[0]
    standard_error = y[near].std(0) / near.sum() ** 0.5
    assert ((estimate - exact).abs() < 4 * standard_error + 0.03).all()  # 0.03: curvature over the 0.15 disc


def test_guidance_touches_every_channel_and_is_plain_at_scale_1():
    def net(x, t, c, lora=()):
        return x * 0 + c[0][:, :, None, None]
    F, c, c_null = Denoiser(net), (torch.randn(2, 3),), (torch.randn(1, 3),)
    x, t = torch.randn(2, 3, 4, 4), torch.tensor(1.0)
    w = torch.tensor([1.0, 3.0])
    _, x_0 = ode_step(F, x, t, t * 0, c, c_null, w)
    v = x - x_0  # x_0 = x - t v
    expected = c_null[0] + w[:, None] * (c[0] - c_null[0])
    torch.testing.assert_close(v, expected[:, :, None, None].expand_as(v), atol=1e-5, rtol=0)


def test_dt_stays_on_the_grid():
    """D's UNet sees s = t - dt: half-way between two trained times it would be diffused to one and told the other."""
    assert delta_t("flow") == 1 / 64 and delta_t("flow", 0.1234) == 0.1234
    assert delta_t("sdxl") == 0.016 and delta_t("sdxl", 0.1234) == 0.123


@pytest.mark.parametrize("schedule", ["flow", "sdxl"])
def test_random_times_leave_room_for_the_step(schedule):
    dt = delta_t(schedule)
    u = torch.cat([torch.zeros(1), torch.linspace(0, 1, 20001)[:-1]])
    t = random_time(schedule, u, low=dt)
    # 1e-3: half a step of sdxl's grid is 5e-4.
    assert t.max() == 1 and (t - dt).min() >= 0 and t.mean().item() == pytest.approx((1 + dt) / 2, abs=1e-3)
    if schedule == "sdxl":  # the grid i/1000, i = 17..1000
        assert set((1000 * t).round().int().tolist()) == set(range(17, 1001))
        assert random_time(schedule, u).min() == torch.tensor(0.001)


@pytest.mark.parametrize("schedule", ["flow", "sdxl", "animatediff"])
@pytest.mark.parametrize("low, high", [(0.0, 0.5), (0.2, 0.98)])  # AVDM2's for its GAN and its scores
def test_random_times_of_a_range(schedule, low, high):
    u = torch.cat([torch.linspace(0, 1, 20001)[:-1], torch.tensor([1 - 2 ** -24])])
    t = random_time(schedule, u, low, high)
    assert t.max() == torch.tensor(high) and t.min() >= low
    if schedule != "flow":  # each grid time above `low` up to `high`, all but equally often
        index, counts = (1000 * t).round().int().unique(return_counts=True)
        assert index.tolist() == list(range(round(1000 * low) + 1, round(1000 * high) + 1))
        assert counts.max() - counts.min() <= 2


def test_generator_schedule():
    # shift 3, N = 4 (ComfyUI's sgm_uniform): s u / (1 + (s - 1) u) at u = 0, 1/4 .. 1.
    torch.testing.assert_close(generator_times(4, 3.0), torch.tensor([0, 0.5, 0.75, 0.9, 1.0]))
    # Trailing spacing of a DDPM grid.
    torch.testing.assert_close(generator_times(8, 1.0)[-2] * 1000 - 1, torch.tensor(874.0))
    assert generator_times(1, 3.0).tolist() == [0, 1]


@pytest.mark.parametrize("path", golden("sd3_flow_euler*.safetensors"), ids=lambda p: p.stem)
def test_teacher_sigmas_equal_the_original(path):
    tensors, _ = read_golden(path)
    names = [n for n in tensors if n.endswith(".sigmas")]
    assert names
    for name in names:
        parts = name.split(".shift")[1].rsplit(".", 2)
        shift, steps = (float(part.removeprefix(p)) for part, p in zip(parts, ("", "steps")))
        # 1e-6: diffusers and the original differ by 1.2e-7 from each other (SD3.md).
        torch.testing.assert_close(teacher_times(int(steps), shift).flip(0), tensors[name], atol=1e-6, rtol=0)


@pytest.mark.parametrize("path", golden("sd3_flow_euler*.safetensors"), ids=lambda p: p.stem)
def test_guided_trajectory_equals_the_original(path):
    tensors, meta = read_golden(path)
    c, c_null = ((tensors[f"in.{kind}.context"], tensors[f"in.{kind}.y"]) for kind in ("cond", "uncond"))
    families = {name.split(".")[1] for name in tensors if name.startswith("traj.")}
    assert families
    for family in families:
        net, *_ = load_golden_net(GOLDEN / meta["config"]["mmdit_files"][family])
        for steps in meta["config"]["steps"]:
            latents = tensors[f"traj.{family}.steps{steps}.latents"]
            denoised = tensors.get(f"traj.{family}.steps{steps}.denoised_cfg")
            x, tn = tensors["in.noise"], teacher_times(steps, meta["config"]["shift"]).flip(0)
            w = torch.full((x.shape[0],), meta["config"]["cfg"])
            for k in range(steps):
                # 5e-4: float32 knows 1000 t to 3e-5; with guidance 5 latents of up to 17 are 8e-5 off.
                torch.testing.assert_close(x, latents[k], atol=5e-4, rtol=0)
                with torch.no_grad():
                    x, x_0 = ode_step(Denoiser(net), x, tn[k], tn[k + 1], c, c_null, w)
                if denoised is not None:
                    torch.testing.assert_close(x_0, denoised[k], atol=5e-4, rtol=0)
            torch.testing.assert_close(x, latents[steps], atol=5e-4, rtol=0)


@pytest.mark.parametrize("path", golden("sdxl_ddim*.safetensors"), ids=lambda p: p.stem)
def test_ddim_trajectories_equal_the_original(path):
    tensors, meta = read_golden(path)
    meta = meta["golden"]
    net, *_ = load_golden_unet(GOLDEN / meta["unet_weights_from"])
    c, c_null = ((tensors[f"in.context_{kind}"], tensors[f"in.y_{kind}"]) for kind in ("cond", "uncond"))
    w = torch.full((len(tensors["in.x_T"]),), meta["cfg_scale"])
    table = ddpm_table("sdxl")[0, 1:].double() ** 2
    # 5e-6: both tables are float32, ours keeps the root.
    torch.testing.assert_close(table, tensors["schedule.alphas_cumprod"].double(), atol=5e-6, rtol=0)
    for case in meta["trajectories"]:
        index, latents = (tensors[f"out.{case}.{name}"] for name in ("timesteps", "latents"))
        # Index i is t = (i + 1)/1000; the last step lands on alphas_cumprod[0], t = 0.001, or on x_0, t = 0.
        end = 0.001 if case.endswith("final_alpha0") else 0.0
        t = torch.cat([(index + 1) / 1000, torch.tensor([end])])
        x = tensors["in.x_T"]
        for k in range(len(index)):
            F = Denoiser(net, "epsilon", "sdxl")
            with torch.no_grad():
                x, x_0 = ode_step(F, x, t[k], t[k + 1], c, c_null, w)
            # 4e-3: the reference's own error is 3e-4, its latents reach a deviation of 29 (SDXL.md).
            torch.testing.assert_close(x, latents[k + 1], atol=4e-3, rtol=0)
            torch.testing.assert_close(x_0, tensors[f"out.{case}.pred_x0"][k], atol=8e-3, rtol=0)


@pytest.mark.parametrize("steps", [7, 48, 50, 96, 99, 185, 240, 999])
def test_rounding_of_the_originals_at_ties(steps):
    """numpy's arange and linspace decide where an index lies half-way, or on a whole number."""
    index = {schedule: (1000 * teacher_times(steps, 1.0, schedule)).round().int().flip(0)[:-1].numpy() - 1
             for schedule in ("cogvideox-2b", "sdxl")}
    assert (index["cogvideox-2b"] == np.round(np.arange(1000, 0, -1000 / steps)).astype(int) - 1).all()
    assert (index["sdxl"] == np.linspace(999, 0, steps, endpoint=False).astype(int)).all()


def test_sdxl_teacher_times_are_sgms():
    """Indices floor(999 (1 - i/n)), none at 0: 999, 799, ... 199 for 5 steps, and the end x_0."""
    assert (1000 * teacher_times(5, 1.0, "sdxl")).round().tolist() == [0, 200, 400, 600, 800, 1000]
    assert (1000 * teacher_times(28, 1.0, "sdxl")).round().int().tolist()[:3] == [0, 36, 72]
    assert (1000 * generator_times(3, 1.0, "sdxl")).tolist() == [0, 333, 667, 1000]  # stays on the grid


# ---- AnimateDiff: linear betas, re-noising -----------------------------------------------------------------

def animatediff_case(path):
    """(tensors, metadata, denoiser, conditional and unconditional c) of a golden file."""
    tensors, meta = read_golden(path)
    meta = meta["golden"]
    net = build_golden_animatediff(GOLDEN / meta["motion_weights_from"])
    contexts = (tensors[f"in.context_{kind}"] for kind in ("cond", "uncond"))
    c, c_null = ((context, context.new_zeros(len(context), 0)) for context in contexts)
    return tensors, meta, Denoiser(net, "epsilon", "animatediff"), c, c_null


sampling = pytest.mark.parametrize("path", golden("animatediff_sampling*.safetensors"), ids=lambda p: p.stem)


@sampling
def test_animatediff_schedule_equals_the_original(path):
    tensors, meta = read_golden(path)
    table = alphas_cumprod("animatediff").float()
    torch.testing.assert_close(table, tensors["schedule.alphas_cumprod"], atol=1e-6, rtol=0)
    assert ddpm_table("animatediff")[0, -1].item() == pytest.approx(0.0397, abs=5e-5)
    assert alpha_sigma("animatediff", torch.ones(1), torch.zeros(1))[0].item() == pytest.approx(
        meta["golden"]["renoise"]["alpha_999"], abs=1e-6)
    index = tensors["out.ddim.timesteps"]
    tn = teacher_times(len(index), 1.0, "animatediff")
    assert ((1000 * tn[1:]).round().long() - 1).flip(0).tolist() == index.tolist() and tn[0] == 0
    tn = generator_times(len(tensors["out.renoise.timesteps"]), 1.0, "animatediff")
    assert ((1000 * tn[1:]).round().long() - 1).flip(0).tolist() == tensors["out.renoise.timesteps"].tolist()


@torch.no_grad()
@sampling
def test_animatediff_ddim_steps_equal_the_original(path):
    g, meta, F, c, c_null = animatediff_case(path)
    latents, steps = [clip(x) for x in g["out.ddim.latents"]], meta["ddim"]["steps"]
    tn = teacher_times(steps, 1.0, "animatediff").flip(0)
    w = torch.full((len(latents[0]),), meta["ddim"]["cfg_scale"])
    assert torch.equal(latents[0], clip(g["in.x_T"]))
    for k in {*range(0, steps, 4), steps - 1}:
        x, _ = ode_step(F, latents[k], tn[k], tn[k + 1], c, c_null, w)
        # 1e-4: 2e-5 was seen, an error of 5e-6 in eps under guidance; alphas_cumprod[0] as the end is 0.1 off.
        torch.testing.assert_close(x, latents[k + 1], atol=1e-4, rtol=0)


@torch.no_grad()
@sampling
def test_four_steps_with_and_without_fresh_noise_equal_the_original(path):
    g, meta, F, c, _ = animatediff_case(path)
    noises, x_0 = [clip(noise) for noise in g["in.noises"]], [clip(x) for x in g["out.renoise.x0"]]
    N = len(noises)
    tn = generator_times(N, 1.0, "animatediff")
    drawn = []

    def renoise(n):
        drawn.append(n)
        return noises[n]
    # 1e-3: the original's own float32 error is 2e-4, the final latent's deviation 30 (ANIMATEDIFF.md).
    end = solve(F, noises[0], tn, c, renoise=renoise)
    torch.testing.assert_close(end, x_0[-1], atol=1e-3, rtol=0)
    torch.testing.assert_close(end, clip(g["out.lcm.denoised"][-1]), atol=1e-3, rtol=0)
    assert drawn == list(range(1, N))  # the step onto x_0 takes no noise
    torch.testing.assert_close(solve(F, noises[0], tn, c), clip(g["out.ode.x0"][-1]), atol=1e-3, rtol=0)
    before_last = solve(F, noises[0], tn[1:], c, renoise=renoise)
    torch.testing.assert_close(before_last, clip(g["out.renoise.x"][-1]), atol=1e-3, rtol=0)


def test_renoising_by_hand_and_a_shorter_rollout_is_its_prefix():
    F = Denoiser(lambda x, t, c, lora: torch.tanh(x) * t.view(-1, 1, 1), "epsilon", "animatediff")
    tn, noises = generator_times(4, 1.0, "animatediff"), torch.randn(4, 2, 3, 5)
    alpha, sigma = ddpm_table("animatediff")[:, [0, 250, 500, 750, 1000]]
    x = noises[0]
    for n in (4, 3, 2, 1):
        x_0 = (x - sigma[n] * torch.tanh(x) * n / 4) / alpha[n]
        x = alpha[n - 1] * x_0 + sigma[n - 1] * (noises[5 - n] if n > 1 else 0)
        rollout = solve(F, noises[0], tn[n - 1:], (), renoise=lambda k: noises[k])
        torch.testing.assert_close(rollout, x, atol=1e-6, rtol=1e-6)


def test_gradient_of_eq6_is_eq5_with_a_normaliser_per_sample():
    x_hat_0 = torch.randn(2, 3, 4, 4, requires_grad=True)
    fake, real = torch.randn(2, 3, 4, 4), torch.randn(2, 3, 4, 4)
    dmd_loss(x_hat_0, fake, real).backward()
    norm = (x_hat_0.detach() - real).abs().mean((1, 2, 3), keepdim=True)
    torch.testing.assert_close(x_hat_0.grad, (fake - real) / norm / x_hat_0.numel())


# ---- CogVideoX: zero terminal signal-to-noise ratio -----------------------------------------------------------------

video = pytest.mark.parametrize("path", golden("cogvideox_ddim*.safetensors"), ids=lambda p: p.stem)


def models_of(tensors):
    return sorted({name.split("/")[1].split(".")[0] for name in tensors
                   if name.startswith("sched/") and name.endswith("alphas_cumprod")})


@video
def test_cogvideox_schedule_equals_the_original(path):
    tensors, _ = read_golden(path)
    assert models_of(tensors) == ["2b", "5b"]
    for model in models_of(tensors):
        schedule = f"cogvideox-{model}"
        abar = alphas_cumprod(schedule)
        torch.testing.assert_close(abar, tensors[f"sched/{model}.alphas_cumprod"], atol=1e-12, rtol=0)
        assert abar[-1] == 0 and ddpm_table(schedule)[:, -1].tolist() == [0, 1]
        for name in tensors:
            if name.startswith("sched/timesteps.n"):
                steps = int(name.removeprefix("sched/timesteps.n"))
                index = (1000 * teacher_times(steps, 1.0, schedule)).round().long().flip(0) - 1
                assert index.tolist() == [*tensors[name].tolist(), -1]  # -1: t = 0, the clean end


@video
def test_cogvideox_noising_and_target_equal_the_original(path):
    tensors, _ = read_golden(path)
    x_0, eps, t = tensors["train/x0"], tensors["train/noise"], (tensors["train/timesteps"] + 1) / 1000
    for model in models_of(tensors):
        x_t = q(f"cogvideox-{model}", x_0, t, eps)
        v = target("v", f"cogvideox-{model}", x_0, t, eps)
        # 2e-5: the original keeps alphas_cumprod in float32 and takes roots of it; x_t is about 3.
        torch.testing.assert_close(x_t, tensors[f"train/{model}.x_t"], atol=2e-5, rtol=0)
        torch.testing.assert_close(v, tensors[f"train/{model}.v"], atol=2e-5, rtol=0)


@video
def test_cogvideox_guided_trajectory_equals_the_original(path):
    tensors, meta = read_golden(path)
    meta = meta["meta"]
    for model, file in meta["weights"].items():
        net = load_golden_dit(GOLDEN / file)[0]
        schedule, steps = f"cogvideox-{model}", meta["steps"]
        context, null = tensors[f"{model}/in.context"], tensors[f"{model}/in.context_uncond"]
        c, c_null = (context, context.new_zeros(1, 0)), (null, null.new_zeros(1, 0))
        tn, x = teacher_times(steps, 1.0, schedule), tensors[f"{model}/in.noise"]
        w = torch.full((1,), meta["cfg"])
        for i in range(steps):
            x, x_0 = ode_step(Denoiser(net, "v", schedule), x, tn[steps - i], tn[steps - i - 1], c, c_null, w)
            # 2e-4: eight steps enlarge float32 rounding to 8e-6 in the original itself (COGVIDEOX.md).
            for name, value in ((f"{model}/step{i}.pred_x0", x_0), (f"{model}/step{i + 1}.latents", x)):
                if name in tensors or i == steps - 1 and name.endswith("latents"):
                    torch.testing.assert_close(value, tensors[name], atol=2e-4, rtol=0)


@pytest.mark.parametrize("schedule", ["cogvideox-2b", "cogvideox-5b"])
def test_zero_signal_at_the_start_and_no_noise_at_the_end(schedule):
    """At t = 1 the latent is pure noise and x_0 = -v; a step to t = 0 returns x_0; nothing divides by 0."""
    v, x, c = torch.randn(2, 3, 4, 2, 2), torch.randn(2, 3, 4, 2, 2), ()
    F = Denoiser(lambda x, t, c, lora: v, "v", schedule)
    one, zero = torch.tensor(1.0), torch.tensor(0.0)
    assert torch.equal(q(schedule, x, one.expand(2), v), v)
    x_s, x_0 = ode_step(F, x, one, zero, c)
    assert torch.equal(x_0, -v) and torch.equal(x_s, x_0)
    near, _ = ode_step(F, x, one, one - delta_t(schedule), c)
    u = random_time(schedule, torch.tensor([0.0, 1 - 2 ** -24]), low=delta_t(schedule))
    assert near.isfinite().all() and u.tolist() == [1.0, pytest.approx(0.017)]  # so that t - dt >= 1/1000
    assert dmd_loss(x_0, *(ode_step(F, x, one, zero, c)[1] for _ in range(2))) == 0
