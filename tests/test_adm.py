"""adm.py on tiny networks: updates' order and ownership, Eq. (7)'s gradient, Eq. (8) by hand, TTUR, FLOPs."""
import re

import pytest
import torch
from conftest import ROOT, refusal_of, rows, run, states_saved
from torch.utils.flop_counter import FlopCounterMode

import adm
from models.discriminator import Discriminator
from models.job import networks
from models.job.families import FAMILIES
from models.data import noise, uniform
from models.diffusion import Denoiser
from models.parallel import local_rows
from models.presets import PRESETS

SCRIPT = (ROOT / "adm.py").read_text()


def train(out, *flags, states=()):
    """Run adm.py in this process on random tiny networks; returns the rows of metrics.jsonl."""
    with states_saved(*states):
        run(adm, "--random-weights", "--batch-size", 4, "--out", out, *flags)
    return rows(out)


@pytest.mark.parametrize("flags", [
    ["--lora-rank", 0], ["--lora-rank", 4], ["--lora-rank", 4, "--fake-lora", 4]],
    ids=["full", "lora", "fake-lora"])
def test_updates_come_in_order_and_change_only_their_own_parameters(tmp_path, spy, flags):
    order = []

    def on_update(role, roles, step):
        before = [{name: local_rows(p.detach())[0].clone() for name, p in params.items()}
                  for params in roles.values()]
        result = step()
        changed = [any(not torch.equal(local_rows(p.detach())[0], old[name]) for name, p in params.items())
                   for params, old in zip(roles.values(), before)]
        assert changed == [name == role for name in ("psi", "theta", "tau")]
        order.append(role)
        return result
    spy(on_update)
    train(tmp_path / "run", "--max-iter", 2, *flags)
    assert order == ["psi", "theta", "tau"] * 2


def test_each_update_reaches_every_parameter_of_its_role(tmp_path, spy):
    silent = {}

    def on_update(role, roles, step):
        silent[role] = [name for name, p in roles[role].items()
                        if p.grad is None or local_rows(p.grad)[0].abs().sum() == 0]
        return step()
    spy(on_update)
    train(tmp_path / "run", "--max-iter", 1, "--lora-rank", 0)
    # The text queries of the last block feed a text output that nothing uses. While no logit is beyond the
    # hinge's margin, the last bias raises one term of Eq. (8) as much as it lowers the other.
    depth = PRESETS["tiny-sd3"].config["depth"]
    unused = [f"joint_blocks.{depth - 1}.context_block.attn.ln_q.weight"]
    assert silent == {"psi": unused, "theta": unused, "tau": [f"heads.{i}.logit.bias" for i in range(depth)]}


def test_gradient_of_eq7_goes_through_f_psi(tmp_path, monkeypatch, spy):
    """Finite differences of the logged loss_theta against the gradient that the script takes. With lr_psi = 0
    and one step theta reaches the loss by Alg. 1 l. 17-22 alone; a graph cut on that way, at f_psi's network
    above all, shows."""
    grads, shift = {}, {}

    def on_update(role, roles, step):
        if role == "theta":
            grads.update({name: local_rows(p.grad)[0].clone() for name, p in roles["theta"].items()})
        return step()
    spy(on_update)
    original = networks.load_network

    def load_network(*args, **named):
        net = original(*args, **named)
        if named.get("trainable") and shift.pop("pending", False):  # the generator is loaded before f_psi
            with torch.no_grad():
                for name, p in net.named_parameters():
                    local_rows(p)[0].add_(shift["size"] * shift["direction"][name])
        return net
    monkeypatch.setattr(networks, "load_network", load_network)

    def loss_theta(size):
        shift.update(pending=bool(size), size=size)
        flags = ["--max-iter", 1, "--lora-rank", 0, "--steps", 1, "--lr-psi", 0]
        return train(tmp_path / f"{size:g}", *flags)[0]["loss_theta"]
    loss_theta(0.0)
    norm = sum(g.square().sum() for g in grads.values()).sqrt().item()
    shift["direction"] = {name: g / norm for name, g in grads.items()}
    # Curvature bends the slope by 0.4 % (measured; 8 % at 4e-3), float32 rounding of the losses by 0.1 %.
    size = 1e-3
    slope = (loss_theta(size) - loss_theta(-size)) / (2 * size)
    assert slope == pytest.approx(norm, rel=0.02)


