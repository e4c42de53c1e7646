"""avdm2.py: its gradients from the paper's equations, who is trained when, real clips, exports, refusals."""
import argparse
import json
import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from conftest import GOLDEN, ROOT, golden, manifest, rows, run, says, states_saved
from test_adm import cited
from test_videos import table
from torch import nn

import avdm2
import sample
from models import data
from models.animatediff import AnimateDiff
from models.checkpoint import open_tensors, save_safetensors
from models.eval import moving_shapes
from models.job import clips, flags, latents, log, networks, sampling
from models.job import job as job_module
from models.job.families import MOTION
from models.job.motion import split_motion
from models.parallel import init_distributed
from models.pictures import to_uint8
from models.presets import PRESETS

SCRIPT = (ROOT / "avdm2.py").read_text()
ROW = PRESETS["tiny-animatediff"]
B, T, K, N, W = 2, 5, 3, 4, 7.5  # clips, frames, those of the score matching, steps, guidance
SHAPE = (T, 4, 4, 4)  # of a latent at 16 x 16 pixels


def train(out, *flags, states=()):
    """Run avdm2.py in this process; returns the rows of metrics.jsonl."""
    with states_saved(*states):
        run(avdm2, *flags, "--evaluate", 0, "--out", out)
    return rows(out)


# ---- stub networks, in float64 -----------------------------------------------------------------------------

class Stub(nn.Module):
    """Noise of pictures (B C H W), or of clips (B T C H W), whose frames see the one before."""

    def __init__(self, seed: int, video: bool):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.pixel, self.text, self.out = nn.Linear(4, 4), nn.Linear(64, 4), nn.Linear(4, 4)
            if video:
                self.motion_modules = nn.ModuleList([nn.Linear(4, 4)])
        self.double()

    def forward(self, x, t, c, taps=(), lora=()):
        context = self.text(c[0].double().mean(1)) + 3 * t.double()[:, None]
        h = torch.tanh(self.pixel(x.movedim(-3, -1)) + context.view(len(x), *[1] * (x.ndim - 2), 4))
        if x.ndim == 5:
            h = h + self.motion_modules[0](h.roll(1, dims=1))
        return [h] if taps else self.out(h).movedim(-1, -3)


class StubD(nn.Module):
    """One logit a clip, (1 B), of F_phi's hidden layer."""

    def __init__(self, net: Stub, seed: int):
        super().__init__()
        with torch.random.fork_rng():
            torch.manual_seed(seed)
            self.head = nn.Linear(4, 1).double()
        self.F_phi = SimpleNamespace(net=net)

    def features(self, x, t, c):
        return self.F_phi.net(x, t, c, taps=("mid",))

    def forward(self, features):
        return self.head(torch.tanh(2 * features[0])).mean((1, 2, 3, 4))[None]


class Recording:
    """What a run with stubs does: its networks by role; of each pass the weights at its start, the gradients and
    learning rates of each update."""

    def __init__(self, monkeypatch, seeds, seed_D=9, first=1):
        self.nets, self.files, self.passes, self.roles = {}, {}, [], {}
        left = iter(seeds)

        def load_network(args, preset, mesh, device, trainable=False, adapters={}, init=None):
            role = {(0, 1): "F_phi", (1, 1): "G", (0, 0): "F_2d", (1, 0): "f_psi"}[trainable, bool(preset.frames)]
            role = "f_psi" if role in self.nets else role  # --sdm video: the fourth, of clips too
            self.files[role] = args.ckpt
            self.nets[role] = Stub(next(left), bool(preset.frames)).requires_grad_(trainable)
            return self.nets[role]

        def new_discriminator(args, preset, F_phi, *_):
            self.nets["D"] = StubD(F_phi.net, seed_D)
            return self.nets["D"]

        def start(job, **roles):
            job_start(job, **roles)
            self.roles = roles
            job.global_iter = first - 1

        def begin(job, global_iter):
            weights = {role: {k: p.detach().clone() for k, p in net.named_parameters()}
                       for role, net in self.nets.items()}
            self.passes.append(dict(pass_=global_iter, weights=weights, order=[], grads={}, rates={}))
            return job_begin(job, global_iter)

        def update(mine, role, opt, warmup=1.0):
            now = self.passes[-1]
            now["order"].append(role)
            now["grads"][role] = {name: p.grad.clone() for name, p in self.roles[role][0].items()}
            log_update(mine, role, opt, warmup)
            now["rates"][role] = [group["lr"] for group in opt.param_groups]
        job_start, job_begin, log_update = job_module.Job.start, job_module.Job.begin, log.Log.update
        noise = job_module.Job.noise
        monkeypatch.setattr(networks, "load_network", load_network)
        monkeypatch.setattr(networks, "new_discriminator", new_discriminator)
        monkeypatch.setattr(job_module.Job, "start", start)
        monkeypatch.setattr(job_module.Job, "begin", begin)
        monkeypatch.setattr(job_module.Job, "noise", lambda *args: noise(*args).double())
        monkeypatch.setattr(log.Log, "update", update)


