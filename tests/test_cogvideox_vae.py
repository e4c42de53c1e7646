"""The 3D VAE. As a script under torchrun, `ranks_agree`: decoding over ranks is decoding in one process."""
import json
import os
import re
import subprocess
import sys
from copy import copy
from datetime import timedelta

import pytest
import torch
import torch.distributed as dist
from conftest import golden, near, read_golden
from einops import rearrange
from torch import nn

from models.cogvideox_vae import CogVideoXVAE, config_from_shapes, split

# Two public implementations differ by 7e-6 here; the smallest mistake, statistics per frame, by 0.2.
TINY = dict(ch=(4, 4, 8), num_res_blocks=1, z_channels=3, scale=0.7, groups=2)
FRAMES_FIRST = "B C F H W -> B F C H W"  # the files have channels first


def shapes_of(weights: dict) -> dict:
    return {name: tuple(value.shape) for name, value in weights.items()}


def vae_of(path) -> tuple[CogVideoXVAE, dict]:
    tensors, meta = read_golden(path)
    config, ratio = meta["meta"]["config"], meta["meta"]["hf_init_kwargs"]["temporal_compression_ratio"]
    weights = {name[2:]: value for name, value in tensors.items() if name.startswith("w/")}
    vae = CogVideoXVAE(**config_from_shapes(shapes_of(weights)), scale=config["scaling_factor"],
                       groups=config["groups"], time_levels=ratio.bit_length() - 1)
    vae.load_state_dict(weights)
    return vae.eval(), {name: value for name, value in tensors.items() if not name.startswith("w/")}


def files() -> list:
    return [path for path in golden("cogvideox_vae_*.safetensors") if ".sat_weights" not in path.name]


def cases(tensors: dict, pattern: str) -> list:
    """(name, clip length, chunk or None) of the tensors whose names match."""
    found = [(name, re.fullmatch(pattern, name)) for name in tensors]
    return [(name, int(m[1]), int(m[2]) if m[2] else None) for name, m in found if m]


@pytest.fixture(scope="module", params=files(), ids=lambda p: p.stem)
def reference(request):
    return vae_of(request.param)


@torch.no_grad()
def test_encode(reference):
    vae, g = reference
    found = cases(g, r"enc/T(\d+)\.moments_(?:full|chunk(\d+))")
    assert {chunk for _, _, chunk in found} >= {None, 8}
    for name, frames, chunk in found:
        moments = vae.moments(rearrange(g["in/video"][:, :, :frames], FRAMES_FIRST), chunk)
        mean, logvar = rearrange(g[name], FRAMES_FIRST).chunk(2, dim=2)
        near(moments[0], mean)
        near(moments[1], logvar.clamp(-30, 20))
        if chunk == 8:
            near(vae.encode(rearrange(g["in/video"][:, :, :frames], FRAMES_FIRST)), mean * vae.scale)


@torch.no_grad()
def test_decode(reference):
    vae, g = reference
    found = cases(g, r"dec/L(\d+)\.(?:full|chunk(\d+))")
    assert {chunk for _, _, chunk in found} >= {None, 2}
    for name, latents, chunk in found:
        latent = rearrange(g["in/latents"][:, :, :latents], FRAMES_FIRST) * vae.scale
        near(vae.decode(latent, chunk), rearrange(g[name], FRAMES_FIRST))
        if chunk == 2:
            near(vae.decode(latent), rearrange(g[name], FRAMES_FIRST))


@torch.no_grad()
def test_inside(reference):
    vae, g = reference
    names = {name: re.fullmatch(r"mid/(enc|dec)(\d+)\.(down|up|midblock)(\d*)", name) for name in g}
    for name, (part, length, kind, i) in ((name, m.groups()) for name, m in names.items() if m):
        net = vae.encoder if part == "enc" else vae.decoder
        block = net.mid_block if kind == "midblock" else getattr(net, f"{kind}_blocks")[int(i)]
        seen = []
        last = list(block.children())[-1][-1]  # a block's resampling is its last layer
        hook = last.register_forward_hook(lambda _, x, out: seen.append(out[0]))
        if part == "enc":
            vae.moments(rearrange(g["in/video"][:, :, :int(length)], FRAMES_FIRST), chunk=None)
        else:
            latent = rearrange(g["in/latents"][:, :, :int(length)], FRAMES_FIRST)
            vae.decode(latent * vae.scale, chunk=None)
        hook.remove()
        near(seen[0], g[name])


