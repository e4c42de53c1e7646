"""Captioned shapes that move: the data and the exact evaluator."""
import pytest
import torch

from models.eval import moving_shapes as moving


def clips_of(prompts, seed=9):
    return moving.reference(prompts, seed)


# ---- data --------------------------------------------------------------------------------------------------

def test_a_scene_depends_on_seed_and_index_alone():
    whole = moving.random_scenes(3, range(20))
    for a, b in zip(whole, moving.random_scenes(3, range(12, 15))):
        assert torch.equal(a[12:15], b)
    assert not torch.equal(whole.labels, moving.random_scenes(4, range(20)).labels)


def test_attributes_are_uniform():
    labels = moving.random_scenes(0, range(4000)).labels
    for a, count in enumerate(moving.COUNTS[:5]):
        share = labels[:, a].bincount(minlength=count) / 4000
        assert (share - 1 / count).abs().max() < 5 * (1 / count / 4000) ** 0.5  # five standard deviations


def test_the_whole_path_is_inside():
    scenes = moving.random_scenes(1, range(500))
    clips = moving.draw_clip(scenes)
    border = torch.cat([clips[..., [0, -1], :].flatten(3), clips[..., [0, -1]].flatten(3)], dim=3)
    plain = moving.shapes.palette("background")[scenes.labels[:, 2]]
    # The tip of a large triangle ends 1.25 pixels from the edge: 1/8 of its anti-aliasing, at most 2 deep.
    assert (border - plain[:, None, :, None]).abs().max() <= 2 / 8


def test_any_number_of_frames_covers_the_same_path():
    scenes = moving.random_scenes(2, range(8))
    clips = {frames: moving.draw_clip(scenes, frames) for frames in (2, 9, 17)}
    assert clips[9].shape == (8, 9, 3, 32, 32)
    assert torch.equal(clips[9][:, [0, -1]], clips[2]) and torch.equal(clips[9], clips[17][:, ::2])
    # One pixel a frame: frame 4 is frame 3, shifted.
    right = moving.draw_clip(moving.random_scenes(2, range(4), torch.tensor([[-1, -1, -1, -1, 1]] * 4)))
    assert (right[:, 4, :, :, 1:] - right[:, 3, :, :, :-1]).abs().max() < 1e-5


def test_captions_name_what_parse_reads():
    captions = moving.captions()
    assert len(set(captions)) == len(captions) == 6 * 7 * 5 * 3 * 5 + 1 and captions[-1] == ""
    assert torch.equal(moving.caption_index(moving.parse(captions[:-1])), torch.arange(len(captions) - 1))
    assert "a small red circle on white moving left" in captions and "a shape moving up" in captions
    assert moving.parse(["A ring, moving DOWN on black"]).tolist() == [[4, -1, 2, -1, 3]]


def test_evaluation_prompts():
    prompts = moving.evaluation_prompts(640)
    assert len(prompts) == 640 and len(set(prompts)) == 20 and prompts[:20] == prompts[20:40]
    assert sorted((moving.parse(prompts[:20]) >= 0).sum(1).tolist()) == sorted([1, 2, 3, 4, 5] * 4)


# ---- evaluator ---------------------------------------------------------------------------------------------

def test_reads_clean_clips_exactly():
    scenes = moving.random_scenes(5, range(500))
    labels, seen, displacement = moving.read_clip(moving.draw_clip(scenes))
    assert torch.equal(labels[:, :5], scenes.labels)
    assert torch.equal(seen, scenes.labels[:, None, :4].expand(-1, 9, -1))
    step = torch.tensor(list(moving.DIRECTIONS.values()))[scenes.labels[:, 4]]
    assert (displacement - step[:, None]).norm(dim=2).max() < 1e-4
    place = (scenes.middle[:, 0] > 16).long() + 2 * (scenes.middle[:, 1] > 16).long()
    assert torch.equal(labels[:, 5], place) and not (scenes.middle == 16).any()


def test_reads_through_slight_noise():
    scenes = moving.random_scenes(6, range(100))
    clips = moving.draw_clip(scenes)
    labels, seen, displacement = moving.read_clip(clips + 0.05 * torch.randn(clips.shape))
    assert (labels[:, :5] == scenes.labels).all(1).float().mean() > 0.95
    assert moving.consistency(seen, displacement) > 0.95