def stub_run(tmp_path, *flags, seeds=(1, 2, 3, 4), **named):
    """(Recording, rows) of a run; a later flag is in place of an earlier one."""
    with pytest.MonkeyPatch.context() as patch:
        recording = Recording(patch, seeds, **named)
        out = tmp_path / f"run{len(list(tmp_path.iterdir()))}"
        rows = train(out, "--random-weights", "--batch-size", B, "--frames", T, "--size", 16, 16, "--frames-sdm", K,
                     "--cfg", W, "--lambdas", 0.7, 0.4, "--max-iter", 1, *flags)
    return recording, rows


# ---- Algorithm 1, computed once more -----------------------------------------------------------------------

def table_of(schedule):
    """alpha and sigma at t = i / 1000, i = 0..1000, as the script's float32 table holds them."""
    power = {"linear": 1, "scaled linear": 2}[schedule]
    betas = torch.linspace(0.00085 ** (1 / power), 0.012 ** (1 / power), 1000, dtype=torch.float64) ** power
    abar = torch.cat([torch.ones(1, dtype=torch.float64), (1 - betas).cumprod(0)])
    return abar.sqrt().float().double(), (1 - abar).sqrt().float().double()


def gradients(recording, now, rollout="renoise", sdm="2d", lambdas=(0.7, 0.4), seed=0):
    """The gradients of theta, psi and tau in a pass, by AVDM2's equations for all its clips at once."""
    nets = {}
    for role, net in recording.nets.items():
        copy = StubD(nets["F_phi"], 0) if role == "D" else Stub(0, hasattr(net, "motion_modules"))
        copy.load_state_dict(now["weights"][role])
        nets[role] = copy
    F_phi, G, f_psi, D, clips = nets["F_phi"], nets["G"], nets.get("f_psi"), nets["D"], range(B)
    F_sdm = nets.get("F_2d", F_phi)
    draw = lambda name: data.noise(SHAPE, seed, now["pass_"], name, clips).double()  # noqa: E731
    u = lambda name, places=clips: data.uniform(seed, now["pass_"], name, places)  # noqa: E731
    c = data.noise((ROW.clip_length, 64), seed, 0, "context", clips)
    linear, other = table_of("linear"), table_of("scaled linear" if sdm == "2d" else "linear")

    def coefficients(table, i, x):  # of each sample, or one of all, at t = i / 1000
        return [values[i].view(-1, *[1] * (x.ndim - 1)) for values in table]

    def logits(x_0, eps, i):
        alpha, sigma = coefficients(linear, i, x_0)
        return D(D.features(alpha * x_0 + sigma * eps, i / 1000, c_of(c)))

    def c_of(context):
        return context, None
    # l. 3, 4: the steps T = t_4 > ... > t_n without gradient, then one from t_n to the clip
    x, n = draw("z_T"), 1 + int(N * u("n", [0]))
    for step in range(N, n, -1):
        (a, s), (a_next, s_next) = ([v[250 * k] for v in linear] for k in (step, step - 1))
        eps = G(x, torch.full((B,), 250 * step / 1000), c_of(c)).detach()
        fresh = draw(f"z_{N - step + 1}") if rollout == "renoise" else eps
        x = a_next * (x - s * eps) / a + s_next * fresh
    a, s = (v[250 * n] for v in linear)
    x_hat = (x - s * G(x, torch.full((B,), 250 * n / 1000), c_of(c))) / a
    result, x_0 = {}, x_hat.detach()

    # l. 5-7: L_ADM = E -log D, D the sigmoid of the logit, t in {1, ..., 500} / 1000
    leaf = x_0.clone().requires_grad_()
    gan = -torch.log(torch.sigmoid(logits(leaf, draw("eps"), 500 - (500 * u("t_eps")).long()))).mean()
    at_x_0 = lambdas[1] * torch.autograd.grad(gan, leaf)[0]

    def frames(name):  # the K smallest of T numbers: places (clip, frame)
        order = u(name, range(B * T)).view(B, T).argsort(1)[:, :K]
        return torch.arange(B).repeat_interleave(K), order.flatten()
    if sdm != "none":  # l. 8-10, Eq. (4): w(t) (eps_real - eps_fake) dG/dtheta with DMD2's w(t)
        at = frames("K") if sdm == "2d" else slice(None)
        clip = at[0] if sdm == "2d" else at
        i, x_K, eps = (980 - (780 * u("t_eps_sdm")).long())[clip], x_0[at], draw("eps_sdm")[at]
        alpha, sigma = coefficients(other, i, x_K)
        x_t, context = alpha * x_K + sigma * eps, c[clip]
        with torch.no_grad():
            eps_fake = f_psi(x_t, i / 1000, c_of(context))
            cond, uncond = (F_sdm(x_t, i / 1000, c_of(y)) for y in (context, c[:1].expand_as(context)))
            eps_real = uncond + W * (cond - uncond)
        frame = x_K.flatten(0, -4), ((x_t - sigma * eps_real) / alpha).flatten(0, -4)  # a sample each
        distance = (frame[0] - frame[1]).abs().mean((1, 2, 3), keepdim=True).view(*x_K.shape[:-3], 1, 1, 1)
        w = sigma / alpha / distance / x_K.numel()
        at_x_0[at] += lambdas[0] * w * (eps_real - eps_fake)
    result["theta"] = dict(zip(now["weights"]["G"], torch.autograd.grad(x_hat, list(G.parameters()), at_x_0)))

    if sdm != "none":  # l. 12-14, Eq. (2)
        at = frames("K_psi") if sdm == "2d" else slice(None)
        clip = at[0] if sdm == "2d" else at
        i, x_K, eps = (980 - (780 * u("t_eps_psi")).long())[clip], x_0[at], draw("eps_psi")[at]
        alpha, sigma = coefficients(other, i, x_K)
        loss = (f_psi(alpha * x_K + sigma * eps, i / 1000, c_of(c[clip])) - eps).square().mean()
        result["psi"] = dict(zip(now["weights"]["f_psi"], torch.autograd.grad(loss, list(f_psi.parameters()))))

    # l. 15-17, Eq. (6): max E log D(real) + E log(1 - D(fake)), both at the same time and noise
    i, eps = 500 - (500 * u("t_eps_tau")).long(), draw("eps_tau")
    fake, real = torch.sigmoid(logits(x_0, eps, i)), torch.sigmoid(logits(draw("x_0"), eps, i))
    loss = -(torch.log(real) + torch.log(1 - fake)).mean()
    result["tau"] = dict(zip(now["weights"]["D"], torch.autograd.grad(loss, list(D.parameters()))))
    return result, x_0, logits