@torch.no_grad()
def test_latent_in_the_denoisers_units(reference):
    vae, g = reference
    frames = vae.time_factor * (g["post/sample_from"].shape[2] - 1) + 1
    video, noise = (rearrange(x, FRAMES_FIRST) for x in (g["in/video"][:, :, :frames], g["post/noise"]))
    for model, scale in {"2b": 1.15258426, "5b": 0.7}.items():
        twin = copy(vae)
        twin.scale = scale
        near(twin.encode(video, noise), g[f"post/scaled_{model}_BTCHW"])
        near(twin.encode(video), rearrange(g["post/sample_from"], FRAMES_FIRST).chunk(2, dim=2)[0] * scale)


# ---- names ------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", golden("cogvideox_[0-9]b.keys.json"), ids=lambda p: p.stem)
def test_manifest(path):
    entry = json.loads(path.read_text())["diffusers"]["vae"]
    shapes = {name: tuple(shape) for name, shape in entry["keys"].items()}
    config = config_from_shapes(shapes)
    assert config == dict(ch=(128, 256, 256, 512), num_res_blocks=3, z_channels=16)
    with torch.device("meta"):
        vae = CogVideoXVAE(**config, scale=1.0)
    assert shapes_of(vae.state_dict()) == shapes
    assert (vae.factor, vae.time_factor) == (8, 4)


# ---- time --------------------------------------------------------------------------------------------------

def test_published_chunks():
    assert split(49, 8) == [9, 8, 8, 8, 8, 8] and split(13, 2) == [3, 2, 2, 2, 2, 2]
    assert split(5, 8) == [5] and split(13, 8) == [13] and split(1, 2) == [1] and split(4, 2) == [2, 2]


@pytest.fixture
def uncoupled():
    """A VAE without statistics: nothing but its convolutions couples the frames."""
    vae = CogVideoXVAE(**TINY).eval()
    for module in list(vae.modules()):
        for name, child in list(module.named_children()):
            if isinstance(child, nn.GroupNorm):
                setattr(module, name, nn.Identity())
    return vae


@torch.no_grad()
def test_chunks_lose_nothing_but_statistics(uncoupled):
    video = torch.randn(2, 17, 3, 8, 12)
    whole = uncoupled.encode(video, chunk=None)
    assert whole.shape == (2, 5, 3, 2, 3) and whole.std() > 0.01
    for chunk in (4, 8, 16):  # 1e-5: a convolution of other sizes rounds otherwise, by 1.4e-6
        near(uncoupled.encode(video, chunk=chunk), whole, 1e-5)
    latent = torch.randn(2, 5, 3, 2, 3)
    whole = uncoupled.decode(latent, chunk=None)
    assert whole.shape == (2, 17, 3, 8, 12) and whole.std() > 0.01
    for chunk in (1, 2, 3, 5):
        near(uncoupled.decode(latent, chunk), whole, 1e-5)  # float32 rounding of values up to 4: 1.5e-6
    # The past ignores the future.
    near(uncoupled.encode(video[:, :9]), uncoupled.encode(video, chunk=None)[:, :3], 1e-5)
    near(uncoupled.decode(latent[:, :3]), whole[:, :9], 1e-5)


@torch.no_grad()
def test_an_even_number_of_latents_has_no_lone_first_frame():
    vae, latent = CogVideoXVAE(**TINY).eval(), torch.randn(1, 4, 3, 2, 3)
    for chunk in (None, 1, 2, 3):
        counts = [vae.decode(latent[:, :n], chunk).shape[1] for n in (1, 2, 3, 4)]
        assert counts == [1, 8, 9, 16]


@torch.no_grad()
@pytest.mark.parametrize("time_levels, frames, latents", [(1, 5, 3), (2, 9, 3), (0, 3, 3)])
def test_fewer_levels_in_time(time_levels, frames, latents):
    vae = CogVideoXVAE(**TINY, time_levels=time_levels).eval()
    assert (vae.factor, vae.time_factor) == (4, 2 ** time_levels)
    found = config_from_shapes(shapes_of(vae.state_dict()))
    assert found == {name: TINY[name] for name in ("ch", "num_res_blocks", "z_channels")}
    latent = vae.encode(torch.randn(1, frames, 3, 8, 8))
    assert latent.shape == (1, latents, 3, 2, 2)
    assert vae.decode(latent).shape == (1, frames, 3, 8, 8)


