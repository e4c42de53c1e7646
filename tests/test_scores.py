"""CLIP score, PickScore, HPSv2 and MPS against the originals, and the reader of MPS's pickled module."""
import json
import os
import pickle
import re
import struct
import subprocess
import sys
import zipfile
import zlib
from functools import partial
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from conftest import ROOT, golden, near, read_golden
from huggingface_hub.errors import EntryNotFoundError
from PIL import Image
from safetensors.torch import save_file
from test_pictures import odd_pictures
from torch import nn

from models.eval import scores
from models.checkpoint import InputError, Tensors, open_tensors
from models.eval.clip import (
    clip_model,
    image_tokens,
    image_vector,
    load_clip,
    open_clip_shapes,
    text_tokens,
    text_vector,
)
from models.eval.mps import CONDITION, cross_model, load_mps, mps_score, open_module, selected
from models.eval.scores import (
    BACKBONES,
    clean,
    clip_pixels,
    dmd2_pixels,
    hps_pixels,
    insert_prefix,
    load_scorer,
    load_tokenizer,
    token_ids,
)
from models.pictures import read_picture
from models.text_encoders import at_end

PIXELS = 1e-4  # HPSv2 resizes in float32, 4e-6 apart between CPUs; a level of 255 is 1.4e-2


def picture(pixels):
    return Image.fromarray(pixels.numpy())


# ---- pixels ------------------------------------------------------------------------------------------------

hf_pixels = partial(clip_pixels, crop="hf")
CASES = {  # golden files and names of the pixels in them
    "torchvision": (clip_pixels, {"clip_preproc*": "out.torchvision.", "clipscore_*": "out.plain.pixels."}),
    "hf": (hf_pixels, {"clip_preproc*": "out.hf.", "pickscore_*": "out.pixels.", "mps_*": "out.pixels."}),
    "dmd2": (dmd2_pixels, {"clipscore_*": "out.dmd2.pixels."}),
    "hpsv2": (hps_pixels, {"hpsv2_*": "out.aa.pixels."}),
}


@pytest.mark.parametrize("case", CASES)
def test_pixels_equal_the_originals(case):
    preprocess, prefixes = CASES[case]
    compared = 0
    for pattern, prefix in prefixes.items():
        for path in golden(f"{pattern}.safetensors"):
            g, _ = read_golden(path)
            for name in (name for name in g if name.startswith(prefix)):
                image, size = picture(g[name.replace(prefix, "in.image.")]), max(g[name].shape)
                near(preprocess(image, size=size), g[name], PIXELS)
                compared += 1
    assert compared


def test_crop_of_an_odd_number_of_pixels():
    image = Image.fromarray(np.arange(4 * 7 * 3, dtype=np.uint8).reshape(4, 7, 3))
    left = lambda crop: scores.middle(image, 4, crop).getpixel((0, 0))[0] // 3  # noqa: E731
    assert (left("torchvision"), left("hf")) == (2, 1)  # of 3 / 2


def test_transparency_is_dropped_as_in_the_originals():
    pixels = np.zeros((8, 8, 4), np.uint8)
    pixels[:, :4] = 255, 255, 255, 0  # a white that cannot be seen, beside a black that can
    pixels[:, 4:, 3] = 255
    image = Image.fromarray(pixels, "RGBA")
    first, after = (clip_pixels(image, 4, crop) for crop in ("hf", "torchvision"))
    near(first, clip_pixels(image.convert("RGB"), 4), 0)
    assert (first - after).abs().max() > 0.1  # Pillow weighs colours by their opacity when it resizes
    assert hps_pixels(image, 4).shape == (3, 4, 4)


@pytest.mark.filterwarnings("ignore:Palette images with Transparency")
def test_every_kind_of_picture_has_pixels(tmp_path):
    """Palette, CMYK, one bit, grey with alpha: what `read_picture` lets through, every preprocessing takes."""
    for name in odd_pictures(tmp_path)[0]:
        for preprocess in (clip_pixels, hf_pixels, dmd2_pixels, partial(hps_pixels, size=16)):
            x = preprocess(read_picture(tmp_path / name))
            assert x.shape in ((3, 224, 224), (3, 16, 16)) and x.isfinite().all(), name


# ---- tokens ------------------------------------------------------------------------------------------------

