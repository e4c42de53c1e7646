"""Captioned shapes: the data and the exact evaluator."""
import pytest
import torch

from models.eval import shapes

# ---- data ---------------------------------------------------------------------------------------------------------

def test_a_scene_depends_on_seed_and_index_alone():
    whole = shapes.random_scenes(3, range(20))
    part = shapes.random_scenes(3, range(12, 15))
    for a, b in zip(whole, part):
        assert torch.equal(a[12:15], b)
    assert not torch.equal(whole.labels, shapes.random_scenes(4, range(20)).labels)


def test_attributes_are_uniform():
    labels = shapes.read(shapes.draw(shapes.random_scenes(0, range(2000))))
    for a, count in enumerate(shapes.COUNTS):
        share = labels[:, a].bincount(minlength=count) / 2000
        assert (share - 1 / count).abs().max() < 5 * (1 / count / 2000) ** 0.5  # five standard deviations


def test_captions_name_what_parse_reads():
    captions = shapes.captions()
    assert len(set(captions)) == len(captions) == 6 * 7 * 5 * 3 + 1 and captions[-1] == ""
    assert torch.equal(shapes.caption_index(shapes.parse(captions[:-1])), torch.arange(len(captions) - 1))
    assert "an orange ring on pink" in captions and "a small shape" in captions
    assert shapes.parse(["A large ring, orange, on a white background"]).tolist() == [[4, 1, 0, 1]]


# ---- evaluator ----------------------------------------------------------------------------------------------------

def test_reads_clean_pictures_exactly():
    scenes = shapes.random_scenes(5, range(2000))
    assert torch.equal(shapes.read(shapes.draw(scenes))[:, :4], scenes.labels)
    assert not (scenes.centre == 16).any()  # no shape lies between two quadrants
    place = (scenes.centre[:, 0] > 16).long() + 2 * (scenes.centre[:, 1] > 16).long()
    assert torch.equal(shapes.read(shapes.draw(scenes))[:, 4], place)


def test_reads_through_slight_noise():
    scenes = shapes.random_scenes(6, range(500))
    images = shapes.draw(scenes)
    labels = shapes.read(images + 0.05 * torch.randn(images.shape))
    assert (labels[:, :4] == scenes.labels).all(1).float().mean() > 0.97


@pytest.mark.parametrize("spoil", ["two shapes", "blank", "noise", "blur"])
def test_what_is_no_single_shape_is_invalid(spoil):
    scenes = shapes.random_scenes(7, range(200))
    images = shapes.draw(scenes)
    if spoil == "two shapes":
        images = torch.cat([images[:, :, :, :16], images[:, :, :, :16].flip(3)], dim=3)
        images = images[(scenes.centre[:, 0] < 14) & (scenes.labels[:, 3] == 0)]
    elif spoil == "blank":
        images = images * 0 + 1
    elif spoil == "noise":
        images = torch.randn(images.shape)
    else:
        images = torch.nn.functional.avg_pool2d(images, 9, 1, 4, count_include_pad=False)
    assert (shapes.read(images) < 0).all(1).float().mean() > 0.9


def test_wrong_attributes_are_wrong():
    prompts = ["a small red circle on white"] * 4
    named = shapes.parse(prompts)
    for a, (attribute, values) in enumerate(list(shapes.ATTRIBUTES.items())[:4]):
        other = named.clone()
        other[:, a] = (other[:, a] + 1) % len(values)
        images = shapes.draw(shapes.random_scenes(0, range(4), other))
        assert shapes.evaluate(images, prompts)["accuracy"] == 0, attribute
        images[:2] = shapes.draw(shapes.random_scenes(0, range(2), named[:2]))
        assert shapes.evaluate(images, prompts)["accuracy"] == 0.5


def test_total_variation_by_hand():
    named = shapes.parse(["a small red circle on white"] * 4)  # only the place is free
    labels = torch.tensor([[0, 0, 0, 0, place] for place in (0, 1, 2, 3)])
    assert shapes.total_variation(labels, named) == 0
    labels[:, 4] = 2
    assert shapes.total_variation(labels, named) == 0.75  # one of four equal outcomes
    labels[2:] = -1
    assert shapes.total_variation(labels, named) == 0.75  # 0.5 * (|1/2 - 1/4| + 3 * 1/4 + 1/2 invalid)
    named = shapes.parse(["a red circle on white"] * 2)  # two distances: size 1/2, place 3/4
    assert shapes.total_variation(torch.tensor([[0, 0, 0, 1, 3]] * 2), named) == pytest.approx(0.625)


