"""Diffusion core: Eqs. (1)-(3), (5), (6), prediction types, classifier-free guidance, PF-ODE, time schedules.

Time t is a fraction of T in [0, 1], one value per sample. A schedule is named by a string and maps t to
(alpha, sigma). "flow" is SD3's, alpha = 1 - t and sigma = t; "wan" is the same path, and differs in the times of
the original sampler. The others are DDPM's betas on the grid t = i/1000: linear for "animatediff", else
scaled-linear. "sdxl" (SD1.5 too) has them unchanged, "cogvideox-2b" and "cogvideox-5b" rescaled to alpha = 0 at
t = 1. What a network predicts is a string too: "velocity" (eps - x_0, flow path), "epsilon", or "v"
(alpha * eps - sigma * x_0).
The file stands alone: torch.

Symbols: x_0 clean latent, eps noise, x_t noisy latent (B C H W or B T C H W), t and s = t - dt times (B,),
c condition.
"""
from collections.abc import Callable
from dataclasses import dataclass
from functools import cache

import torch
from torch import Tensor


@dataclass(frozen=True)
class Denoiser:
    """A network as teacher, fake model or generator. Schedule and prediction type belong to this role and not
    to the model: after ADP the generator of an epsilon model predicts velocity on the straight path. `lora`
    names the role's adapter, () for the weights as they are."""
    net: Callable
    predicts: str = "velocity"
    schedule: str = "flow"
    lora: tuple[str, ...] = ()
    renoise: bool = False  # sampled with fresh noise between its steps, not along the ODE

    def __call__(self, x_t: Tensor, t: Tensor, c: tuple) -> Tensor:
        """The network's prediction at x_t, in the dtype of x_t (float32) whatever the network computes in."""
        return self.net(x_t, t, c, lora=self.lora).to(x_t.dtype)


# ---- schedules ---------------------------------------------------------------------------------------------

FLOWS = ("flow", "wan")
SNR_SHIFT = {"cogvideox-2b": 3.0, "cogvideox-5b": 1.0}


@cache
def alphas_cumprod(schedule: str) -> Tensor:
    """The product of 1 - beta up to each of DDPM's 1000 steps, (1000,) float64. CogVideoX divides the
    signal-to-noise ratio by 3 (2b) or 1 (5b). Then it shifts and stretches the square root so that the last
    value is 0 and the first stays (zero terminal SNR)."""
    if schedule not in ("sdxl", "animatediff", *SNR_SHIFT):
        raise ValueError(f"unknown schedule {schedule!r}: expected {', '.join(FLOWS)}, sdxl, animatediff, "
                         f"{', '.join(SNR_SHIFT)}")
    power = 1 if schedule == "animatediff" else 2  # scaled-linear: the betas' square roots are evenly spaced
    betas = torch.linspace(0.00085 ** (1 / power), 0.012 ** (1 / power), 1000, dtype=torch.float64) ** power
    abar = (1 - betas).cumprod(0)
    if schedule in SNR_SHIFT:
        root = (abar / (SNR_SHIFT[schedule] + (1 - SNR_SHIFT[schedule]) * abar)).sqrt()
        abar = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
    return abar


@cache
def ddpm_table(schedule: str) -> Tensor:
    """(alpha, sigma) at t = i/1000, (2 1001) float32: i = 0 is the clean end, i >= 1 alphas_cumprod[i-1]."""
    abar = torch.cat([torch.ones(1, dtype=torch.float64), alphas_cumprod(schedule)])
    return torch.stack([abar.sqrt(), (1 - abar).sqrt()]).float()


def alpha_sigma(schedule: str, t: Tensor, x: Tensor) -> tuple[Tensor, Tensor]:
    """Coefficients of Eq. (1) at t (B,), shaped to broadcast over x (B ...)."""
    if schedule in FLOWS:
        alpha, sigma = 1 - t, t
    else:
        alpha, sigma = ddpm_table(schedule).to(t.device)[:, (1000 * t).round().long()]
    shape = (-1,) + (1,) * (x.ndim - 1)
    return alpha.to(x.dtype).view(shape), sigma.to(x.dtype).view(shape)


