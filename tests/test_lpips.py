"""LPIPS and diversity: equal to the originals on random weights; every published layout of files."""
import hashlib
import zlib

import numpy as np
import pytest
import torch
from conftest import golden, read_golden
from PIL import Image

from models.checkpoint import InputError, save_safetensors
from models.eval.lpips import GROUPS, LPIPS, diversity, load_lpips, resized

TOLERANCE = 1e-4  # as for every network in float32; distances in another range are 1e-2 away


@pytest.fixture(scope="module", params=golden("lpips_small*.safetensors"), ids=lambda path: path.stem)
def case(request):
    """(tensors, metadata, images (n 3 H W) in [0, 1], first and second of each pair)."""
    tensors, meta = read_golden(request.param)
    images = tensors["in.images"].permute(0, 3, 1, 2).float() / 255
    first, second = (list(side) for side in zip(*meta["golden"]["pairs"]))
    return tensors, meta["golden"], images, first, second


def weights(tensors: dict, prefix: str) -> dict:
    return {name.removeprefix(prefix): t for name, t in tensors.items() if name.startswith(prefix)}


def build(net: str, own: dict) -> LPIPS:
    shapes = {name: t.shape for name, t in own.items()}
    lpips = LPIPS(net.removesuffix("-avgpool"), shapes, net.endswith("-avgpool"))
    lpips.load_state_dict(own)
    return lpips.requires_grad_(False)


def full_size(about: dict, net: str) -> dict:
    """Weights of full width as the metadata's recipe draws them."""
    widths = dict(alex=[64, 192, 384, 256, 256], vgg=[64, 64, 128, 128, 256, 256, 256, *[512] * 6])[net]
    convolutions = [i for group in GROUPS[net][0] for i, _, _ in group]
    sizes = dict(alex=[11, 5, 3, 3, 3], vgg=[3] * 13)[net]
    shapes = {}
    for i, inputs, width, size in zip(convolutions, [3, *widths], widths, sizes):
        shapes |= {f"features.{i}.weight": (width, inputs, size, size), f"features.{i}.bias": (width,)}
    for k, group in enumerate(GROUPS[net][0]):
        shapes[f"lin{k}.model.1.weight"] = (1, widths[convolutions.index(group[-1][0])], 1, 1)
    drawn, sha256 = {}, hashlib.sha256()
    for name in sorted(shapes):
        key, shape = f"{net}_full.{name}", shapes[name]
        z = np.random.RandomState(zlib.crc32(f"{about['seed']}:{key}".encode())).standard_normal(shape)
        z = abs(z) * 2 / shape[1] if name.startswith("lin") else 0.1 * z if len(shape) == 1 else \
            z * np.sqrt(2 / np.prod(shape[1:]))
        drawn[name] = torch.from_numpy(z.astype(np.float32))
        sha256.update(key.encode() + drawn[name].numpy().tobytes())
    assert sha256.hexdigest() == about["weights_sha256"][f"{net}_full."]
    return drawn


@pytest.mark.parametrize("net", ["alex", "vgg"])
@pytest.mark.parametrize("width", ["narrow", "full"])
def test_equals_the_original(case, net, width):
    tensors, about, images, first, second = case
    own = weights(tensors, f"{net}.") if width == "narrow" else full_size(about, net)
    expected = weights(tensors, f"out.{net}." if width == "narrow" else f"out.{net}_full.")
    lpips = build(net, own)
    maps = lpips.taps(images)
    half = (images + 1) / 2  # what the lpips package, which takes [-1, 1], makes of pictures in [0, 1]
    for found, name in ((lpips.compare([x[first] for x in maps], [x[second] for x in maps]), "per_layer"),
                        (lpips(images[first], images[second]), "m1p1"),
                        (lpips(half[first], half[second]), "raw01_unnormalised")):
        torch.testing.assert_close(found, expected[name], atol=TOLERANCE, rtol=0)
    assert (expected["m1p1"] - expected["raw01_unnormalised"]).abs().max() > 20 * TOLERANCE


def test_piq_is_vgg_and_its_average_pooling_another_network(case):
    tensors, _, images, first, second = case
    own = weights(tensors, "vgg.")
    for net, name in (("vgg", "piq"), ("vgg-avgpool", "piq_avgpool")):
        scores = build(net, own)(images[first], images[second])
        torch.testing.assert_close(scores, tensors[f"out.vgg.{name}"], atol=TOLERANCE, rtol=0)
    assert (tensors["out.vgg.piq"] - tensors["out.vgg.piq_avgpool"]).abs().max() > 20 * TOLERANCE


