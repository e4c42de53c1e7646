"""adp.py: Eqs. (9), (10) by hand, times and path of Sec. 4.2.1, gradients' ways, exports, refusals."""
import json
import os
import re
import shutil
from itertools import cycle
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, rows, run, says, states_saved
from PIL import Image
from torch import Tensor, nn

import adm
import adp
import collect_odes
import sample
from models import data, vision
from models.job import job as job_module
from models.job import networks
from models.checkpoint import open_tensors, save_safetensors
from models.data import noise, uniform
from models.shards import open_pairs
from models.diffusion import q
from models.job.families import FAMILIES
from models.job.flags import resolve
from models.parallel import full_tensors, init_distributed, local_rows
from models.presets import PRESETS
from models.saving import checksum
from models.text import Cond
from models.vision import SOURCES, random_vision

SCRIPT = (ROOT / "adp.py").read_text()
ROW = PRESETS["tiny-sdxl"]
SD3, SAM = PRESETS["tiny-sd3"], ROW.sam_ckpt
SMALL = {
    "tiny-sdxl": ROW._replace(config=ROW.config | dict(channel_mult=(1, 2), depth=(0, 0), middle_depth=1),
                              vae=ROW.vae | dict(ch=16), head_width=64, no_checkpointing=False),
    "tiny-sd3": SD3._replace(config=SD3.config | dict(depth=2), vae=SD3.vae | dict(ch=16), head_width=64),
}
RANDOM = ["--random-weights", "--batch-size", 4]
DENOISER = "model.diffusion_model."
FLOW = {"dmdx.predicts": "velocity", "dmdx.schedule": "flow"}


def train(out, *flags, script=adp, states=()) -> list[dict]:
    """Run adp.py in this process; returns the rows of metrics.jsonl. Random networks are smaller than the
    presets'. `states`: the iterations whose state is saved."""
    with pytest.MonkeyPatch.context() as patch, states_saved(*states):
        for name, row in SMALL.items() if "--random-weights" in flags else ():
            patch.setitem(PRESETS, name, row)
        run(script, "--out", out, *flags)
    return rows(out) if (out / "metrics.jsonl").exists() else []


def refusal(out, *flags, script=adp) -> str:
    """The one sentence with which the script refuses these flags."""
    return says(train, out, *flags, script=script)


@pytest.fixture(scope="session")
def pairs(tmp_path_factory):
    """Eight of the embedded teacher in two shards, each with a prompt of its own."""
    out = tmp_path_factory.mktemp("pairs")
    flags = ["--model", "tiny-sdxl", "--count", 8, "--steps", 2, "--shard-size", 4, "--out", out / "pairs"]
    collect_odes.main(collect_odes.parse_args(list(map(str, flags))))
    return out / "pairs"


# ---- networks of a line, whose losses can be worked out by hand --------------------------------------------

class Net(nn.Module):
    """Stands for a denoiser: weight * answer(x_t, t), and keeps what it is asked."""

    def __init__(self, answer=None, weight: float = 1.0):
        super().__init__()
        self.weight, self.answer, self.asked = nn.Parameter(torch.tensor(weight)), answer, []

    def forward(self, x_t, t, c, taps=(), lora=()) -> Tensor:
        self.asked.append((x_t.detach(), t, c))
        return self.weight * self.answer(x_t, t)


class D(nn.Module):
    """Stands for a discriminator of two heads: logit(weight, map) of the sample and of its double."""

    def __init__(self, logit=lambda weight, h: weight * h.mean((1, 2, 3))):
        super().__init__()
        self.weight, self.logit, self.asked = nn.Parameter(torch.tensor(1.0)), logit, []
        self.F_phi = None

    def features(self, x, *rest) -> list[Tensor]:
        self.asked.append((x, *rest))
        return [x, 2 * x]

    def forward(self, maps) -> Tensor:
        return torch.stack([self.logit(self.weight, h) for h in maps])


@pytest.fixture
def stubs(monkeypatch):
    """stubs(G): adp.py's networks are G, two D and a decoder that triples; returns both discriminators."""
    def stubs(G, D_tau1=None, D_tau2=None):
        found = D_tau1 or D(), D_tau2 or D()
        monkeypatch.setattr(networks, "load_network",
                            lambda *_, trainable=False, **__: G if trainable else Net())
        monkeypatch.setattr(networks, "new_discriminator", lambda *_: found[0])
        monkeypatch.setattr(networks, "new_pixel_discriminator", lambda *_: found[1])
        monkeypatch.setattr(job_module, "load_vae", lambda *_: SimpleNamespace(decode=lambda z, checkpoint: 3 * z))
        return found
    return stubs