# Rank and merge, of CLIP's vocabulary, of most prompts in eval_clip_tokens.json.
MERGES = """
0 i n|2 a n|3 r e|5 e r|9 o n|12 e n|16 e r</w>|17 i t|19 t o</w>|23 i c|25 an d</w>|27 o f</w>
30 e s</w>|34 a c|36 a m|45 n e|46 ð Ł|49 d e|51 v e</w>|54 a l</w>|56 ' s</w>|68 t o|73 i t</w>|75 a s
76 s p|78 t s</w>|83 i s|88 t e|92 p p|94 h o|105 m o|127 d o|131 k e|136 t a|154 q u|156 ðŁ ĺ|186 c i
190 a f|201 ' t</w>|203 in e</w>|216 â Ģ|225 re n|289 d er</w>|304 p ho|334 on g</w>|364 sp e
382 as e</w>|389 p ic|401 r y</w>|446 i l</w>|454 t w|540 x t</w>|585 n a|613 pho to</w>|631 ci al</w>
636 l ine</w>|706 ne w|725 tw o</w>|947 p t</w>|1026 l ong</w>|1177 spe cial</w>|1351 o t|1417 do g</w>
1556 c ase</w>|1701 l it|1798 j er|1923 to m</w>|1928 pp er</w>|2185 j i</w>|2411 is n</w>|2573 lit er
2959 c af|3226 e mo|3620 ta il</w>|3648 te xt</w>|3654 Ã ©</w>|4940 qu ot|5213 ac es</w>
5296 quot es</w>|5747 am p</w>|6555 u pper</w>|6822 ðŁĺ Ģ</w>|7225 ke pt</w>|7765 do f|8494 sp aces</w>
8652 jer ry</w>|10795 de pic|12512 ren der</w>|14792 caf Ã©</w>|15815 emo ji</w>|23757 liter al</w>
28778 å ¥|28828 depic ts</w>|35177 Ã ¯|40274 en dof|46954 ä ½
"""


@pytest.fixture(scope="module")
def excerpt(tmp_path_factory):
    """Folder of CLIP's tokenizer with these merges alone: 256 bytes, the same as ends of words, merges."""
    merges = dict(line.split(" ", 1) for line in re.split(r"[|\n]", MERGES.strip()))
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]  # as themselves; other bytes from 256 on
    letters = [chr(byte) for byte in shown] + [chr(256 + i) for i in range(256 - len(shown))]
    vocabulary = {token: i for i, token in enumerate(letters + [letter + "</w>" for letter in letters])}
    vocabulary |= {merge.replace(" ", ""): 512 + int(rank) for rank, merge in merges.items()}
    vocabulary |= {"<|startoftext|>": 49406, "<|endoftext|>": 49407}
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "vocab.json").write_text(json.dumps(vocabulary))
    (folder / "merges.txt").write_text("\n".join(["#version: 0.2", *merges.values(), ""]), encoding="utf-8")
    return folder


@pytest.mark.parametrize("path", golden("eval_clip_tokens*.json"), ids=lambda p: p.stem)
def test_tokens_equal_the_originals(path, excerpt):
    g, tokenizer = json.loads(path.read_text()), load_tokenizer(excerpt, "")
    known = set(tokenizer.get_vocab().values())
    known = [i for i, ids in enumerate(g["hf_padded_transformers_5_23"]) if known.issuperset(ids)]
    assert len(known) > 8  # of 12, among them curly quotes, &amp; and a literal <|endoftext|>
    prompts = [g["prompts"][i] for i in known]
    rows = lambda key: torch.tensor([g[key][i] for i in known])  # noqa: E731
    cleaned = [clean(prompt) for prompt in prompts]
    ids = token_ids(tokenizer, cleaned, 77, 0)
    near(ids, rows("openai_clip"), 0)
    near(token_ids(tokenizer, cleaned, 77, 0, split_special_tokens=True), rows("hpsv2_open_clip"), 0)
    near(insert_prefix(ids, tokenizer("a photo depicts").input_ids[1:-1]), rows("dmd2_prefixed"), 0)
    near(token_ids(tokenizer, prompts, 77, tokenizer.pad_token_id), rows("hf_padded_transformers_5_23"), 0)
    assert CONDITION == g["condition_overall"]


@pytest.mark.parametrize("path", golden("clipscore*.safetensors"), ids=lambda p: p.stem)
def test_prefix_of_dmd2(path):
    g, meta = read_golden(path)
    for p in meta["golden"]["cols"]:
        near(insert_prefix(g[f"in.tokens.{p}"], [320, 1125, 29340]), g[f"out.dmd2.tokens.{p}"], 0)


# ---- networks and scores -----------------------------------------------------------------------------------

