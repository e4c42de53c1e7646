import json
import re
from pathlib import Path

import pytest
import torch
from conftest import GOLDEN, from_recipe, golden, near, read_golden

from models.vae import AutoencoderKL, FramesVAE, config_from_shapes

# The references differ from their own float64 runs by less than 1.5e-5; a wrong padding or eps by over 1e-2.


def group(tensors: dict, prefix: str = "first_stage_model.") -> dict:
    return {name.removeprefix(prefix): value for name, value in tensors.items() if name.startswith(prefix)}


def build(weights: dict, groups: int, shift: float, scale: float) -> AutoencoderKL:
    config = config_from_shapes({name: tuple(value.shape) for name, value in weights.items()})
    vae = AutoencoderKL(**config, shift=shift, scale=scale, groups=groups)
    vae.load_state_dict(weights)
    return vae.eval()


def record(vae: AutoencoderKL) -> dict:
    """Dict that every later call of these layers writes its output to."""
    seen = {}
    middle = [f"{part}.mid.{layer}" for part in ("encoder", "decoder") for layer in ("attn_1", "block_2")]
    for name in ["quant_conv", *middle]:
        vae.get_submodule(name).register_forward_hook(lambda _, x, out, name=name: seen.update({name: out}))
    return seen


@pytest.fixture(params=golden("sd3_vae_*.safetensors"), ids=lambda p: p.stem)
def sd3(request):
    tensors, meta = read_golden(request.param)
    c = meta["config"]
    return build(group(tensors), c["norm_groups"], c["shift_factor"], c["scale_factor"]), tensors, c


@torch.no_grad()
def test_sd3_golden(sd3):
    vae, g, c = sd3
    seen = record(vae)
    mean, logvar = vae.moments(g["in.image"])
    near(seen["quant_conv"], g["out.moments"])
    near(seen["encoder.mid.attn_1"], g["out.enc_attn"])
    near(seen["encoder.mid.block_2"], g["out.enc_mid"])
    near(mean, g["out.mean"])
    near(logvar, g["out.logvar"])
    near(vae.encode(g["in.image"], g["in.eps"]), g["out.latent_in"])
    near(vae.encode(g["in.image"], g["in.eps"]) / vae.scale + vae.shift, g["out.sample"])
    near(vae.encode(g["in.image"]), (g["out.mean"] - c["shift_factor"]) * c["scale_factor"])
    vae.moments(g["in.flat_image"])  # a nearly constant image: the only place where GroupNorm's eps shows
    near(seen["quant_conv"], g["out.flat_moments"])
    near(vae.decode(g["in.latent"]), g["out.decoded"])
    near(seen["decoder.mid.block_2"], g["out.dec_mid"])


def test_sd3_config(sd3):
    vae, g, c = sd3
    config = config_from_shapes({name: tuple(value.shape) for name, value in group(g).items()})
    assert config == dict(ch=c["ch"], ch_mult=tuple(c["ch_mult"]), num_res_blocks=c["num_res_blocks"],
                          z_channels=c["z_channels"], quant=False)
    assert vae.factor == g["in.image"].shape[-1] // g["in.latent"].shape[-1]


def sd_weights(path) -> dict:
    g, meta = read_golden(path)
    return group(g if meta["golden"]["weights_stored"] else from_recipe(meta["golden"]))


# None for a file with weights or their recipe, else the file whose weights it uses at another scale.
SD = [(p, read_golden(p)[1]["golden"].get("weights_from")) for p in golden("sd_vae_*.safetensors")]


@torch.no_grad()
@pytest.mark.parametrize("path", [p for p, source in SD if not source], ids=lambda p: p.stem)
def test_sd_golden(path):
    g, meta = read_golden(path)
    about = meta["golden"]
    scale = float(re.search(r"in\.latent/([\d.]+)", about["semantics"]["out.decoded"])[1])
    vae = build(sd_weights(path), about["config"]["norm_groups"], 0.0, scale)
    seen = record(vae)
    mean, logvar = vae.moments(g["in.image"])
    near(seen["quant_conv"], g["out.moments"])
    near(seen["encoder.mid.attn_1"], g["aux.enc_mid_attn"])
    near(mean, g["out.mean"])
    near(logvar, g["out.logvar"])
    near(vae.encode(g["in.image"], g["in.noise"]), g["out.scaled_latent_sample"])
    near(vae.decode(g["in.latent"]), g["out.decoded"])
    near(seen["decoder.mid.attn_1"], g["aux.dec_mid_attn"])
    near(vae.decode(g["in.latent"] * vae.scale), g["out.decoded_unscaled"])


