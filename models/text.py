"""Prompts to the conditioning of SD3, SDXL, CogVideoX, SD1.5 and Wan, by the encoders of models/text_encoders.py.

    parts = text_parts("sd3_medium_incl_clips_t5xxlfp16.safetensors")
    text = SD3Text(parts, load_tokenizers("stabilityai/stable-diffusion-3-medium-diffusers"))
    context, pooled = text.load(parts).encode(["a red fox"])

    parts = text_parts("sd_xl_base_1.0.safetensors")
    text = SDXLText(parts, load_tokenizers("stabilityai/stable-diffusion-xl-base-1.0", t5=False))

    parts = {"t5": open_tensors("CogVideoX-2b/text_encoder")}
    text = CogVideoXText(parts, load_tokenizers("CogVideoX-2b", t5=False))

    parts = text_parts("v1-5-pruned-emaonly.safetensors")
    text = SD15Text(parts, load_tokenizers("stable-diffusion-v1-5/stable-diffusion-v1-5", t5=False))

    parts = {"umt5": umt5_tensors(open_tensors("models_t5_umt5-xxl-enc-bf16.pth"))}
    text = WanText(parts, load_tokenizers("Wan2.1-T2V-1.3B/google/umt5-xxl", t5=False))

The unconditional of guidance is `unconditional()`: the encoded empty prompt for SD3 and SD1.5, zeros for SDXL
and CogVideoX, a negative prompt for Wan. Letters: B prompts, L tokens, D width of the context, P width of the
pooled vector.
"""
import html
import json
import math
import re
import warnings
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple, Self

import torch
from tokenizers.models import Unigram
from torch import Tensor, nn
from torch.nn.functional import pad

from models import checkpoint
from models.checkpoint import InputError, Tensors
from models.parse import read_object, short
from models.text_encoders import (
    EXTRAS,
    check_vocabulary,
    clip_encoder,
    clip_outputs,
    layers,
    pad_ids,
    run_clip,
    run_t5,
    t5_encoder,
)

try:
    import ftfy
except ImportError:  # `WanText` says what differs
    ftfy = None


class Cond(NamedTuple):
    context: Tensor  # B L D
    pooled: Tensor  # B P


def check_settings(path: str | Path, config) -> None:
    """Raises InputError where config.json beside an encoder's file says otherwise what no shape tells."""
    beside = Path(path) / "config.json" if Path(path).is_dir() else Path(path).with_name("config.json")
    settings = read_object(beside, "an encoder's settings") if beside.is_file() else {}
    for key in ("hidden_act", "num_attention_heads", "layer_norm_eps", "feed_forward_proj", "layer_norm_epsilon"):
        built = getattr(config, key, None)
        if settings.get("model_type") == config.model_type and settings.get(key, built) != built:
            raise InputError(f"{beside}: {key} {short(settings[key], 40)}; expected {built}")