def drawn(batch: int, size: int = 8, iteration: int = 1) -> tuple[Tensor, Tensor]:
    """The ends x_T, x_0 of the random pairs in a random run with seed 0."""
    return tuple(noise((4, size, size), 0, iteration, name, range(batch)) for name in ("x_T", "x_0"))


def test_one_iteration_by_hand(tmp_path, stubs):
    """Eqs. (9), (10), their gradients and the margins, with G(x_t, t) = 0.5 x_t and logits of mean pixels."""
    D_tau1, D_tau2 = stubs(Net(lambda x_t, t: x_t, 0.5))
    row, = train(tmp_path / "run", *RANDOM, "--max-iter", 1, "--lambdas", 0.75, 0.25)
    (x_T, x_0), t = drawn(4), 1 - uniform(0, 1, "t", range(4)) ** 3
    t_d = (1000 - (1000 * uniform(0, 1, "t_d", range(4))).floor()) / 1000
    z_d = noise((4, 8, 8), 0, 1, "z_d", range(4))
    a, b_1, b_2 = (torch.tensor(value, requires_grad=True) for value in (0.5, 1.0, 1.0))
    x_t = (1 - t)[:, None, None, None] * x_0 + t[:, None, None, None] * x_T
    x_hat_0 = x_t - t[:, None, None, None] * a * x_t

    def logits(b, x):  # heads B
        return b * torch.stack([x.mean((1, 2, 3)), 2 * x.mean((1, 2, 3))])
    fake_1, fake_2 = q("sdxl", x_hat_0, t_d, z_d), 3 * x_hat_0
    real_1, real_2 = q("sdxl", x_0, t_d, z_d), 3 * x_0
    loss_theta = -0.75 * logits(1, fake_1).mean() - 0.25 * logits(1, fake_2).mean()
    loss_tau = sum(scale * ((1 + logits(b, fake.detach())).clamp_min(0).mean()
                            + (1 - logits(b, real)).clamp_min(0).mean())
                   for scale, b, fake, real in ((0.75, b_1, fake_1, real_1), (0.25, b_2, fake_2, real_2)))
    loss_theta.backward(), loss_tau.backward()
    expected = dict(loss_theta=loss_theta, loss_tau=loss_tau, grad_norm_theta=a.grad.abs(),
                    grad_norm_tau=(b_1.grad ** 2 + b_2.grad ** 2).sqrt())
    for name, value in expected.items():
        # Float32 sums in another order.
        assert row[name] == pytest.approx(value.item(), rel=1e-5, abs=1e-7), name
    assert row["x_0_std"] == pytest.approx(x_hat_0.std((0, 2, 3), correction=0).tolist(), rel=1e-5)
    assert row["margin"] == pytest.approx((logits(1, real_1 - fake_1).mean(1)).tolist(), abs=1e-6)
    assert row["margin_pixel"] == pytest.approx((logits(1, real_2 - fake_2).mean(1)).tolist(), abs=1e-6)
    assert [len(x.asked) for x in (D_tau1, D_tau2)] == [2, 2]  # no feature is computed twice
    assert all(torch.equal(a, b) for a, b in zip(D_tau1.asked[0][2], D_tau1.asked[1][2]))  # the pair's prompt
    assert not any(isinstance(x, Cond) for asked in D_tau2.asked for x in asked)  # D_tau2 sees no prompt


@pytest.mark.parametrize("lambdas, loss_theta, loss_tau", [
    # Fake and real logits 0.25, -0.5 of D_tau1, -3, 0.5 of D_tau2: hinges 1.25 + 1.5, and 0 + 0.5.
    ((0.75, 0.25), -0.75 * 0.25 + 0.25 * 3, 0.75 * 2.75 + 0.25 * 0.5), ((1, 0), -0.25, 2.75), ((0, 2), 6, 1)])
def test_losses_and_margins_of_constant_logits(tmp_path, stubs, lambdas, loss_theta, loss_tau):
    seen = []

    def constant(*logits):  # of Eq. (9) on fake, Eq. (10) on fake and on real, two heads each
        order = cycle([value for value in (logits[0], *logits) for _ in range(2)])

        def logit(weight, h):
            seen.append(h.requires_grad)
            return next(order) + 0 * (weight + h.mean((1, 2, 3)))
        return D(logit)
    stubs(Net(lambda x_t, t: x_t), constant(0.25, -0.5), constant(-3, 0.5))
    row, = train(tmp_path / "run", *RANDOM, "--max-iter", 1, "--lambdas", *lambdas)
    assert (row["loss_theta"], row["loss_tau"]) == (loss_theta, loss_tau)
    margins = dict(margin=[-0.75, -0.75], margin_pixel=[3.5, 3.5])
    for scale, (name, value) in zip(lambdas, margins.items()):
        assert row.get(name) == (value if scale else None)
    count = sum(map(bool, lambdas))
    assert seen == [True, True] * count + [False] * 4 * count  # Eq. (10) sees detached features


