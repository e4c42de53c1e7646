"""Wan2.1's 3D VAE against the original's outputs and the names of its file."""
import json
import re

import pytest
import torch
from conftest import golden, near, wan_golden
from einops import rearrange

from models.wan_vae import MEAN, STD, WanVAE, config_from_shapes

FRAMES_FIRST = "B C F H W -> B F C H W"  # the golden file has channels first
FILE, = golden("wan_vae_small.safetensors")
TINY = dict(ch=(4, 6, 8), num_res_blocks=1, z_channels=16, time=(False, True))


def shapes_of(weights) -> dict:
    return {name: tuple(value.shape) for name, value in weights.items()}


@pytest.fixture(scope="module")
def reference():
    tensors, weights, _ = wan_golden(FILE)
    vae = WanVAE(**config_from_shapes(shapes_of(weights)))
    vae.load_state_dict(weights, strict=True)
    return vae.eval(), {name: rearrange(t, FRAMES_FIRST) if t.ndim == 5 else t for name, t in tensors.items()}


@torch.no_grad()
@pytest.mark.parametrize("chunk", [4, 8, None])
@pytest.mark.parametrize("frames", [1, 5, 9])
def test_encode_in_the_originals_parts_in_others_and_whole(reference, frames, chunk):
    vae, g = reference
    video = g["in/video"][:, :frames]
    near(torch.cat(vae.moments(video, chunk), dim=2), g[f"enc/T{frames}.moments"])
    near(vae.encode(video, chunk), g[f"enc/T{frames}.latents"])


@torch.no_grad()
@pytest.mark.parametrize("chunk", [1, 2, None])
@pytest.mark.parametrize("latents", [1, 2, 3])
def test_decode_in_the_originals_parts_in_others_and_whole(reference, latents, chunk):
    vae, g = reference
    near(vae.decode(g["in/latents"][:, :latents], chunk), g[f"dec/L{latents}.video"])


@torch.no_grad()
@pytest.mark.parametrize("part", ["enc5", "dec2"])
def test_inside(reference, part):
    vae, g = reference
    net, hooks, seen = vae.encoder if part == "enc5" else vae.decoder, [], {}
    names = [name for name in g if re.match(rf"mid/{part}\.", name)]
    for name in names:
        hooks.append(net.get_submodule(name.split(".", 1)[1]).register_forward_hook(
            lambda _, __, out, name=name: seen.update({name: out[0] if isinstance(out, tuple) else out})))
    vae.encode(g["in/video"][:, :5], None) if part == "enc5" else vae.decode(g["in/latents"][:, :2], None)
    for hook in hooks:
        hook.remove()
    for name in names:
        near(rearrange(seen[name], FRAMES_FIRST), g[name])
    assert len(names) > 10


def test_gradients(reference):
    vae, g = reference
    video, latents = g["in/video"][:, :5].clone().requires_grad_(), g["in/latents"][:, :2].clone().requires_grad_()
    (vae.encode(video) * g["grad/enc5.probe"]).sum().backward()
    (vae.decode(latents) * g["grad/dec2.probe"]).sum().backward()
    near(video.grad, g["grad/enc5.in.video"], atol=1e-3)  # WAN.md; they reach 8, and kernels differ by 1e-4
    near(latents.grad, g["grad/dec2.in.latents"], atol=1e-3)


def test_a_part_needs_memory_of_its_own_size_alone(reference):
    """What the layers keep is a few frames, however long the clip is."""
    vae, g = reference
    for net, x in ((vae.encoder, g["in/video"][:, :5]), (vae.decoder, g["in/latents"][:, :2])):
        x, tails = rearrange(x, FRAMES_FIRST), {}
        with torch.no_grad():
            net(x, tails)
            first = {layer: [t.shape for t in kept] for layer, kept in tails.items()}
            net(x[:, :, 1:].repeat(1, 1, 4, 1, 1), tails)
        assert {layer: [t.shape for t in kept] for layer, kept in tails.items()} == first
        assert all(t.shape[2] <= 2 and t.untyped_storage().nbytes() == 4 * t.numel()
                   for kept in tails.values() for t in kept)


def test_manifest():
    data = json.loads(golden("wan_vae.keys.json")[0].read_text())
    shapes = {name: tuple(shape) for name, shape in data["original"]["keys"].items()}
    config = config_from_shapes(shapes)
    assert config == dict(ch=(96, 192, 384, 384), num_res_blocks=2, z_channels=16, time=(False, True, True))
    with torch.device("meta"):
        vae = WanVAE(**config)
    assert shapes_of(vae.state_dict()) == shapes and (vae.factor, vae.time_factor) == (8, 4)
    assert (list(MEAN), list(STD)) == (data["meta"]["mean"], data["meta"]["std"])


@torch.no_grad()
def test_half_precision():
    vae = WanVAE(**TINY).bfloat16()
    latent = vae.encode(torch.randn(1, 3, 3, 8, 8))
    assert latent.shape == (1, 2, 16, 2, 2) and latent.dtype == torch.bfloat16
    assert vae.decode(latent.float()).dtype == torch.bfloat16 and vae.decode(latent).shape == (1, 3, 3, 8, 8)


def test_what_the_original_drops_is_refused():
    vae = WanVAE(**TINY)
    with pytest.raises(ValueError, match=r"4 frames; expected 2k\+1"):
        vae.encode(torch.zeros(1, 4, 3, 8, 8))
    with pytest.raises(ValueError, match="multiple of 4"):
        vae.encode(torch.zeros(1, 5, 3, 8, 6))
    with pytest.raises(ValueError, match="chunk 3 is not a multiple of 2 frames"):
        vae.encode(torch.zeros(1, 5, 3, 8, 8), chunk=3)
    with pytest.raises(ValueError, match="no Wan VAE: expected encoder.conv1.weight.*found decoder.conv_in.weight"):
        config_from_shapes({"decoder.conv_in.weight": (512, 16, 3, 3)})
