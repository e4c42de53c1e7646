"""FVD: the Frechet distance, I3D and its three ways to resize, TorchScript files."""
import hashlib
import json
import zlib

import numpy as np
import pytest
import torch
from conftest import golden, read_golden
from torch import Tensor

from models.checkpoint import InputError, save_safetensors
from models.eval import fvd
from models.eval.fvd import I3D, frechet_distance, load_i3d, pixels

# ---- the distance ------------------------------------------------------------------------------------------

DISTANCES = [(path, group, name) for path in golden("fvd_small*.json")
             for group in ("small", "big") for name in json.loads(path.read_text())[group]]


def features(seed: int, name: str, n: int, d: int, shift: float, scale: float) -> Tensor:
    """Features as the file's recipe draws them."""
    z, mix = (np.random.RandomState(zlib.crc32(f"{seed}:{key}".encode())).standard_normal(shape)
              for key, shape in ((name, (n, d)), (f"{name}:mix", (d, d))))
    x = z @ (mix / np.sqrt(d)) * scale + shift * np.cos(np.arange(d))
    return torch.from_numpy(x.astype(np.float32))


@pytest.mark.parametrize("path, group, name", DISTANCES, ids=[name for *_, name in DISTANCES])
def test_distance(path, group, name):
    data = json.loads(path.read_text())
    case = data[group][name]
    if group == "small":
        a, b = torch.tensor(case["gen"]), torch.tensor(case["real"])
    else:
        a, b = (features(data["seed"], f"{name}.{side}", **case["recipe"][side]) for side in ("gen", "real"))
        assert a.double().sum().item() == pytest.approx(case["sum_gen"], rel=1e-9)
    assert frechet_distance(a, b) == pytest.approx(case["unbiased_cov_exact"], rel=1e-9)
    assert frechet_distance(a, b, biased=True) == pytest.approx(case["biased_cov_exact"], rel=1e-9)
    assert frechet_distance(b, a) == pytest.approx(case["unbiased_cov_exact"], rel=1e-9)


def test_fewer_samples_than_dimensions():
    torch.manual_seed(1)
    a, b = torch.randn(9, 40), torch.randn(7, 40) + 1
    assert 0 < frechet_distance(a, b) < 1000
    # A set against itself, and against itself moved by 1 along every axis.
    assert frechet_distance(a, a) < 1e-10 and frechet_distance(a, a + 1) == pytest.approx(40, rel=1e-6)
    with pytest.raises(InputError, match="1 and 7 videos; expected at least 2"):
        frechet_distance(a[:1], b)


def test_in_one_dimension_by_hand():
    a, b = torch.tensor([[0.0], [2.0]]), torch.tensor([[5.0], [9.0]])  # means 1, 7; variances 2, 8 or 1, 4
    assert frechet_distance(a, b) == pytest.approx(36 + (8 ** 0.5 - 2 ** 0.5) ** 2)
    assert frechet_distance(a, b, biased=True) == pytest.approx(36 + (2 - 1) ** 2)


# ---- I3D ---------------------------------------------------------------------------------------------------

@pytest.fixture(scope="module", params=golden("i3d_recipe*.safetensors"), ids=lambda path: path.stem)
def case(request, tmp_path_factory):
    """(tensors, file of weights)."""
    tensors, meta = read_golden(request.param)
    about, weights, sha256 = meta["golden"], {}, hashlib.sha256()
    assert {name: list(t.shape) for name, t in I3D().state_dict().items()} == about["keys"]
    for name, shape in sorted(about["keys"].items()):
        if name.endswith("num_batches_tracked"):
            weights[name] = torch.tensor(0)
            continue
        z = np.random.RandomState(zlib.crc32(f"{about['seed']}:{name}".encode())).standard_normal(shape)
        if len(shape) == 5:
            z = z * np.sqrt(2 / np.prod(shape[1:]))
        else:
            z = 1 + 0.2 * z if name.endswith("bn.weight") else \
                np.exp(0.2 * z) if name.endswith("running_var") else 0.1 * z
        weights[name] = torch.from_numpy(z.astype(np.float32))
        sha256.update(name.encode() + weights[name].numpy().tobytes())
    assert sha256.hexdigest() == about["weights_sha256"]
    path = tmp_path_factory.mktemp("i3d") / "i3d_pretrained_400.pt"
    torch.save(weights, path)
    return tensors, path