def test_rectified_flow_has_no_loss_where_the_velocity_is_x_T_minus_x_0(tmp_path, stubs):
    """Eq. (3) on the pair: the path is straight, its velocity x_T - x_0 at any time, and its end x_0."""
    x_T, x_0 = drawn(4)
    G = Net(lambda x_t, t: x_T - x_0)
    _, D_tau2 = stubs(G)
    row, = train(tmp_path / "mse", *RANDOM, "--max-iter", 1, "--loss", "mse")
    assert (row["loss_theta"], row["grad_norm_theta"]) == (0, 0)
    assert "loss_tau" not in row and not D_tau2.asked
    (x_t, t, _), = G.asked
    t = t[:, None, None, None]
    torch.testing.assert_close(x_t, (1 - t) * x_0 + t * x_T, rtol=0, atol=0)
    assert row["x_0_mean"] == pytest.approx(x_0.mean((0, 2, 3)).tolist(), abs=1e-6)
    train(tmp_path / "gan", *RANDOM, "--max-iter", 1)
    x_hat_0, real = (asked[0] / 3 for asked in D_tau2.asked)
    # x_t - t v rounds twice on values of at most 5.
    torch.testing.assert_close(x_hat_0, x_0, rtol=0, atol=2e-6)
    torch.testing.assert_close(real, x_0, rtol=0, atol=2e-6)
    stubs(Net(lambda x_t, t: x_T - x_0, weight=0.5))
    row, = train(tmp_path / "half", *RANDOM, "--max-iter", 1, "--loss", "mse")
    assert row["loss_theta"] == pytest.approx(0.25 * (x_T - x_0).square().mean().item(), rel=1e-6)


def furthest(values: Tensor, cdf) -> float:
    """Kolmogorov's distance of an empirical distribution from an exact one."""
    x, n = values.double().sort().values, len(values)
    ranks = torch.arange(n, dtype=torch.float64) / n
    return max((cdf(x) - ranks).max().item(), (ranks + 1 / n - cdf(x)).max().item())


def test_generator_times_are_denser_towards_noise_and_discriminator_times_uniform(tmp_path, stubs):
    G, n = Net(lambda x_t, t: x_t), 4096
    D_tau1, _ = stubs(G)
    flags = ["--random-weights", "--size", 8, 8, "--batch-size", n, "--micro-batch", n, "--max-iter", 1]
    train(tmp_path / "run", *flags, "--lambdas", 1, 0)
    (_, t, _), = G.asked
    # For t = 1 - u^3: P(t <= a) = P(u >= (1 - a)^(1/3)). By chance n draws are as far off as 2 / sqrt(n) =
    # 0.031 once in 1500 seeds; 1 - u^2 is 0.15 off, u^3 is 0.68.
    assert furthest(t, lambda a: 1 - (1 - a) ** (1 / 3)) < 2 / n ** 0.5
    (_, t_d, _), (_, t_real, _) = D_tau1.asked
    index = (1000 * t_d.double())
    assert torch.equal(t_d, t_real)  # [choice]
    torch.testing.assert_close(index, index.round(), rtol=0, atol=2e-4)  # float32 knows 1000 t to 3e-5
    assert 1 <= index.min() and index.max() <= 1000.0001
    assert furthest(t_d, lambda a: a) < 2 / n ** 0.5 + 1e-3  # the grid's own step
    assert abs(torch.corrcoef(torch.stack([t, t_d]))[0, 1]) < 4 / n ** 0.5  # drawn apart: four deviations


@pytest.mark.parametrize("u, t, t_d", [(0.0, 1.0, 1.0), (1 - 2 ** -24, 3 * 2 ** -24, 1e-3)])
def test_times_at_the_ends_of_their_draws(tmp_path, stubs, monkeypatch, u, t, t_d):
    """(0, T] for both: at t = 0 there would be nothing to learn, and q would not diffuse."""
    G = Net(lambda x_t, t: x_t)
    D_tau1, _ = stubs(G)
    monkeypatch.setattr(data, "uniform", lambda seed, iteration, name, indices: torch.full((len(indices),), u))
    train(tmp_path / "run", *RANDOM, "--max-iter", 1)
    (_, asked, _), (_, asked_d, _) = G.asked[0], D_tau1.asked[0]
    assert asked.tolist() == pytest.approx([t] * 4, rel=1e-6) and asked_d.tolist() == pytest.approx([t_d] * 4)
    if t == 1:
        assert torch.equal(G.asked[0][0], drawn(4)[0])  # pure noise of the pair