def test_total_variation_sees_collapse_and_floor():
    prompts = shapes.evaluation_prompts(512)
    one_each = shapes.reference(prompts[:16], seed=8).repeat(32, 1, 1, 1)
    collapsed = shapes.evaluate(one_each, prompts)
    data = shapes.evaluate(shapes.reference(prompts, seed=9), prompts)
    assert collapsed["accuracy"] == data["accuracy"] == 1
    assert collapsed["total_variation"] > 0.6 and data["total_variation"] < 0.2


def test_frechet():
    images = shapes.reference(shapes.evaluation_prompts(512), seed=9)
    f = shapes.features(images)
    assert f.shape == (512, 48) and f.dtype == torch.float64
    assert shapes.frechet(f, f) < 1e-6  # square roots of rounded eigenvalues
    shift = 0.5 * f.std(0)
    assert shapes.frechet(f + shift, f) == pytest.approx(0.25, rel=1e-3)  # a pure shift, per feature
    moved = 3 * f + shift  # every feature three times as wide: (3 - 1)^2, whatever the correlations
    expected = 4 + ((moved.mean(0) - f.mean(0)) / f.std(0)).square().mean().item()
    assert shapes.frechet(moved, f) == pytest.approx(expected, rel=1e-6)


def test_frechet_of_covariances_that_do_not_commute():
    g = torch.Generator().manual_seed(0)
    a, b = (torch.randn(300, 3, generator=g).double() @ torch.randn(3, 3, generator=g).double() for _ in range(2))
    a, b = a / b.std(0), b / b.std(0)
    A, B = a.T.cov(), b.T.cov()
    cross = torch.linalg.eigvals(A @ B).real.sqrt().sum()  # tr (AB)^1/2, the textbook form
    expected = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    assert shapes.frechet(a, b) == pytest.approx(expected.item() / 3)


def test_sharpness_sees_blur():
    prompts = shapes.evaluation_prompts(256)
    images = shapes.reference(prompts, seed=9)
    blurred = torch.nn.functional.avg_pool2d(images, 3, stride=1, padding=1, count_include_pad=False)
    sharp, soft = shapes.evaluate(images, prompts), shapes.evaluate(blurred, prompts)
    assert sharp["sharpness"] == pytest.approx(1, abs=0.1)  # other shapes than the held-out ones
    assert soft["sharpness"] < 0.5 < soft["accuracy"]  # most shapes can still be read
    x = torch.zeros(1, 3, 5, 5)
    x[:, :, 2, 2] = 1  # one of nine inner pixels has 4, four have 1
    assert shapes.sharpness(x).item() == pytest.approx(8 / 9)


def test_evaluate_takes_uint8():
    prompts = shapes.evaluation_prompts(64)
    images = shapes.reference(prompts, seed=9)
    a, b = shapes.evaluate(images, prompts), shapes.evaluate(((images + 1) * 127.5).round().byte(), prompts)
    assert a["accuracy"] == b["accuracy"] and a["total_variation"] == b["total_variation"]
    assert a["frechet"] == pytest.approx(b["frechet"], abs=1e-3)  # rounding to 8 bits
    assert a["sharpness"] == pytest.approx(b["sharpness"], rel=1e-2)  # the rounding's own Laplacian


def test_evaluation_prompts():
    prompts = shapes.evaluation_prompts(512)
    assert len(prompts) == 512 and len(set(prompts)) == 16 and prompts[:16] == prompts[16:32]
    assert sorted((shapes.parse(prompts[:16]) >= 0).sum(1).tolist()) == sorted([1, 2, 3, 4] * 4)


def test_evaluation_prompts_repeat_when_there_are_no_more():
    prompts = shapes.evaluation_prompts(100, repeats=1)
    assert len(prompts) == 100 and len(set(prompts)) == 68  # 17 values of the four attributes, four kinds