def assert_near(found, expected):
    assert found.keys() == expected.keys()
    for role in found:
        assert found[role].keys() == expected[role].keys()
        for name, grad in found[role].items():
            # Float64 sums in another order: 1e-14 on the CPU tried.
            assert (grad - expected[role][name]).norm() <= 1e-9 * expected[role][name].norm(), (role, name)
            assert grad.norm() > 0, (role, name)


@pytest.mark.parametrize("flags", [
    {}, {"--rollout": "ode"}, {"--sdm": "video"}, {"--sdm": "none"}, {"--teacher-2d": "x"}, {"--micro-batch": 1},
    {"--seed": 3}, {"--seed": 4, "--teacher-2d": "x"}],
    ids=lambda flags: " ".join(f"{flag} {value}" for flag, value in flags.items()) or "default")
def test_gradients_are_those_of_the_equations(tmp_path, flags):
    """Of a pass that updates the generator and of one between; each network has the weights of the right file."""
    recording, _ = stub_run(tmp_path, *(part for pair in flags.items() for part in pair))
    sdm, rollout, seed = flags.get("--sdm", "2d"), flags.get("--rollout", "renoise"), flags.get("--seed", 0)
    for now, order in zip(recording.passes, (["psi", "tau"], ["theta", "psi", "tau"]), strict=True):
        order = [role for role in order if role != "psi" or sdm != "none"]
        assert now["order"] == order
        expected, *_ = gradients(recording, now, rollout, sdm, seed=seed)
        assert_near(now["grads"], {role: expected[role] for role in order})
    style = Path(flags.get("--teacher-2d", ROW.ckpt))
    files = {"F_phi": ROW.ckpt, "G": ROW.ckpt, "F_2d": style, "f_psi": style}
    absent = ["F_2d"] * (style == ROW.ckpt) + ["f_psi"] * (sdm == "none")
    assert recording.files == {role: path for role, path in files.items() if role not in absent}


def test_a_step_of_the_generator_raises_the_logit_of_its_clip(tmp_path):
    """And the score matching's teacher and fake model, when they are the same network, ask for no change."""
    recording, _ = stub_run(tmp_path, "--lambdas", 0, 1, "--ttur", 1, "--warmup", 1, "--lr-theta", 1e-4,
                            "--lr-motion", 1e-4, "--lr-psi", 0, "--lr-tau", 0)
    now, = recording.passes
    after = {role: {k: p.detach() for k, p in net.named_parameters()} for role, net in recording.nets.items()}
    seen = []
    for weights in (now["weights"], after):
        _, x_0, logits = gradients(recording, now | dict(weights=weights))
        i = torch.full((B,), 250)
        seen.append(logits(x_0, data.noise(SHAPE, 0, 1, "eps", range(B)).double(), i).detach())
    assert (seen[1] > seen[0]).all()


def test_equal_teacher_and_fake_model_ask_for_no_change(tmp_path):
    """Stubs of one seed differ in the motion module alone, which pictures do not meet."""
    for guidance, least, most in ((1, 0, 1e-12), (W, 1e-3, 10)):
        _, rows = stub_run(tmp_path, "--ttur", 1, "--cfg", guidance, "--lambdas", 1, 0, seeds=(1, 2, 1))
        assert least <= rows[0]["grad_sdm"] <= most
        assert rows[0]["grad_gan"] == 0


def test_lambda_0_switches_a_term_off_bit_for_bit(tmp_path):
    """Then other weights of D, or of the fake model, change nothing of theta's gradient."""
    def theta(*flags, **named):
        recording, _ = stub_run(tmp_path, "--ttur", 1, *flags, **named)
        return torch.cat([grad.flatten() for grad in recording.passes[0]["grads"]["theta"].values()])
    no_gan, no_sdm, both = ["--lambdas", 1, 0], ["--lambdas", 0, 1], ["--lambdas", 1, 1]
    assert torch.equal(theta(*no_gan), theta(*no_gan, seed_D=5))
    assert torch.equal(theta(*no_sdm), theta(*no_sdm, seeds=(1, 2, 7)))
    assert torch.equal(theta(*no_sdm), theta("--sdm", "none", "--lambdas", 1, 1))
    for other in (dict(seed_D=5), dict(seeds=(1, 2, 7))):
        assert not torch.equal(theta(*both), theta(*both, **other))