def test_latent_times_of_a_flow_model_are_continuous(tmp_path, stubs):
    D_tau1, _ = stubs(Net(lambda x_t, t: x_t))
    train(tmp_path / "run", *RANDOM, "--model", "tiny-sd3", "--max-iter", 1, "--lambdas", 1, 0)
    x, t_d, _ = D_tau1.asked[1]
    assert torch.equal(t_d, 1 - uniform(0, 1, "t_d", range(4)))
    z_d, t = noise((4, 8, 8), 0, 1, "z_d", range(4)), t_d[:, None, None, None]
    torch.testing.assert_close(x, (1 - t) * drawn(4)[1] + t * z_d)  # the teacher's path


# ---- pairs -------------------------------------------------------------------------------------------------

def test_an_epoch_reads_every_pair_with_its_own_prompt(tmp_path, stubs, monkeypatch, pairs):
    asked, known = [], open_pairs(pairs, "tiny-sdxl", (4, 8, 8))
    _, _, prompts = known.read(list(range(8)))
    assert len(set(prompts)) == 8

    def encode(texts):  # the place of the prompt
        asked.extend(texts)
        places = torch.tensor([float(prompts.index(text)) for text in texts])
        return Cond(places[:, None, None], torch.zeros(len(texts), 1))
    text = SimpleNamespace(encode=encode, unconditional=lambda: None)
    monkeypatch.setattr(job_module, "open_text", lambda *_: text)
    G = Net(lambda x_t, t: x_t)
    stubs(G)
    monkeypatch.setattr(networks, "export", lambda *_: None)
    train(tmp_path / "run", "--pairs", pairs, "--batch-size", 4, "--max-iter", 2, "--loss", "mse",
          "--evaluate", 0)
    assert sorted(asked) == sorted(prompts)
    for x_t, t, c in G.asked:
        x_T, x_0, _ = known.read(c.context.flatten().int().tolist())
        t = t[:, None, None, None]
        torch.testing.assert_close(x_t, (1 - t) * x_0 + t * x_T)


# ---- real networks, small and random -----------------------------------------------------------------------

def keep(monkeypatch, module, name) -> list:
    """What calls of module.name will have returned."""
    kept, original = [], getattr(module, name)

    def call(*args, **named):
        kept.append(original(*args, **named))
        return kept[-1]
    monkeypatch.setattr(module, name, call)
    return kept


def copy_of(p: Tensor) -> Tensor:
    return local_rows(p.detach())[0].clone()


def forbid(monkeypatch, *names):
    def fail(*_):
        pytest.fail("this discriminator has weight 0")
    for name in names:
        monkeypatch.setattr(networks, name, fail)


LATENT, PIXEL = "new_discriminator", "new_pixel_discriminator"


@pytest.mark.parametrize("flags, unused", [
    ([], []), (["--lambdas", 1, 0], [PIXEL]), (["--lambdas", 0, 1], [LATENT]),
    (["--loss", "mse"], [LATENT, PIXEL])],
    ids=["gan", "latent", "pixel", "mse"])
def test_updates_theta_then_tau_each_of_its_own_parameters(tmp_path, monkeypatch, spy, flags, unused):
    """And all of them: of every parameter a gradient arrives. Nothing else changes or holds a gradient."""
    order, silent, frozen = [], {}, {}
    forbid(monkeypatch, *unused)
    nets, vaes, encoders = (keep(monkeypatch, *place) for place in (
        (networks, "load_network"), (job_module, "load_vae"), (vision, "load_vision")))

    def on_update(role, roles, step):
        if not order:
            for net in (nets[0], *vaes, *(encoder.net for encoder in encoders)):
                frozen.update({p: copy_of(p) for p in net.parameters()})
        silent[role] = [name for name, p in roles[role].items()
                        if p.grad is None or local_rows(p.grad)[0].abs().sum() == 0]
        before = {key: {name: copy_of(p) for name, p in params.items()} for key, params in roles.items()}
        result = step()
        for key, params in roles.items():
            changed = any(not torch.equal(copy_of(p), before[key][name]) for name, p in params.items())
            assert changed == (key == role)
        order.append(role)
        return result
    spy(on_update)
    train(tmp_path / "run", *RANDOM, "--max-iter", 2, *flags)
    assert order == (["theta"] if len(unused) == 2 else ["theta", "tau"]) * 2
    assert len(encoders) == (PIXEL not in unused) and len(frozen) > 100
    for p, value in frozen.items():
        assert p.grad is None and not p.requires_grad and torch.equal(copy_of(p), value)
    # While no logit is beyond the hinge's margin, the last bias raises one term of Eq. (10) as much as it
    # lowers the other.
    heads = {"latent": 5 * (LATENT not in unused), "pixel": 4 * (PIXEL not in unused)}
    biases = [f"{kind}.heads.{i}.logit.bias" for kind, count in heads.items() for i in range(count)]
    assert silent == ({"theta": [], "tau": biases} if biases else {"theta": []})


