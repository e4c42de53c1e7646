"""Scores of images for their prompts: CLIP score, PickScore, HPSv2, MPS, in the units that tables print.

    score = load_scorer("clip", backbone="ViT-g-14")  # or "pickscore", "hpsv2", "mps"
    print(score.describe, score(images, prompts).mean())

All four are a CLIP of transformers, whatever layout its file has, and differ in weights, preprocessing and
tokens. Sources: open_clip, DMD2's coco_evaluator.py, yuvalkirstain/PickScore, tgxs002/HPSv2, Kwai-Kolors/MPS.
Letters: B images or prompts, L tokens of text, S of an image, P width of what both are projected to.
"""
import html
import json
import math
import re
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial, reduce
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, interpolate, pad
from transformers import CLIPConfig, CLIPModel, CLIPTokenizer

from models.checkpoint import TORCH_SUFFIXES, InputError, Tensors, check_names, find, load, open_tensors
from models.eval.mps import CONDITION, cross_model, mps_score, open_module
from models.text import at_end, check_vocabulary, pad_ids, shapes_of

MEAN, STD = (0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)
# Name -> repository, what it was trained on, width and patch of its image encoder.
BACKBONES = {
    "ViT-g-14": ("laion/CLIP-ViT-g-14-laion2B-s12B-b42K", "laion2b_s12b_b42k", (1408, 14)),
    "ViT-H-14": ("laion/CLIP-ViT-H-14-laion2B-s32B-b79K", "laion2b_s32b_b79k", (1280, 14)),
    "ViT-L-14": ("openai/clip-vit-large-patch14", "openai", (1024, 14)),
    "ViT-B-32": ("openai/clip-vit-base-patch32", "openai", (768, 32)),
    "ViT-B-16": ("openai/clip-vit-base-patch16", "openai", (768, 16)),
}
HEADS = {1280: 16, 1408: 16}  # width -> heads of the H and g image encoders; all others are 64 wide
IGNORED = ("*position_ids",)  # a buffer in files of older transformers
OPEN_CLIP_FILES = ("open_clip_pytorch_model.safetensors", "open_clip_pytorch_model.bin")
HUB_FILES = ("model.safetensors", "pytorch_model.bin")
TOKENIZER_FILES = ("vocab.json", "merges.txt", "tokenizer_config.json")
HPS_FILES = {"v2.0": "HPS_v2_compressed.pt", "v2.1": "HPS_v2.1_compressed.pt"}
MPS_FILE = "MPS_overall_checkpoint.pth"
MPS_SOURCE = "https://drive.google.com/file/d/17qrK_aJkVNM75ZEvMEePpLj6L867MLkN (https://github.com/Kwai-Kolors/MPS)"
# transformers' names -> open_clip's, which are OpenAI's.
RULES = (
    (r"^vision_model\.(embeddings\.)?", "visual."), (r"^text_model\.(embeddings\.)?", ""),
    (r"patch_embedding", "conv1"), (r"position_embedding\.weight", "positional_embedding"),
    (r"pre_layrnorm", "ln_pre"), (r"post_layernorm", "ln_post"), (r"final_layer_norm", "ln_final"),
    (r"encoder\.layers", "transformer.resblocks"), (r"layer_norm([12])", r"ln_\1"),
    (r"self_attn\.[qkv]_proj\.", "attn.in_proj_"), (r"self_attn", "attn"),
    (r"mlp\.fc1", "mlp.c_fc"), (r"mlp\.fc2", "mlp.c_proj"),
    (r"^visual_projection\.weight", "visual.proj"), (r"^text_projection\.weight", "text_projection"),
)


# ---- pixels ------------------------------------------------------------------------------------------------

def zero_to_one(image: Image.Image) -> Tensor:
    """-> (3 H W)."""
    return torch.from_numpy(np.array(image.convert("RGB"))).permute(2, 0, 1) / 255


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
    return standardize(zero_to_one(middle(image, size, crop)))