def test_gradient_of_eq7_without_f_psis_graph(tmp_path, monkeypatch):
    """--detach-fake: f_psi's prediction is a constant, so that x_fake = x_t + (s - t) v moves as x_t does. D_tau is
    replaced by the mean of the tapped network's input."""
    monkeypatch.setattr(Discriminator, "features", lambda self, x, t, c: [x])
    monkeypatch.setattr(Discriminator, "forward", lambda self, h: sum(p.sum() * 0 for p in self.parameters())
                        + h[0].mean((1, 2, 3))[None])
    row, = train(tmp_path / "run", "--max-iter", 1, "--steps", 1, "--detach-fake")
    # dx_t / dx_hat_0 = 1 - t: between 1/64 and 1, and largest where t is smallest.
    every, first, _, last = row["grad_x_0"]
    size = (4 * 8 * 8) ** 0.5  # the norm of a gradient of 1 / n in each of n elements is 1 / size
    assert 0 < every * size < 1
    t = (1 - (1 - 1 / 64) * uniform(0, 1, "t", range(4)))
    assert every * size == pytest.approx((1 - t).mean().item(), rel=1e-4)


def test_dt_is_what_the_two_steps_span_and_D_sees_their_ends(tmp_path, monkeypatch):
    """With the teacher's network, at the time t - dt that they have reached, not at t, and under their prompt."""
    spans, steps, asked, step, features = [], [], [], adm.ode_step, Discriminator.features

    def ode_step(F, x_t, t, s, c, *rest):
        spans.append((t - s).expand(len(x_t)))
        result = step(F, x_t, t, s, c, *rest)
        steps.append((F.net, result[0], s, *c))
        return result

    def spy(D_tau, x, t, c):
        asked.append((D_tau.F_phi.net, x, t, *c))
        return features(D_tau, x, t, c)
    monkeypatch.setattr(adm, "ode_step", ode_step)
    monkeypatch.setattr(Discriminator, "features", spy)
    train(tmp_path / "run", "--max-iter", 1, "--steps", 1, "--dt", 0.25)
    for span in spans[1:]:  # the first is the generator's, from 1 to 0
        torch.testing.assert_close(span, torch.full((4,), 0.25))
    _, fake, real = steps
    for (_, *end), (backbone, *seen) in zip((fake, real), asked, strict=True):
        assert backbone is real[0] is not fake[0] and all(map(torch.equal, end, seen))
    for dt in ("0", "1.5", "nan"):
        assert refusal_of("adm.py", "--out", tmp_path / "no", "--dt", dt).startswith(f"adm.py: --dt {float(dt):g}: expected")


def test_eq8_and_margins_by_hand(tmp_path, monkeypatch):
    """D_tau replaced by constant logits: fake 0.25, real -0.5 give 1.25 + 1.5 in Eq. (8), -0.25 in Eq. (7), a
    margin of -0.75."""
    calls = []

    def forward(self, features):
        calls.append(features[0].requires_grad)
        value = (0.25, 0.25, -0.5)[(len(calls) - 1) % 3]  # Eq. (7) on x_fake, Eq. (8) on x_fake, on x_real
        logits = torch.stack([value + 0 * h.float().mean((1, 2, 3)) for h in features])
        return logits + torch.zeros((), requires_grad=True)
    monkeypatch.setattr(Discriminator, "forward", forward)
    row = train(tmp_path / "run", "--max-iter", 1)[0]
    assert (row["loss_theta"], row["loss_tau"]) == (-0.25, 2.75) and set(row["margin"]) == {-0.75}
    assert calls == [True, False, False]  # Eq. (8) sees detached features


def test_maps_that_are_too_small_have_no_head(tmp_path, capsys):
    """Of tiny-sdxl's seven maps three are 2 x 2; at 16 x 16 pixels all of tiny-sd3's are."""
    row = train(tmp_path / "unet", "--max-iter", 1, "--model", "tiny-sdxl")[0]
    assert "note: D has no head on down.2, mid, up.0, whose maps are too small to be halved" in capsys.readouterr().out
    assert len(row["margin"]) == 4
    train(tmp_path / "mmdit", "--max-iter", 1)  # its maps are 4 x 4
    assert "linear" not in capsys.readouterr().out
    row = train(tmp_path / "small", "--max-iter", 1, "--size", 16, 16)[0]
    assert "note: D's heads are linear on 0, 1" in capsys.readouterr().out


def test_ttur_updates_the_fake_model_more_often(tmp_path, spy):
    order = []
    spy(lambda role, roles, step: order.append(role) or step())
    rows = train(tmp_path / "run", "--max-iter", 2, "--ttur", 3)
    assert order == ["psi", "psi", "psi", "theta", "tau"] * 2
    assert [row["gen_iter"] for row in rows] == [0, 0, 1, 1, 1, 2]