@pytest.mark.parametrize("lambdas", [(1, 0), (0, 1)], ids=["latent", "pixel"])
def test_gradient_of_eq9_goes_through_the_backbones_and_the_decoder(tmp_path, monkeypatch, spy, lambdas):
    """Finite differences of the logged loss_theta against the gradient that the script takes: with the pixel
    discriminator alone theta reaches the loss by the VAE's decoder and the vision encoder."""
    grads, shift = {}, {}

    def on_update(role, roles, step):
        if role == "theta":
            grads.update({name: copy_of(p.grad) for name, p in roles["theta"].items()})
        return step()
    spy(on_update)
    original = networks.load_network

    def load_network(*args, **named):
        net = original(*args, **named)
        if named.get("trainable") and shift:
            with torch.no_grad():
                for name, p in net.named_parameters():
                    local_rows(p)[0].add_(shift["size"] * shift["direction"][name])
        return net
    monkeypatch.setattr(networks, "load_network", load_network)

    def loss_theta(name):
        return train(tmp_path / name, *RANDOM, "--max-iter", 1, "--lambdas", *lambdas)[0]["loss_theta"]
    here = loss_theta("here")
    norm = sum(g.square().sum() for g in grads.values()).sqrt().item()
    shift.update(size=5e-5, direction={name: g / norm for name, g in grads.items()})
    slope = (loss_theta("there") - here) / shift["size"]
    # Curvature and float32 rounding bend the slope by 0.5 % (measured; curvature alone by 2 % at 2e-4).
    assert slope == pytest.approx(norm, rel=0.05)


def test_recomputing_accumulating_and_decoding_in_parts_change_nothing(tmp_path, monkeypatch):
    calls, original = [], job_module.Job.start
    vaes, encoders = keep(monkeypatch, job_module, "load_vae"), keep(monkeypatch, vision, "load_vision")

    def start(job, **roles):
        layers = dict(decoder=vaes[-1].decoder.mid.block_1, encoder=encoders[-1].net.layers[0])
        for name, layer in layers.items():
            layer.register_forward_pre_hook(lambda *_, name=name: calls.append(name))
        return original(job, **roles)
    monkeypatch.setattr(job_module.Job, "start", start)
    plain, = train(tmp_path / "plain", *RANDOM, "--max-iter", 1, "--no-checkpointing")
    assert sorted(calls) == ["decoder"] * 2 + ["encoder"] * 2  # of the fake and of the real pictures
    calls.clear()
    monkeypatch.setitem(SMALL, "tiny-sdxl", SMALL["tiny-sdxl"]._replace(decode_batch=1))
    parts, = train(tmp_path / "parts", *RANDOM, "--max-iter", 1, "--micro-batch", 2)
    # Once more of the fake ones in backward; four pictures one by one.
    assert sorted(calls) == ["decoder"] * 3 * 4 + ["encoder"] * 3 * 4
    for name in ("loss_theta", "loss_tau", "grad_norm_theta", "grad_norm_tau", "margin", "margin_pixel"):
        # Float32 sums in another order.
        assert parts[name] == pytest.approx(plain[name], rel=1e-4, abs=1e-5), name


def test_profile_counts_every_evaluation_once(tmp_path, capsys):
    train(tmp_path / "run", *RANDOM, "--profile", 1)
    out = capsys.readouterr().out
    for phase in ("generator", "discriminator", "update", "iteration"):
        assert any(line.startswith(f"{phase} ") and " s/it" in line for line in out.splitlines()), phase
    # Features of x_hat_0 and of x_0; the teacher itself is never asked.
    assert "network evaluations per sample and iteration: G_theta 1.00, D_tau features 2.00\n" in out
    assert not (tmp_path / "run").exists()