def heads(config):
    """(of images, of text); each original has its own way to say it."""
    if "vision_cfg" in config:
        vision = config["vision_cfg"]
        return vision["width"] // vision["head_width"], config["text_cfg"]["heads"]
    if "vision_width" in config:
        return config["vision_width"] // 64, config["transformer_heads"]
    return config["vision"]["heads"], config["text"]["heads"]


def checkpoint(folder, path):
    """The weights of a golden file and a config.json with its heads -> (file, tensors, metadata)."""
    g, meta = read_golden(path)
    meta = meta["golden"]
    weights = {name: t for name, t in g.items() if not name.startswith(("in.", "out."))}
    if path.name.startswith("mps") and not any(name.startswith("model.") for name in weights):
        module = open_module(path.with_name(path.stem + "_module.pth"))  # the same, stored once
        weights |= {name: module[name] for name in module}
    if "vocab_size" in meta["config"] and "token_embedding.weight" not in weights:
        shape = meta["config"]["vocab_size"], meta["config"]["transformer_width"]
        seed = zlib.crc32(f"{meta['seed']}:token_embedding.weight".encode())
        weights["token_embedding.weight"] = torch.from_numpy(
            0.5 * np.random.RandomState(seed).standard_normal(shape)).float()
    folder.mkdir(exist_ok=True)
    save_file(weights, folder / "model.safetensors")
    config = {f"{part}_config": {"num_attention_heads": n}
              for part, n in zip(("vision", "text"), heads(meta["config"]))}
    (folder / "config.json").write_text(json.dumps(config))
    return folder / "model.safetensors", g, meta


def names_of(g, meta):
    """The images, of those in the file, and the prompts of the table of scores."""
    rows, columns = meta.get("score_rows", meta.get("rows")), meta.get("score_cols", meta.get("cols"))
    return [row for row in rows if f"in.image.{row}" in g], columns


def table(g, meta, name):
    """Scores (images, prompts) of the images in the file."""
    rows = meta.get("score_rows", meta.get("rows"))
    return torch.stack([g[name][rows.index(row)] for row in names_of(g, meta)[0]])


def pixels_of(g, meta, preprocess):
    size = size_of(meta["config"])
    return torch.stack([preprocess(picture(g[f"in.image.{row}"]), size=size) for row in names_of(g, meta)[0]])


def size_of(config):
    return config.get("image_size") or config.get("image_resolution") or config["vision_cfg"]["image_size"]


def unit(x):
    return x / x.norm(dim=-1, keepdim=True)