@torch.no_grad()
@pytest.mark.parametrize("path, source", [pair for pair in SD if pair[1]], ids=lambda p: Path(p).stem)
def test_sd15_scale(path, source):
    g, meta = read_golden(path)
    about = meta["golden"]
    vae = build(sd_weights(GOLDEN / source), about["config"]["norm_groups"], 0.0, about["scale_factor"])
    mean, logvar = vae.moments(g["in.image"])
    near(mean, g["out.mean"])
    near(logvar, g["out.logvar"])
    near(vae.encode(g["in.image"]), g["out.latent"])
    near(vae.encode(g["in.image"], g["in.noise"]), g["out.latent_sample"])
    near(vae.decode(g["in.latent"]), g["out.decoded"])
    near(vae.decode(g["out.latent"]), g["out.reconstruction"])


@pytest.mark.parametrize("path", [p for p in golden("*.keys.json") if "first_stage_model." in p.read_text()],
                         ids=lambda p: p.stem)
def test_manifest(path):
    tensors = json.loads(path.read_text())["tensors"]
    # The SDXL family's manifests store [shape, dtype], the others the shape.
    shapes = {name: tuple(s[0] if isinstance(s[0], list) else s) for name, s in group(tensors).items()}
    with torch.device("meta"):
        vae = AutoencoderKL(**config_from_shapes(shapes), shift=0.0, scale=1.0)
    assert {name: tuple(value.shape) for name, value in vae.state_dict().items()} == shapes


def test_two_levels_and_gradients():
    vae = AutoencoderKL(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, shift=0.1, scale=2.0)
    shapes = {name: tuple(value.shape) for name, value in vae.state_dict().items()}
    found = config_from_shapes(shapes)
    assert found == dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, quant=False)
    latent = vae.encode(torch.randn(2, 3, 8, 12))
    assert latent.shape == (2, 4, 4, 6) and vae.decode(latent).shape == (2, 3, 8, 12)
    grads = []
    for checkpoint in (False, True):
        leaf = latent.detach().requires_grad_()
        image = vae.decode(leaf, checkpoint=checkpoint)
        weights = [leaf, vae.decoder.mid.attn_1.q.weight]
        grads.append([image.detach(), *torch.autograd.grad(image.square().sum(), weights)])
    for plain, recomputed in zip(*grads):
        torch.testing.assert_close(plain, recomputed, atol=0, rtol=0)  # the same operations in the same order
    assert grads[0][1].abs().max() > 0


def test_frames_are_coded_one_by_one(monkeypatch):
    """As pictures are, however many at once; eps is each frame's own, and gradients reach every frame."""
    config = dict(ch=32, ch_mult=(1, 2), num_res_blocks=1, z_channels=4, shift=0.1, scale=2.0, quant=True)
    frames, plain = FramesVAE(**config), AutoencoderKL(**config)
    plain.load_state_dict(frames.state_dict())
    video, eps = torch.randn(2, 3, 3, 8, 12), torch.randn(2, 3, 4, 4, 6)
    latent, image = plain.encode(video.flatten(0, 1), eps.flatten(0, 1)), torch.randn(2, 3, 8, 12)
    decoded = plain.decode(latent).unflatten(0, (2, 3))
    latent = latent.unflatten(0, (2, 3))
    for at_once in (1, 4, 100):
        monkeypatch.setattr(FramesVAE, "AT_ONCE", at_once)
        near(frames.encode(video, eps), latent)
        near(frames.encode(image, eps[:, 0]), plain.encode(image, eps[:, 0]))
        leaf = latent.detach().requires_grad_()
        near(frames.decode(leaf), decoded)
        near(frames.decode(leaf[:, 1]), decoded[:, 1])
        grad, = torch.autograd.grad(frames.decode(leaf, checkpoint=True)[0, 2].square().sum(), leaf)
        assert torch.equal(grad.abs().amax((2, 3, 4)) > 0, torch.tensor([[False, False, True], [False] * 3]))
        sizes = []
        hook = frames.decoder.register_forward_hook(lambda _, x, __: sizes.append(len(x[0])))
        frames.decode(leaf)
        hook.remove()
        assert sizes == {1: [1] * 6, 4: [4, 2], 100: [6]}[at_once]


def test_logvar_is_clamped():
    vae = AutoencoderKL(ch=32, ch_mult=(1,), num_res_blocks=1, z_channels=1, shift=0.0, scale=1.0)
    for value, clamped in ((1e3, 20.0), (-1e3, -30.0)):
        torch.nn.init.constant_(vae.encoder.conv_out.bias, value)
        mean, logvar = vae.moments(torch.zeros(1, 3, 4, 4))
        assert (logvar == clamped).all() and (mean.abs() > 100).all()


def test_errors():
    vae = AutoencoderKL(ch=32, ch_mult=(1, 1), num_res_blocks=1, z_channels=4, shift=0.0, scale=1.0)
    with pytest.raises(ValueError, match="multiple of 2"):
        vae.encode(torch.zeros(1, 3, 8, 7))
    with pytest.raises(ValueError, match="encoder.down_blocks"):
        config_from_shapes({"encoder.down_blocks.0.resnets.0.norm1.weight": (32,)})