class Text(nn.Module):
    """What the classes below share: the encoders `names`, as attributes, and the way from prompts to a Cond.

    The encoders are built on `meta` from the shapes in `parts` and filled by `load`; shard between the two.
    `tokenizers`: those of `load_tokenizers`; `t5_length`: tokens that T5 gets; `heads`: how many a CLIP has
    where one is not 64 wide; `device`: where token ids go.
    Raises InputError for a missing encoder, another architecture, tokenizers of another vocabulary."""

    def __init__(self, names: tuple[str, ...], parts: dict[str, Tensors], tokenizers: tuple | None,
                 device: torch.device | str, t5_length: int = 0, heads: dict[str, int] = {}):
        super().__init__()
        self.tokenizers, self.device = tokenizers, device
        files = ", ".join(dict.fromkeys(str(tensors.path) for tensors in parts.values())) or "no file"
        absent = [name for name in names if name not in parts]
        if absent:
            raise InputError(f"{files}: {' and '.join(absent)} missing; expected {' and '.join(names)}")
        with torch.device("meta"):
            for name in names:
                self.add_module(name, t5_encoder(parts[name], name) if name in ("t5", "umt5")
                                else clip_encoder(parts[name], name, heads.get(name)))
        self.requires_grad_(False).eval()
        first, second = tokenizers or (None, None)
        self.readers, self.windows = {}, {}  # of each encoder: its tokenizer, and how many tokens it takes
        for name, net in self.named_children():
            self.readers[name] = second if name == "t5" and len(names) > 1 else first
            self.windows[name] = t5_length if name in ("t5", "umt5") else net.config.max_position_embeddings
            # CLIP's end token is its last; T5's and UMT5's embeddings are padded, and hold up to 300 extra tokens.
            check_vocabulary(self.readers[name], net, files, 512 if name in ("t5", "umt5") else 0)
            check_settings(parts[name].path, net.config)

    def blocks(self) -> list[nn.Module]:
        return [block for net in self.children() for block in layers(net)]

    def load(self, parts: dict[str, Tensors], fill: Callable = checkpoint.load) -> Self:
        """Fill every encoder by `fill(net, tensors, ignore=patterns)`: sharded by `parallel.load_sharded`.

        Raises InputError for missing, extra and mis-shaped tensors."""
        for name, net in self.named_children():
            fill(net, parts[name], ignore=EXTRAS[name])
        return self

    @torch.no_grad()
    def encode_ids(self, *ids: Tensor) -> Cond:
        """The ids of `tokenize` -> context (B L D) and pooled (B P), float32."""
        context, pooled = self(*(rows.to(self.device) for rows in ids))
        return Cond(context.float(), pooled.float())

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> context (B L D) and pooled (B P), float32. Raises InputError without tokenizers."""
        return self.encode_ids(*self.tokenize(prompts))

    def unconditional(self) -> Cond:
        """The encoded empty prompt, as a batch of one."""
        return self.encode([""])

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """Ids (B L) for each encoder: CLIP-L's are padded with the end token, the others' with 0. What is too
        long is cut and ends in the end token."""
        return tuple(pad_ids(self.rows(name, prompts, window), window,
                             self.readers[name].eos_token_id if name == "clip_l" else 0)
                     for name, window in self.windows.items())

    def rows(self, name: str, prompts: list[str], most: int) -> list[list[int]]:
        """Token ids of the prompts for the encoder `name`, at most so many of each."""
        if self.readers[name] is None:
            folder = "tokenizer_3/" if name == "t5" and len(self.readers) > 1 else "tokenizer/"
            raise InputError(f"no tokenizers: expected a folder with {folder}")
        return self.readers[name](prompts, truncation=True, max_length=most).input_ids

    def overlong(self, prompts: list[str]) -> int:
        """How many of the prompts one encoder or more cuts. Raises InputError without tokenizers."""
        cut = set()
        for start in range(0, len(prompts), 1000):
            for name in set(self.windows) - {"clip_g"}:  # which has CLIP-L's tokens and window
                rows = self.rows(name, prompts[start:start + 1000], self.windows[name] + 1)
                cut |= {start + i for i, row in enumerate(rows) if len(row) > self.windows[name]}
        return len(cut)


class SD3Text(Text):
    """CLIP-L and CLIP-G side by side, then T5's tokens, of which there are always `t5_length`.

    Nothing masks T5's padding, so that another length is another conditioning: 256 is diffusers', and the
    original pads to at least 77 and never cuts. Without "t5" in `parts` T5's tokens are zeros of width
    `context_dim`, as in diffusers. CLIP takes the first 75 tokens, as in diffusers; the original only drops
    parentheses and differs in words that straddle the 75th."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None, t5_length: int = 256,
                 context_dim: int = 4096, heads: dict[str, int] = {}, device: torch.device | str = "cpu"):
        names = ("clip_l", "clip_g", "t5") if "t5" in parts else ("clip_l", "clip_g")
        super().__init__(names, parts, tokenizers, device, t5_length, heads)
        self.t5, self.t5_length = getattr(self, "t5", None), t5_length
        self.context_dim = self.t5.config.d_model if self.t5 else context_dim
        clip_width = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        if clip_width > self.context_dim:
            raise InputError(f"{parts['clip_l'].path}: CLIP-L and CLIP-G are {clip_width} wide together; "
                             f"expected at most {self.context_dim}, the width of the context")

    def forward(self, l_ids: Tensor, g_ids: Tensor, t5_ids: Tensor) -> Cond:
        """-> context (B 77+L D), pooled (B P)."""
        l_states, l_pooled = run_clip(self.clip_l, l_ids)
        g_states, g_pooled = run_clip(self.clip_g, g_ids)
        clip = torch.cat([l_states, g_states], dim=-1)
        clip = pad(clip, (0, self.context_dim - clip.shape[-1]))  # B 77 D
        t5 = run_t5(self.t5, t5_ids) if self.t5 else clip.new_zeros(*t5_ids.shape, self.context_dim)  # B L D
        return Cond(torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=-1))

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, ...]:
        """As Text; ids that are not read stand for the zeros of a T5 that is not there."""
        ids = super().tokenize(prompts)
        return ids if self.t5 else (*ids, torch.zeros(len(prompts), self.t5_length, dtype=torch.long))