@torch.no_grad()
@pytest.mark.parametrize("path", golden("hpsv2_*.safetensors"), ids=lambda p: p.stem)
def test_hpsv2_golden(path, tmp_path):
    file, g, meta = checkpoint(tmp_path, path)
    net = load_clip(open_tensors(file), "gelu")
    text = text_vector(net, torch.cat([g[f"in.tokens.{column}"] for column in meta["score_cols"]]))
    near(text, g["out.text_features"], 1e-4)  # tanh-gelu would be off by 1e-3
    image = image_vector(net, pixels_of(g, meta, hps_pixels))
    features = {row: g["out.aa.image_features"][i] for i, row in enumerate(meta["score_rows"])}
    near(image, torch.stack([features[row] for row in names_of(g, meta)[0]]), 1e-4)
    near(unit(image) @ unit(text).T, table(g, meta, "out.aa.score"), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("path", golden("pickscore_*.safetensors"), ids=lambda p: p.stem)
def test_pickscore_golden(path, tmp_path):
    file, g, meta = checkpoint(tmp_path, path)
    net = load_clip(open_tensors(file), "gelu")
    rows, columns = names_of(g, meta)
    image = unit(image_vector(net, pixels_of(g, meta, hf_pixels)))
    text = unit(torch.cat([text_vector(net, g[f"in.tokens.{column}"]) for column in columns]))
    near(image, torch.stack([g[f"out.image_embeds.{row}"] for row in rows]), 1e-4)
    near(text, torch.stack([g[f"out.text_embeds.{column}"] for column in columns]), 1e-4)
    # A scale of 100; tanh-gelu would be off by 8e-3.
    near(net.logit_scale.exp() * image @ text.T, table(g, meta, "out.score"), 5e-4)


@torch.no_grad()
@pytest.mark.parametrize("path", golden("clipscore_*.safetensors"), ids=lambda p: p.stem)
def test_clip_score_golden(path, tmp_path):
    file, g, meta = checkpoint(tmp_path, path)
    net = load_clip(open_tensors(file), "quick_gelu")
    for name, preprocess, tokens in (("plain", clip_pixels, "in"), ("dmd2", dmd2_pixels, "out.dmd2")):
        ids = torch.cat([g[f"{tokens}.tokens.{column}"] for column in meta["cols"]])
        cosines = unit(image_vector(net, pixels_of(g, meta, preprocess))) @ unit(text_vector(net, ids)).T
        near(cosines, table(g, meta, f"out.{name}.score"), 1e-4)


@torch.no_grad()
@pytest.mark.parametrize("path", golden("mps_*.safetensors"), ids=lambda p: p.stem)
def test_mps_golden(path, tmp_path):
    file, g, meta = checkpoint(tmp_path, path)
    net = load_mps(open_tensors(file))
    clip, cross = net["model"], net["cross_model"]
    rows, columns = names_of(g, meta)
    image = image_tokens(clip, pixels_of(g, meta, hf_pixels))
    condition = text_tokens(clip, g["in.condition"])[0]
    near(condition, g["out.condition_tokens"], 1e-4)  # tanh-gelu: 4e-4
    ids = torch.cat([g[f"in.tokens.{column}"] for column in columns])
    text = text_tokens(clip, ids)  # B L P
    vectors, words = at_end(text, ids), selected(text, condition, meta["threshold"])
    near(vectors, g["out.text_eos"], 1e-4)
    for i, column in enumerate(columns):
        if f"out.text_tokens.{column}" in g:
            near(text[i], g[f"out.text_tokens.{column}"], 1e-4)
        assert words[i].tolist() == g[f"out.mask.{column}"].tolist()
    for i, row in enumerate(rows):
        near(image[i], g[f"out.image_tokens.{row}"], 5e-4)  # of sizes up to 100; tanh-gelu: 4e-3
    expected = torch.stack([g[f"out.cross.{row}"] for row in rows])  # of one of the prompts
    outputs = [cross(image, *(x[i:i + 1].expand(len(rows), *x.shape[1:]) for x in (text, words)))
               for i in range(len(ids))]
    near(min(outputs, key=lambda out: (out - expected).abs().max()), expected, 5e-4)
    for name, threshold in (("out.score", meta["threshold"]),
                            ("out.score_forward_thr0.01", meta["threshold_module_forward"])):
        for tokens, scored in zip(image, table(g, meta, name)):  # an image with all prompts in one batch
            batch = mps_score(cross, tokens[None].expand(len(ids), -1, -1), text, vectors, condition,
                              clip.logit_scale, threshold)
            near(batch, scored, 5e-4)


# ---- full size ---------------------------------------------------------------------------------------------

def published(pattern):
    """(names and shapes, Tensors without contents) of a manifest."""
    for path in golden(pattern):
        shapes = {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text())["tensors"].items()}
        yield shapes, Tensors(path, shapes, None)


def test_full_size_hpsv2_is_the_manifest():
    for shapes, tensors in published("hpsv2*.keys.json"):
        net = clip_model(tensors, "gelu")
        assert open_clip_shapes({name: tuple(p.shape) for name, p in net.state_dict().items()}) == shapes
        vision, text = net.config.vision_config, net.config.text_config
        assert (vision.num_attention_heads, text.num_attention_heads) == (16, 16)
        assert (vision.image_size, vision.hidden_act, text.hidden_act) == (224, "gelu", "gelu")


def test_full_size_mps_is_the_manifest():
    for shapes, tensors in published("mps_overall*.keys.json"):
        clip = clip_model(tensors.group("model."), "gelu")
        cross = cross_model(tensors.group("cross_model."))
        own = {f"{part}.{name}": tuple(p.shape) for part, net in (("model", clip), ("cross_model", cross))
               for name, p in net.state_dict().items()}
        assert own == {name: shape for name, shape in shapes.items() if not name.endswith("position_ids")}
        assert (cross.layers[0][0]["fn"].heads, len(cross.layers)) == (16, 4)


