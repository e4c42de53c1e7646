"""The embedded default: captioned shapes, an exact evaluator for them, and the training of the tiny teacher.

    python -m models.tiny --out runs/tiny  # trains VAE and MMDiT, writes models/tiny/tiny_sd3.safetensors

Every picture is one anti-aliased shape on a plain background, 32 x 32. Its attributes (shape, colour,
background, size) are uniform and independent; each size has one fixed radius, and the place is uniform on a
4-pixel grid. A caption names any subset of the four ("a red circle", "a shape on white"), so the true
distribution given a prompt is known exactly: uniform over whatever the prompt leaves open.

Letters: B pictures, A = 5 attributes (the four and the quadrant of the place), H W pixels, Z h w latent,
L tokens, D width.
"""
import argparse
import copy
import json
import math
import re
import time
from collections.abc import Callable
from functools import cache
from itertools import product
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import conv2d, l1_loss, mse_loss
from transformers import T5Tokenizer

from models.checkpoint import load, open_tensors, replacing, save_safetensors
from models.data import noise, save_rows, uniform
from models.diffusion import Denoiser, generator_times, q, solve, target, teacher_times
from models.mmdit import MMDiT
from models.text import Cond, SD3Text, load_tokenizers, text_parts
from models.vae import AutoencoderKL

SIZE = 32  # pixels
ATTRIBUTES = {
    "shape": ("circle", "square", "triangle", "cross", "ring"),
    "colour": ("red", "orange", "yellow", "green", "blue", "purple"),
    "background": ("white", "gray", "black", "pink"),
    "size": ("small", "large"),
    "place": ("top left", "top right", "bottom left", "bottom right"),  # read off pictures, not in captions
}
NAMED = tuple(ATTRIBUTES)[:4]
COUNTS = tuple(len(values) for values in ATTRIBUTES.values())
RGB = {"red": (215, 35, 40), "orange": (240, 135, 30), "yellow": (245, 220, 50), "green": (40, 160, 60),
       "blue": (45, 75, 215), "purple": (140, 50, 175),
       "white": (255, 255, 255), "gray": (128, 128, 128), "black": (0, 0, 0), "pink": (250, 185, 200)}
RADIUS = (4.5, 8.25)  # of a small and of a large shape, in pixels
PLACES = (4, 2)  # of a small and of a large shape along each axis, 4 pixels apart
AREA = (math.pi, 3.24, 2.03, 2.708, math.pi * (1.05 ** 2 - 0.6 ** 2))  # of each shape at radius 1


# ---- the data ----------------------------------------------------------------------------------------------

class Scenes(NamedTuple):
    """What is in B pictures: labels (B 4) into ATTRIBUTES, centre (B 2) x and y in pixels, radius (B,)."""
    labels: Tensor
    centre: Tensor
    radius: Tensor


def random_scenes(seed: int, indices: range, named: Tensor | None = None) -> Scenes:
    """Scene i depends on (seed, i) alone; `named` (B 4) fixes the attributes that are not -1 there."""
    u = uniform(seed, 0, "scene", [6 * i + column for i in indices for column in range(6)]).view(-1, 6)
    labels = (u[:, :4] * torch.tensor(COUNTS[:4])).long()
    if named is not None:
        labels = torch.where(named >= 0, named, labels)
    radius, places = torch.tensor(RADIUS)[labels[:, 3]], torch.tensor(PLACES)[labels[:, 3], None]
    centre = SIZE / 2 + 2 - 2 * places + 4 * (u[:, 4:] * places).floor()
    return Scenes(labels, centre, radius)


def coverage(centre: Tensor, radius: Tensor) -> Tensor:
    """How much of each pixel each of the five shapes covers, by its signed distance: (B 5 H W) in [0, 1]."""
    grid = torch.arange(SIZE) + 0.5
    x = grid[None, None, :] - centre[:, 0, None, None]
    y = grid[None, :, None] - centre[:, 1, None, None]
    r = radius[:, None, None]
    distance = (x * x + y * y).sqrt()
    box = torch.maximum(x.abs(), y.abs())
    bars = [torch.maximum(x.abs() - a * r, y.abs() - b * r) for a, b in ((1.1, 0.37), (0.37, 1.1))]
    shapes = [
        distance - r,
        box - 0.9 * r,
        torch.maximum(y - 0.625 * r, (math.sqrt(3) * x.abs() - y) / 2 - 0.625 * r),  # centroid in the centre
        torch.minimum(*bars),
        torch.maximum(distance - 1.05 * r, 0.6 * r - distance),
    ]
    return (0.5 - torch.stack(torch.broadcast_tensors(*shapes), dim=1)).clamp(0, 1)