def dmd2_pixels(image: Image.Image, size: int = 224) -> Tensor:
    """As DMD2 does it: the square in the middle, to 256 x 256, and only then CLIP's preprocessing."""
    square = middle(image.convert("RGB"), min(image.size))
    return clip_pixels(square.resize((256, 256), Image.Resampling.LANCZOS), size)


def hps_pixels(image: Image.Image, size: int = 224, antialias: bool = True) -> Tensor:
    """Long side to `size`, bicubic in floating point, black bars -> (3 size size). `antialias` as torchvision
    does from 0.17 on; without as before. An image whose long side is `size` stays without bars, as it is."""
    x = zero_to_one(image)
    scale = size / max(x.shape[1:])
    if scale != 1:
        height, width = (round(side * scale) for side in x.shape[1:])
        x = interpolate(x[None], (height, width), mode="bicubic", antialias=antialias)[0]
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
    rows = tokenizer(prompts, truncation=True, max_length=window, **options).input_ids
    return pad_ids(rows, window, padding)


def insert_prefix(ids: Tensor, prefix: list[int]) -> Tensor:
    """DMD2's prompts: `prefix` after the start token of ids (B L), which 0 pads -> (B L), cut at the end; a
    row that is full then ends in the end token."""
    end = ids.amax(dim=1)
    longer = torch.cat([ids[:, :1], ids.new_tensor(prefix).expand(len(ids), -1), ids[:, 1:]], dim=1)
    longer = longer[:, :ids.shape[1]]
    longer[:, -1] = torch.where(longer[:, -1] != 0, end, 0)
    return longer


def load_tokenizer(folder: str | Path | None, repo: str) -> CLIPTokenizer:
    """From `folder`, or else the hub's `repo`. Raises InputError: transformers would take a folder without a
    vocabulary, or a failed download, for a tokenizer of two tokens."""
    try:
        if folder is None:
            folder = [find(file, None, repo) for file in TOKENIZER_FILES][0].parent
    except InputError as error:
        advice = "; --tokenizer PATH takes a folder with it"  # instead of the weights'
        raise InputError(str(error).rpartition("; ")[0] + advice) from error
    absent = [file for file in TOKENIZER_FILES[:2] if not (Path(folder) / file).is_file()]
    if absent and not (Path(folder) / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no {' and no '.join(absent)} in this folder; expected CLIP's tokenizer, "
                         f"as in {repo}")
    try:
        return CLIPTokenizer.from_pretrained(str(folder))
    except Exception as error:  # of many kinds, from the files' parsers
        raise InputError(f"{folder}: damaged tokenizer files ({type(error).__name__}: {error})") from error


# ---- networks ----------------------------------------------------------------------------------------------

def open_clip_name(name: str) -> str:
    return reduce(lambda new, rule: re.sub(*rule, new), RULES, name)


def open_clip_shapes(shapes: dict[str, tuple]) -> dict[str, tuple]:
    """Names and shapes of a transformers CLIP -> of the open_clip file: q, k and v are one tensor, what
    projects is transposed."""
    found = {}
    for name, shape in shapes.items():
        new = open_clip_name(name)
        wide = (3 * shape[0], *shape[1:]) if ".in_proj_" in new else shape
        found[new] = shape[::-1] if name.endswith("projection.weight") else wide
    return found


def from_open_clip(tensors: Tensors, shapes: dict[str, tuple]) -> Tensors:
    """An open_clip file as if it had the names and shapes of transformers. Raises InputError for another
    architecture, in the file's own names."""
    check_names(tensors, open_clip_shapes(shapes))

    def read(name: str, _) -> Tensor:
        new = open_clip_name(name)
        if ".in_proj_" in new:
            rows, part = shapes[name][0], "qkv".index(re.search("([qkv])_proj", name)[1])
            return tensors.rows(new, part * rows, (part + 1) * rows)
        return tensors[new].T.contiguous() if name.endswith("projection.weight") else tensors[new]

    return Tensors(tensors.path, shapes, read, tensors.metadata, tensors.prefix)


