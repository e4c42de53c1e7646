"""Captioned shapes: the data, the exact evaluator, the committed teacher, and resumable training."""
from pathlib import Path

import pytest
import torch

from models import tiny
from models.diffusion import generator_times, teacher_times
from models.text import load_tokenizers

FOLDER = Path(tiny.__file__).parent / "tiny"
CKPT = FOLDER / "tiny_sd3.safetensors"


# ---- data ---------------------------------------------------------------------------------------------------------

def test_a_scene_depends_on_seed_and_index_alone():
    whole = tiny.random_scenes(3, range(20))
    part = tiny.random_scenes(3, range(12, 15))
    for a, b in zip(whole, part):
        assert torch.equal(a[12:15], b)
    assert not torch.equal(whole.labels, tiny.random_scenes(4, range(20)).labels)


def test_attributes_are_uniform():
    labels = tiny.read(tiny.draw(tiny.random_scenes(0, range(4000))))
    for a, count in enumerate(tiny.COUNTS):
        share = labels[:, a].bincount(minlength=count) / 4000
        assert (share - 1 / count).abs().max() < 5 * (1 / count / 4000) ** 0.5  # five standard deviations


def test_captions_name_what_parse_reads():
    captions = tiny.captions()
    assert len(set(captions)) == len(captions) == 6 * 7 * 5 * 3 + 1 and captions[-1] == ""
    assert torch.equal(tiny.caption_index(tiny.parse(captions[:-1])), torch.arange(len(captions) - 1))
    assert "an orange ring on pink" in captions and "a small shape" in captions
    assert tiny.parse(["A large ring, orange, on a white background"]).tolist() == [[4, 1, 0, 1]]


def test_every_word_is_one_token():
    clip, t5 = load_tokenizers(FOLDER)
    for word in {word for text in tiny.captions() for word in text.split()}:
        assert len(clip.tokenize(word)) == len(t5.tokenize(word)) == 1, word
    longest = max(tiny.captions(), key=lambda text: len(text.split()))
    assert len(clip(longest).input_ids) == tiny.LENGTH  # nothing is cut


# ---- evaluator ----------------------------------------------------------------------------------------------------

def test_reads_clean_pictures_exactly():
    scenes = tiny.random_scenes(5, range(2000))
    assert torch.equal(tiny.read(tiny.draw(scenes))[:, :4], scenes.labels)
    assert not (scenes.centre == 16).any()  # no shape lies between two quadrants
    place = (scenes.centre[:, 0] > 16).long() + 2 * (scenes.centre[:, 1] > 16).long()
    assert torch.equal(tiny.read(tiny.draw(scenes))[:, 4], place)


def test_reads_through_slight_noise():
    scenes = tiny.random_scenes(6, range(500))
    images = tiny.draw(scenes)
    labels = tiny.read(images + 0.05 * torch.randn(images.shape))
    assert (labels[:, :4] == scenes.labels).all(1).float().mean() > 0.97


@pytest.mark.parametrize("spoil", ["two shapes", "blank", "noise", "blur"])
def test_what_is_no_single_shape_is_invalid(spoil):
    scenes = tiny.random_scenes(7, range(200))
    images = tiny.draw(scenes)
    if spoil == "two shapes":
        images = torch.cat([images[:, :, :, :16], images[:, :, :, :16].flip(3)], dim=3)
        images = images[(scenes.centre[:, 0] < 14) & (scenes.labels[:, 3] == 0)]
    elif spoil == "blank":
        images = images * 0 + 1
    elif spoil == "noise":
        images = torch.randn(images.shape)
    else:
        images = torch.nn.functional.avg_pool2d(images, 9, 1, 4, count_include_pad=False)
    assert (tiny.read(images) < 0).all(1).float().mean() > 0.9


def test_wrong_attributes_are_wrong():
    prompts = ["a small red circle on white"] * 4
    named = tiny.parse(prompts)
    for a, (attribute, values) in enumerate(list(tiny.ATTRIBUTES.items())[:4]):
        other = named.clone()
        other[:, a] = (other[:, a] + 1) % len(values)
        images = tiny.draw(tiny.random_scenes(0, range(4), other))
        assert tiny.evaluate(images, prompts)["accuracy"] == 0, attribute
        images[:2] = tiny.draw(tiny.random_scenes(0, range(2), named[:2]))
        assert tiny.evaluate(images, prompts)["accuracy"] == 0.5


def test_total_variation_by_hand():
    named = tiny.parse(["a small red circle on white"] * 4)  # only the place is free
    labels = torch.tensor([[0, 0, 0, 0, place] for place in (0, 1, 2, 3)])
    assert tiny.total_variation(labels, named) == 0
    labels[:, 4] = 2
    assert tiny.total_variation(labels, named) == 0.75  # one of four equal outcomes
    labels[2:] = -1
    assert tiny.total_variation(labels, named) == 0.75  # 0.5 * (|1/2 - 1/4| + 3 * 1/4 + 1/2 invalid)
    named = tiny.parse(["a red circle on white"] * 2)  # two distances: size 1/2, place 3/4
    assert tiny.total_variation(torch.tensor([[0, 0, 0, 1, 3]] * 2), named) == pytest.approx(0.625)


