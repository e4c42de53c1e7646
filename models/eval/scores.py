"""Scores of images for their prompts: CLIP score, PickScore, HPSv2, MPS, in the units that tables print.

    score = load_scorer("clip", backbone="ViT-g-14")  # or "pickscore", "hpsv2", "mps"
    print(score.describe, score(images, prompts).mean())

All four are a CLIP (models/eval/clip.py) and differ in weights, preprocessing and tokens. Sources: open_clip,
DMD2's coco_evaluator.py, yuvalkirstain/PickScore, tgxs002/HPSv2, Kwai-Kolors/MPS.
Letters: B images or prompts, L tokens of text, H W pixels.
"""
import html
import re
import sys
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, pad
from transformers import CLIPModel, CLIPTokenizer

from models.checkpoint import TORCH_SUFFIXES, InputError, find, open_tensors, weights_in
from models.eval.clip import image_tokens, image_vector, load_clip, text_tokens, text_vector
from models.eval.mps import CONDITION, load_mps, mps_score, open_module
from models.pictures import rgb
from models.text_encoders import at_end, check_vocabulary, open_tokenizer, pad_ids

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Name -> repository, what it was trained on, width and patch of its image encoder.
BACKBONES = {
    "ViT-g-14": ("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "laion2b_s12b_b42k", (1408, 14)),
    "ViT-H-14": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "laion2b_s32b_b79k", (1280, 14)),
    "ViT-L-14": ("openai/clip-vit-large-patch14", "openai", (1024, 14)),
    "ViT-B-32": ("openai/clip-vit-base-patch32", "openai", (768, 32)),
    "ViT-B-16": ("openai/clip-vit-base-patch16", "openai", (768, 16)),
}
OPEN_CLIP_FILES = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
MPS_FILE = "MPS_overall_checkpoint.pth"
MPS_SOURCE = ("https://drive.google.com/file/d/17qrK_aJkVNM75ZEvMEePpLj6L867MLkN "
              "(https://github.com/Kwai-Kolors/MPS)")


# ---- pixels ------------------------------------------------------------------------------------------------

def standardize(x: Tensor) -> Tensor:
    """(3 H W) in 0..1 -> CLIP's mean and deviation taken out."""
    mean, std = (x.new_tensor(c).view(3, 1, 1) for c in (MEAN, STD))
    return (x - mean) / std


