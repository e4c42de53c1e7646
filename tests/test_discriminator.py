"""D_tau: heads on every block of the teacher itself, and the hinge of Eqs. (7), (8)."""
import pytest
import torch
from conftest import golden, manifest
from test_mmdit import PREFIX
from torch import nn

from models.diffusion import Denoiser
from models.discriminator import Discriminator, shrink_count
from models.mmdit import MMDiT, config_from_shapes

SMALL = dict(depth=3, width=48, heads=3, patch=2, in_channels=4, pos_grid=8, context_dim=20, pooled_dim=10,
             qk_norm=True, attn2=())


def small_discriminator(width=32):
    F_phi = Denoiser(MMDiT(**SMALL).requires_grad_(False))
    nn.init.normal_(F_phi.net.pos_embed, std=0.02)
    taps = F_phi.net.tap_shapes(16, 16)
    return F_phi, Discriminator(F_phi, tuple(taps), list(taps.values()), width)


def batch():
    return torch.randn(2, 4, 16, 16), torch.tensor([0.2, 0.8]), (torch.randn(2, 5, 20), torch.randn(2, 10))


@pytest.mark.parametrize("path", [p for p in golden("sd3*.keys.json") if "mmdit" in manifest(p)[1]],
                         ids=lambda p: p.stem)
def test_a_head_on_every_block_of_the_full_model(path):
    shapes, meta = manifest(path)
    shapes = {k.removeprefix(PREFIX): s for k, s in shapes.items() if k.startswith(PREFIX)}
    with torch.device("meta"):
        net = MMDiT(**config_from_shapes(shapes))
        taps = net.tap_shapes(128, 128)
        D_tau = Discriminator(Denoiser(net), tuple(taps), list(taps.values()))
    assert len(D_tau.heads) == meta["mmdit"]["depth"]  # App. B.1: 24 for SD3-Medium, 38 for SD3.5-Large
    convs = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.Conv2d)]
    norms = [m for m in D_tau.heads[0].shrink if isinstance(m, nn.GroupNorm)]
    assert convs[0].in_channels == meta["mmdit"]["hidden"]
    assert all((c.kernel_size, c.stride, c.out_channels) == ((4, 4), (2, 2), 256) for c in convs)
    assert all(n.num_groups == 32 for n in norms)
    assert len(convs) == len(norms) == 3  # 64 x 64 tokens at 1024 px: 32, 16, 8


def test_heads_shrink_to_8_and_twice_where_2_by_2_are_left():
    # side -> halvings: 64 -> 8 takes 3; 33 -> 16 -> 8, 16 -> 4 and 8 -> 2 take two; 4 -> 2 allows one, 3 and less none.
    assert [shrink_count(side) for side in (128, 64, 33, 16, 8, 4, 3, 2, 1)] == [4, 3, 2, 2, 2, 1, 0, 0, 0]


def test_backbone_is_the_teacher_and_is_not_registered():
    F_phi, D_tau = small_discriminator()
    assert D_tau.F_phi.net is F_phi.net
    teacher = {p.data_ptr() for p in F_phi.net.parameters()}
    assert all(p.data_ptr() not in teacher for p in D_tau.parameters())
    assert all(name.startswith("heads.") for name in D_tau.state_dict())


def test_gradient_reaches_the_sample_and_the_heads_but_not_the_backbone():
    F_phi, D_tau = small_discriminator()
    x, t, c = batch()
    D_tau(D_tau.features(x.requires_grad_(), t, c)).sum().backward()
    assert x.grad.abs().sum() > 0
    assert all(p.grad is not None for p in D_tau.parameters())
    assert all(p.grad is None for p in F_phi.net.parameters())


def test_one_logit_per_head_and_sample_that_sees_time_and_prompt():
    _, D_tau = small_discriminator()
    x, t, (context, pooled) = batch()
    with torch.no_grad():
        logits = D_tau(D_tau.features(x, t, (context, pooled)))
        other_time = D_tau(D_tau.features(x, 1 - t, (context, pooled)))
        other_prompt = D_tau(D_tau.features(x, t, (context.flip(0), pooled.flip(0))))
        alone = D_tau(D_tau.features(x[:1], t[:1], (context[:1], pooled[:1])))
    assert logits.shape == (3, 2)
    assert (logits != other_time).all() and (logits != other_prompt).all()
    # GroupNorm: a sample does not see its batch.
    torch.testing.assert_close(logits[:, :1], alone, atol=1e-5, rtol=0)
