"""dmd.py: Eqs. (2)-(6) by hand, updates' order and ownership, its difference from adm.py, --init."""
import re

import pytest
import torch
from conftest import ROOT, rows, run, states_saved
from torch import Tensor, nn

import dmd
from models.checkpoint import open_tensors, save_safetensors
from models.data import noise, uniform
from models.diffusion import alpha_sigma, generator_times
from models.job import log as log_module
from models.job import networks
from models.job.families import FAMILIES
from models.parallel import local_rows
from models.presets import PRESETS

SCRIPT, ADM = ((ROOT / name).read_text() for name in ("dmd.py", "adm.py"))
SD3, SDXL = PRESETS["tiny-sd3"], PRESETS["tiny-sdxl"]
SMALL = {
    "tiny-sd3": SD3._replace(config=SD3.config | dict(depth=2)),
    "tiny-sdxl": SDXL._replace(config=SDXL.config | dict(channel_mult=(1, 2), depth=(0, 0), middle_depth=1)),
}
RANDOM = ["--random-weights", "--batch-size", 4]
DENOISER = "model.diffusion_model."


def train(out, *flags) -> list[dict]:
    """Run dmd.py in this process; returns the rows of metrics.jsonl. Random networks are smaller than the
    presets'."""
    with pytest.MonkeyPatch.context() as patch, states_saved():
        for name, row in SMALL.items() if "--random-weights" in flags else ():
            patch.setitem(PRESETS, name, row)
        run(dmd, "--out", out, *flags)
    return rows(out) if (out / "metrics.jsonl").exists() else []


# ---- networks of a line, whose losses can be worked out by hand --------------------------------------------

class Net(nn.Module):
    """Stands for a denoiser: weight * x_t + the mean of the prompt's vector, and keeps what it is asked."""

    def __init__(self, weight: float):
        super().__init__()
        self.weight, self.asked = nn.Parameter(torch.tensor(weight)), []

    def forward(self, x_t, t, c, taps=(), lora=()) -> Tensor:
        self.asked.append((t, torch.is_grad_enabled()))
        return self.weight * x_t + c[1].mean(1)[:, None, None, None]


@pytest.fixture
def stubs(monkeypatch):
    """Networks of dmd.py: (F_phi's, G_theta's, f_psi's)."""
    nets = Net(0.3), Net(0.5), Net(0.2)
    order = iter(nets)  # as Alg. 1 l. 1, 3
    monkeypatch.setattr(networks, "load_network", lambda *_, **__: next(order))
    return nets


def wide(values: Tensor) -> Tensor:
    return values[:, None, None, None]


@pytest.mark.parametrize("model, micro, offset", [
    ("tiny-sd3", 4, None), ("tiny-sd3", 1, None), ("tiny-sdxl", 4, None), ("tiny-sd3", 4, 0.5)])