def open_clip_file(width, patch):
    """Names and shapes of an image encoder of the published width and a text encoder, one layer each."""
    shapes = {"positional_embedding": (77, 512), "text_projection": (512, 64), "logit_scale": (),
              "visual.class_embedding": (width,), "visual.positional_embedding": (50, width),
              "visual.proj": (width, 64), "visual.conv1.weight": (width, 3, patch, patch),
              "token_embedding.weight": (100, 512)}
    norms = {"visual.ln_pre": width, "visual.ln_post": width, "ln_final": 512}
    for tower, wide in (("visual.transformer", width), ("transformer", 512)):
        block = f"{tower}.resblocks.0"
        norms |= {f"{block}.ln_1": wide, f"{block}.ln_2": wide}
        shapes |= {f"{block}.attn.in_proj_weight": (3 * wide, wide),
                   f"{block}.attn.in_proj_bias": (3 * wide,)}
        parts = {"attn.out_proj": (wide, wide), "mlp.c_fc": (128, wide), "mlp.c_proj": (wide, 128)}
        for part, size in parts.items():
            shapes |= {f"{block}.{part}.weight": size, f"{block}.{part}.bias": size[:1]}
    return shapes | {f"{name}.{part}": (wide,) for name, wide in norms.items() for part in ("weight", "bias")}


@pytest.mark.parametrize("backbone, heads", [
    ("ViT-g-14", 16), ("ViT-H-14", 16), ("ViT-L-14", 16), ("ViT-B-32", 12), ("ViT-B-16", 12)])
def test_heads_are_the_published(backbone, heads):
    *_, (width, patch) = BACKBONES[backbone]
    net = clip_model(Tensors(Path("clip.safetensors"), open_clip_file(width, patch), None), "gelu")
    vision, text = net.config.vision_config, net.config.text_config
    assert (vision.num_attention_heads, text.num_attention_heads) == (heads, 8)


# ---- scorers -----------------------------------------------------------------------------------------------

class GoldenTokenizer:
    """Stands for CLIP's where the prompts of a golden file are known as ids alone."""

    def __init__(self, rows: dict[str, list[int]], pad_token_id: int):
        self.rows, self.pad_token_id = rows, pad_token_id

    def get_vocab(self):
        return {"a": 0}

    def __call__(self, text, **options):
        one = isinstance(text, str)
        return SimpleNamespace(input_ids=self.rows[text] if one else [self.rows[prompt] for prompt in text])


def unpadded(ids):
    ids = ids[0].tolist()
    return ids[:ids.index(max(ids)) + 1]


# Kind, golden file, options, tensor that holds the scores, unit of the scorer in units of that.
SCORERS = [
    ("clip", "clipscore_*", dict(backbone="ViT-B-32"), "out.plain.score", 100),
    ("clip", "clipscore_*", dict(backbone="ViT-B-32", pipeline="dmd2"), "out.dmd2.score", 100),
    ("pickscore", "pickscore_*", {}, "out.score", 1),
    ("hpsv2", "hpsv2_*", {}, "out.aa.score", 100),
    ("hpsv2", "hpsv2_*", dict(version="v2.1"), "out.aa.score", 100),
    ("mps", "mps_*", {}, "out.score", 1),
    ("mps", "mps_*", dict(threshold=0.01), "out.score_forward_thr0.01", 1),
]
VARIANTS = ["ViT-B-32 clip, plain", "ViT-B-32 clip, dmd2", "PickScore_v1", "v2.0 assumed", "v2.1",
            "overall, threshold 0.3", "overall, threshold 0.01"]


TOKENIZER = ROOT / "models" / "tiny" / "tokenizer"


def scorer_of(kind, pattern, folder, tokenizer=TOKENIZER, **options):
    """(scorer, tensors, metadata) of the first golden file."""
    file, g, meta = checkpoint(folder / "clip", golden(f"{pattern}.safetensors")[0])
    return load_scorer(kind, file.parent, tokenizer, **options), g, meta


@pytest.mark.parametrize("case, variant", list(zip(SCORERS, VARIANTS)), ids=VARIANTS)
def test_scorer_prints_the_originals_score(case, variant, tmp_path, monkeypatch):
    kind, pattern, options, name, unit = case
    tokenizer = GoldenTokenizer({"a photo depicts": [49406, 320, 1125, 29340, 49407]}, 0)
    monkeypatch.setattr(scores, "load_tokenizer", lambda *_: tokenizer)
    path = golden(f"{pattern}.safetensors")[0]
    g, meta = read_golden(path)
    rows, columns = names_of(g, meta["golden"])
    tokenizer.rows |= {column: unpadded(g[f"in.tokens.{column}"]) for column in columns}
    tokenizer.pad_token_id = meta["golden"].get("pad_id")
    if kind == "mps":
        tokenizer.rows[CONDITION] = unpadded(g["in.condition"])
    scorer, *_ = scorer_of(kind, pattern, tmp_path, **options)
    assert scorer.describe == variant
    pairs = [(row, column) for row in rows for column in columns]  # each image with each prompt, in one batch
    found = scorer([picture(g[f"in.image.{row}"]) for row, _ in pairs], [column for _, column in pairs])
    assert found.dtype == torch.float32 and found.device.type == "cpu"
    near(found, unit * table(g, meta["golden"], name).flatten(), 1e-3)  # of values up to 100; tanh-gelu: 6e-3