def test_any_preset_can_be_pre_trained(tmp_path):
    flags = [*RANDOM, "--model", "tiny-sd3", "--pixel-ckpt", SAM]
    _, row = train(tmp_path / "run", *flags, "--max-iter", 2)
    assert (len(row["margin"]), len(row["margin_pixel"])) == (SMALL["tiny-sd3"].config["depth"], 4)
    assert row["skipped"] == 0 and row["grad_norm_theta"] > 0


# ---- runs on the embedded teacher's pairs ------------------------------------------------------------------

@pytest.fixture(scope="session")
def finished(tmp_path_factory, pairs):
    """A run of two updates."""
    out = tmp_path_factory.mktemp("adp") / "run"
    train(out, "--pairs", pairs, "--batch-size", 4, "--max-iter", 2, "--evaluate", 0, "--sample-every", 2)
    return out


def test_the_generator_is_exported_as_a_velocity_network_on_the_straight_path(finished):
    source, export = open_tensors(ROW.ckpt), open_tensors(finished / "generator.safetensors")
    named = {key: value for key, value in export.metadata.items() if not key.startswith("modelspec.")}
    assert named == FLOW | {"format": "pt", "dmdx.model": "tiny-sdxl", "dmdx.steps": str(ROW.steps),
                            "dmdx.shift": str(ROW.shift), "dmdx.crc32": checksum(export, export.metadata)}
    assert export.metadata["modelspec.architecture"] == "stable-diffusion-xl-v1-base"
    assert export.shapes == source.shapes
    changed = {name for name in source if not torch.equal(source[name].float(), export[name].float())}
    assert changed and all(name.startswith(DENOISER) for name in changed)


def test_sample_py_makes_the_pictures_of_the_run(tmp_path, finished):
    """The run's last grid comes from the weights in training, sample.py's from the export."""
    sample.main(sample.parse_args(["--ckpt", str(finished), "--out", str(tmp_path)]))
    ours, theirs = (np.asarray(Image.open(path)).astype(int)
                    for path in (tmp_path / "grid.png", finished / "samples" / "00000002.png"))
    assert np.abs(ours - theirs).max() <= 1  # batches of 4 and of 2 * 4: at most the next grey level
    text = Image.open(tmp_path / "000.png").text
    assert (text["model"], text["steps"], text["cfg"]) == ("tiny-sdxl", str(ROW.steps), "1")


def test_adm_starts_from_it_and_keeps_it_apart_from_the_teacher(tmp_path, monkeypatch, finished):
    """Weights and parameterisation of the generator are the run's, those of F_phi and f_psi the teacher's."""
    roles, weights, original, step = [], {}, networks.load_generator, adm.ode_step

    def load_generator(*args):
        G_theta = original(*args)
        weights.update((name, p.clone()) for name, p in full_tensors(list(G_theta.net.named_parameters())))
        return G_theta
    monkeypatch.setattr(networks, "load_generator", load_generator)
    monkeypatch.setattr(adm, "ode_step",
                        lambda F, *rest: roles.append((F.predicts, F.schedule)) or step(F, *rest))
    flags = ["--model", "tiny-sdxl", "--batch-size", 2, "--evaluate", 0, "--max-iter", 1, "--init", finished]
    train(tmp_path / "adm", *flags, script=adm)
    assert roles == [("velocity", "flow"), ("epsilon", "sdxl"), ("epsilon", "sdxl")]  # G_theta, f_psi, F_phi
    export = open_tensors(finished / "generator.safetensors").group(DENOISER)
    assert set(export) == set(weights) and all(torch.equal(export[name], weights[name]) for name in export)
    metadata = open_tensors(tmp_path / "adm" / "generator.safetensors").metadata
    assert (metadata["dmdx.predicts"], metadata["dmdx.schedule"]) == ("velocity", "flow")


# ---- what is refused ---------------------------------------------------------------------------------------

def test_a_collection_that_is_not_finished_is_told(tmp_path, capsys, pairs):
    flags = ["--loss", "mse", "--batch-size", 2, "--max-iter", 1, "--evaluate", 0, "--pairs"]
    copy = shutil.copytree(pairs, tmp_path / "pairs")
    train(tmp_path / "whole", *flags, copy)
    assert "not all collected yet" not in capsys.readouterr().out
    manifest = json.loads((copy / "manifest.json").read_text())
    (copy / "manifest.json").write_text(json.dumps(manifest | dict(count=50)))
    train(tmp_path / "run", *flags, copy)
    assert f"note: {copy}: ODE pairs of tiny-sdxl at 32x32, 8 of 50, not all collected yet\n" in capsys.readouterr().out