def test_one_iteration_by_hand(tmp_path, stubs, model, micro, offset):
    """Eqs. (2)-(6) with N = 1. Micro-batches of one sample show that Eq. (5)'s norm is each sample's own. With an
    offset the generator is guided too, at each sample's own scale less that (Table 3, w/ CFG)."""
    (F_phi, G_theta, f_psi), row = stubs, PRESETS[model]
    flags = [*RANDOM, "--model", model, "--steps", 1, "--max-iter", 1, "--micro-batch", micro]
    flags += [] if offset is None else ["--generator-cfg-offset", offset]
    log, = train(tmp_path / "run", *flags, "--lr-psi", 0, "--lr-theta", 0.25, "--cfg", 2, 4)

    def draw(name):
        return noise((4, 8, 8), 0, 1, name, range(4))
    vectors = noise(FAMILIES[row.family].condition_shapes(row)[1], 0, 0, "pooled", range(4))
    m, one = wide(vectors.mean(1)), torch.ones(4)  # of the prompts; the first's stands for the empty one
    a, b = torch.tensor(0.5, requires_grad=True), torch.tensor(0.2, requires_grad=True)

    def ends(prediction, x, t):  # x_0, and what f_psi regresses to given (x_0, eps)
        alpha, sigma = alpha_sigma(row.schedule, t, x)
        if row.predicts == "velocity":
            return x - sigma * prediction, lambda x_0, eps: eps - x_0
        return (x - sigma * prediction) / alpha, lambda x_0, eps: eps

    def time(u):  # (0, 1], on the teacher's grid
        return 1 - u if row.schedule == "flow" else (1000 - (1000 * u).floor()) / 1000

    def diffuse(x_0, t, eps):  # Eq. (1)
        alpha, sigma = alpha_sigma(row.schedule, t, x_0)
        return alpha * x_0 + sigma * eps

    def prompts(name):  # in G_theta's prediction
        w = 1 if offset is None else wide(2 + 2 * uniform(0, 1, name, range(4))) - offset
        return m[:1] + w * (m - m[:1])

    # the fake model: Eq. (2) or (3) on the generator's samples
    x_0, _ = ends(0.5 * draw("z") + prompts("w_f"), draw("z"), one)
    t_f = time(uniform(0, 1, "t_f", range(4)))
    x_tf = diffuse(x_0, t_f, draw("z_f"))
    prediction = b * x_tf + m
    loss_psi = (prediction - ends(prediction, x_tf, t_f)[1](x_0, draw("z_f"))).square().mean()
    # the generator
    t, w = time(uniform(0, 1, "t", range(4))), wide(2 + 2 * uniform(0, 1, "w", range(4)))
    x_hat_0, _ = ends(a * draw("z_hat") + prompts("w"), draw("z_hat"), one)
    with torch.no_grad():
        x_t = diffuse(x_hat_0, t, draw("z_g"))
        fake, _ = ends(0.2 * x_t + m, x_t, t)
        real, _ = ends(0.3 * x_t + m[:1] + w * (m - m[:1]), x_t, t)
        norm = (x_hat_0 - real).abs().mean((1, 2, 3), keepdim=True)
        grad = (fake - real) / norm                     # Eq. (5), the norm a mean over the sample
    (loss_psi + (grad * x_hat_0).mean()).backward()     # Eq. (6)'s gradient is grad
    expected = dict(loss_psi=loss_psi, grad_norm_psi=b.grad.abs(), loss_theta=0.5 * grad.square().mean(),
                    grad_norm_theta=a.grad.abs(),
                    grad_x_0=grad.flatten(1).norm(dim=1).mean() / grad[0].numel())
    for name, value in expected.items():
        found = log[name][0] if name == "grad_x_0" else log[name]  # the first is of all times
        assert found == pytest.approx(value.item(), rel=1e-4), name  # float32, sums in another order
    assert log["cos_dmd"][0] == pytest.approx(1)
    assert log["x_0_mean"] == pytest.approx(x_hat_0.mean((0, 2, 3)).tolist(), rel=1e-4)
    # Without momentum AdamW's first step is the rate, against the gradient's sign.
    assert G_theta.weight.item() == pytest.approx(0.5 - 0.25 * a.grad.sign().item(), abs=1e-4)
    # Eq. (4): the generator follows s_real - s_fake, s = (alpha x_0 - x_t) / sigma^2, in every pixel.
    alpha, sigma = alpha_sigma(row.schedule, t, x_t)
    difference = ((alpha * real - x_t) - (alpha * fake - x_t)) / sigma ** 2
    assert (difference * grad <= 0).all() and difference.abs().max() > 0
    parts = 4 // micro
    assert [on for _, on in F_phi.asked] == [False] * parts
    assert [on for _, on in f_psi.asked] == [True] * parts + [False] * parts
    assert f_psi.weight.grad is None and F_phi.weight.grad is None  # its own update has cleared f_psi's


def test_rates_fall_in_the_last_share_of_the_updates(tmp_path, stubs, monkeypatch):
    rates, update = [], log_module.update

    def recording(opt, *rest):
        result = update(opt, *rest)
        rates.append(opt.param_groups[0]["lr"])
        return result
    monkeypatch.setattr(log_module, "update", recording)
    train(tmp_path / "run", *RANDOM, "--max-iter", 4, "--lr-psi", 1e-3, "--lr-theta", 1e-4, "--lr-decay", 0.5)
    assert rates[::2] == [1e-3, 1e-3, 1e-3, 5e-4] and rates[1::2] == [1e-4, 1e-4, 1e-4, 5e-5]