def palette(attribute: str) -> Tensor:
    """RGB of an attribute's values in [-1, 1]: (values 3)."""
    return torch.tensor([RGB[value] for value in ATTRIBUTES[attribute]]) / 127.5 - 1


def draw(scenes: Scenes) -> Tensor:
    """Pictures (B 3 H W) in [-1, 1]."""
    shape, colour, background, _ = scenes.labels.unbind(1)
    alpha = coverage(scenes.centre, scenes.radius)[torch.arange(len(shape)), shape][:, None]  # B 1 H W
    colour, background = palette("colour")[colour], palette("background")[background]
    return background[:, :, None, None] + alpha * (colour - background)[:, :, None, None]


def caption(named: list[int]) -> str:
    """The caption that names these four attributes; -1 leaves one out."""
    shape, colour, background, size = (ATTRIBUTES[a][i] if i >= 0 else "" for a, i in zip(NAMED, named))
    words = ["an" if colour == "orange" and not size else "a", size, colour, shape or "shape",
             background and f"on {background}"]
    return " ".join(word for word in words if word)


@cache
def captions() -> list[str]:
    """Every caption there is, and last the empty prompt that guidance needs; `caption_index` finds one."""
    every = product(*(range(count + 1) for count in COUNTS[:4]))
    return [caption([i - 1 for i in kept]) for kept in every] + [""]


def caption_index(named: Tensor) -> Tensor:
    """Positions in `captions()` of the captions that name these attributes (B 4): (B,)."""
    index = torch.zeros(len(named), dtype=torch.long)
    for a in range(4):
        index = index * (COUNTS[a] + 1) + named[:, a] + 1
    return index


def parse(prompts: list[str]) -> Tensor:
    """What each prompt names: (B 4), -1 where it leaves an attribute free."""
    named = torch.full((len(prompts), 4), -1)
    for row, prompt in zip(named, prompts):
        words = set(re.findall("[a-z]+", prompt.lower()))
        for a, attribute in enumerate(NAMED):
            for value, word in enumerate(ATTRIBUTES[attribute]):
                if word in words:
                    row[a] = value
    return named