def test_pairs_that_do_not_fit(tmp_path, monkeypatch, stubs, pairs):
    stubs(Net(lambda x_t, t: x_t))
    encode = SimpleNamespace(encode=lambda texts: None, unconditional=lambda: None)
    monkeypatch.setattr(job_module, "open_text", lambda *_: encode)
    out, flags = tmp_path / "run", ["--batch-size", 2, "--max-iter", 1]
    where = f"{pairs}: pairs of tiny-sdxl at 32x32, latents 4 x 8 x 8; expected "
    message = refusal(out, *flags, "--model", "tiny-sd3", "--pairs", pairs)
    assert message == where + "tiny-sd3, latents 4 x 8 x 8"
    message = refusal(out, *flags, "--size", 32, 64, "--pairs", pairs)
    assert message == where + "tiny-sdxl, latents 4 x 8 x 16"
    message = refusal(out, *flags, "--pairs", tmp_path)
    assert message.startswith(f"{tmp_path / 'manifest.json'}: no such file; expected a folder of ODE pairs")
    assert not out.exists()

    broken = shutil.copytree(pairs, tmp_path / "broken")
    for shard in broken.glob("*.safetensors"):
        data = bytearray(shard.read_bytes())
        data[-1] ^= 1
        shard.write_bytes(data)
    message = refusal(out, *flags, "--pairs", broken)
    shards = r"pairs_0000000[04]-0000000[37]\.safetensors"
    assert re.match(rf"{broken}/{shards}: its sha256 is not that of the manifest; `collect_odes", message)
    os.truncate(shard, 100)
    message = refusal(tmp_path / "short", *flags, "--pairs", broken)
    assert message.startswith(f"{shard}: 100 bytes, expected {len(data)}; ")
    assert not (tmp_path / "short").exists()


def test_vision_weights_that_are_missing_or_of_something_else(tmp_path, monkeypatch, stubs):
    build = networks.new_pixel_discriminator
    stubs(Net(lambda x_t, t: x_t))
    monkeypatch.setattr(networks, "new_pixel_discriminator", build)
    out, absent = tmp_path / "run", tmp_path / "sam.safetensors"
    message = refusal(out, *RANDOM, "--pixel-ckpt", absent)
    assert message == f"{absent}: no such file or folder; --pixel-ckpt takes {SOURCES['sam']}"
    message = refusal(out, *RANDOM, "--pixel-ckpt", ROW.ckpt)
    assert message.startswith(f"{ROW.ckpt}: expected tensors named image_encoder.*, found ")
    message = refusal(out, *RANDOM, "--pixel-ckpt", SAM, "--pixel-encoder", "dinov2")
    assert message.startswith(f"{SAM}: expected a copy of facebook/dinov2-base, but ")
    assert not out.exists()


def test_dinov2_is_not_looked_for_in_the_file_of_sam(monkeypatch):
    """Which tiny-sdxl's preset names, for SAM alone."""
    asked, load = [], vision.load_vision

    def encoder(*what):
        asked.append(what)
        return load("sam", SAM)
    monkeypatch.setattr(vision, "load_vision", lambda kind, path, *_: encoder(kind, path))
    monkeypatch.setattr(vision, "random_vision", lambda kind, *_: encoder(kind))
    device, mesh = init_distributed()
    args = adp.parse_args([*map(str, RANDOM), "--pixel-encoder", "dinov2"])
    networks.new_pixel_discriminator(args, resolve(args, adp=True), mesh, device)
    assert asked == [("dinov2",)]


@pytest.mark.parametrize("lambdas", [(0, 0), (-1, 1)], ids=["none", "negative"])
def test_lambdas_that_train_nothing_or_turn_a_loss_round(tmp_path, stubs, lambdas):
    stubs(Net(lambda x_t, t: x_t))
    message = refusal(tmp_path / "run", *RANDOM, "--max-iter", 1, "--lambdas", *lambdas)
    assert message.startswith("--lambdas {} {}: expected ".format(*lambdas))
    assert not (tmp_path / "run").exists()


def test_random_weights_of_full_size_have_features_that_tell_pictures_apart():
    """transformers starts SAM at 1e-10: the discriminator of --random-weights would see nothing at all."""
    weight = random_vision("sam", torch.float32, "cpu").net.patch_embed.projection.weight
    assert weight.std() > 1e-3


@pytest.mark.parametrize("found, words", [
    (FLOW | {"dmdx.model": "tiny-sd3"}, "a generator of tiny-sd3"), ({}, "a generator of no run of ours")])