def test_the_penalty_is_half_the_squared_slope(tmp_path, monkeypatch):
    """D_tau replaced by 2 times the mean of what it sees: along noise of mean m its slope is 2 m."""
    monkeypatch.setattr(Discriminator, "features", lambda self, x, t, c: [x])
    monkeypatch.setattr(Discriminator, "forward", lambda self, h: sum(p.sum() * 0 for p in self.parameters())
                        + 2 * h[0].mean((1, 2, 3))[None])
    (plain,), (row,) = (train(tmp_path / str(weight), "--max-iter", 1, "--r1", weight) for weight in (0, 300))
    slope = 2 * noise((4, 8, 8), 0, 1, "r1", range(4)).mean((1, 2, 3))
    # Float32 leaves three digits of a difference of 0.03 m.
    assert row["loss_tau"] - plain["loss_tau"] == pytest.approx(150 * slope.square().mean().item(), rel=0.02)
    assert row["loss_theta"] == plain["loss_theta"] and row["loss_psi"] == plain["loss_psi"]


@pytest.mark.parametrize("micro", [4, 2])
def test_normalised_gradients_have_one_length(tmp_path, micro):
    """Their mean size is that of the gradient of a mean over the batch's elements, 1 / n."""
    grads, register = [], torch.Tensor.register_hook

    def register_hook(x, hook):
        def keeping(grad):
            grads.append((grad, hook(grad)))
            return grads[-1][1]
        return register(x, keeping)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.Tensor, "register_hook", register_hook)
        row, = train(tmp_path / "run", "--max-iter", 1, "--micro-batch", micro, "--normalise")
    assert len(grads) == 4 // micro
    for before, after in grads:
        size = after.abs().mean((1, 2, 3))
        torch.testing.assert_close(size, torch.full_like(size, 1 / (4 * 4 * 8 * 8)))
        ratio = (after / before).flatten(1)
        torch.testing.assert_close(ratio, ratio[:, :1].expand_as(ratio), rtol=1e-4, atol=0)  # no direction is turned
    assert row["grad_norm_theta"] > 0


@pytest.mark.parametrize("flags", [(), ("--normalise", "--r1", 2)], ids=["paper", "with penalty"])
def test_accumulation_gives_the_same_gradients(tmp_path, flags):
    whole, = train(tmp_path / "whole", "--max-iter", 1, "--micro-batch", 4, *flags)
    cut, = train(tmp_path / "cut", "--max-iter", 1, "--micro-batch", 1, *flags)
    for name in ("loss_psi", "loss_theta", "loss_tau", "dmd"):
        # Float32 sums in another order.
        assert whole[name] == pytest.approx(cut[name], rel=1e-4, abs=1e-5), name
    for name in ("grad_norm_psi", "grad_norm_theta", "grad_norm_tau"):
        # Eq. (8)'s gradient is a difference of two that nearly cancel, x_fake and x_real being one 64th of
        # the path from x_t: its norm is known to 8e-5 on the CPUs tried.
        assert whole[name] == pytest.approx(cut[name], rel=1e-3), name


def test_non_finite_iterations_are_skipped_and_stop_the_run(tmp_path, monkeypatch):
    from models.checkpoint import InputError
    monkeypatch.setattr(adm, "mse_loss", lambda a, b: (a - b).square().mean() * float("nan"))
    with pytest.raises(InputError, match="10 iterations in a row"):
        train(tmp_path / "run", "--max-iter", 20, "--batch-size", 1, states=[10])
    assert [row["skipped"] for row in rows(tmp_path / "run")] == list(range(1, 11))
    assert list((tmp_path / "run" / "state").glob("iter_*"))  # saved before it stopped


def flops(call):
    with FlopCounterMode(display=False) as counter:
        call()
    return counter.get_total_flops()