def clip_model(tensors: Tensors, activation: str) -> CLIPModel:
    """The CLIP of a file in transformers', open_clip's or OpenAI's names, on `meta`. Sizes come from the
    shapes, heads and activation from a config.json beside the file or as published. Raises InputError."""
    own = open_clip_name if "visual.conv1.weight" in tensors else str
    vision, text = "vision_model.embeddings", "text_model.embeddings"
    names = [f"{vision}.patch_embedding", f"{vision}.position_embedding", f"{text}.token_embedding",
             f"{text}.position_embedding", "text_projection", *(
                 f"{part}_model.encoder.layers.0.mlp.fc1" for part in ("vision", "text"))]
    (*_, patch), (places, _), (vocabulary, _), (window, _), projection, *fc1 = shapes_of(
        tensors, "a CLIP of images and text", [own(f"{name}.weight") for name in names])
    beside, sizes = tensors.path.with_name("config.json"), {}
    try:
        towers = dict(json.loads(beside.read_bytes())) if beside.is_file() else {}
    except (ValueError, TypeError) as error:
        raise InputError(f"{beside}: expected the JSON of a transformers CLIP") from error
    for part, (hidden, width) in zip(("vision_config", "text_config"), fc1):
        layers, given = own(part.replace("config", "model.encoder.layers.")), towers.get(part, {})
        sizes[part] = dict(
            hidden_size=width, intermediate_size=hidden, hidden_act=given.get("hidden_act", activation),
            num_attention_heads=given.get("num_attention_heads", HEADS.get(width, max(1, width // 64))),
            num_hidden_layers=sum(name.startswith(layers) and name.endswith(own(".layer_norm1.weight"))
                                  for name in tensors))
    sizes["vision_config"] |= dict(patch_size=patch, image_size=patch * math.isqrt(places - 1))
    sizes["text_config"] |= dict(vocab_size=vocabulary, max_position_embeddings=window,
                                 bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
    try:
        with torch.device("meta"):
            return CLIPModel(CLIPConfig(projection_dim=projection[0 if own is str else 1], **sizes))
    except Exception as error:  # transformers refuses sizes in many ways
        reason = " ".join(str(error).split())
        raise InputError(f"{tensors.path}: no CLIP of these shapes and {beside.name} ({reason})") from error


def load_clip(tensors: Tensors, activation: str, dtype: torch.dtype = torch.float32) -> CLIPModel:
    """`clip_model`, filled. Raises InputError unless the file holds exactly its tensors."""
    net = clip_model(tensors, activation)
    if "visual.conv1.weight" in tensors:
        tensors = from_open_clip(tensors, {name: tuple(p.shape) for name, p in net.state_dict().items()})
    load(net, tensors, dtype, ignore=IGNORED)
    return frozen(net)


def frozen(net: nn.Module) -> nn.Module:
    for module in net.modules():
        if hasattr(module, "position_ids"):  # a buffer that no file fills
            module.position_ids = torch.arange(module.position_embedding.num_embeddings)[None]
    return net.requires_grad_(False).eval()


# ---- scores ------------------------------------------------------------------------------------------------

def text_tokens(net: CLIPModel, ids: Tensor) -> Tensor:
    """Ids (B L) -> projected tokens (B L P). Padding after the end token changes none of those before it."""
    return net.text_projection(net.text_model(input_ids=ids).last_hidden_state)


def text_vector(net: CLIPModel, ids: Tensor) -> Tensor:
    """Ids (B L) -> (B P), the token that ends the prompt."""
    return at_end(text_tokens(net, ids), ids)


def image_vector(net: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (B 3 H W) -> (B P), the class token."""
    return net.visual_projection(net.vision_model(pixel_values=pixels).pooler_output)


def image_tokens(net: CLIPModel, pixels: Tensor) -> Tensor:
    """Pixels (B 3 H W) -> projected tokens (B S P); as in MPS, without the norm that the class token gets."""
    return net.visual_projection(net.vision_model(pixel_values=pixels).last_hidden_state)


def cosine(net: CLIPModel, pixels: Tensor, ids: Tensor) -> Tensor:
    """Pixels (B 3 H W) and ids (B L) -> (B,), float32."""
    return cosine_similarity(image_vector(net, pixels).float(), text_vector(net, ids).float(), dim=-1)


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
        pixels, p = [self.pixels(image) for image in images], next(self.net.parameters())
        square = max(pixels[0].shape)
        for image, x in zip(images, pixels):
            if x.shape != (3, square, square):
                raise InputError(f"an image of {image.width} x {image.height}: HPSv2 has no answer where the "
                                 "long side is its own size and the other is not")
        scores = self.score(torch.stack(pixels).to(p.device, p.dtype), self.ids(prompts).to(p.device))
        return scores.float().cpu()


def load_scorer(kind: str, ckpt: str | Path | None = None, tokenizer: str | Path | None = None,
                device: torch.device | str = "cpu", dtype: torch.dtype = torch.float32, **options) -> Scorer:
    """The "clip", "pickscore", "hpsv2" or "mps" score.

    `ckpt`: a file or folder of weights, `tokenizer`: a folder; else the hub. Options of "clip": backbone, one
    of BACKBONES, and pipeline, "plain" or "dmd2"; of "hpsv2": version, "v2.0" or "v2.1", and antialias; of
    "mps": threshold. The cosine is in units of 0.01 for "clip" and "hpsv2", for the others times their
    exp(logit_scale). Raises InputError."""
    scorer = one_of("score", kind, LOADERS)(ckpt, tokenizer, device, dtype, **options)
    if dtype != torch.float32:
        scorer.describe += f", {str(dtype).removeprefix('torch.')}"
    return scorer


def one_of(what: str, value: str, choices: dict):
    if value not in choices:
        raise InputError(f"no {what} {value!r}; expected one of {', '.join(choices)}")
    return choices[value]


def weights(files: tuple[str, ...], ckpt: str | Path | None, repo: str) -> Path:
    """The first of `files` in the folder `ckpt`, or else `ckpt` itself; without it the first in `repo`."""
    if ckpt is not None:
        return next((Path(ckpt) / file for file in files if (Path(ckpt) / file).is_file()), None) or find(
            files[0], ckpt, repo)
    for file in files[:-1]:
        try:
            return find(file, None, repo)
        except InputError as error:
            if "no such file" not in str(error):
                raise
    return find(files[-1], None, repo)


def tokenizer_for(net: CLIPModel, given, ckpt, repo: str) -> CLIPTokenizer:
    """The `given` one, else that in the folder `ckpt`, else that of `repo`."""
    if given is None and ckpt is not None and (Path(ckpt) / "vocab.json").is_file():
        given = ckpt
    tokenizer = load_tokenizer(given, repo)
    check_vocabulary(tokenizer, net.text_model, "the weights")
    return tokenizer


def clip_scorer(ckpt, tokenizer, device, dtype, backbone="ViT-g-14", pipeline="plain") -> Scorer:
    repo, tag, _ = one_of("backbone", backbone, BACKBONES)
    preprocess = one_of("pipeline", pipeline, {"plain": clip_pixels, "dmd2": dmd2_pixels})
    path = weights(HUB_FILES if tag == "openai" else OPEN_CLIP_FILES + HUB_FILES, ckpt, repo)
    net = load_clip(open_tensors(path), "quick_gelu" if tag == "openai" else "gelu", dtype).to(device)
    vision, text = net.config.vision_config, net.config.text_config
    size = vision.hidden_size, vision.patch_size
    found = [name for name, (*_, published) in BACKBONES.items() if size == published]
    if found not in ([], [backbone]):
        raise InputError(f"{path}: holds a {found[0]}; expected {backbone}, another --backbone takes it")
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-L-14"][0])
    prefix = tok("a photo depicts").input_ids[1:-1] if pipeline == "dmd2" else []

    def ids(prompts: list[str]) -> Tensor:
        rows = token_ids(tok, [clean(prompt) for prompt in prompts], text.max_position_embeddings, 0)
        return insert_prefix(rows, prefix) if prefix else rows

    described = f"{backbone} {tag if ckpt is None else Path(ckpt).name}, {pipeline}"
    return Scorer(described, partial(preprocess, size=vision.image_size), ids,
                  lambda pixels, ids: 100 * cosine(net, pixels, ids), net)


def pick_scorer(ckpt, tokenizer, device, dtype) -> Scorer:
    path = weights(HUB_FILES, ckpt, "yuvalkirstain/PickScore_v1")
    net = load_clip(open_tensors(path), "gelu", dtype).to(device)
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-H-14"][0])
    window = net.config.text_config.max_position_embeddings
    return Scorer("PickScore_v1", partial(clip_pixels, size=net.config.vision_config.image_size, crop="hf"),
                  partial(token_ids, tok, window=window, padding=tok.pad_token_id),
                  lambda pixels, ids: net.logit_scale.float().exp() * cosine(net, pixels, ids), net)


def hps_scorer(ckpt, tokenizer, device, dtype, version: str = "v2.0", antialias: bool = True) -> Scorer:
    path = weights((one_of("version", version, HPS_FILES),), ckpt, "xswu/HPSv2")
    if path.name in set(HPS_FILES.values()) - {HPS_FILES[version]}:
        raise InputError(f"{path}: another version; expected {HPS_FILES[version]} for {version}")
    net = load_clip(open_tensors(path), "gelu", dtype).to(device)
    tok = tokenizer_for(net, tokenizer, ckpt, BACKBONES["ViT-L-14"][0])
    window = net.config.text_config.max_position_embeddings

    def ids(prompts: list[str]) -> Tensor:  # "<|endoftext|>" in a prompt is text to HPSv2
        return token_ids(tok, [clean(prompt) for prompt in prompts], window, 0, split_special_tokens=True)

    return Scorer(version + ("" if antialias else ", no antialias"),
                  partial(hps_pixels, size=net.config.vision_config.image_size, antialias=antialias), ids,
                  lambda pixels, ids: 100 * cosine(net, pixels, ids), net)


def mps_scorer(ckpt, tokenizer, device, dtype, threshold: float = 0.3) -> Scorer:
    if ckpt is None:
        raise InputError(f"{MPS_FILE}: not on the hub; --ckpt PATH takes the file from {MPS_SOURCE}")
    path = weights((MPS_FILE,), ckpt, MPS_SOURCE)
    tensors = open_module(path) if path.suffix in TORCH_SUFFIXES else open_tensors(path)
    net = load_mps(tensors, dtype).to(device)
    clip, cross = net["model"], net["cross_model"]
    tok = tokenizer_for(clip, tokenizer, ckpt, BACKBONES["ViT-H-14"][0])
    window = clip.config.text_config.max_position_embeddings
    ids = partial(token_ids, tok, window=window, padding=tok.pad_token_id)
    condition = ids([CONDITION]).to(device)

    def score(pixels: Tensor, ids: Tensor) -> Tensor:
        about, text = text_tokens(clip, torch.cat([condition, ids])).split([1, len(ids)])
        return mps_score(cross, image_tokens(clip, pixels), text, at_end(text, ids), about[0],
                         clip.logit_scale, threshold)

    return Scorer(f"overall, threshold {threshold:g}",
                  partial(clip_pixels, size=clip.config.vision_config.image_size, crop="hf"), ids, score, net)


def load_mps(tensors: Tensors, dtype: torch.dtype = torch.float32) -> nn.ModuleDict:
    """The CLIP "model" and the "cross_model". Raises InputError unless the file holds exactly these."""
    net = nn.ModuleDict({"model": clip_model(tensors.group("model."), "gelu"),
                         "cross_model": cross_model(tensors.group("cross_model."))})
    load(net, tensors, dtype, ignore=IGNORED)
    return frozen(net)


LOADERS = {"clip": clip_scorer, "pickscore": pick_scorer, "hpsv2": hps_scorer, "mps": mps_scorer}
