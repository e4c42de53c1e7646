"""Files in diffusers' layout under the original names: every name of the published files, every row, the same outputs.

`diffusers_layout.safetensors` has inputs and outputs of diffusers 0.42.1's own networks, on small weights that
conftest.from_recipe draws again.
"""
import json

import pytest
import torch
from conftest import from_recipe, golden, read_golden
from test_sat import in_memory

from models import mmdit, sdxl_unet, vae
from models.checkpoint import Tensors, load
from models.diffusers_names import MMDIT, denoiser_from_diffusers, vae_from_diffusers

FILE, = golden("diffusers_layout.safetensors")
CASES, ABOUT = read_golden(FILE)


def of(name: str) -> Tensors:
    """A network of the golden file in diffusers' layout."""
    return in_memory(from_recipe(ABOUT["about"][name]))[0]


def loaded(net, tensors):
    load(net, tensors)
    return net.eval()


def deviation(value, expected) -> float:
    return ((value - expected).abs().max() / expected.abs().max()).item()


@pytest.mark.parametrize("name, fixed", [("sdxl", dict(head_dim=32)), ("sd15", dict(heads=4))])
def test_unet(name, fixed):
    tensors = denoiser_from_diffusers(of(name))
    net = loaded(sdxl_unet.UNet(**sdxl_unet.config_from_shapes(tensors.shapes), groups=8, **fixed), tensors)
    x, context = CASES[f"{name}.in.x"], CASES[f"{name}.in.context"]
    with torch.no_grad():  # t = i/1000 is the index i - 1
        eps = net(x, torch.tensor([0.5, 0.1]), (context, CASES.get(f"{name}.in.vector")))
    assert deviation(eps, CASES[f"{name}.out"]) < 1e-5  # float32 of other kernels: 2e-6


@pytest.mark.parametrize("name", ["sd3", "sd35"])
def test_mmdit(name):
    tensors = denoiser_from_diffusers(of(name))
    net = loaded(mmdit.MMDiT(**mmdit.config_from_shapes(tensors.shapes)), tensors)
    x, context, pooled = (CASES[f"{name}.in.{key}"] for key in ("x", "context", "vector"))
    with torch.no_grad():
        v = net(x, torch.tensor([0.5, 0.1]), (context, pooled))
    assert deviation(v, CASES[f"{name}.out"]) < 1e-5


@pytest.mark.parametrize("name", ["sdxl_vae", "sd3_vae"])
def test_vae(name):
    tensors = vae_from_diffusers(of(name))
    config = vae.config_from_shapes(tensors.shapes)
    assert config["quant"] == (name == "sdxl_vae")
    net = loaded(vae.AutoencoderKL(**config, shift=0.0, scale=1.0, groups=8), tensors)
    with torch.no_grad():
        assert deviation(net.moments(CASES[f"{name}.in.image"])[0], CASES[f"{name}.mean"]) < 1e-5
        assert deviation(net.decode(CASES[f"{name}.in.latent"]), CASES[f"{name}.image"]) < 1e-5


def test_vae_with_the_older_names_of_its_attention():
    new, old = from_recipe(ABOUT["about"]["sdxl_vae"]), {}
    for name, value in new.items():
        for a, b in (("to_q", "query"), ("to_k", "key"), ("to_v", "value"), ("to_out.0", "proj_attn")):
            name = name.replace(f"attentions.0.{a}", f"attentions.0.{b}")
        old[name] = value
    assert new.keys() != old.keys()
    a, b = (vae_from_diffusers(in_memory(weights)[0]) for weights in (new, old))
    assert a.shapes == b.shapes and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("name", ["sdxl", "sd3", "sd35", "sdxl_vae"])
def test_rows_are_those_of_the_whole_tensor_and_nothing_else_is_read(name):
    stored, reads = in_memory(from_recipe(ABOUT["about"][name]))
    tensors = (vae_from_diffusers if "vae" in name else denoiser_from_diffusers)(stored)
    for key, shape in tensors.shapes.items():
        whole, (n, half) = tensors[key], (shape[0], shape[0] // 2)
        assert tuple(whole.shape) == shape
        for start, stop in ((0, n), (0, half), (half, n), (half, half + 1), (n, n)):
            reads.clear()
            assert torch.equal(tensors.rows(key, start, stop), whole[start:stop])
            assert sum(len(range(*rows.indices(stored.shapes[source][0]))) for source, rows in reads) == stop - start


def test_what_no_rule_knows_stays():
    for name, reader in (("sdxl", denoiser_from_diffusers), ("sd3", denoiser_from_diffusers), ("sdxl_vae", vae_from_diffusers)):
        weights = from_recipe(ABOUT["about"][name]) | {"adapter.scale": torch.zeros(()), "router.weight": torch.zeros(2)}
        assert {"adapter.scale", "router.weight"} <= set(reader(in_memory(weights)[0]))
    original = in_memory({"input_blocks.0.0.weight": torch.zeros(1)})[0]
    assert denoiser_from_diffusers(original) is original and vae_from_diffusers(original) is original


# ---- full size -----------------------------------------------------------------------------------------------------

def published(file: str, prefix: str) -> dict[str, tuple]:
    """Name -> shape of a part of an original single file."""
    tensors = json.loads(golden(f"{file}.keys.json")[0].read_text())["tensors"]
    shapes = {name.removeprefix(prefix): entry for name, entry in tensors.items() if name.startswith(prefix)}
    return {name: tuple(entry[0] if entry and isinstance(entry[0], list) else entry) for name, entry in shapes.items()}


@pytest.mark.parametrize("file", ["sd3_medium", "sd3.5_medium", "sd3.5_large"])
def test_full_size_mmdit_comes_back_from_its_names_in_diffusers(file):
    """Through `mmdit_to_diffusers`, which test_lora.py holds against diffusers' names."""
    expected, shapes = published(file, "model.diffusion_model."), {}
    with torch.device("meta"):
        net = mmdit.MMDiT(**mmdit.config_from_shapes(expected))
    for name, shape in expected.items():
        module, _, kind = name.rpartition(".") if "." in name else (name, "", "")
        for theirs, rows in MMDIT.to_diffusers(module, shape[0], net).items():
            shapes[f"{theirs}.{kind}".rstrip(".")] = sum(stop - start for start, stop in rows), *shape[1:]
    assert denoiser_from_diffusers(Tensors(FILE, shapes, read=None)).shapes == expected


@pytest.mark.parametrize("part, file, prefix", [
    ("sdxl", "sdxl_base_1.0", "model.diffusion_model."), ("sd15", "sd15", "model.diffusion_model."),
    ("vae", "sdxl_base_1.0", "first_stage_model."), ("vae", "sd15", "first_stage_model.")])
def test_full_size_unets_and_vae_have_the_original_names_and_shapes(part, file, prefix):
    shapes = json.loads(golden("diffusers_layout.keys.json")[0].read_text())[part]
    tensors = Tensors(FILE, {name: tuple(shape) for name, shape in shapes.items()}, read=None)
    reader = vae_from_diffusers if part == "vae" else denoiser_from_diffusers
    assert reader(tensors).shapes == published(file, prefix)
