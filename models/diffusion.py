"""Diffusion core: Eqs. (1)-(3), (5), (6), prediction types, classifier-free guidance, PF-ODE, time schedules.

Time t is a fraction of T in [0, 1], one value per sample. A schedule is named by a string and maps t to
(alpha, sigma): "flow" (SD3: alpha = 1 - t, sigma = t), or scaled-linear DDPM betas on the grid i/1000, "sdxl"
as they are, "cogvideox-2b" and "cogvideox-5b" brought to alpha = 0 at t = 1. What a network predicts is a
string too: "velocity" (eps - x_0, flow path), "epsilon", or "v" (alpha * eps - sigma * x_0). The file stands
alone: torch.

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
    """A network in one role. Schedule and prediction type belong to the role, not to the model: after ADP the
    generator of an epsilon model predicts velocity on the straight path. `lora` names the role's adapter, ()
    for the weights as they are."""
    net: Callable
    predicts: str = "velocity"
    schedule: str = "flow"
    lora: tuple[str, ...] = ()

    def __call__(self, x_t: Tensor, t: Tensor, c: tuple) -> Tensor:
        """Raw prediction at x_t, float32 whatever the network computes in."""
        return self.net(x_t, t, c, lora=self.lora).to(x_t.dtype)


# ---- schedules ---------------------------------------------------------------------------------------------

SNR_SHIFT = {"cogvideox-2b": 3.0, "cogvideox-5b": 1.0}


@cache
def alphas_cumprod(schedule: str) -> Tensor:
    """Of DDPM's 1000 steps, float64. CogVideoX divides the signal-to-noise ratio by 3 (2b) or 1 (5b), then
    shifts and stretches its root so that the last value is 0 and the first stays: zero terminal SNR."""
    if schedule not in ("sdxl", *SNR_SHIFT):
        raise ValueError(f"unknown schedule {schedule!r}: expected flow, sdxl, {', '.join(SNR_SHIFT)}")
    betas = torch.linspace(0.00085 ** 0.5, 0.012 ** 0.5, 1000, dtype=torch.float64) ** 2
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
    if schedule == "flow":
        alpha, sigma = 1 - t, t
    else:
        alpha, sigma = ddpm_table(schedule).to(t.device)[:, (1000 * t).round().long()]
    shape = (-1,) + (1,) * (x.ndim - 1)
    return alpha.to(x.dtype).view(shape), sigma.to(x.dtype).view(shape)


def delta_t(schedule: str) -> float:
    """dt = T/64 (Sec. 4.1); 16/1000 on the DDPM grid: networks see only times they trained on.  # [choice]"""
    return 1 / 64 if schedule == "flow" else 16 / 1000


def random_time(schedule: str, u: Tensor, low: float = 0.0) -> Tensor:
    """Uniform times in (low, 1] from u ~ U[0, 1); DDPM schedules stay on the grid i/1000."""
    if schedule == "flow":
        return 1 - (1 - low) * u
    return (1000 - (u * (1000 - round(1000 * low))).floor()) / 1000


def shift_time(u: Tensor, shift: float) -> Tensor:
    """SD3's resolution shift, s * u / (1 + (s - 1) * u); fixed points 0 and 1."""
    return shift * u / (1 + (shift - 1) * u)


def generator_times(steps: int, shift: float, schedule: str = "flow") -> Tensor:
    """The generator's schedule {t_0 = 0, ..., t_N = 1}: N + 1 values, tn[n] being t_n.  # [choice]

    Evenly spaced, then shifted: for shift 3 and N = 4 the steps start at 1, 0.9, 0.75, 0.5 (ComfyUI's
    sgm_uniform). The teachers' own spacing would start its last step at 0.009 and waste it. DDPM schedules
    stay on the grid i/1000."""
    tn = shift_time(torch.linspace(0, 1, steps + 1), shift)
    return tn if schedule == "flow" else (1000 * tn).round() / 1000


def teacher_times(steps: int, shift: float, schedule: str = "flow") -> Tensor:
    """The original samplers' times, ascending: 0 and N values.

    "flow" is SD3's: the end points are shifted once before the linear spacing and once after it, as the
    published sampler does. "sdxl" is sgm's: indices 999, ..., evenly spaced and rounded down, none at 0.
    CogVideoX's are trailing: 999 and down by 1000 / steps, rounded."""
    if schedule in SNR_SHIFT:
        index = (torch.arange(steps + 1, dtype=torch.float64) * 1000 / steps).round()
        return (index / 1000).float()
    if schedule != "flow":
        index = torch.arange(1, steps + 1) * 999 // steps
        return torch.cat([torch.zeros(1), (index + 1) / 1000])
    ends = shift_time(torch.tensor([1.0, 0.001]), shift)
    descending = shift_time(torch.linspace(ends[0].item(), ends[1].item(), steps), shift)
    return torch.cat([torch.zeros(1), descending.flip(0)])


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
    # Never divides by alpha, which is 0 at zero SNR.
    return alpha * x_t - sigma * prediction, sigma * x_t + alpha * prediction


# ---- the PF-ODE --------------------------------------------------------------------------------------------

def guided(F: Denoiser, x_t: Tensor, t: Tensor, c: tuple, c_null: tuple, w: Tensor) -> Tensor:
    """Classifier-free guidance, uncond + w * (cond - uncond), of the raw prediction's every channel; w (B,),
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
          w: Tensor | None = None) -> Tensor:
    """PF-ODE from the last of the ascending times tn down to the first; deterministic, no re-noising."""
    for t, s in zip(tn.flip(0)[:-1], tn.flip(0)[1:]):
        x, _ = ode_step(F, x, t, s, c, c_null, w)
    return x


def dmd_loss(x_hat_0: Tensor, x_0_fake: Tensor, x_0_real: Tensor) -> Tensor:
    """Eqs. (5), (6): half the squared distance to a stopped target whose gradient is Eq. (5). The L1 norm is
    a mean over each sample alone, as in DMD2's code: its scale depends on no neighbour."""  # [choice]
    with torch.no_grad():
        dims = tuple(range(1, x_hat_0.ndim))
        norm = (x_hat_0 - x_0_real).abs().mean(dims, keepdim=True).clamp_min(1e-8)
        grad = (x_0_fake - x_0_real) / norm  # Eq. (5)
        stopped = x_hat_0 - grad
    return 0.5 * (x_hat_0 - stopped).square().mean()  # Eq. (6)