def evaluation_prompts(count: int, repeats: int = 32, seed: int = 1) -> list[str]:
    """`count` prompts, each distinct one `repeats` times: the coverage of its free attributes can be counted.

    They name 1, 2, 3, 4 attributes in turn; the order is such that any leading part is balanced too."""
    prompts, tries = [], iter(range(10 ** 6))
    while len(prompts) < max(1, count // repeats):
        u = uniform(seed, next(tries), "prompt", range(8))
        kept = u[4:].argsort()[:len(prompts) % 4 + 1]
        prompt = caption([int(u[a] * COUNTS[a]) if a in kept else -1 for a in range(4)])
        prompts += [prompt] if prompt not in prompts else []
    return [prompts[i % len(prompts)] for i in range(count)]


# ---- the evaluator -----------------------------------------------------------------------------------------

def contrast(alpha: Tensor) -> Tensor:
    """Coverage with a harder edge, so that a decoder's faint noise is no part of a shape."""
    return ((alpha - 0.2) / 0.6).clamp(0, 1)


def read(images: Tensor) -> Tensor:
    """Attributes read off pictures (B 3 H W): (B A), all -1 where one shows no single shape of the data set.

    Background: median of the border ring. Colour: the one whose mixture with the background explains the
    picture best, which also gives each pixel's coverage. Shape: the template of the same area and centroid
    with the best IoU. Size: that template's radius."""
    images = images.float().clamp(-1, 1)
    ring = torch.ones(SIZE, SIZE, dtype=torch.bool)
    ring[1:-1, 1:-1] = False
    border = images[:, :, ring].median(dim=2).values  # B 3
    off = (border[:, None] - palette("background")).norm(dim=2)
    valid = off.min(1).values < 0.35
    background = off.argmin(1)

    rest = images - palette("background")[background][:, :, None, None]
    step = palette("colour")[None] - palette("background")[background][:, None]  # B K 3
    alpha = torch.einsum("bchw,bkc->bkhw", rest, step) / step.square().sum(2)[:, :, None, None]
    alpha = alpha.clamp(0, 1)
    error = (rest[:, None] - alpha[:, :, None] * step[:, :, :, None, None]).square().sum((2, 3, 4))  # B K
    colour = error.argmin(1)
    every = torch.arange(len(images))
    valid &= error[every, colour] < 0.2 * rest.square().sum((1, 2, 3))

    alpha = contrast(alpha[every, colour])  # B H W
    area = alpha.sum((1, 2)).clamp_min(1e-6)
    grid = torch.arange(SIZE) + 0.5
    centre = torch.stack([(alpha.sum(i) * grid).sum(1) for i in (1, 2)], dim=1) / area[:, None]  # B 2
    radius = (area[:, None] / torch.tensor(AREA)).sqrt()  # B 5
    templates = torch.stack([coverage(centre, radius[:, s])[:, s] for s in range(5)], dim=1)
    templates = contrast(templates)  # B 5 H W
    shared = torch.minimum(templates, alpha[:, None]).sum((2, 3))
    overlap = shared / torch.maximum(templates, alpha[:, None]).sum((2, 3))
    shape = overlap.argmax(1)
    radius = radius[every, shape]
    valid &= (overlap.max(1).values > 0.8) & (radius > RADIUS[0] - 1) & (radius < RADIUS[1] + 1)

    size = (radius > sum(RADIUS) / 2).long()
    place = (centre[:, 0] > SIZE / 2).long() + 2 * (centre[:, 1] > SIZE / 2).long()
    return torch.where(valid[:, None], torch.stack([shape, colour, background, size, place], dim=1), -1)


def accuracy(labels: Tensor, named: Tensor) -> float:
    """Share of pictures that are valid and show all that their prompt names; labels (B A), named (B 4)."""
    right = ((labels[:, :4] == named) | (named < 0)).all(1) & (labels[:, 0] >= 0)
    return right.double().mean().item()


def total_variation(labels: Tensor, named: Tensor) -> float:
    """Mean over distinct prompts and the attributes each leaves free of 0.5 * sum |share - 1/K|, invalid
    pictures being one more outcome of probability 0. n pictures of a perfect sampler give about
    0.4 * sqrt((K - 1) / n), not 0."""
    distances = []
    for prompt in named.unique(dim=0):
        mine = labels[(named == prompt).all(1)]
        for a, count in enumerate(COUNTS):
            if a == 4 or prompt[a] < 0:
                share = torch.bincount(mine[:, a] + 1, minlength=count + 1).double() / len(mine)
                distances.append(0.5 * (share[1:] - 1 / count).abs().sum() + 0.5 * share[0])
    return torch.stack(distances).mean().item()


def features(images: Tensor) -> Tensor:
    """(B 48) float64: a picture's mean and, for sharpness, standard deviation of 24 random filters with ReLU.

    The filters (seed 0) are the feature space: changing them changes every Frechet distance reported."""
    weight = torch.randn(24, 3, 5, 5, generator=torch.Generator().manual_seed(0)) / math.sqrt(75)
    maps = conv2d(images.float().clamp(-1, 1), weight).relu().flatten(2)  # B 24 pixels
    return torch.cat([maps.mean(2), maps.std(2)], dim=1).double()


def frechet(a: Tensor, b: Tensor) -> float:
    """Squared Frechet distance of the Gaussians fitted to features a (n D) and b (m D), per feature and in
    units of b's per-feature variance: |mean difference|^2 + tr(A + B - 2 (A^1/2 B A^1/2)^1/2), in float64."""
    scale = b.std(0).clamp_min(1e-12)
    a, b = a / scale, b / scale
    A, B = a.T.cov(), b.T.cov()
    values, vectors = torch.linalg.eigh(A)
    root = vectors * values.clamp_min(0).sqrt() @ vectors.T
    cross = torch.linalg.eigvalsh(root @ B @ root).clamp_min(0).sqrt().sum()
    distance = (a.mean(0) - b.mean(0)).square().sum() + A.trace() + B.trace() - 2 * cross
    return max(distance.item(), 0.0) / a.shape[1]


def reference(prompts: list[str], seed: int, repeats: int = 1) -> Tensor:
    """Held-out data given the prompts: `repeats` pictures of each, free attributes uniform."""
    named = parse(prompts).repeat(repeats, 1)
    return draw(random_scenes(seed, range(len(named)), named))


@cache
def held_out_features(prompts: tuple[str, ...]) -> Tensor:
    return features(reference(list(prompts), seed=2, repeats=max(1, 4096 // len(prompts))))


def evaluate(images: Tensor, prompts: list[str]) -> dict[str, float]:
    """Prompt accuracy, total variation over free attributes and Frechet distance to held-out data of pictures
    (B 3 H W), uint8 or in [-1, 1]. Use `evaluation_prompts`, whose repeats the total variation needs."""
    images = images / 127.5 - 1 if images.dtype == torch.uint8 else images
    labels, named = read(images), parse(prompts)
    return dict(accuracy=accuracy(labels, named), total_variation=total_variation(labels, named),
                frechet=frechet(features(images), held_out_features(tuple(prompts))))


# ---- the tiny networks -------------------------------------------------------------------------------------

SHIFT = 3.0  # of the time schedules, as in SD3
BATCH, PICTURES = 64, 8192  # of the denoiser's training
LENGTH = 8  # tokens of each text encoder: start, six words, end
VAE = dict(ch=32, ch_mult=(1, 1, 1), num_res_blocks=1, z_channels=4, shift=0.0, scale=1.0, groups=8)
MMDIT = dict(depth=6, width=96, heads=6, patch=2, in_channels=4, pos_grid=8, context_dim=128, pooled_dim=128,
             qk_norm=True, attn2=())


def position_table(grid: int, width: int) -> Tensor:
    """2D sinusoids (1 grid*grid width), half of the channels for y, half for x, periods from 2 patches up."""
    k = torch.arange(width // 4) / (width // 4)
    angles = torch.arange(grid)[:, None] * math.pi * (1 / (2 * grid)) ** k
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # grid D/2
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=2)
    return rearrange(table, "y x D -> 1 (y x) D").contiguous()


def new_mmdit(seed: int) -> MMDiT:
    """Initialised as diffusion transformers are: gates and output zero, so every block starts as identity."""
    torch.manual_seed(seed)
    net = MMDiT(**MMDIT)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    net.pos_embed.copy_(position_table(MMDIT["pos_grid"], MMDIT["width"]))
    return net


def write_tokenizers(folder: Path) -> tuple[int, int]:
    """tokenizer/ (CLIP) and tokenizer_3/ (T5): one token for each word of the captions, letters for others.

    Returns the sizes of the two vocabularies."""
    words = {word for text in captions() for word in text.split()}
    words = sorted(words, key=lambda word: (-len(word), word))  # no merge of a short word may cut a long one
    letters = "abcdefghijklmnopqrstuvwxyz"
    merges = {}  # an ordered set
    for word in words:
        stem = word[0]
        for c in (*word[1:-1], word[-1] + "</w>") if len(word) > 1 else ():
            merges[stem, c] = None
            stem += c
    tokens = ["!", *letters, *(c + "</w>" for c in letters), *(a + b for a, b in merges)]
    tokens += ["<|startoftext|>", "<|endoftext|>"]  # CLIP's pooling finds the end as the largest id
    files = {"vocab.json": json.dumps({token: i for i, token in enumerate(tokens)}),
             "merges.txt": "\n".join(["#version: 0.2", *(f"{a} {b}" for a, b in merges)]),
             "tokenizer_config.json": json.dumps(dict(tokenizer_class="CLIPTokenizer",
                                                      model_max_length=LENGTH))}
    (folder / "tokenizer").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        (folder / "tokenizer" / name).write_text(text + "\n")
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(c, -4.0) for c in letters]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=LENGTH).save_pretrained(folder / "tokenizer_3")
    return len(tokens), len(pieces)


def text_encoders(clip_words: int, t5_words: int) -> dict[str, Tensor]:
    """Random, frozen CLIP-L, CLIP-G (one head of 64) and T5 (two of 64), names of the original single file.

    Random is enough: token embeddings of unit variance keep words apart, the denoiser learns the rest."""
    tensors, g = {}, torch.Generator().manual_seed(0)

    def matrix(name: str, *shape: int, std: float | None = None, bias: bool = False) -> None:
        tensors[f"{name}.weight"] = torch.randn(shape, generator=g) * (std or shape[1] ** -0.5)
        tensors.update({f"{name}.bias": torch.zeros(shape[0])} if bias else {})

    for name in ("clip_l", "clip_g"):
        root = f"text_encoders.{name}.transformer.text_model."
        matrix(root + "embeddings.token_embedding", clip_words, 64, std=1.0)
        matrix(root + "embeddings.position_embedding", LENGTH, 64, std=0.5)
        for norm in ("final_layer_norm", *(f"encoder.layers.{i}.layer_norm{j}" for i in "01" for j in "12")):
            tensors |= {f"{root}{norm}.weight": torch.ones(64), f"{root}{norm}.bias": torch.zeros(64)}
        for layer in (f"{root}encoder.layers.0.", f"{root}encoder.layers.1."):
            for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
                matrix(f"{layer}self_attn.{part}", 64, 64, bias=True)
            matrix(layer + "mlp.fc1", 256, 64, bias=True)
            matrix(layer + "mlp.fc2", 64, 256, bias=True)
    matrix("text_encoders.clip_g.transformer.text_projection", 64, 64)
    root = "text_encoders.t5xxl.transformer."
    matrix(root + "shared", t5_words, 128, std=1.0)
    tensors[root + "encoder.embed_tokens.weight"] = tensors[root + "shared.weight"].clone()
    for norm in ("final_layer_norm", "block.0.layer.0.layer_norm", "block.0.layer.1.layer_norm"):
        tensors[f"{root}encoder.{norm}.weight"] = torch.ones(128)
    attention = root + "encoder.block.0.layer.0.SelfAttention."
    feed = root + "encoder.block.0.layer.1.DenseReluDense."
    matrix(attention + "relative_attention_bias", 32, 2, std=1.0)
    matrix(attention + "q", 128, 128, std=128 ** -0.5 / 8)  # q carries the 1 / sqrt(64) that T5 leaves out
    for name in [attention + part for part in "kvo"] + [feed + part for part in ("wi_0", "wi_1", "wo")]:
        matrix(name, 128, 128)
    return tensors


def open_teacher(path: Path) -> tuple[MMDiT, AutoencoderKL, SD3Text]:
    """Denoiser, autoencoder and text encoders of a tiny checkpoint; tokenizers lie beside it."""
    prefixes = "model.diffusion_model.", "first_stage_model."
    denoiser, vae = (open_tensors(path).group(prefix) for prefix in prefixes)
    parts = text_parts(path)
    networks = MMDiT(**MMDIT), AutoencoderKL(**VAE)
    for net, tensors in zip(networks, (denoiser, vae)):
        load(net, tensors)
    return *networks, SD3Text(parts, load_tokenizers(path.parent), t5_length=LENGTH).load(parts)


# ---- training ----------------------------------------------------------------------------------------------

def train(name: str, net: nn.Module, loss_at: Callable, steps: int, lr: float, out: Path,
          stop: int | None = None, look: Callable | None = None) -> nn.Module:
    """Warm-up and cosine decay on `loss_at(net, step)`: Muon for the matrices of an MMDiT's blocks, which
    learn faster by it, AdamW for everything else. Returns the moving average of the weights.

    Batches depend on the step alone, all else is in out/<name>.pt: a killed run goes on as if never stopped.
    `stop` ends early, for tests; `look(average, step)` is called now and then to show samples."""
    average = copy.deepcopy(net).requires_grad_(False)
    matrices = [p for path, p in net.named_parameters() if path.startswith("joint_blocks.") and p.ndim == 2]
    others = [p for p in net.parameters() if all(p is not matrix for matrix in matrices)]
    opts = {"adamw": torch.optim.AdamW(others, lr=lr, betas=(0.9, 0.99))}
    if matrices:
        opts["muon"] = torch.optim.Muon(matrices, lr=lr, weight_decay=0.0, adjust_lr_fn="match_rms_adamw")
    kept, path, first = dict(net=net, average=average, **opts), out / f"{name}.pt", 0
    if path.exists():
        state = torch.load(path, weights_only=True)
        first = state.pop("step")
        for key, value in state.items():
            kept[key].load_state_dict(value)
    clock, total = time.time(), 0.0
    for step in range(first, min(steps, stop or steps)):
        loss = loss_at(net, step)
        net.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        decay = 0.5 + 0.5 * math.cos(math.pi * step / steps)
        for opt in opts.values():
            opt.param_groups[0]["lr"] = lr * min(1, (step + 1) / 200) * decay
            opt.step()
        for a, p in zip(average.parameters(), net.parameters()):
            a.lerp_(p.detach(), 1 - min(0.999, (step + 1) / (step + 10)))
        total += loss.item()
        done = step + 1
        if done % 100 == 0:
            print(f"{name} {done}/{steps} loss {total / 100:.5f} {(time.time() - clock) / 100:.3f} s/it",
                  flush=True)
            clock, total = time.time(), 0.0
        if done % 500 == 0 or done in (steps, stop):
            with replacing(path) as temporary:
                state = {key: value.state_dict() for key, value in kept.items()}
                torch.save(state | dict(step=done), temporary)
        if look and (done % 1000 == 0 or done == steps):
            look(average, done)
    return average


def vae_loss(net: AutoencoderKL, step: int) -> Tensor:
    """Reconstruction and a light KL term on 16 fresh pictures. L1 alone would long miss the small shapes."""
    images = draw(random_scenes(10, range(step * 16, step * 16 + 16)))
    mean, logvar = net.moments(images)
    eps = torch.randn(mean.shape, generator=torch.Generator().manual_seed(step))
    z = mean + torch.exp(0.5 * logvar) * eps
    kl = 0.5 * (mean.square() + logvar.exp() - 1 - logvar).mean()
    decoded = net.decode(z)
    return mse_loss(decoded, images) + 0.1 * l1_loss(decoded, images) + 3e-5 * kl


@torch.no_grad()
def normalise(vae: AutoencoderKL, images: Tensor) -> None:
    """Fold a scale per latent channel into the weights: the data's latents then have standard deviation 1."""
    std = vae.encode(images).std((0, 2, 3))
    last = vae.encoder.conv_out
    last.weight[:len(std)] /= std[:, None, None, None]  # the mean's rows
    last.bias[:len(std)] /= std
    last.bias[len(std):] -= 2 * std.log()  # the log-variance's
    vae.decoder.conv_in.weight *= std[:, None, None]


def flow_loss(latents: Tensor, labels: Tensor, table: Cond) -> Callable:
    """Eq. (3) with prompt dropout, each attribute named at probability 0.7. `table`: `captions()` encoded."""
    def loss_at(net: MMDiT, step: int) -> Tensor:
        g = torch.Generator().manual_seed(step)
        i = torch.randint(len(latents), (BATCH,), generator=g)
        named = torch.where(torch.rand(BATCH, 4, generator=g) < 0.7, labels[i], -1)
        prompt = torch.where(torch.rand(BATCH, generator=g) < 0.1, len(captions()) - 1, caption_index(named))
        t = torch.sigmoid(0.4 + torch.randn(BATCH, generator=g))  # logit-normal: outlines form at 0.3 to 0.8
        x_0, eps = latents[i], torch.randn(BATCH, *latents.shape[1:], generator=g)
        v = net(q("flow", x_0, t, eps), t, (table.context[prompt], table.pooled[prompt]))
        return mse_loss(v, target("velocity", "flow", x_0, t, eps))
    return loss_at


@torch.no_grad()
def generate(net: MMDiT, vae: AutoencoderKL, table: Cond, prompts: list[str], tn: Tensor,
             cfg: float | None) -> Tensor:
    """Pictures (B 3 H W) for prompts among `captions()`; picture i starts from the noise of index i."""
    images, shape = [], (vae.z_channels, SIZE // vae.factor, SIZE // vae.factor)
    for start in range(0, len(prompts), 128):
        index = caption_index(parse(prompts[start:start + 128]))
        z = noise(shape, 0, 0, "sample", list(range(start, start + len(index))))
        c, null = Cond(table.context[index], table.pooled[index]), Cond(table.context[-1:], table.pooled[-1:])
        w = None if cfg is None else torch.full((len(index),), cfg)
        images.append(vae.decode(solve(Denoiser(net), z, tn, c, null, w)))
    return torch.cat(images)


def report(path: Path, net: MMDiT, vae: AutoencoderKL, table: Cond, settings: list[tuple],
           count: int) -> None:
    """Print the figures of the data and of the teacher at each (steps, guidance), save samples of each."""
    prompts, rows = evaluation_prompts(count), []
    for setting in (None, *settings):
        label, images = "data", reference(prompts, seed=3)
        if setting:
            steps, cfg = setting
            label = f"teacher, {steps} step{'s' * (steps > 1)}" + (f", guidance {cfg:g}" if cfg else "")
            tn = (teacher_times if steps >= 20 else generator_times)(steps, SHIFT)
            images = generate(net, vae, table, prompts, tn, cfg)
        figures = evaluate(images, prompts)
        print(f"{label:30}" + "".join(f"  {name} {value:.4f}" for name, value in figures.items()), flush=True)
        rows.append((label, images[:16]))
    save_rows(path, rows, least=64)


def main() -> None:
    folder = Path(__file__).parent / "tiny"
    parser = argparse.ArgumentParser(description="Train the tiny VAE and SD3 teacher on captioned shapes.")
    parser.add_argument("--out", type=Path, default=Path("runs/tiny"), help="resumable state, sample grids")
    parser.add_argument("--ckpt", type=Path, default=folder / "tiny_sd3.safetensors", help="file to write")
    parser.add_argument("--vae-steps", type=int, default=2500)
    parser.add_argument("--steps", type=int, default=5000)
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    torch.manual_seed(0)
    vae = train("vae", AutoencoderKL(**VAE), vae_loss, args.vae_steps, 2e-3, args.out)
    scenes = random_scenes(11, range(PICTURES))
    prompts = evaluation_prompts(512)
    with torch.no_grad():
        normalise(vae, draw(Scenes(*(part[:1024] for part in scenes))))
        parts = zip(*(x.split(512) for x in scenes))
        latents = torch.cat([vae.encode(draw(Scenes(*part))) for part in parts])  # B Z h w
        decoded = vae.decode(vae.encode(reference(prompts, seed=4)))
        print("autoencoded data", evaluate(decoded, prompts), flush=True)

    weights = text_encoders(*write_tokenizers(args.ckpt.parent))
    weights |= {f"first_stage_model.{name}": p for name, p in vae.state_dict().items()}
    (args.ckpt.parent / "prompts.txt").write_text("\n".join(captions()[:-1]) + "\n")

    def export(net: MMDiT) -> None:
        denoiser = {f"model.diffusion_model.{name}": p for name, p in net.state_dict().items()}
        save_safetensors(args.ckpt, {name: p.half() for name, p in (denoiser | weights).items()})

    net = new_mmdit(0)
    export(net)
    table = open_teacher(args.ckpt)[2].encode(captions())

    def look(average: MMDiT, step: int) -> None:
        report(args.out / f"{step:06d}.png", average, vae, table, [(2, 3.0), (28, 3.0)], 256)

    loss = flow_loss(latents, scenes.labels, table)
    export(train("mmdit", net, loss, args.steps, 2e-3, args.out, look=look))
    net, vae, _ = open_teacher(args.ckpt)
    report(args.ckpt.parent / "teacher.png", net, vae, table, list(product((1, 2, 4, 28), (None, 3.0))), 1024)
    print(f"{args.ckpt}: {args.ckpt.stat().st_size / 1e6:.2f} MB")


if __name__ == "__main__":
    main()