def middle(image: Image.Image, size: int, crop: str = "torchvision") -> Image.Image:
    """The square of `size` in the middle. Where an odd number of pixels is cut off, `crop` "torchvision" (of
    CLIP, open_clip and DMD2) rounds the offset to even, "hf" (of transformers) down."""
    left, top = ((side - size) // 2 if crop == "hf" else round((side - size) / 2) for side in image.size)
    return image.crop((left, top, left + size, top + size))


def clip_pixels(image: Image.Image, size: int = 224, crop: str = "torchvision") -> Tensor:
    """Short side to `size`, bicubic in 8 bits, then the middle -> (3 size size). `crop` as in `middle`; "hf"
    also converts to RGB before it resizes, the other after."""
    image = image.convert("RGB") if crop == "hf" else image
    short = min(image.size)
    image = image.resize(tuple(int(size * side / short) for side in image.size), Image.Resampling.BICUBIC)
    return standardize(rgb(middle(image, size, crop)) / 255)


def dmd2_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """As DMD2 does it: the square in the middle, to 256 x 256, and only then CLIP's preprocessing."""
    square = middle(image.convert("RGB"), min(image.size))
    return clip_pixels(square.resize((256, 256), Image.Resampling.LANCZOS), size)


def hps_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """Long side to `size`, bicubic in floating point, antialiased as by torchvision from 0.17 on, black bars
    -> (3 size size). An image whose long side is `size` stays without bars, as it is."""
    x = rgb(image) / 255
    scale = size / max(x.shape[1:])
    if scale != 1:
        height, width = (round(side * scale) for side in x.shape[1:])
        x = interpolate(x[None], (height, width), mode="bicubic", antialias=True)[0]
        left, top = (size - width) // 2, (size - height) // 2
        x = pad(x, (left, size - width - left, top, size - height - top))
    return standardize(x)


# ---- tokens ------------------------------------------------------------------------------------------------

def clean(prompt: str) -> str:
    """What CLIP's and open_clip's tokenizers do to a text and transformers' does not: straight quotes and no
    HTML entities. The originals also repair wrongly decoded text, with ftfy."""
    for curly, straight in (("[\u02bc\u2018-\u201b]", "'"), ("[\u201c-\u201f]", '"')):
        prompt = re.sub(curly, straight, prompt)
    return html.unescape(html.unescape(prompt))


def token_ids(tokenizer, prompts: list[str], window: int, padding: int, **options) -> Tensor:
    """Ids (B window): start, at most window - 2 tokens, end, padding."""
    ids = tokenizer(prompts, truncation=True, max_length=window, **options).input_ids
    return pad_ids(ids, window, padding)


def insert_prefix(ids: Tensor, prefix: list[int]) -> Tensor:
    """DMD2's prompts: `prefix` after the start token of ids (B L), which 0 pads -> (B L), cut at the end; a
    prompt that fills all L then ends in the end token."""
    end = ids.amax(dim=1)
    longer = torch.cat([ids[:, :1], ids.new_tensor(prefix).expand(len(ids), -1), ids[:, 1:]], dim=1)
    longer = longer[:, :ids.shape[1]]
    longer[:, -1] = torch.where(longer[:, -1] != 0, end, 0)
    return longer


def load_tokenizer(folder: str | Path | None, repo: str) -> CLIPTokenizer:
    """From `folder`, or else the hub's `repo`. Raises InputError, as `open_tokenizer`."""
    if folder is None:
        advice = "--tokenizer PATH takes a folder with it"
        folder = [find(file, None, repo, advice) for file in TOKENIZER_FILES][0].parent
    try:
        return open_tokenizer(Path(folder))
    except InputError as error:
        raise InputError(f"{error}, as in {repo}") from error


# ---- scores ------------------------------------------------------------------------------------------------

def cosine(net: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Pixels (B 3 H W) and ids (B L) -> (B,)."""
    return cosine_similarity(image_vector(net, pixels), text_vector(net, ids), dim=-1)


@dataclass
class Scorer:
    """Images and as many prompts -> scores (B,), float32 on the CPU. `describe`: the variant, for a table."""
    describe: str
    pixels: Callable[[Image.Image], Tensor]  # -> 3 H W
    ids: Callable[[list[str]], Tensor]  # -> B L
    score: Callable[[Tensor, Tensor], Tensor]  # of pixels (B 3 H W) and ids
    net: nn.Module

    @torch.no_grad()
    def __call__(self, images: list[Image.Image], prompts: list[str]) -> Tensor:
        if len(images) != len(prompts):
            raise InputError(f"{len(images)} images and {len(prompts)} prompts; expected one for each")
        pixels, device = [self.pixels(image) for image in images], next(self.net.parameters()).device
        square = max(pixels[0].shape)
        for image, x in zip(images, pixels):
            if x.shape != (3, square, square):
                raise InputError(f"an image of {image.width} x {image.height}: HPSv2 has no answer where the "
                                 "long side is its own size and the other is not")
        return self.score(torch.stack(pixels).to(device), self.ids(prompts).to(device)).cpu()


def load_scorer(kind: str, ckpt: str | Path | None = None, tokenizer: str | Path | None = None,
                device: torch.device | str = "cpu", **options) -> Scorer:
    """The "clip", "pickscore", "hpsv2" or "mps" score.

    `ckpt`: a file or folder of weights, `tokenizer`: a folder; else the hub. Options of "clip": backbone, one
    of BACKBONES, and pipeline, "plain" or "dmd2"; of "hpsv2": version, "v2.0" or "v2.1"; of "mps": threshold.
    The cosine is in units of 0.01 for "clip" and "hpsv2", for the others times their exp(logit_scale). Raises
    InputError, whose advice is the flags of evaluate.py."""
    return one_of("score", kind, LOADERS)(ckpt, tokenizer, device, **options)


def one_of(what: str, value: str, choices: dict):
    if value not in choices:
        raise InputError(f"no {what} {value!r}; expected one of {', '.join(choices)}")
    return choices[value]


def weights(kind: str, files: tuple[str, ...], ckpt: str | Path | None, repo: str) -> Path:
    """The first of `files` in the folder `ckpt`, or else `ckpt` itself; without it the first in `repo`."""
    advice = f"--{kind}-ckpt PATH takes a local copy"
    if ckpt is not None:
        return next((Path(ckpt) / file for file in files if (Path(ckpt) / file).is_file()), None) or find(
            files[0], ckpt, repo)
    for file in files[:-1]:
        try:
            return find(file, None, repo, advice)
        except InputError as error:
            if "no such file" not in str(error):
                raise
    return find(files[-1], None, repo, advice)


def tokenizer_for(net: CLIPModel, given, ckpt, repo: str) -> CLIPTokenizer:
    """The `given` one, else that in the folder `ckpt`, else that of `repo`."""
    if given is None and ckpt is not None and (Path(ckpt) / "vocab.json").is_file():
        given = ckpt
    tokenizer = load_tokenizer(given, repo)
    check_vocabulary(tokenizer, net.text_model, "the weights")
    return tokenizer


def check_backbone(path: Path, net: CLIPModel, backbone: str, advice: str = "") -> None:
    vision = net.config.vision_config
    size = vision.hidden_size, vision.patch_size
    found = [name for name, (*_, published) in BACKBONES.items() if size == published]
    if found not in ([], [backbone]):
        raise InputError(f"{path}: holds a {found[0]}; expected {backbone}{advice}")


def clip_scorer(ckpt, tokenizer, device, backbone="ViT-g-14", pipeline="plain") -> Scorer:
    repo, tag, _ = one_of("backbone", backbone, BACKBONES)
    preprocess = one_of("pipeline", pipeline, {"plain": clip_pixels, "dmd2": dmd2_pixels})
    path = weights("clip", HUB_FILES if tag == "openai" else OPEN_CLIP_FILES + HUB_FILES, ckpt, repo)
    net = load_clip(open_tensors(path), "quick_gelu" if tag == "openai" else "gelu").to(device)
    vision, text = net.config.vision_config, net.config.text_config
    check_backbone(path, net, backbone, ", another --clip-backbone takes it")
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-L-14"][0])
    prefix = tok("a photo depicts").input_ids[1:-1] if pipeline == "dmd2" else []

    def ids(prompts: list[str]) -> Tensor:
        plain = token_ids(tok, [clean(prompt) for prompt in prompts], text.max_position_embeddings, 0)
        return insert_prefix(plain, prefix) if prefix else plain

    described = f"{backbone} {tag if ckpt is None else Path(ckpt).name}, {pipeline}"
    return Scorer(described, partial(preprocess, size=vision.image_size), ids,
                  lambda pixels, ids: 100 * cosine(net, pixels, ids), net)


def pick_scorer(ckpt, tokenizer, device) -> Scorer:
    path = weights("pickscore", HUB_FILES, ckpt, "yuvalkirstain/PickScore_v1")
    net = load_clip(open_tensors(path), "gelu").to(device)
    check_backbone(path, net, "ViT-H-14")
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-H-14"][0])
    window = net.config.text_config.max_position_embeddings
    return Scorer("PickScore_v1", partial(clip_pixels, size=net.config.vision_config.image_size, crop="hf"),
                  partial(token_ids, tok, window=window, padding=tok.pad_token_id),
                  lambda pixels, ids: net.logit_scale.exp() * cosine(net, pixels, ids), net)


def hps_scorer(ckpt, tokenizer, device, version: str | None = None) -> Scorer:
    """v2.0 unless `version` says otherwise. Only the published files' names tell the versions apart."""
    given, version = version, version or "v2.0"
    path = weights("hpsv2", (one_of("version", version, HPS_FILES),), ckpt, "xswu/HPSv2")
    path = weights_in(path) if path.is_dir() else path
    if path.name in set(HPS_FILES.values()) - {HPS_FILES[version]}:
        raise InputError(f"{path}: another version; expected {HPS_FILES[version]} for {version}")
    net, described = load_clip(open_tensors(path), "gelu").to(device), version
    check_backbone(path, net, "ViT-H-14")
    if path.name != HPS_FILES[version] and not given:
        described += " assumed"
        print(f"{path}: HPS {version} assumed, as neither {HPS_FILES['v2.0']} nor {HPS_FILES['v2.1']} is its "
              "name; --hpsv2-version says it", file=sys.stderr)
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-L-14"][0])
    window = net.config.text_config.max_position_embeddings

    def ids(prompts: list[str]) -> Tensor:  # "<|endoftext|>" in a prompt is text to HPSv2
        return token_ids(tok, [clean(prompt) for prompt in prompts], window, 0, split_special_tokens=True)

    return Scorer(described, partial(hps_pixels, size=net.config.vision_config.image_size), ids,
                  lambda pixels, ids: 100 * cosine(net, pixels, ids), net)


def mps_scorer(ckpt, tokenizer, device, threshold: float = 0.3) -> Scorer:
    if ckpt is None:
        raise InputError(f"{MPS_FILE}: not on the hub; --mps-ckpt PATH takes the file from {MPS_SOURCE}")
    path = weights("mps", (MPS_FILE,), ckpt, MPS_SOURCE)
    tensors = open_module(path) if path.suffix in TORCH_SUFFIXES else open_tensors(path)
    net = load_mps(tensors).to(device)
    clip, cross = net["model"], net["cross_model"]
    tok = tokenizer_for(clip, tokenizer, ckpt, BACKBONES["ViT-H-14"][0])
    window = clip.config.text_config.max_position_embeddings
    ids = partial(token_ids, tok, window=window, padding=tok.pad_token_id)
    condition = ids([CONDITION])

    def score(pixels: Tensor, ids: Tensor) -> Tensor:
        about, text = text_tokens(clip, torch.cat([condition.to(ids.device), ids])).split([1, len(ids)])
        return mps_score(cross, image_tokens(clip, pixels), text, at_end(text, ids), about[0],
                         clip.logit_scale, threshold)

    return Scorer(f"overall, threshold {threshold:g}",
                  partial(clip_pixels, size=clip.config.vision_config.image_size, crop="hf"), ids, score, net)


LOADERS = {"clip": clip_scorer, "pickscore": pick_scorer, "hpsv2": hps_scorer, "mps": mps_scorer}