@pytest.mark.parametrize("flags", [[], ["--generator-cfg-offset", 0.5]], ids=["plain", "guided"])
def test_generator_has_its_gradient_from_one_step_of_its_schedule(tmp_path, stubs, flags):
    _, G_theta, _ = stubs
    N = 4
    train(tmp_path / "run", *RANDOM, "--steps", N, "--max-iter", 3, *flags)
    tn, asked = generator_times(N, SD3.shift), iter(G_theta.asked)
    chosen = [1 + int(N * uniform(0, i, "n", [0])) for i in (1, 2, 3)]
    for n in chosen:
        # Alg. 1 l. 9: all steps; l. 16: those down to t_n; l. 17: from t_n to 0 at once.
        expected = [(k, False) for k in range(N, 0, -1)] + [(k, False) for k in range(N, n, -1)] + [(n, True)]
        for k, grad in expected:
            t, on = next(asked)
            assert (t == tn[k]).all() and on == grad and len(t) == (8 if flags else 4)  # with and without the prompt
    assert next(asked, None) is None and len(set(chosen)) > 1


# ---- real networks, small and random -----------------------------------------------------------------------

def copy_of(p: Tensor) -> Tensor:
    return local_rows(p.detach())[0].clone()


@pytest.mark.parametrize("flags", [
    ["--model", "tiny-sd3"], ["--lora-rank", 4, "--fake-lora", 4, "--steps", 3, "--ttur", 3],
    ["--model", "tiny-sdxl"], ["--model", "tiny-sdxl", "--steps", 2]],
    ids=["sd3", "sd3-lora-steps-ttur", "sdxl", "sdxl-steps"])
def test_updates_psi_then_theta_each_of_its_own_parameters(tmp_path, monkeypatch, spy, flags):
    """And all of them: of every parameter a gradient arrives. That of theta leaves none anywhere else."""
    order, silent, nets, ttur = [], {}, [], 3 if "--ttur" in flags else 1
    load = networks.load_network
    monkeypatch.setattr(networks, "load_network",
                        lambda *args, **named: nets.append(load(*args, **named)) or nets[-1])

    def on_update(role, roles, step):
        everything = [p for net in nets for p in net.parameters()]
        mine = {id(p) for p in roles[role].values()}
        assert all(p.grad is None for p in everything if id(p) not in mine)
        silent[role] = {name for name, p in roles[role].items()
                        if p.grad is None or local_rows(p.grad)[0].abs().sum() == 0}
        before = [copy_of(p) for p in everything]
        result = step()
        changed = {id(p) for p, old in zip(everything, before) if not torch.equal(copy_of(p), old)}
        assert changed and changed <= mine
        order.append(role)
        return result
    spy(on_update)
    rows = train(tmp_path / "run", *RANDOM, "--max-iter", 2, *flags)
    assert order == (["psi"] * ttur + ["theta"]) * 2
    assert [row["gen_iter"] for row in rows] == ([0] * (ttur - 1) + [1] + [1] * (ttur - 1) + [2])
    assert len(nets) == (1 if "--lora-rank" in flags else 3)
    # The text queries of the last block feed a text output that nothing uses.
    unused = {"joint_blocks.1.context_block.attn.ln_q.weight"} if "tiny-sd3" in flags else set()
    if "--lora-rank" not in flags:
        assert silent == {"psi": unused, "theta": unused}
    row = rows[-1]
    assert {"loss_psi", "loss_theta", "grad_norm_psi", "grad_norm_theta", "x_0_mean", "x_0_std"} < set(row)
    assert not {"loss_tau", "margin"} & set(row) and row["skipped"] == 0


@pytest.mark.parametrize("model", SMALL)
def test_where_fake_and_real_scores_agree_nothing_is_left_to_learn(tmp_path, model):
    """Both are the teacher's weights, without guidance: Eq. (5) is 0 but for the rounding of a batch twice as
    large."""
    flags = [*RANDOM, "--model", model, "--max-iter", 1, "--lr-psi", 0]
    same, = train(tmp_path / "same", *flags, "--cfg", 1, 1)
    assert same["loss_theta"] < 1e-8 and same["grad_norm_theta"] < 1e-5
    guided, = train(tmp_path / "guided", *flags, "--cfg", 4, 4)
    for name in ("loss_theta", "grad_norm_theta"):
        assert guided[name] > 1e3 * same[name]