class SDXLText(Text):
    """CLIP-L and CLIP-G side by side. The pooled part is SDXL's vector y: CLIP-G pooled, `size_embedding` of
    the original (height, width), the crop's (top, left) and the target (height, width). The first and the
    last are `size`, the crop is (0, 0): the picture was neither scaled nor cropped.  # [choice]"""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None,
                 size: tuple[int, int] = (1024, 1024), heads: dict[str, int] = {},
                 device: torch.device | str = "cpu"):
        super().__init__(("clip_l", "clip_g"), parts, tokenizers, device, heads=heads)
        self.size = size

    def forward(self, l_ids: Tensor, g_ids: Tensor) -> Cond:
        """-> context (B 77 D), pooled (B P), which is y without the sizes."""
        l_states, _ = run_clip(self.clip_l, l_ids)
        g_states, g_pooled = run_clip(self.clip_g, g_ids)
        return Cond(torch.cat([l_states, g_states], dim=-1), g_pooled)

    def encode_ids(self, *ids: Tensor) -> Cond:
        """Ids (B 77), (B 77) -> context (B 77 D) and y (B P+6*256), float32."""
        return self.with_sizes(super().encode_ids(*ids))

    def with_sizes(self, cond: Cond) -> Cond:
        """y in place of the pooled vector, in float32: bfloat16 would round 1026 to 1024."""
        sizes = torch.tensor([[*self.size, 0, 0, *self.size]], device=cond.pooled.device)
        embedded = size_embedding(sizes).expand(len(cond.pooled), -1)
        return Cond(cond.context, torch.cat([cond.pooled, embedded], dim=-1))

    def unconditional(self) -> Cond:
        """Zeros for all that comes of the prompt, as a batch of one; the sizes stay."""
        clip_l, clip_g = self.clip_l.config, self.clip_g.config
        context = torch.zeros(1, self.windows["clip_l"], clip_l.hidden_size + clip_g.hidden_size, device=self.device)
        return self.with_sizes(Cond(context, context.new_zeros(1, clip_g.projection_dim)))


def size_embedding(numbers: Tensor) -> Tensor:
    """Pixels (B n), such as n = 2 heights and widths -> (B n*256): cosines, then sines, of each number."""
    angles = numbers[..., None] * torch.exp(-math.log(10000) * torch.arange(128, device=numbers.device) / 128)
    return torch.cat([angles.cos(), angles.sin()], dim=-1).flatten(1)