def test_generators_of_another_model_or_of_nobody(tmp_path, stubs, found, words):
    stubs(Net())
    path, out = tmp_path / "generator.safetensors", tmp_path / "run"
    save_safetensors(path, {"a": torch.zeros(1)}, found)
    flags = [*RANDOM, "--model", "tiny-sdxl", "--max-iter", 1]
    for init in (path, tmp_path):
        message = refusal(out, *flags, "--init", init, script=adm)
        assert message == f"--init {path}: {words}; expected one of tiny-sdxl"
    message = refusal(out, *flags, "--init", tmp_path / "absent", script=adm)
    assert message == f"{tmp_path / 'absent'}: no such file or folder; expected a checkpoint"
    message = refusal(out, *flags, "--model", "tiny-sd3", "--lora-rank", 4, "--init", path, script=adm)
    assert message.startswith("--init starts from weights of its own")
    assert message.endswith("expected --lora-rank 0")
    assert not out.exists()


def test_a_generator_of_epsilon_is_not_read_as_velocity(tmp_path):
    """The teacher's epsilon is, from the first update on; a finished generator's would be lost by it."""
    net = FAMILIES["unet"].network(**SMALL["tiny-sdxl"].config)
    save_safetensors(tmp_path / "dmd.safetensors", {DENOISER + name: p for name, p in net.state_dict().items()},
                     FLOW | {"dmdx.model": "tiny-sdxl", "dmdx.predicts": "epsilon", "dmdx.schedule": "sdxl"})
    message = refusal(tmp_path / "run", *RANDOM, "--max-iter", 1, "--init", tmp_path / "dmd.safetensors")
    assert message.endswith("dmd.safetensors: a generator that predicts epsilon; expected a run of adp.py")
    assert not (tmp_path / "run").exists()


@pytest.fixture(scope="session")
def started(tmp_path_factory):
    """(flags, generator, run folder) of a small run of adm.py from a generator of ADP's kind."""
    folder, net = tmp_path_factory.mktemp("adm"), FAMILIES["unet"].network(**SMALL["tiny-sdxl"].config)
    init, out = folder / "generator.safetensors", folder / "run"
    save_safetensors(init, {DENOISER + name: p for name, p in net.state_dict().items()},
                     FLOW | {"dmdx.model": "tiny-sdxl"})
    flags = [*RANDOM, "--model", "tiny-sdxl", "--max-iter", 1]
    train(out, *flags, "--init", init, script=adm, states=[1])
    return flags, init, out


def test_a_resumed_run_keeps_to_its_init(tmp_path, started):
    """The state does not tell what the network predicts."""
    flags, init, out = started
    def written():
        return sorted(path.stat().st_mtime_ns for path in out.rglob("*") if path.name != "lock")
    before = written()
    words = f"expected {init}, with which this run was started"
    assert refusal(out, *flags, "--resume", script=adm) == f"--init None: {words}"
    copy = shutil.copy(init, tmp_path / "copy.safetensors")
    assert refusal(out, *flags, "--resume", "--init", copy, script=adm) == f"--init {copy}: {words}"
    assert written() == before


def test_so_does_one_that_goes_on_in_another_folder(tmp_path, started):
    flags, init, out = started
    message = refusal(tmp_path / "new", *flags, "--resume", out / "state" / "iter_00000001", script=adm)
    assert message == f"--init None: expected {init}, with which this run was started"


def test_a_generator_that_does_not_say_what_it_predicts_does_as_its_teacher(tmp_path, stubs):
    """sample.py reads these exports of adm.py, which are older than adp.py, so."""
    stubs(Net())
    save_safetensors(tmp_path / "old.safetensors", {"a": torch.zeros(1)}, {"dmdx.model": "tiny-sd3"})
    args = adm.parse_args(["--init", str(tmp_path / "old.safetensors")])
    G_theta = networks.load_generator(args, PRESETS["tiny-sd3"], None, None)
    assert (G_theta.predicts, G_theta.schedule) == ("velocity", "flow")


# ---- the text of the script --------------------------------------------------------------------------------

def test_equations_are_cited_where_they_are():
    assert len(re.findall(r"# Eq\. \(9\)$", SCRIPT, re.M)) == 2  # one for each discriminator
    assert len(re.findall(r"# Eq\. \(10\)$", SCRIPT, re.M)) == 2
    assert re.search(r"1 - job\.uniform\(\"t\", indices\) \*\* 3 +# Sec\. 4\.2\.1$", SCRIPT, re.M)
    assert re.search(r"# Eq\. \(3\), ablation A1$", SCRIPT, re.M)