def videos(tensors: dict) -> dict[str, Tensor]:
    """Name -> uint8 (1 F 3 H W)."""
    return {name.removeprefix("in.video."): t.permute(0, 3, 1, 2)[None]
            for name, t in tensors.items() if name.startswith("in.video.")}


@pytest.mark.parametrize("resize, codes", [("crop", ("styleganv_common_metrics", "videogpt_common_metrics")),
                                           ("stretch", ("cdfvd",))])
def test_i3d_and_its_preprocessing(case, resize, codes):
    tensors, path = case
    logits = load_i3d(path, resize)
    for name, video in videos(tensors).items():
        found = logits(video)
        for code in codes:
            torch.testing.assert_close(found[0], tensors[f"out.logits.{code}.{name}"], atol=2e-4, rtol=0)


def test_pixels():
    video = torch.randint(0, 256, (2, 3, 3, 30, 40), dtype=torch.uint8)
    for resize in ("crop", "stretch"):
        x = pixels(video, resize)
        assert x.shape == (2, 3, 3, 224, 224) and x.abs().max() <= 1  # B C F
        one = pixels(video[1:, 2:], resize)
        assert torch.equal(x[1:, :, 2:], one)  # videos and frames do not mix
    # A red left half stays the left half of a square; of 40 x 20, a crop shows the middle 20.
    square = torch.zeros(1, 1, 3, 20, 40, dtype=torch.uint8)
    square[..., 0, :, :20] = 255
    for resize, red in (("crop", 0.5), ("stretch", 0.5)):
        assert (pixels(square, resize)[0, 0, 0] > 0).float().mean().item() == pytest.approx(red, abs=0.01)
    square[..., 0, :, 10:20] = 0
    assert (pixels(square, "crop")[0, 0, 0] > 0).float().mean() == 0
    assert (pixels(square, "stretch")[0, 0, 0] > 0).float().mean().item() == pytest.approx(0.25, abs=0.01)


def test_batches_equal_single_videos(case):
    tensors, path = case
    logits = load_i3d(path)
    video = next(iter(videos(tensors).values()))[:, :10]
    both = logits(torch.cat([video, video.flip(1)]))
    torch.testing.assert_close(both[1:], logits(video.flip(1)), atol=1e-4, rtol=0)
    assert both.shape == (2, 400) and (both[0] - both[1]).abs().max() > 1e-3  # time matters
    with pytest.raises(InputError, match="9 frames; I3D needs at least 10"):
        logits(video[:, :9])


class Program(torch.nn.Module):
    """With the published program's arguments."""

    def forward(self, x: Tensor, rescale: bool = False, resize: bool = False, return_features: bool = False):
        size = x.amax((1, 2, 3, 4)) * (100.0 if rescale else 1.0)
        return torch.stack([size, torch.full_like(size, float(x.shape[4])),
                            torch.full_like(size, float(resize) + 2 * float(return_features))], dim=1)


@pytest.mark.filterwarnings("ignore::DeprecationWarning:torch")
def test_torchscript(tmp_path, monkeypatch):
    path = tmp_path / "i3d_torchscript.pt"
    torch.jit.script(Program()).save(path)
    with monkeypatch.context() as patch, pytest.raises(InputError, match="would be run, and not the published one"):
        patch.setattr(torch.jit, "load", None)  # calling it would raise TypeError
        load_i3d(path)
    monkeypatch.setattr(fvd, "PROGRAM", hashlib.sha256(path.read_bytes()).hexdigest())
    video = torch.full((1, 10, 3, 32, 48), 255, dtype=torch.uint8)
    # Our own pixels are in [-1, 1], 224 wide; StyleGAN-V's program gets 0..255 of the video's own size.
    assert load_i3d(path)(video).tolist() == [[1, 224, 2]]
    assert load_i3d(path, "inside")(video).tolist() == [[25500, 48, 3]]


def test_what_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"i3d_torchscript\.pt \(https://.*--i3d-ckpt"):
        load_i3d(None)
    with pytest.raises(InputError, match="no such file"):
        load_i3d(tmp_path / "absent.pt")
    save_safetensors(tmp_path / "x.safetensors", {"x": torch.zeros(1)})
    with pytest.raises(InputError, match="expected tensors are missing"):
        load_i3d(tmp_path / "x.safetensors")
    with pytest.raises(InputError, match="plain weights do not resize"):
        load_i3d(tmp_path / "x.safetensors", "inside")