def test_no_evaluation_is_done_twice(tmp_path, capsys):
    """An iteration's FLOPs are those of Algorithm 1's own evaluations, counted apart on the same networks."""
    row, N = PRESETS["tiny-sd3"], 2
    flags = ["--lora-rank", 0, "--steps", N, "--no-checkpointing", "--micro-batch", 4]
    two = flops(lambda: train(tmp_path / "2", "--max-iter", 2, *flags))
    one = flops(lambda: train(tmp_path / "1", "--max-iter", 1, *flags))
    n = 1 + int(N * uniform(0, 2, "n", [0]))  # of the second iteration

    net = FAMILIES[row.family].network(**row.config)
    taps = net.tap_shapes(row.size[0] // row.vae_factor, row.size[1] // row.vae_factor)
    D_tau = Discriminator(Denoiser(net), tuple(taps), list(taps.values()), row.head_width)
    x = torch.randn(4, row.latent_channels, row.size[0] // row.vae_factor, row.size[1] // row.vae_factor)
    t = torch.rand(4)
    c = tuple(torch.randn(4, *shape) for shape in FAMILIES[row.family].condition_shapes(row))
    maps = [torch.randn(4, *shape) for shape in taps.values()]
    with torch.no_grad():
        forward, features = flops(lambda: net(x, t, c)), flops(lambda: D_tau.features(x, t, c))
    trained = flops(lambda: net(x, t, c).sum().backward())
    heads_trained = flops(lambda: D_tau(maps).sum().backward())
    net.requires_grad_(False), D_tau.requires_grad_(False)
    x.requires_grad_(), [m.requires_grad_() for m in maps]
    through = flops(lambda: net(x, t, c).sum().backward())
    features_through = flops(lambda: sum(m.sum() for m in D_tau.features(x, t, c)).backward())
    heads_through = flops(lambda: D_tau(maps).sum().backward())

    fake = N * forward + trained                                     # l. 9, 11
    generator = (N - n) * forward + trained + through + 2 * forward  # l. 16, 17, 20, and 21 with guidance
    generator += features_through + heads_through                    # l. 22
    discriminator = features + 2 * heads_trained                     # l. 26; has x_fake's features from l. 22
    expected = fake + generator + discriminator
    with capsys.disabled():
        print(f"\n{(two - one) / forward:.2f} forward-equivalents an iteration for N = {N}, n = {n}; "
              f"Algorithm 1's own evaluations: {expected / forward:.2f}")
    assert two - one == pytest.approx(expected, rel=0.01)  # one evaluation more would be 5 %


# What each line of Algorithm 1 says, as the statements that carry its number begin; 6, 13, 24 are blank there.
ALGORITHM = {
    1: ["F_phi = Denoiser(base"], 2: ["tn = generator_times(args.steps"],
    3: ["G_theta = replace(F_phi", "G_theta = networks.load_generator(", "f_psi = replace(F_phi, lora",
        "f_psi = replace(F_phi, net=load(trainable=True))", "D_tau = networks.new_discriminator(",
        "gen_iter, global_iter ="],
    4: ["while gen_iter < args.max_iter:"], 5: ["global_iter += 1"],
    7: ["# update fake score estimator f_psi"], 8: ['z = job.noise("z"'], 9: ["x_0 = solve(G_theta, z, tn, c"],
    10: ['z_f = job.noise("z_f"', "t_f = random_time(f_psi.schedule"], 11: ['log.update("psi", opt_psi)'],
    12: ["if global_iter % args.ttur:"], 14: ["# update generator G_theta"],
    15: ['n = job.integer("n", args.steps)', 'z_hat = job.noise("z_hat"'],
    16: ["x_hat_tn = solve(G_theta, z_hat, tn[n:], c"],
    17: ["_, x_hat_0 = ode_step(G_theta, x_hat_tn, tn[n], tn[0], c"],
    18: ['z_g = job.noise("z_g"', "t = random_time(F_phi.schedule"], 19: ["x_t = q(F_phi.schedule, x_hat_0, t, z_g)"],
    20: ["x_fake, x_0_fake = ode_step(f_step, x_t, t, s, c)"],
    21: ["x_real, x_0_real = ode_step(F_phi, x_t, t, s, c, job.c_null, w)"],
    22: ['log.update("theta", opt_theta)'], 23: ["gen_iter += 1"],
    25: ["logits_fake, logits_real = D_tau("], 26: ['log.update("tau", opt_tau)'],
    27: ["job.finish(F_phi, G_theta, tn)"],
}


def cited(script, pattern):
    """(what the citation names, its statement) of each line of a script, in order."""
    return [(match[2], match[1].strip().split("  #")[0]) for match in re.finditer(rf"^(.*?) +# {pattern}$", script, re.M)]


def test_every_line_of_algorithm_1_is_cited_at_its_statement():
    found = {}
    for number, statement in cited(SCRIPT, r"Alg\. 1 l\. (\d+)"):
        found.setdefault(int(number), []).append(statement)
    assert found.keys() == ALGORITHM.keys() == set(range(1, 28)) - {6, 13, 24}
    for number, starts in ALGORITHM.items():
        assert len(found[number]) == len(starts), number
        assert all(map(str.startswith, found[number], starts)), (number, found[number])
    body = [int(number) for number, _ in cited(SCRIPT, r"Alg\. 1 l\. (\d+)") if 4 <= int(number) <= 21]
    assert body == sorted(body)


def test_equations_are_cited_at_their_statements():
    found = dict(cited(SCRIPT, r"(Eqs?\. .*)"))
    assert found["Eq. (2), (3)"] == "loss_psi = mse_loss(f_psi(x_tf, t_f, c), expected)"
    assert found["Eq. (7)"] == "loss_theta = -D_tau(h_fake).mean()"
    assert found["Eq. (8)"] == "loss_tau = hinge(logits_fake, logits_real)"
    assert found["Eq. (6), Fig. 3"] == "log.add(loss_tau=loss_tau, dmd=dmd_loss(x_hat_0, x_0_fake, x_0_real))"