def test_gradient_reaches_the_latent_through_every_chunk():
    vae = CogVideoXVAE(**TINY).double()
    latent, probe = torch.randn(1, 5, 3, 2, 3, dtype=torch.double), torch.randn(1, 17, 3, 8, 12).double()
    grads = []
    for checkpoint in (False, True):
        leaf = latent.clone().requires_grad_()
        loss = (vae.decode(leaf, checkpoint=checkpoint) * probe).sum()
        grads.append(torch.autograd.grad(loss, [leaf, vae.decoder.conv_in.conv.weight]))
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)  # the same operations in the same order
    step = 1e-5 * torch.randn_like(latent)
    with torch.no_grad():
        change = ((vae.decode(latent + step) - vae.decode(latent - step)) * probe).sum()
    # Central differences: the relative error is of the order of the step squared, 1e-10.
    torch.testing.assert_close(2 * (grads[0][0] * step).sum(), change, rtol=1e-6, atol=0)
    assert grads[0][0].abs().amin(dim=(0, 2, 3, 4)).min() > 0


# ---- dtypes, errors ----------------------------------------------------------------------------------------

@torch.no_grad()
def test_half_precision():
    vae = CogVideoXVAE(**TINY).bfloat16()
    latent = vae.encode(torch.randn(1, 5, 3, 8, 8))
    assert latent.dtype == torch.bfloat16 and vae.decode(latent.float()).dtype == torch.bfloat16


def test_logvar_is_clamped():
    vae = CogVideoXVAE(**TINY)
    for value, clamped in ((1e3, 20.0), (-1e3, -30.0)):
        nn.init.constant_(vae.encoder.conv_out.conv.bias, value)
        mean, logvar = vae.moments(torch.zeros(1, 1, 3, 4, 4))
        assert (logvar == clamped).all() and (mean.abs() > 100).all()


def test_errors():
    vae = CogVideoXVAE(**TINY)
    with pytest.raises(ValueError, match=r"6 frames; expected 4k\+1.*8k\+1"):
        vae.encode(torch.zeros(1, 6, 3, 8, 8))
    with pytest.raises(ValueError, match="multiple of 4"):
        vae.encode(torch.zeros(1, 5, 3, 8, 6))
    with pytest.raises(ValueError, match="chunk 6 is not a multiple of 4 frames"):
        vae.encode(torch.zeros(1, 9, 3, 8, 8), chunk=6)
    with pytest.raises(ValueError, match="down_blocks.0.resnets.0.*found decoder.conv_in.weight"):
        config_from_shapes({"decoder.conv_in.weight": (512, 16, 3, 3)})


# ---- ranks -------------------------------------------------------------------------------------------------

@pytest.mark.parametrize("ranks", [2, 3])
def test_ranks(ranks):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks),
               __file__]
    done = subprocess.run(command, env=os.environ | {"OMP_NUM_THREADS": "1"}, text=True,
                          stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    assert done.returncode == 0 and done.stdout.count("all equal") == ranks, done.stdout


@torch.no_grad()
def ranks_agree():
    dist.init_process_group("gloo", timeout=timedelta(seconds=60))  # a rank that waits in vain fails
    everyone, size = dist.group.WORLD, dist.get_world_size()
    for path in files():
        vae, g = vae_of(path)
        for name, latents, chunk in cases(g, r"dec/L(\d+)\.(?:full|chunk(\d+))"):
            latent = rearrange(g["in/latents"][:, :, :latents], FRAMES_FIRST) * vae.scale
            video = vae.decode(latent, chunk, group=everyone)
            near(video, rearrange(g[name], FRAMES_FIRST))
            near(video, vae.decode(latent, chunk), 5e-5)
    torch.manual_seed(0)
    vae = CogVideoXVAE(**TINY).eval()
    latent = torch.randn(2, 9, 3, 2, 3)  # 4 chunks: a second round on 2 ranks, and on 3 with idle ones
    for kind in (dict(), dict(chunk=1), dict(chunk=None)):
        for latents in (1, 2, 9):
            clip = latent[:, :latents]
            near(vae.decode(clip, group=everyone, **kind), vae.decode(clip, **kind), 5e-5)
    last = dist.new_group([size - 2, size - 1])  # its ranks are not those of the world
    if dist.get_rank() >= size - 2:
        near(vae.decode(latent, group=last), vae.decode(latent), 5e-5)
        near(vae.decode(latent, chunk=None, group=last), vae.decode(latent, chunk=None), 5e-5)
    vae.bfloat16()
    assert vae.decode(latent, group=everyone).dtype == torch.bfloat16
    with torch.enable_grad(), pytest.raises(ValueError, match="no gradient"):
        vae.decode(latent, group=everyone)
    print("all equal", flush=True)
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    ranks_agree()