def test_the_data_score_full_marks():
    prompts = moving.evaluation_prompts(320)
    figures = moving.evaluate(clips_of(prompts), prompts)
    assert figures["accuracy"] == figures["direction"] == figures["consistency"] == 1
    assert figures["total_variation"] < 0.2  # 0.4 * sqrt((K - 1) / 32) is 0.07 to 0.16
    assert figures["frechet"] < 0.1


@pytest.mark.parametrize("spoil", ["backwards", "frozen", "flipping", "jumping", "noise", "another shape"])
def test_each_fault_lowers_its_own_figure(spoil):
    prompts = ["a small red circle on white moving left"] * 8 + ["a large green cross moving down"] * 8
    clips = clips_of(prompts)
    good = moving.evaluate(clips, prompts)
    expected = dict(accuracy=1, direction=1, consistency=1)
    if spoil == "backwards":
        clips, expected["direction"] = clips.flip(1), 0
    elif spoil == "frozen":
        clips, expected["direction"] = clips[:, :1].expand_as(clips), 0
    elif spoil == "flipping":  # colour, in the last four of nine frames: one of eight changes
        blue = clips_of([p.replace("red", "blue").replace("green", "blue") for p in prompts])
        clips = torch.cat([clips[:, :5], blue[:, 5:]], dim=1)
        expected |= dict(accuracy=5 / 9, consistency=7 / 8)
    elif spoil == "jumping":  # all of the way between two frames: no displacement is near the mean
        clips = clips[:, [0] * 5 + [8] * 4]
        expected["consistency"] = 0
    elif spoil == "noise":
        clips, expected = torch.randn(clips.shape), dict(accuracy=0, direction=0, consistency=0)
    else:
        clips = clips_of([p.replace("circle", "ring").replace("cross", "ring") for p in prompts])
        expected["accuracy"] = 0
    figures = moving.evaluate(clips, prompts)
    assert {name: figures[name] for name in expected} == pytest.approx(expected), spoil
    if spoil not in ("backwards", "jumping"):  # random filters see neither an order nor a mean's spread
        assert figures["frechet"] > 3 * good["frechet"]


def test_an_unnamed_direction_may_be_any_but_must_be_one():
    prompts = ["a red circle"] * 4
    clips = clips_of([f"a red circle moving {direction}" for direction in moving.DIRECTIONS])
    assert moving.evaluate(clips, prompts)["direction"] == 1
    clips[0] = clips[0, :1]  # stands still
    clips[1, -1] = 1  # ends blank
    assert moving.evaluate(clips, prompts)["direction"] == 0.5


def test_total_variation_by_hand():
    named = moving.parse(["a small red circle on white moving left"] * 4)  # only the place is free
    labels = torch.tensor([[0, 0, 0, 0, 0, place] for place in (0, 1, 2, 3)])
    assert moving.total_variation(labels, named) == 0
    labels[:, 5] = 2
    assert moving.total_variation(labels, named) == 0.75  # one of four equal outcomes
    named[:, 4] = -1  # now the direction too, and it is always left
    assert moving.total_variation(labels, named) == 0.75
    labels[2:, 4] = -1  # 0.5 * (|1/2 - 1/4| + 3 * 1/4 + 1/2 without direction) is 0.75 again
    labels[:, 5] = torch.arange(4)
    assert moving.total_variation(labels, named) == pytest.approx(0.375)


def test_evaluate_takes_uint8():
    prompts = ["a small red circle on white moving left"] * 8 + ["a large green cross moving down"] * 8
    clips = clips_of(prompts)
    a, b = (moving.evaluate(x, prompts) for x in (clips, ((clips + 1) * 127.5).round().byte()))
    assert a.pop("frechet") == pytest.approx(b.pop("frechet"), abs=5e-3)  # rounding to 8 bits
    assert a.pop("sharpness") == pytest.approx(b.pop("sharpness"), rel=1e-2)
    assert a == b


def test_evaluation_prompts_repeat_when_there_are_no_more():
    prompts = moving.evaluation_prompts(120, repeats=1)
    assert len(prompts) == 120 and len(set(prompts)) == 105  # 21 values of the five attributes, five kinds