def test_total_variation_sees_collapse_and_floor():
    prompts = tiny.evaluation_prompts(512)
    one_each = tiny.reference(prompts[:16], seed=8).repeat(32, 1, 1, 1)
    collapsed = tiny.evaluate(one_each, prompts)
    data = tiny.evaluate(tiny.reference(prompts, seed=9), prompts)
    assert collapsed["accuracy"] == data["accuracy"] == 1
    assert collapsed["total_variation"] > 0.6 and data["total_variation"] < 0.2


def test_frechet():
    images = tiny.reference(tiny.evaluation_prompts(512), seed=9)
    f = tiny.features(images)
    assert f.shape == (512, 48) and f.dtype == torch.float64
    assert tiny.frechet(f, f) < 1e-6  # square roots of rounded eigenvalues
    shift = 0.5 * f.std(0)
    assert tiny.frechet(f + shift, f) == pytest.approx(0.25, rel=1e-3)  # a pure shift, per feature
    moved = 3 * f + shift  # every feature three times as wide: (3 - 1)^2, whatever the correlations
    expected = 4 + ((moved.mean(0) - f.mean(0)) / f.std(0)).square().mean().item()
    assert tiny.frechet(moved, f) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_covariances_that_do_not_commute():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 3, generator=g).double() @ torch.randn(3, 3, generator=g).double() for _ in range(2))
    a, b = a / b.std(0), b / b.std(0)
    A, B = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(A @ B).real.sqrt().sum()  # tr (AB)^1/2, the textbook form
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    assert tiny.frechet(a, b) == pytest.approx(expected.item() / 3)


def test_evaluate_takes_uint8():
    prompts = tiny.evaluation_prompts(64)
    images = tiny.reference(prompts, seed=9)
    a, b = tiny.evaluate(images, prompts), tiny.evaluate(((images + 1) * 127.5).round().byte(), prompts)
    assert a["accuracy"] == b["accuracy"] and a["total_variation"] == b["total_variation"]
    assert a["frechet"] == pytest.approx(b["frechet"], abs=1e-3)  # rounding to 8 bits


def test_evaluation_prompts():
    prompts = tiny.evaluation_prompts(512)
    assert len(prompts) == 512 and len(set(prompts)) == 16 and prompts[:16] == prompts[16:32]
    assert sorted((tiny.parse(prompts[:16]) >= 0).sum(1).tolist()) == sorted([1, 2, 3, 4] * 4)


# ---- the committed teacher ----------------------------------------------------------------------------------------

def test_checkpoint_is_small_and_loads_strictly():
    assert CKPT.stat().st_size <= 6e6
    net, vae, text = tiny.open_teacher(CKPT)
    assert text.encode(["a red circle"]).context.shape == (1, 2 * tiny.LENGTH, tiny.MMDIT["context_dim"])


def test_latents_are_normalised_and_decode_to_the_same_picture():
    _, vae, _ = tiny.open_teacher(CKPT)
    scenes = tiny.random_scenes(12, range(256))
    with torch.no_grad():
        latents = vae.encode(tiny.draw(scenes))
        labels = tiny.read(vae.decode(latents))
    assert latents.shape == (256, 4, 8, 8)
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1 and latents.mean().abs() < 0.2
    assert (labels[:, :4] == scenes.labels).all(1).float().mean() > 0.98


def test_teacher_draws_what_the_prompt_says():
    net, vae, text = tiny.open_teacher(CKPT)
    table = text.encode(tiny.captions())
    prompts = tiny.evaluation_prompts(64, repeats=2)
    few = tiny.evaluate(tiny.generate(net, vae, table, prompts, generator_times(1, tiny.SHIFT), 3.0), prompts)
    full = tiny.evaluate(tiny.generate(net, vae, table, prompts, teacher_times(20, tiny.SHIFT), 3.0), prompts)
    assert full["accuracy"] >= 0.8
    assert few["frechet"] > 2 * full["frechet"]


# ---- training -----------------------------------------------------------------------------------------------------

def test_training_resumes_where_it_stopped(tmp_path):
    scenes = tiny.random_scenes(0, range(64))
    latents, table = torch.randn(64, 4, 8, 8), tiny.open_teacher(CKPT)[2].encode(tiny.captions())
    loss = tiny.flow_loss(latents, scenes.labels, table)
    states = {}
    for name, stops in (("whole", [2]), ("halves", [1, 2])):
        (tmp_path / name).mkdir()
        for stop in stops:
            tiny.train("net", tiny.new_mmdit(0), loss, 5, 1e-3, tmp_path / name, stop=stop)
        states[name] = torch.load(tmp_path / name / "net.pt", weights_only=True)
    for key in ("net", "average"):
        for name, value in states["whole"][key].items():
            assert torch.equal(value, states["halves"][key][name]), (key, name)
    assert states["whole"]["step"] == states["halves"]["step"] == 2


def test_normalise_changes_no_picture():
    torch.manual_seed(1)
    vae = tiny.AutoencoderKL(**tiny.VAE)
    images = tiny.draw(tiny.random_scenes(0, range(32)))
    eps = torch.randn(32, 4, 8, 8)
    with torch.no_grad():
        before = vae.decode(vae.encode(images, eps))
        tiny.normalise(vae, images)
        after = vae.decode(vae.encode(images, eps))
        assert (vae.encode(images).std((0, 2, 3)) - 1).abs().max() < 1e-4  # float32 rounding
    assert (before - after).abs().max() < 1e-4
