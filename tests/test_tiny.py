"""The committed tiny teachers, their text encoders, and resumable training."""
import pytest
import torch

from models.eval import moving_shapes
from models.tiny import images, video
from models.checkpoint import open_tensors
from models.diffusion import generator_times, teacher_times
from models.presets import PRESETS
from models.eval.shapes import captions, draw, evaluate, evaluation_prompts, random_scenes, read
from models.text import load_tokenizers

TEACHERS = [PRESETS["tiny-sd3"], PRESETS["tiny-sdxl"]]
each = pytest.mark.parametrize("row", TEACHERS, ids=lambda row: row.file)


def test_every_word_is_one_token():
    clip, t5 = load_tokenizers(images.FOLDER)
    for word in {word for text in captions() for word in text.split()}:
        assert len(clip.tokenize(word)) == len(t5.tokenize(word)) == 1, word
    longest = max(captions(), key=lambda text: len(text.split()))
    assert len(clip(longest).input_ids) == images.LENGTH  # nothing is cut


# ---- the committed teachers ---------------------------------------------------------------------------------------

@each
def test_checkpoint_is_small_and_loads_strictly(row):
    assert row.ckpt.stat().st_size <= 6e6
    _, _, text = images.open_teacher(row)
    assert text.encode(["a red circle"]).context.shape == (1, row.clip_length + row.t5_length, 128)


@each
def test_latents_are_normalised_and_decode_to_the_same_picture(row):
    _, vae, _ = images.open_teacher(row)
    scenes = random_scenes(12, range(256))
    with torch.no_grad():
        latents = vae.encode(draw(scenes))
        labels = read(vae.decode(latents))
    assert latents.shape == (256, 4, 8, 8)
    assert (latents.std((0, 2, 3)) - 1).abs().max() < 0.1 and latents.mean().abs() < 0.2
    assert (labels[:, :4] == scenes.labels).all(1).float().mean() > 0.98


@each
def test_teacher_draws_what_the_prompt_says(row):
    F, vae, text = images.open_teacher(row)
    table, prompts, figures = images.encode_captions(row, text), evaluation_prompts(64, repeats=2), []
    for times, steps in ((generator_times, 1), (teacher_times, 20)):
        tn = times(steps, row.shift, row.schedule)
        figures.append(evaluate(images.generate(row, F, vae, table, prompts, tn, 3.0), prompts))
    few, full = figures
    assert full["accuracy"] >= 0.8
    assert few["frechet"] > 2 * full["frechet"]