def delta_t(schedule: str, dt: float = 1 / 64) -> float:
    """dt = T/64 (Sec. 4.1), on the DDPM grid the nearest i/1000: networks see only times they were trained on."""
    return dt if schedule in FLOWS else round(1000 * dt) / 1000  # [choice]


def random_time(schedule: str, u: Tensor, low: float = 0.0, high: float = 1.0) -> Tensor:
    """Uniform times in (low, high] from u ~ U[0, 1); DDPM schedules stay on the grid i/1000."""
    if schedule in FLOWS:
        return high - (high - low) * u
    first, last = round(1000 * low), round(1000 * high)
    return (last - (u * (last - first)).floor()) / 1000


def shift_time(u: Tensor, shift: float) -> Tensor:
    """SD3's resolution shift, s * u / (1 + (s - 1) * u); fixed points 0 and 1."""
    return shift * u / (1 + (shift - 1) * u)


def on_grid(tn: Tensor, schedule: str) -> Tensor:
    """Times as they are; for a DDPM schedule the nearest on its grid i/1000."""
    return tn if schedule in FLOWS else (1000 * tn).round() / 1000


def generator_times(steps: int, shift: float, schedule: str = "flow") -> Tensor:
    """The generator's schedule {t_0 = 0, ..., t_N = 1}: N + 1 values, tn[n] being t_n.

    Evenly spaced, then shifted: for shift 3 and N = 4 the steps start at 1, 0.9, 0.75, 0.5. The spacing of
    `teacher_times` would start the last step at 0.009, where almost nothing is left to do. DDPM schedules
    stay on the grid i/1000."""
    return on_grid(shift_time(torch.linspace(0, 1, steps + 1), shift), schedule)  # [choice]