class CogVideoXText(Text):
    """T5's tokens, always `length` of them; there is no pooled vector (B 0).

    `null`: guidance's unconditional, "zeros" as the original was trained with, or "empty", the encoded empty
    prompt that diffusers uses. T5's tokenizer is the first of `tokenizers`, that of tokenizer/."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None, length: int = 226,
                 null: str = "zeros", device: torch.device | str = "cpu"):
        super().__init__(("t5",), parts, tokenizers, device, length)
        self.null = null

    def forward(self, ids: Tensor) -> Cond:
        """-> context (B L D), pooled (B 0)."""
        context = run_t5(self.t5, ids)
        return Cond(context, context.new_zeros(len(ids), 0))

    def unconditional(self) -> Cond:
        """As a batch of one."""
        if self.null == "empty":
            return super().unconditional()
        context = torch.zeros(1, self.windows["t5"], self.t5.config.d_model, device=self.device)
        return Cond(context, context.new_zeros(1, 0))


class SD15Text(Text):
    """CLIP-L's last layer with the final norm, no layer skipped; there is no pooled vector (B 0)."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None, heads: dict[str, int] = {},
                 device: torch.device | str = "cpu"):
        super().__init__(("clip_l",), parts, tokenizers, device, heads=heads)

    def forward(self, ids: Tensor) -> Cond:
        """-> context (B 77 D), pooled (B 0)."""
        context = clip_outputs(self.clip_l, ids).last_hidden_state
        return Cond(context, context.new_zeros(len(ids), 0))


# The original's, which the unconditional is made of, as it is after the cleaning: with half-width commas.
WAN_NEGATIVE = (
    "色调艳丽,过曝,静态,细节模糊不清,字幕,风格,作品,画作,画面,静止,整体发灰,最差质量,低质量,JPEG压缩残留,丑陋的,残缺的,"
    "多余的手指,画得不好的手部,画得不好的脸部,畸形的,毁容的,形态畸形的肢体,手指融合,静止不动的画面,杂乱的背景,三条腿,"
    "背景人很多,倒着走")


def clean_prompt(prompt: str) -> str:
    """As the original does: mended by ftfy where that is installed, HTML entities read twice, single blanks."""
    prompt = ftfy.fix_text(prompt) if ftfy else prompt
    return re.sub(r"\s+", " ", html.unescape(html.unescape(prompt))).strip()


class WanText(Text):
    """UMT5's tokens and zeros after them, always `length` rows; there is no pooled vector (B 0).

    `null`: guidance's unconditional, "negative" for the original's negative prompt or "empty" for the empty one,
    which is diffusers'."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None, length: int = 512,
                 null: str = "negative", device: torch.device | str = "cpu"):
        super().__init__(("umt5",), parts, tokenizers, device, length)
        self.null, tokenizer = null, self.readers["umt5"]
        if tokenizer is not None:  # transformers 5 gives unknown characters T5's id, 2; UMT5's own is 3
            vocabulary = json.loads(tokenizer.backend_tokenizer.to_str())["model"]["vocab"]
            tokenizer.backend_tokenizer.model = Unigram([*map(tuple, vocabulary)], tokenizer.unk_token_id)
        if ftfy is None:
            warnings.warn("ftfy is not installed: full-width punctuation, ligatures, curly quotes and broken "
                          "encodings in prompts stay as they are, where Wan's original mends them; `pip install ftfy`")

    def forward(self, ids: Tensor) -> Cond:
        """-> context (B L D), pooled (B 0)."""
        mask = ids.flip(1).cumsum(1).flip(1) > 0  # up to the end token; padding, 0 in all of them, follows it
        context = run_t5(self.umt5, ids, mask).masked_fill(~mask[..., None], 0)
        return Cond(context, context.new_zeros(len(ids), 0))

    def rows(self, name: str, prompts: list[str], most: int) -> list[list[int]]:
        return super().rows(name, [clean_prompt(prompt) for prompt in prompts], most)

    def unconditional(self) -> Cond:
        """As a batch of one."""
        return self.encode([WAN_NEGATIVE if self.null == "negative" else ""])