@pytest.mark.parametrize("case", [SCORERS[2], SCORERS[-1]], ids=["pickscore", "mps"])
def test_batch_leaves_the_score(case, tmp_path):
    kind, pattern, options, *_ = case
    scorer, g, meta = scorer_of(kind, pattern, tmp_path, **options)
    image = picture(g[f"in.image.{names_of(g, meta)[0][0]}"])
    images, prompts = [image, image.rotate(90)], ["a red fox", "two"]
    both = scorer(images, prompts)
    near(both, torch.cat([scorer([image], [prompt]) for image, prompt in zip(images, prompts)]), 1e-4)
    assert both[0] != both[1]


def test_prompts_are_cleaned_as_the_original_does(tmp_path):
    cleaned, *_ = scorer_of("clip", "clipscore_*", tmp_path, backbone="ViT-B-32")
    raw, *_ = scorer_of("pickscore", "pickscore_*", tmp_path)
    assert cleaned.ids(["a &lt;b&gt;"]).equal(cleaned.ids(["a <b>"]))
    assert not raw.ids(["a &lt;b&gt;"]).equal(raw.ids(["a <b>"]))
    hpsv2, *_ = scorer_of("hpsv2", "hpsv2_*", tmp_path)
    assert hpsv2.ids(["a &lt;b&gt;"]).equal(cleaned.ids(["a <b>"]))
    assert not hpsv2.ids(["<|endoftext|>"]).equal(cleaned.ids(["<|endoftext|>"]))  # a word, and the token


# ---- what the user can mend --------------------------------------------------------------------------------