def teacher_times(steps: int, shift: float, schedule: str = "flow") -> Tensor:
    """The times of the original samplers, ascending: 0 and N values.

    "flow" as SD3's: the end points are shifted before the linear spacing and the result again. "wan": 1/N, ...,
    1, shifted, as its DPM-Solver and FlowMatchEuler; its default sampler, UniPC, starts at 0.9998.
    "sdxl" as in sgm: DDPM indices from 999 down, evenly spaced and rounded down, the last one not 0.
    CogVideoX: DDPM indices from 999 down in steps of 1000 / N, rounded ("trailing"). AnimateDiff: indices
    1, 1 + 1000 // N, ... ("leading"), so that 25 steps start at 961 and not in pure noise."""
    if schedule == "wan":
        return generator_times(steps, shift, schedule)
    k = torch.arange(steps, dtype=torch.float64)
    if schedule == "flow":
        first, last = shift_time(torch.tensor([1.0, 0.001]), shift).tolist()
        times = shift_time(torch.linspace(first, last, steps), shift).flip(0)
    elif schedule == "animatediff":  # with 1000 steps the last index would be 1000
        times = (k * (1000 // steps) + 2).clamp(max=1000) / 1000
    elif schedule in SNR_SHIFT:  # numpy's arange, as there: its step is a difference, which decides at .5
        times = (1000 + k * ((1000 - 1000 / steps) - 1000)).round().flip(0) / 1000
    else:
        times = ((999 - k * (999 / steps)).floor().flip(0) + 1) / 1000
    return torch.cat([torch.zeros(1), times.float()])


# ---- Eqs. (1)-(3) ------------------------------------------------------------------------------------------

def q(schedule: str, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """A sample of q(x_t | x_0) with noise eps, Eq. (1)."""
    alpha, sigma = alpha_sigma(schedule, t, x_0)
    return alpha * x_0 + sigma * eps


def target(predicts: str, schedule: str, x_0: Tensor, t: Tensor, eps: Tensor) -> Tensor:
    """What the network regresses to: eps in Eq. (2), the velocity eps - x_0 in Eq. (3), or DDPM's v."""
    if predicts == "epsilon":
        return eps
    if predicts == "velocity":
        return eps - x_0
    alpha, sigma = alpha_sigma(schedule, t, x_0)
    return alpha * eps - sigma * x_0


def to_x_0_eps(predicts: str, schedule: str, prediction: Tensor, x_t: Tensor,
               t: Tensor) -> tuple[Tensor, Tensor]:
    """The estimates (x_0, eps) that a prediction stands for: the inverse of `target` given x_t."""
    alpha, sigma = alpha_sigma(schedule, t, x_t)
    if predicts == "epsilon":
        return (x_t - sigma * prediction) / alpha, prediction
    if predicts == "velocity":
        return x_t - sigma * prediction, x_t + alpha * prediction
    # No division by alpha, which CogVideoX has at 0 where t = 1.
    return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction


# ---- the PF-ODE --------------------------------------------------------------------------------------------

def guided(F: Denoiser, x_t: Tensor, t: Tensor, c: tuple, c_null: tuple, w: Tensor) -> Tensor:
    """Classifier-free guidance of the prediction, uncond + w * (cond - uncond), in all its channels; w (B,),
    c_null of batch 1."""
    both = tuple(torch.cat([a, b.expand_as(a)]) for a, b in zip(c, c_null))
    cond, uncond = F(torch.cat([x_t, x_t]), torch.cat([t, t]), both).chunk(2)
    return uncond + w.to(x_t.dtype).view((-1,) + (1,) * (x_t.ndim - 1)) * (cond - uncond)


def ode_step(F: Denoiser, x_t: Tensor, t: Tensor, s: Tensor, c: tuple, c_null: tuple | None = None,
             w: Tensor | None = None) -> tuple[Tensor, Tensor]:
    """One PF-ODE step t -> s of F: (x_s, and the end point x_0 that Eq. (5) calls F(x_t, t)).

    x_s = alpha_s * x_0 + sigma_s * eps is DDIM on a DDPM schedule and the Euler step on the flow path.
    w: guidance scales, None for none."""
    t, s = t.expand(x_t.shape[0]), s.expand(x_t.shape[0])
    prediction = F(x_t, t, c) if w is None else guided(F, x_t, t, c, c_null, w)
    x_0, eps = to_x_0_eps(F.predicts, F.schedule, prediction, x_t, t)
    alpha_s, sigma_s = alpha_sigma(F.schedule, s, x_t)
    return alpha_s * x_0 + sigma_s * eps, x_0


def solve(F: Denoiser, x: Tensor, tn: Tensor, c: tuple, c_null: tuple | None = None,
          w: Tensor | None = None, renoise: Callable[[int], Tensor] | None = None) -> Tensor:
    """From the last of the ascending times tn to the first, along the PF-ODE. With `renoise`, step n = 1, 2, ...
    instead diffuses its x_0 to the next time with the noise renoise(n)."""
    for n, (t, s) in enumerate(zip(tn.flip(0)[:-1], tn.flip(0)[1:]), 1):
        x, x_0 = ode_step(F, x, t, s, c, c_null, w)
        if renoise and s > 0:
            x = q(F.schedule, x_0, s.expand(x.shape[0]), renoise(n))
    return x


def dmd_loss(x_hat_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """Eq. (6) as half the mean squared distance to a target without gradient: its gradient is Eq. (5) over
    the number of elements.

    The L1 norm in Eq. (5) is a mean over each sample, as in DMD2's code."""  # [choice]
    with torch.no_grad():
        dims = tuple(range(1, x_hat_0.ndim))
        norm = (x_hat_0 - x_0_real).abs().mean(dims, keepdim=True).clamp_min(1e-8)
        grad = (x_0_fake - x_0_real) / norm  # Eq. (5)
        stopped = x_hat_0 - grad
    return 0.5 * (x_hat_0 - stopped).square().mean()  # Eq. (6)