@pytest.mark.parametrize("net, name", [("alex", "normalised"), ("vgg", "normalised"), ("vgg", "piq"),
                                       ("vgg-avgpool", "piq_avgpool")])
def test_diversity_is_dmd2s(case, net, name):
    tensors = case[0]
    pictures = [Image.fromarray(pixels.numpy()) for pixels in tensors["in.images"]]
    trunk = net.removesuffix("-avgpool")
    lpips = build(net, weights(tensors, f"{trunk}."))
    expected = tensors[f"out.{trunk}.dmd2_diversity_{name}"].item()
    assert diversity(lpips, pictures, batch=3) == pytest.approx(expected, abs=TOLERANCE)


def test_equal_pictures_are_0_apart_and_pairs_have_no_order(case):
    tensors, _, images, *_ = case
    lpips = build("vgg", weights(tensors, "vgg."))
    assert (lpips(images, images) == 0).all()
    assert torch.equal(lpips(images[:1], images[1:2]), lpips(images[1:2], images[:1]))
    pictures = [Image.fromarray(tensors["in.images"][0].numpy())] * 3
    assert diversity(lpips, pictures) == 0
    with pytest.raises(ValueError, match="diversity needs two"):
        diversity(lpips, pictures[:1])


def test_pictures_become_rgb_squares():
    picture = Image.new("RGBA", (30, 10), (255, 0, 51, 128))
    x = resized(picture)
    assert x.shape == (3, 512, 512) and x.flatten(1).mean(1).tolist() == pytest.approx([1, 0, 0.2])


# ---- files -------------------------------------------------------------------------------------------------

def in_layout(folder, own: dict, layout: str) -> list:
    """The files a user has: torchvision's with its classifier and lpips' own, or all in one."""
    trunk = {name: t for name, t in own.items() if name.startswith("features.")}
    lin = {name: t for name, t in own.items() if name.startswith("lin")}
    if layout == "two files":
        torch.save(trunk | {"classifier.1.weight": torch.zeros(4, 4)}, folder / "trunk.pth")
        torch.save(lin, folder / "lin.pth")
        return [folder / "trunk.pth", folder / "lin.pth"]
    if layout == "one file":
        save_safetensors(folder / "all.safetensors", own)
        return [folder / "all.safetensors"]
    # The lpips package's state_dict: each tap's convolutions in a slice of their own, each lin layer twice.
    slices = {i: k for k, group in enumerate(GROUPS["vgg"][0]) for i, _, _ in group}
    whole = {}
    for name, t in trunk.items():
        _, i, kind = name.split(".")
        whole[f"net.slice{slices[int(i)] + 1}.{i}.{kind}"] = t
    whole |= lin | {f"lins.{name[3]}{name[4:]}": t for name, t in lin.items()}
    torch.save(whole | {"scaling_layer.shift": torch.zeros(1, 3, 1, 1)}, folder / "whole.pth")
    return [folder / "whole.pth"]


@pytest.mark.parametrize("layout", ["two files", "one file", "the package's state_dict"])
def test_published_layouts(case, tmp_path, layout):
    own = weights(case[0], "vgg.")
    lpips = load_lpips("vgg", in_layout(tmp_path, own, layout))
    loaded = lpips.state_dict()
    assert loaded.keys() == own.keys() and all(torch.equal(t, own[name]) for name, t in loaded.items())


def test_what_is_refused(case, tmp_path):
    with pytest.raises(InputError, match=r"alexnet-owt-7be5be79\.pth \(https://.*alex\.pth .*--lpips-ckpt"):
        load_lpips("alex")
    trunk, lin = in_layout(tmp_path, weights(case[0], "vgg."), "two files")
    with pytest.raises(InputError, match=r"5 tensors of vgg's LPIPS are missing \(lin0.*expected vgg16"):
        load_lpips("vgg", [trunk])
    with pytest.raises(InputError, match=r"tensors of alex's LPIPS are missing \(features\.3\.weight"):
        load_lpips("alex", [trunk, lin])
    torch.save({f"lin{k}.model.1.weight": torch.ones(1, 7, 1, 1) for k in range(5)}, lin)
    with pytest.raises(InputError, match=r"5 tensors have another shape \(lin0\.model\.1\.weight is \(1, 7,"):
        load_lpips("vgg", [trunk, lin])