def test_a_weight_too_few_or_too_many_is_named(tmp_path):
    file, *_ = checkpoint(tmp_path, golden("hpsv2_*.safetensors")[0])
    weights = {name: t for name, t in open_tensors(file).items()}
    lost = "transformer.resblocks.0.attn.in_proj_bias"
    save_file({name: t for name, t in weights.items() if name != lost}, file)
    with pytest.raises(InputError, match=f"1 of .* missing \\({lost}\\)"):
        load_clip(open_tensors(file), "gelu")
    save_file(weights | {"visual.extra": torch.zeros(1)}, file)
    with pytest.raises(InputError, match=r"1 tensors are not expected \(visual.extra\)"):
        load_clip(open_tensors(file), "gelu")
    save_file({"decoder.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="expected a CLIP of images and text, but .* is missing"):
        load_clip(open_tensors(file), "gelu")
    save_file({"model.decoder.weight": torch.zeros(1)}, file)
    with pytest.raises(InputError, match="expected a CLIP of images and text, but .* is missing"):
        load_scorer("mps", file)


def test_config_beside_the_weights_that_does_not_fit(tmp_path):
    file, *_ = checkpoint(tmp_path, golden("hpsv2_*.safetensors")[0])
    file.with_name("config.json").write_text('{"vision_config": {"num_attention_heads": 7}}')
    with pytest.raises(InputError, match="no CLIP of these shapes and config.json .*heads"):
        load_clip(open_tensors(file), "gelu")
    for content in ("{", "7"):
        file.with_name("config.json").write_text(content)
        with pytest.raises(InputError, match="config.json: expected the JSON of a transformers CLIP"):
            load_clip(open_tensors(file), "gelu")


def test_missing_files_name_source_and_flag(tmp_path, monkeypatch):
    with pytest.raises(InputError, match="MPS_overall_checkpoint.pth: .*--mps-ckpt PATH.*drive.google.com"):
        load_scorer("mps")
    with pytest.raises(InputError, match="nowhere: no such .* expected HPS_v2_compressed.pt, as in xswu"):
        load_scorer("hpsv2", "nowhere")
    with pytest.raises(InputError, match="no backbone 'RN50'; expected one of ViT-g-14"):
        load_scorer("clip", backbone="RN50")
    asked = []

    def download(repo, file):
        asked.append((repo, file))
        raise EntryNotFoundError("404")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", download)
    with pytest.raises(InputError, match="PickScore_v1: no such file in .*; --pickscore-ckpt PATH takes a local copy"):
        load_scorer("pickscore")
    assert asked == [("yuvalkirstain/PickScore_v1", f) for f in ("model.safetensors", "pytorch_model.bin")]
    repo = "openai/clip-vit-large-patch14"
    with pytest.raises(InputError, match=f"vocab.json of {repo}.*; --tokenizer PATH takes a folder with it"):
        load_tokenizer(None, repo)
    with pytest.raises(InputError, match=f"no vocab.json and no merges.txt in this folder; .* as in {repo}"):
        load_tokenizer(tmp_path, repo)


def test_another_network_than_the_flag_says(tmp_path):
    file = tmp_path / "copy" / "HPS_v2.1_compressed.pt"
    file.parent.mkdir()
    file.touch()
    for path in (file, file.parent):
        with pytest.raises(InputError, match="another version; expected HPS_v2_compressed.pt for v2.0"):
            load_scorer("hpsv2", path)
    *_, (width, patch) = BACKBONES["ViT-B-32"]
    zeros = {name: torch.zeros(shape) for name, shape in open_clip_file(width, patch).items()}
    save_file(zeros, tmp_path / "clip.safetensors")
    with pytest.raises(InputError, match="holds a ViT-B-32; expected ViT-L-14, another --clip-backbone takes it"):
        load_scorer("clip", tmp_path / "clip.safetensors", TOKENIZER, backbone="ViT-L-14")
    for kind in ("pickscore", "hpsv2"):  # both are of one backbone
        with pytest.raises(InputError, match="holds a ViT-B-32; expected ViT-H-14$"):
            load_scorer(kind, tmp_path / "clip.safetensors", TOKENIZER)


def test_hpsv2_says_what_it_assumes(tmp_path, capsys):
    """Two versions of equal shapes: only the published file's name tells which one a file holds."""
    (tmp_path / "clip").mkdir()
    file, *_ = checkpoint(tmp_path / "clip", golden("hpsv2_*.safetensors")[0])
    assert load_scorer("hpsv2", file, TOKENIZER).describe == "v2.0 assumed"
    told = capsys.readouterr().err
    assert told.startswith(f"{file}: HPS v2.0 assumed, as neither") and told.count("\n") == 1
    published = tmp_path / "HPS_v2.1_compressed.pt"
    torch.save({"state_dict": {name: t for name, t in open_tensors(file).items()}}, published)
    published.with_name("config.json").write_bytes(file.with_name("config.json").read_bytes())
    for path, version in ((file, "v2.1"), (published, "v2.1"), (published.parent, "v2.1")):
        assert load_scorer("hpsv2", path, TOKENIZER, version=version).describe == "v2.1"
    assert capsys.readouterr().err == ""


def test_images_that_cannot_be_scored(tmp_path):
    scorer, g, _ = scorer_of("hpsv2", "hpsv2_*", tmp_path)
    with pytest.raises(InputError, match="1 images and 2 prompts"):
        scorer([Image.new("RGB", (64, 64))], ["a", "b"])
    size = scorer.net.config.vision_config.image_size
    for box in ((size, size - 4), (size - 4, size)):  # neither resized nor padded; the original fails too
        with pytest.raises(InputError, match=f"an image of {box[0]} x {box[1]}: .* long side"):
            scorer([Image.new("RGB", (64, 64)), Image.new("RGB", box)], ["a", "b"])


# ---- pickled modules ---------------------------------------------------------------------------------------

@pytest.mark.parametrize("path", golden("mps_*_module.pth"), ids=lambda p: p.stem)
def test_pickled_module_is_the_flat_file(path, tmp_path):
    before = set(sys.modules)
    module = open_module(path)
    assert not {name for name in set(sys.modules) - before if name.startswith(("trainer", "transformers"))}
    flat, _ = read_golden(path.with_name(path.name.replace("_module.pth", ".safetensors")))
    for name in flat:
        if name.startswith(("model.", "cross_model.")):
            near(module[name], flat[name], 0)
    assert module["cross_model.layers.0.0.fn.norm.bias"].dtype == torch.float32
    name = "model.text_model.embeddings.token_embedding.weight"
    near(module.rows(name, 2, 4), module[name][2:4], 0)
    net = load_mps(module)  # strict both ways
    torch.save(net.state_dict(), tmp_path / "flat.pt")
    again = load_mps(open_module(tmp_path / "flat.pt"))
    for a, b in zip(net.state_dict().values(), again.state_dict().values(), strict=True):
        near(a, b, 0)


def archive(path, program: bytes, **files: bytes):
    """A file of torch.save whose pickle is `program`."""
    with zipfile.ZipFile(path, "w") as file:
        for name, content in {"data.pkl": program, "version": b"3\n", **files}.items():
            file.writestr(f"archive/{name}", content)
    return path


class Call:
    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call


def test_a_pickle_that_asks_for_a_call_is_refused(tmp_path):
    mark = tmp_path / "mark"
    calls = {"posix.system": Call(os.system, f"touch {mark}"), "builtins.getattr": Call(getattr, 1, "real"),
             "subprocess.Popen": Call(subprocess.Popen, ["touch", str(mark)]), "pathlib.PosixPath": mark,
             "builtins.exec": Call(exec, f"open({str(mark)!r}, 'w')"),
             "torch.nn.modules.linear.Linear": Call(nn.Linear, 1, 1)}
    for protocol in range(5):
        for name, call in calls.items():
            program = pickle.dumps({"model.weight": call}, protocol, fix_imports=False)
            with pytest.raises(InputError, match=f"evil.pth: refused, .* run code .it calls {name}.;"):
                open_module(archive(tmp_path / "evil.pth", program))
    torch.save({"model.weight": torch.zeros(2), "extra": calls["posix.system"]}, tmp_path / "evil.pt")
    with pytest.raises(InputError, match="evil.pt: refused, .*it calls posix.system"):
        load_scorer("mps", tmp_path / "evil.pt")
    assert not mark.exists()


def test_an_archive_with_two_directories_is_refused(tmp_path):
    """torch finds the directory by the offset at the end of a file, zipfile just before that end: a file that is a
    pickle to one may be a program, which runs when it is loaded, to the other."""
    program = archive(tmp_path / "a", b"", **{"constants.pkl": b"", "code": bytes(1000)}).read_bytes()
    plain = archive(tmp_path / "b", pickle.dumps({}, 2)).read_bytes()
    ends = [data.rindex(b"PK\5\6") for data in (program, plain)]
    (start, size), (first, _) = (struct.unpack_from("<2L", data, end + 12)[::-1] for data, end in zip((program, plain), ends))
    entries = bytearray(plain[first:ends[1]])  # moved behind the program, and filled to the other directory's size
    last = entries.rindex(b"PK\1\2")
    for at in (0, last):
        place, = struct.unpack_from("<L", entries, at + 42)
        struct.pack_into("<L", entries, at + 42, place + start - first)
    struct.pack_into("<H", entries, last + 32, size - len(entries))
    (tmp_path / "x.pth").write_bytes(program[:ends[0]] + plain[:first] + entries.ljust(size, b" ") + program[ends[0]:])
    assert zipfile.ZipFile(tmp_path / "x.pth").namelist() == ["archive/data.pkl", "archive/version"]
    assert "constants.pkl" in torch._C.PyTorchFileReader(str(tmp_path / "x.pth")).get_all_records()
    for read in (open_module, open_tensors):
        with pytest.raises(InputError, match="two directories"):
            read(tmp_path / "x.pth")


def test_nothing_that_a_pickle_names_is_imported_or_changed(tmp_path):
    rebuild = torch._utils._rebuild_tensor_v2
    before = dict(vars(rebuild)), rebuild.__defaults__
    # Makes an object of antigravity.Apple without calling it, fills it; then tries to fill torch's function.
    program = (b"\x80\x02cantigravity\nApple\n)\x81}X\x01\x00\x00\x00aK\x01sb0"
               b"ctorch._utils\n_rebuild_tensor_v2\nN}X\x0c\x00\x00\x00__defaults__)s\x86b.")
    with pytest.raises(InputError, match="not a pickled module, or damaged"):
        open_module(archive(tmp_path / "odd.pth", program))
    assert "antigravity" not in sys.modules
    assert (dict(vars(rebuild)), rebuild.__defaults__) == before


def test_other_files_than_pickled_modules(tmp_path):
    (tmp_path / "old.pth").write_bytes(pickle.dumps([1]))
    with pytest.raises(InputError, match="expected a PyTorch file in zip format"):
        open_module(tmp_path / "old.pth")
    with pytest.raises(InputError, match="refused, it is a TorchScript program"):
        open_module(archive(tmp_path / "script.pth", pickle.dumps({}), **{"constants.pkl": b""}))
    with pytest.raises(InputError, match="no tensors in this file"):
        open_module(archive(tmp_path / "empty.pth", pickle.dumps({})))
    for program in (pickle.dumps(1), pickle.dumps({"a": 1})[:-2], b""):
        with pytest.raises(InputError, match="not a pickled module, or damaged"):
            open_module(archive(tmp_path / "odd.pth", program))