# ---- updates -----------------------------------------------------------------------------------------------

def test_groups_and_settings_of_the_optimizers(tmp_path):
    recording, _ = stub_run(tmp_path, "--lr-theta", 1e-5, "--lr-motion", 2e-5, "--lr-psi", 3e-5, "--lr-tau", 4e-5)
    rates = {"theta": (1e-5, 2e-5), "psi": (3e-5,), "tau": (4e-5,)}
    for role, net in (("theta", "G"), ("psi", "f_psi"), ("tau", "D")):
        opt, mine = recording.roles[role][1], recording.nets[net].parameters()
        assert sorted(id(p) for group in opt.param_groups for p in group["params"]) == sorted(map(id, mine))
        assert tuple(group["initial_lr"] for group in opt.param_groups) == rates[role]
        assert all((g["betas"], g["weight_decay"]) == ((0.9, 0.999), 0.01) for g in opt.param_groups)
    unet, motion = recording.roles["theta"][1].param_groups
    assert [id(p) for p in motion["params"]] == [id(p) for p in recording.nets["G"].motion_modules.parameters()]


@pytest.mark.parametrize("first, share", [(1, 1 / 500), (250, 1 / 2), (500, 1), (600, 1)])
def test_warm_up_of_500_passes(tmp_path, first, share):
    recording, _ = stub_run(tmp_path, "--warmup", 500, "--ttur", 1, "--lr-theta", 1e-3, "--lr-motion", 2e-3,
                            "--lr-psi", 3e-3, "--lr-tau", 4e-3, first=first)
    now, = recording.passes
    assert now["pass_"] == first
    assert now["rates"] == dict(theta=[1e-3 * share, 2e-3 * share], psi=[3e-3 * share], tau=[4e-3 * share])


def test_the_generator_moves_in_every_second_pass(tmp_path):
    recording, rows = stub_run(tmp_path, "--max-iter", 2)
    starts = [now["weights"] for now in recording.passes]
    starts.append({role: dict(net.named_parameters()) for role, net in recording.nets.items()})
    for role, moves in (("G", [False, True] * 2), ("f_psi", [True] * 4), ("D", [True] * 4), ("F_phi", [False] * 4)):
        for name in starts[0][role]:
            assert [not torch.equal(a[role][name], b[role][name]) for a, b in zip(starts, starts[1:])] == moves, name
    assert [row["gen_iter"] for row in rows] == [0, 1, 1, 2]
    assert [now["order"] for now in recording.passes] == [["psi", "tau"], ["theta", "psi", "tau"]] * 2


def test_figures_do_not_depend_on_how_the_batch_is_cut(tmp_path):
    whole, cut = (stub_run(tmp_path, "--batch-size", 4, "--micro-batch", M)[1] for M in (4, 1))
    for a, b in zip(whole, cut, strict=True):
        for name in a.keys() - {"seconds", "gib"}:  # float64; times and the loss's logarithm are too
            assert a[name] == pytest.approx(b[name], rel=1e-6), name
    figures = ("sdm", "gan", "grad_sdm", "grad_gan", "margin", "x_0_mean", "x_0_std")
    assert all(name in whole[1] for name in figures)


# ---- K frames ----------------------------------------------------------------------------------------------