def test_it_starts_from_a_generator_of_adp(tmp_path, monkeypatch):
    """B3 of Table 4. Scores stay the teacher's."""
    nets, roles, step = [], [], dmd.ode_step
    net = FAMILIES["unet"].network(**SMALL["tiny-sdxl"].config)
    weights = {DENOISER + name: p.detach().clone() for name, p in net.state_dict().items()}
    save_safetensors(tmp_path / "adp" / "generator.safetensors", weights, {
        "dmdx.model": "tiny-sdxl", "dmdx.predicts": "velocity", "dmdx.schedule": "flow"})
    load = networks.load_generator

    def load_generator(*args):
        nets.append(load(*args))
        for name, p in nets[-1].net.named_parameters():
            assert torch.equal(copy_of(p), weights[DENOISER + name])
        return nets[-1]
    monkeypatch.setattr(networks, "load_generator", load_generator)
    monkeypatch.setattr(dmd, "ode_step",
                        lambda F, *rest: roles.append((F.predicts, F.schedule)) or step(F, *rest))
    flags = [*RANDOM, "--model", "tiny-sdxl", "--max-iter", 1, "--init", tmp_path / "adp"]
    row, = train(tmp_path / "run", *flags)
    assert len(nets) == 1 and row["skipped"] == 0
    assert roles == [("velocity", "flow"), ("epsilon", "sdxl"), ("epsilon", "sdxl")]  # G_theta, f_psi, F_phi


def test_its_export_says_its_steps(tmp_path):
    train(tmp_path / "run", "--batch-size", 2, "--max-iter", 1, "--evaluate", 0, "--steps", 2)
    assert open_tensors(tmp_path / "run" / "generator.safetensors").metadata["dmdx.steps"] == "2"


def test_profile_counts_every_evaluation_once(tmp_path, capsys):
    N = 3
    train(tmp_path / "run", *RANDOM, "--profile", 1, "--steps", N, "--micro-batch", 2)
    n = 1 + int(N * uniform(0, 1, "n", [0]))
    # G_theta: N steps for the fake update, N - n to x_tn, one to x_hat_0. f_psi: its update and its score.
    # F_phi with guidance: two.
    counts = f"G_theta {2 * N - n + 1:.2f}, f_psi 2.00, F_phi 2.00"
    assert f"network evaluations per sample and iteration: {counts}\n" in capsys.readouterr().out


# ---- the text of the script --------------------------------------------------------------------------------

def code(text: str) -> list[str]:
    """Lines of code without docstring, comments and indentation."""
    lines = [re.sub(r"\s*(#.*)?$", "", line).strip() for line in text.split('"""', 2)[2].splitlines()]
    return [line for line in lines if line]


def test_the_diff_to_adm_is_sec_4_1_3():
    """What dmd.py has and adm.py has not: the loss of Eqs. (5), (6), and lines that have lost their tau."""
    ours, theirs = code(SCRIPT), code(ADM)
    new = [line for line in ours if line not in theirs]
    assert new == [
        "parser, _ = parsers.distillation_parser(__file__, __doc__)",
        "job.start(psi=(psi, opt_psi), theta=(theta, opt_theta))",
        "job.watch(F_phi=F_phi, f_psi=f_psi, G_theta=G_theta)",
        't = random_time(F_phi.schedule, job.uniform("t", indices))',
        "_, x_0_fake = ode_step(f_psi, x_t, t, tn[0], c)",
        "_, x_0_real = ode_step(F_phi, x_t, t, tn[0], c, job.c_null, w)",
        "loss_theta = dmd_loss(x_hat_0, x_0_fake, x_0_real)",
    ]
    rest = iter(theirs)
    assert all(line in rest for line in ours if line not in new)  # the others are in adm.py in the same order
    statements = r'add\("--(?:r1|normalise)"|NEAR =|if args\.(?:r1|normalise):'  # of what is not in the paper
    paper = code(re.sub(rf"^( *)(?:{statements}).*\n(?:\1 +.*\n)*", "", ADM, flags=re.M))
    assert len(paper) == len(theirs) - 12
    assert len(paper) - len(ours) <= 24


def test_algorithm_and_equations_are_cited_in_order():
    cited = [int(k) for k in re.findall(r"# Alg\. 1 l\. (\d+)$", SCRIPT, re.M)]
    # 6, 13, 24 are blank lines of the listing; 20, 21, 25, 26 are ADM's own.
    assert set(cited) == set(range(1, 28)) - {6, 13, 20, 21, 24, 25, 26}
    body = [k for k in cited if 4 <= k <= 22]
    assert body == sorted(body)
    assert "# Eq. (2), (3)" in SCRIPT and "# Eqs. (5), (6)" in SCRIPT
    assert re.search(r"reverse KL, Eqs\.\s+\(4\)-\(6\)", SCRIPT.split('"""')[1])
