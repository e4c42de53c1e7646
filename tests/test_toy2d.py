"""The comparison in the plane: its closed forms, its measures by hand, a short training of each kind."""
from copy import deepcopy

import pytest
import torch
import toy2d
from toy2d import CENTRES, STD, Mixture

from models.diffusion import to_x_0_eps

RATES = {"dmd": (3e-3, 6e-3), "adm": (2e-4, 1.6e-3)}


def test_teacher_is_the_score_of_the_diffused_density():
    t = torch.tensor([0.02, 0.3, 0.7, 1.0], dtype=torch.float64).repeat_interleave(64)
    x_t = (2 * torch.randn(256, 2, dtype=torch.float64)).requires_grad_()
    log_density = Mixture().components(x_t, t)[2].logsumexp(1)
    score, = torch.autograd.grad(log_density.sum(), x_t)
    _, eps = to_x_0_eps("velocity", "flow", Mixture().net(x_t, t, ()), x_t, t)
    # E[eps | x_t] = -sigma * score; float64 on both sides.
    torch.testing.assert_close(eps, -t[:, None] * score, atol=1e-9, rtol=1e-9)


@pytest.mark.parametrize("t", [0.0, 0.5])
def test_diffused_density_has_mass_one_and_the_mean_of_the_data(t):
    axis = torch.arange(-8, 8, 0.1, dtype=torch.float64)
    x_t = torch.cartesian_prod(axis, axis)
    density = Mixture().components(x_t, torch.full((len(x_t),), t, dtype=torch.float64))[2].logsumexp(1).exp()
    # Sums over cells narrower than STD / 3 are exact for Gaussians; 1e-6: the constants are float32.
    assert (density * 0.1 ** 2).sum().item() == pytest.approx(1, abs=1e-6)
    mean = (density[:, None] * x_t).sum(0) * 0.1 ** 2
    torch.testing.assert_close(mean, (1 - t) * (toy2d.WEIGHTS @ CENTRES).double(), atol=1e-6, rtol=0)


def test_measures_of_ten_samples_counted_by_hand():
    counts = torch.tensor([4, 1, 2, 1, 1, 1])
    variation, modes, plane = toy2d.measure(CENTRES.repeat_interleave(counts, 0))
    # Shares .4 .1 .2 .1 .1 .1 against .25 .10 .20 .05 .15 .25: 0.5 * (.15 + .05 + .05 + .15).
    assert variation == pytest.approx(0.2) and modes == 6
    assert plane > 0.85  # they sit in six cells; a cell holds at most 0.383^2 = 0.147 of its component
    # Moved by 2.2 STD samples still go to their component (the nearest are 5 STD apart) and cover it no more.
    variation, modes, _ = toy2d.measure((CENTRES + torch.tensor([0, 2.2 * STD])).repeat_interleave(counts, 0))
    assert variation == pytest.approx(0.2) and modes == 0
    # .25 / 4 = .0625 of the samples are enough for the first component, .05 are not.
    for count, covered in ((7, 6), (5, 5)):
        counts = torch.tensor([count, 10, 20, 5, 15, 100 - 50 - count])
        assert toy2d.measure(CENTRES.repeat_interleave(counts, 0))[1] == covered


def test_samples_of_the_data_score_what_sampling_leaves():
    variation, modes, plane = toy2d.measure(Mixture().sample(8192))
    # Half the sum over K of sqrt(2 w (1 - w) / (pi n)) is 0.009 in the mean; over the plane's cells 0.05.
    assert variation < 0.03 and modes == 6 and plane < 0.08


@pytest.fixture(scope="module")
def generators():
    torch.manual_seed(0)
    return toy2d.start(Mixture(CENTRES[:2], torch.tensor([0.5, 0.5])), 200)


@pytest.mark.parametrize("method", ["dmd", "adm"])
def test_short_training_finds_modes_that_the_start_lacks(method, generators):
    with torch.no_grad():
        before = toy2d.measure(toy2d.generate(generators[0], 4096))
    weights = deepcopy(generators[0].net.state_dict())
    G_theta = toy2d.distil(method, *generators, 300, RATES[method])
    with torch.no_grad():
        after = toy2d.measure(toy2d.generate(G_theta, 4096))
    # The start holds .5 .5 of .25 .10 .20 .05 .15 .25: 0.65.
    print(method, before, after)
    assert before[0] == pytest.approx(0.65, abs=0.05) and before[1] == 2
    # 0.18 to 0.24 with adm, by the rounding alone; the start's two modes cannot fall under 0.65.
    assert after[0] < 0.4
    assert all((generators[0].net.state_dict()[name] == w).all() for name, w in weights.items())