@pytest.mark.parametrize("sdm", ["2d", "video"])
def test_frames_are_distinct_uniform_and_drawn_for_each_clip(tmp_path, monkeypatch, sdm):
    """The noises of the score matching and of the fake model are made to tell clip and frame."""
    clips, seen, q = 384 if sdm == "2d" else 3, {}, avdm2.q

    def noise(job, name, indices):
        if not name.startswith(("eps_sdm", "eps_psi")):
            return torch.zeros(len(indices), *SHAPE).double()
        places = 100 * torch.tensor(indices)[:, None] + torch.arange(T)  # B T
        return places.view(-1, T, 1, 1, 1).expand(-1, -1, *SHAPE[1:]).double() + 1e6 * (name == "eps_psi")

    def spy(schedule, x_0, t, eps):
        place = eps[..., 0, 0, 0].long()
        if place.max() > 0:
            seen.setdefault(int(place.max() > 5e5), []).append((place % 10 ** 6, t))
        return q(schedule, x_0, t, 0 * eps)
    monkeypatch.setattr(avdm2, "q", spy)
    with pytest.MonkeyPatch.context() as patch:
        Recording(patch, (1, 2, 3))
        patch.setattr(job_module.Job, "noise", noise)
        train(tmp_path / "run", "--random-weights", "--batch-size", clips, "--micro-batch", clips, "--frames", T,
              "--size", 16, 16, "--frames-sdm", 2, "--max-iter", 13, "--ttur", 1, "--sdm", sdm)
    drawn = {key: torch.stack([place for place, _ in parts]) for key, parts in seen.items()}
    assert drawn.keys() == {0, 1} and all(len(parts) == 13 for parts in seen.values())
    if sdm == "video":
        every = 100 * torch.arange(clips)[:, None] + torch.arange(T)
        assert all(torch.equal(places, every.expand_as(places)) for places in drawn.values())
        return
    for key, places in drawn.items():
        places = places.view(13, clips, 2)
        assert torch.equal(places // 100, torch.arange(clips)[None, :, None].expand_as(places))  # K of each clip
        frames = places % 100
        assert (frames[..., 0] != frames[..., 1]).all()
        pairs = (T * frames.amin(-1) + frames.amax(-1)).flatten()
        _, counts = pairs.unique(return_counts=True)
        # 9,984 frames: all 10 pairs equally often. Chi-square with 9 degrees of freedom is above 27.9 in one of
        # a thousand cases.
        expected = 13 * clips / 10
        assert len(counts) == 10 and ((counts - expected) ** 2 / expected).sum() < 27.9
        times = torch.stack([t for _, t in seen[key]]).view(13, clips, 2)
        assert torch.equal(times[..., 0], times[..., 1]) and times.unique().numel() > 500  # one for a clip
        assert 0.2 < times.min() < 0.25 and 0.95 < times.max() <= 0.98
    assert not torch.equal(drawn[0], drawn[1])


# ---- a run on real videos, and its exports -----------------------------------------------------------------

VIDEOS = GOLDEN / "clips"
GOOD = ("plain.mp4", "rotated.mp4", "vfr.mp4", "tenbit.mp4")
BAD = ("audio_only.mp4", "truncated_no_moov.mp4")


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """(folder, rows of metrics, G_theta's network, the generator's samples) of a run on golden videos, whose base
    model holds averaged weights too, as fine-tunes of SD1.5 do."""
    folder, seen = tmp_path_factory.mktemp("finished"), {}
    base = open_tensors(PRESETS["tiny-sd15"].ckpt)
    save_safetensors(folder / "base.safetensors", {name: base[name] for name in base} | {
        "model_ema.decay": torch.ones(()), "model_ema.diffusion_modelout2weight": torch.ones(3)})
    table(folder, [(name, "a red circle") for name in (*BAD, "plain.mp4")])
    export, generate = job_module.export, job_module.generate

    def export_and_keep(args, preset, G_theta, out):
        seen["net"] = G_theta.net
        export(args, preset, G_theta, out)

    def generate_and_keep(*args):
        seen["samples"] = generate(*args)
        return seen["samples"]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(job_module, "export", export_and_keep)
        patch.setattr(job_module, "generate", generate_and_keep)
        rows = train(folder / "run", "--ckpt", folder / "base.safetensors", "--motion-ckpt", ROW.motion_ckpt,
                     "--videos", VIDEOS, "--prompts", folder / "t.csv", "--stride", 2, "--workers", 2,
                     "--batch-size", 4, "--micro-batch", 2, "--max-iter", 1, "--sample-every", 1, "--warmup", 1,
                     "--lr-theta", 1e-3, "--lr-motion", 1e-2)
    return folder / "run", rows, seen["net"], seen["samples"]


def test_bad_videos_are_counted_and_listed(finished):
    out, rows, *_ = finished
    faults = (out / "bad_videos.txt").read_text().splitlines()
    assert [fault.split(": ")[0] for fault in faults] == [str(VIDEOS / name) for name in BAD]
    # In how many tries each sample reaches the only good one of three, a permutation for each.
    clips_of = clips.Clips(VIDEOS, out.parent / "t.csv", ROW.size, ROW.frames, 2)
    for row in rows:
        assert row["bad_videos"] == sum(len(clips_of.clip(row["global_iter"], i)[2]) for i in range(4))
    assert max(row["bad_videos"] for row in rows) > 0


def test_exported_files_have_their_original_names(finished):
    out, _, net, _ = finished
    base, generator = open_tensors(out.parent / "base.safetensors"), open_tensors(out / "generator.safetensors")
    assert set(generator) == {name for name in base if not name.startswith("model_ema.")}
    motion, source = open_tensors(out / MOTION), open_tensors(ROW.motion_ckpt)
    assert motion.shapes == source.shapes and any(".pos_encoder.pe" in name for name in motion)
    denoiser = "model.diffusion_model."
    unet, moved = split_motion(net.state_dict())
    for name in generator:
        expected = unet[name.removeprefix(denoiser)] if name.startswith(denoiser) else base[name]
        assert torch.equal(generator[name], expected.to(generator[name].dtype)), name
    assert all(torch.equal(motion[name], moved[name]) for name in motion)
    for tensors in (generator, motion):
        notes = {key: value for key, value in tensors.metadata.items() if key.startswith("dmdx.")}
        assert len(notes.pop("dmdx.crc32")) == 8 and notes == {
            "dmdx.model": "tiny-animatediff", "dmdx.steps": str(ROW.steps), "dmdx.shift": "1.0",
            "dmdx.predicts": "epsilon", "dmdx.schedule": "animatediff", "dmdx.rollout": "renoise"}


def test_export_of_the_full_size_has_the_names_of_the_published_files():
    path, = golden("animatediff_mm_sd_v15_v2.keys.json")
    published = {name: shape for name, (shape, _) in json.loads(path.read_text())["tensors"].items()}
    with torch.device("meta"):
        net = AnimateDiff(**PRESETS["animatediff"].config)
    unet, motion = split_motion(dict(net.named_parameters()))
    assert {name: list(p.shape) for name, p in motion.items()} == published and len(motion) == 588
    shapes, _ = manifest(golden("sd15.keys.json")[0])
    prefix = "model.diffusion_model."
    names = {name.removeprefix(prefix) for name in shapes if name.startswith(prefix)}
    assert unet.keys() == names and len(names) == 686


def load(ckpt, motion_ckpt=None):
    """The network of sample.py with these files."""
    device, mesh = init_distributed()
    given = ["--motion-ckpt", str(motion_ckpt)] if motion_ckpt else []
    args = sample.parse_args(["--model", "tiny-animatediff", "--ckpt", str(ckpt), *given])
    return networks.load_network(args, flags.resolve_model(args), mesh, device)


def test_the_export_is_a_teacher_again(finished):
    """Its motion modules are those beside it, unless others are named."""
    out, _, net, _ = finished
    x, t = torch.randn(1, 3, 4, 8, 8), torch.tensor([0.5])
    c = torch.randn(1, ROW.clip_length, 64), torch.zeros(1, 0)
    with torch.no_grad():
        expected = net(x, t, c)
        assert torch.equal(load(out / "generator.safetensors")(x, t, c), expected)
        assert torch.equal(load(out / "generator.safetensors", out / MOTION)(x, t, c), expected)
        other = load(out / "generator.safetensors", ROW.motion_ckpt)(x, t, c)
    assert (other - expected).abs().max() > 1e-3


def sampled(monkeypatch, ckpt, out):
    """(what sample.py makes of a run or a file, the Denoiser it makes it with)."""
    seen, generate = {}, sampling.generate

    def keep(F, *args):
        seen.update(F=F, samples=generate(F, *args))
        return seen["samples"]
    monkeypatch.setattr(sampling, "generate", keep)
    sample.main(sample.parse_args(["--ckpt", str(ckpt), "--count", "4", "--out", str(out)]))
    return seen["samples"], seen["F"]


def test_sample_py_makes_the_samples_of_the_run(tmp_path, monkeypatch, finished):
    out, _, _, during = finished
    samples, F = sampled(monkeypatch, out, tmp_path / "run")
    assert F.renoise and torch.equal(samples, during[:4])
    assert len(list((tmp_path / "run").glob("[0-9]*.mp4"))) == 4

    shutil.copytree(out, tmp_path / "ode", ignore=shutil.ignore_patterns("state"))
    tensors = open_tensors(out / "generator.safetensors")
    notes = {key: value for key, value in tensors.metadata.items() if key != "dmdx.rollout"}  # as of --rollout ode
    save_safetensors(tmp_path / "ode" / "generator.safetensors", {name: tensors[name] for name in tensors}, notes)
    other, F = sampled(monkeypatch, tmp_path / "ode", tmp_path / "other")
    assert not F.renoise and not torch.equal(other, samples)


def test_a_run_starts_from_the_generator_of_another(tmp_path, finished):
    """Both of its files: the teacher's and the fake model's weights stay those of --ckpt."""
    out, _, net, _ = finished
    device, mesh = init_distributed()
    args = avdm2.parse_args(["--init", str(out), "--out", str(tmp_path)])
    G_theta = networks.load_generator(args, flags.resolve(args), mesh, device)
    weights = G_theta.net.state_dict()
    assert all(torch.equal(weights[name], p) for name, p in net.state_dict().items())
    assert G_theta.schedule == "animatediff" and G_theta.predicts == "epsilon"


# ---- real clips --------------------------------------------------------------------------------------------

def open_job(out, *flags_given):
    """(the job of a run with these flags, its real clips, what the VAE and the text encoder were given)."""
    device, mesh = init_distributed()
    args = avdm2.parse_args(list(map(str, [*flags_given, "--out", out])))
    preset = flags.resolve(args)
    source = clips.open_source(args, preset)
    job = job_module.Job("avdm2", args, preset, mesh, device)
    seen = {}
    encode, vae_encode = job.text.encode, job.vae.encode
    job.text.encode = lambda captions: seen.update(captions=captions) or encode(captions)
    job.vae.encode = lambda video, eps: seen.update(video=video, eps=eps) or vae_encode(video, eps)
    return job, clips.open_clips(job, source), seen


def test_drawn_clips_show_their_captions(tmp_path):
    job, real, seen = open_job(tmp_path / "run")
    drawn = []
    for iteration in (1, 2):
        job.begin(iteration)
        x_0, c = real(list(range(8)))
        shown, _, _ = moving_shapes.read_clip(to_uint8(seen["video"]) / 127.5 - 1)
        named = moving_shapes.parse(seen["captions"])
        assert (shown >= 0).all() and ((shown[:, :5] == named) | (named < 0)).all()
        drawn.append((x_0, seen["captions"], seen["eps"]))
        assert x_0.shape == (8, *job.latent_shape) and x_0.dtype == torch.float32 and len(c.context) == 8
        part, _ = real([5, 6])
        torch.testing.assert_close(part, x_0[5:7], rtol=0, atol=1e-4)  # whoever draws them; kernels' rounding
        assert len(set(seen["captions"])) == 2
    (a, captions, eps), (b, other, fresh) = drawn
    assert captions != other and not torch.equal(eps, fresh) and (a - b).flatten(1).norm(dim=1).min() > 1
    mean = job.vae.encode(seen["video"], torch.zeros_like(seen["eps"]))
    assert not torch.equal(part, mean)  # a sample of the posterior


def test_clips_of_a_vae_in_half_precision_are_diffused_in_float32(tmp_path):
    """As generated ones are: D would tell real from fake by their rounding."""
    job, real, _ = open_job(tmp_path / "run", "--vae-precision", "bf16")
    job.begin(1)
    assert real([0, 1])[0].dtype == torch.float32


def test_latents_are_the_videos_as_they_are_encoded_live(tmp_path, capsys, monkeypatch):
    table(tmp_path, [("plain.mp4", "a red circle moving left")])
    source = ["--videos", VIDEOS, "--prompts", tmp_path / "t.csv"]
    made = ["--model", "tiny-animatediff", *source, "--count", 6, "--out", tmp_path / "latents"]
    latents.main(latents.parse_args(list(map(str, made))))
    live, real, _ = open_job(tmp_path / "a", *source)
    cached, read, seen = open_job(tmp_path / "b", "--latents", tmp_path / "latents", "--batch-size", 6)
    assert "made with another" not in capsys.readouterr().out
    videos, encoded = clips.open_source(live.args, ROW), clips.open_source(cached.args, ROW)
    assert set(clips.captions_of(videos)) == set(clips.captions_of(encoded)) == {"a red circle moving left"}
    assert len(clips.captions_of(encoded, 2)) == len(clips.captions_of(encoded)) - 4
    monkeypatch.setitem(PRESETS, "tiny-v3", ROW)  # of the same VAE, as animatediff-v3
    assert len(clips.open_source(argparse.Namespace(**vars(cached.args) | {"model": "tiny-v3"}), ROW)) == 6
    open_job(tmp_path / "c", "--latents", tmp_path / "latents", "--stride", 2, "--vae-precision", "bf16")
    assert (f"note: {tmp_path / 'latents'} was made with another --vae-ckpt or --vae-precision and another --stride\n"
            in capsys.readouterr().out)
    cached.begin(1)
    x_0, c = read(list(range(6)))
    places = cached.shuffled(list(range(6)), 6)
    assert sorted(places) == list(range(6)) and seen["captions"] == ["a red circle moving left"] * 6
    live.begin(0)  # of which iteration latents have their start and noise
    expected, c_live = real(places)
    torch.testing.assert_close(x_0, expected, rtol=4e-3, atol=1e-5)  # bf16 rounds to half of 2^-7
    assert torch.equal(c.context, c_live.context)
    assert (expected[0] - expected[1]).abs().max() > 0.1  # other starts
    live.begin(1)
    assert (real(places)[0] - expected).flatten(1).norm(dim=1).min() > 0.1


# ---- refusals ----------------------------------------------------------------------------------------------

def refusal(tmp_path, *flags) -> str:
    message = says(run, avdm2, *flags, "--out", tmp_path / "run")
    assert not (tmp_path / "run").exists()
    return message


CLIPS = "expected real clips from --videos FOLDER, with --prompts FILE.csv where that has not one .csv file, or from "
BASE, MOVING = PRESETS["tiny-sd15"].ckpt, ROW.motion_ckpt


@pytest.mark.parametrize("given, words", [
    (["--model", "tiny-sd3"], "--model tiny-sd3: expected one with a teacher of single frames, such as animatediff"),
    (["--model", "sd1.5"], "--model sd1.5: expected one with a teacher of single frames"),
    (["--model", "animatediff"], f"--model animatediff: {CLIPS}--latents FOLDER"),
    (["--model", "animatediff", "--prompts", "p.csv"], f"--model animatediff: {CLIPS}"),
    (["--prompts", "p.csv"], f"--model tiny-animatediff: {CLIPS}"),
    (["--videos", "a", "--latents", "b"], f"--model tiny-animatediff: {CLIPS}"),
    (["--videos", "nowhere"], "nowhere: no such folder"), (["--latents", "nowhere"], "nowhere"),
    (["--size", 16, 16], "--size 16 16: the clips of tiny-animatediff are drawn at 32 32"),
    (["--frames-sdm", 10], "--frames-sdm 10: expected at most the clip's 9 frames"),
    (["--frames-sdm", 0], "--frames-sdm 0: expected at least 1"), (["--warmup", 0], "--warmup 0: expected at least 1"),
    (["--lambdas", -1, 1], "--lambdas -1 1 --sdm 2d: expected weights >= 0"),
    (["--lambdas", 0, 0], "--lambdas 0 0 --sdm 2d: expected weights >= 0, not all 0"),
    (["--lambdas", 1, 0, "--sdm", "none"], "--lambdas 1 0 --sdm none: expected weights >= 0, not all 0"), (["--steps", 0], "--steps 0"),
    (["--ttur", 0], "--ttur 0"), (["--stride", 0], "--stride 0"), (["--workers", 0], "--workers 0"),
    (["--frames", 33], "--frames 33: tiny-animatediff takes 1 to 32 frames; its own are 9"),
    (["--ckpt", MOVING, "--motion-ckpt", BASE], f"{MOVING}: motion modules; expected SD1.5 or a fine-tune of it"),
    (["--motion-ckpt", BASE], f"{BASE}: a base model; expected a motion file of AnimateDiff v2 or v3"),
    (["--teacher-2d", MOVING], f"{MOVING}: motion modules; expected SD1.5 or a fine-tune of it"),
    (["--teacher-2d", BASE, "--sdm", "video"], f"--teacher-2d {BASE} --sdm video: expected --sdm 2d"),
    (["--init", VIDEOS], f"--init {VIDEOS}: no generator.safetensors; expected the folder of a finished run"),
], ids=lambda value: " ".join(map(str, value)).replace(str(ROOT), "") if isinstance(value, list) else "")
def test_refused_in_words(tmp_path, given, words):
    assert refusal(tmp_path, *given).startswith(words)


def test_a_generator_without_its_motion_modules_is_refused(tmp_path, finished):
    path = shutil.copy(finished[0] / "generator.safetensors", tmp_path / "generator.safetensors")
    for given in (["--ckpt", path], ["--init", path]):
        message = refusal(tmp_path, *given)
        assert f"{path} is a generator whose motion modules are in {MOTION} beside it" in message
        assert str(tmp_path / MOTION) in message


# ---- the citations -----------------------------------------------------------------------------------------

# What each line of the paper's Algorithm 1 says, as the statements that carry its number begin.
ALGORITHM = {
    1: ["G_theta = networks.load_generator(", "D_tau = networks.new_discriminator(",
        "f_psi = Denoiser(load_2d(trainable=True)"],
    2: ["while gen_iter < args.max_iter:"], 3: ['z_T = job.noise("z_T", indices)'],
    4: ["x_tn = solve(G_theta, z_T, tn[n:], c, renoise", "_, x_hat_0 = ode_step(G_theta, x_tn, tn[n], tn[0], c)"],
    5: ['t, eps = pair(F_phi, GAN_TIMES, "eps", indices)'], 6: ["x_t = q(F_phi.schedule, x, t, eps)"],
    7: ["loss_gan = softplus(-D_tau(D_tau.features(x_t, t, c))).mean()"],
    8: ['t, eps = pair(F_sdm, SDM_TIMES, "eps_sdm", indices)', 'x_K, eps, t, *c_K = pick("K", indices, x, eps, t, *c)'],
    9: ["x_t = q(F_sdm.schedule, x_K, t, eps)"], 10: ["loss_sdm = dmd_loss(*per_frame)"],
    11: ["x_hat_0.backward((grad_gan + grad_sdm) / accumulation)", 'log.update("theta", opt_theta, warm)'],
    12: ['t, eps = pair(f_psi, SDM_TIMES, "eps_psi", indices)'], 13: ["x_t = q(f_psi.schedule, x_K, t, eps)"],
    14: ["(loss_psi / accumulation).backward()", 'log.update("psi", opt_psi, warm)'],
    15: ['t, eps = pair(F_phi, GAN_TIMES, "eps_tau", indices)'],
    16: ["h_fake = D_tau.features(q(F_phi.schedule, x_hat_0, t, eps), t, c)",
         "h_real = D_tau.features(q(F_phi.schedule, x_0, t, eps), t, c)"],
    17: ["loss_tau = softplus(logits_fake).mean() + softplus(-logits_real).mean()", 'log.update("tau", opt_tau, warm)'],
    18: ["while gen_iter < args.max_iter:"], 19: ["job.finish(F_phi, G_theta, tn)"],
}


def test_every_line_of_algorithm_1_is_cited_at_its_statement():
    found = {}
    for numbers, statement in cited(SCRIPT, r"Alg\. 1 l\. (\d+(?:, \d+)*)(?:, Eq\. \(\d+\))?"):
        for number in numbers.split(", "):
            found.setdefault(int(number), []).append(statement)
    assert sorted(found) == list(ALGORITHM) == list(range(1, 20))
    for number, starts in ALGORITHM.items():
        assert len(found[number]) == len(starts), (number, found[number])
        assert all(map(str.startswith, found[number], starts)), (number, found[number])


def test_equations_are_cited_at_their_statements():
    found = dict(cited(SCRIPT, r"(?:Alg\. 1 l\. \d+, )?(Eq\. \(\d+\))"))
    assert found["Eq. (2)"].startswith("loss_psi = mse_loss(f_psi(x_t, t, c_K), target(")
    assert found["Eq. (6)"].startswith("loss_tau = ") and found["Eq. (7)"].startswith("loss_gan = softplus(-")
    assert found["Eq. (8)"] == "loss_sdm = dmd_loss(*per_frame)" and found["Eq. (9)"].startswith("x_hat_0.backward(")
    assert found.keys() == {f"Eq. ({i})" for i in (2, 6, 7, 8, 9)}