def test_video_folder_is_small_and_every_word_one_token():
    files = [path for path in video.ROW.ckpt.rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 6e6
    text = video.open_text()
    for word in {word for caption in moving_shapes.captions() for word in caption.split()}:
        assert len(text.tokenizers[0].tokenize(word)) == 1, word
    longest = max(moving_shapes.captions(), key=lambda caption: len(caption.split()))
    assert 0 in text.tokenize([longest])  # nothing is cut
    assert text.encode([longest]).context.shape == (1, 12, 128) and not text.unconditional().context.any()


def test_video_latents_are_normalised_and_decode_to_the_same_clip():
    _, vae, _ = video.open_video()
    scenes = moving_shapes.random_scenes(12, range(64))
    with torch.no_grad():
        latents = vae.encode(moving_shapes.draw_clip(scenes))
        labels, seen, displacement = moving_shapes.read_clip(vae.decode(latents))
    assert latents.shape == (64, 3, 4, 8, 8)
    assert (latents.std((0, 1, 3, 4)) - 1).abs().max() < 0.1
    assert latents.mean((0, 1, 3, 4)).abs().max() < 0.4  # of 64 clips: 3 standard errors, by background
    assert (seen == scenes.labels[:, None, :4]).all(2).float().mean() > 0.95
    assert (labels[:, 4] == scenes.labels[:, 4]).float().mean() > 0.95
    assert moving_shapes.consistency(seen, displacement) > 0.9


def test_video_decoder_bears_noise_in_the_latent():
    """0.3 standard deviations of it; a decoder that is trained to reconstruct alone loses most shapes."""
    _, vae, _ = video.open_video()
    scenes, g = moving_shapes.random_scenes(12, range(64)), torch.Generator().manual_seed(0)
    with torch.no_grad():
        z = vae.encode(moving_shapes.draw_clip(scenes))
        _, seen, _ = moving_shapes.read_clip(vae.decode(z + 0.3 * torch.randn(z.shape, generator=g)))
    assert (seen == scenes.labels[:, None, :4]).all(2).float().mean() > 0.9


def test_video_teacher_shows_and_moves_as_the_prompt_says():
    F, vae, text = video.open_video()
    row, prompts, figures = video.ROW, moving_shapes.evaluation_prompts(48, 1), []
    table = images.encode_captions(row, text)
    for times, steps in ((generator_times, 1), (teacher_times, 25)):
        tn = times(steps, row.shift, row.schedule)
        figures.append(moving_shapes.evaluate(images.generate(row, F, vae, table, prompts, tn, 3.0), prompts))
    few, full = figures
    assert full["accuracy"] >= 0.75 and full["direction"] >= 0.7  # 48 clips: two errors less than over 640
    assert few["frechet"] > 2 * full["frechet"]


def test_vision_encoder_outlines_shapes():
    """The committed encoder has the names and shapes of the one that is trained, whose loss starts at ln 2."""
    tensors = open_tensors(PRESETS["tiny-sdxl"].pixel_ckpt)
    encoder = images.SamVisionModel(images.SamVisionConfig(**images.SAM)).vision_encoder
    expected = {"image_encoder." + images.original_name("sam", name): tuple(p.shape)
                for name, p in encoder.state_dict().items() if not name.startswith("neck.")}
    assert tensors.shapes == expected
    assert PRESETS["tiny-sdxl"].pixel_ckpt.stat().st_size + PRESETS["tiny-sdxl"].ckpt.stat().st_size < 7e6


# ---- training -----------------------------------------------------------------------------------------------------

@each
def test_training_resumes_where_it_stopped(row, tmp_path):
    scenes = random_scenes(0, range(64))
    latents, table = torch.randn(64, 4, 8, 8), images.encode_captions(row, images.open_teacher(row)[2])
    loss = images.denoiser_loss(row, latents, scenes.labels, table)
    states = {}
    for name, stops in (("whole", [2]), ("halves", [1, 2])):
        (tmp_path / name).mkdir()
        for stop in stops:
            torch.manual_seed(0)
            net = (images.new_unet if row.family == "unet" else images.new_mmdit)(row.config)
            images.train("net", net, loss, 5, 1e-3, tmp_path / name, stop=stop)
        states[name] = torch.load(tmp_path / name / "net.pt", weights_only=True)
    for key in ("net", "average"):
        for name, value in states["whole"][key].items():
            assert torch.equal(value, states["halves"][key][name]), (key, name)
    assert states["whole"]["step"] == states["halves"]["step"] == 2


def test_normalise_changes_no_clip():
    """But by the zeros around the latent, which no longer mean what they did: the decoder's first layer is
    given kernels here that do not reach them."""
    torch.manual_seed(1)
    vae, clips = video.new_vae(), moving_shapes.draw_clip(moving_shapes.random_scenes(0, range(16)))
    eps = torch.randn(16, 3, 4, 8, 8)
    with torch.no_grad():
        weight = vae.decoder.conv_in.conv.weight
        weight[..., [0, 2], :] = weight[..., [0, 2]] = 0
        before = vae.decode(vae.encode(clips, eps))
        video.normalise(vae, clips)
        z, after = vae.encode(clips), vae.decode(vae.encode(clips, eps))
    assert (z.std((0, 1, 3, 4)) - 1).abs().max() < 1e-4 and z.mean((0, 1, 3, 4)).abs().max() < 1e-4
    assert (before - after).abs().max() < 1e-4  # float32 rounding, as above


def test_normalise_changes_no_picture():
    torch.manual_seed(1)
    vae = images.AutoencoderKL(**TEACHERS[0].vae)
    pictures = draw(random_scenes(0, range(32)))
    eps = torch.randn(32, 4, 8, 8)
    with torch.no_grad():
        before = vae.decode(vae.encode(pictures, eps))
        images.normalise(vae, pictures)
        after = vae.decode(vae.encode(pictures, eps))
        assert (vae.encode(pictures).std((0, 2, 3)) - 1).abs().max() < 1e-4  # float32 rounding
    assert (before - after).abs().max() < 1e-4
