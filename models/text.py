"""Text encoders of SD3 (CLIP-L, CLIP-G, T5 v1.1), SDXL (the CLIPs) and CogVideoX (T5), and the conditioning
made of them.

Each encoder keeps the tensor names of its file, PREFIXES of a single file removed. The networks are
transformers' but for a CLIP-G in open_clip's names, as SDXL's single file has it: that is OpenClip.

    parts = text_parts("sd3_medium_incl_clips_t5xxlfp16.safetensors")
    text = SD3Text(parts, load_tokenizers("stabilityai/stable-diffusion-3-medium-diffusers"))
    context, pooled = text.load(parts).encode(["a red fox"])

    parts = text_parts("sd_xl_base_1.0.safetensors")
    text = SDXLText(parts, load_tokenizers("stabilityai/stable-diffusion-xl-base-1.0", t5=False))

    parts = {"t5": open_tensors("CogVideoX-2b/text_encoder")}
    text = CogVideoXText(parts, load_tokenizers("CogVideoX-2b", t5=False))

The unconditional of guidance is `unconditional()`: SD3's encoded empty prompt, SDXL's and CogVideoX's zeros.
Letters: B prompts, L tokens, D width of the context, P width of the pooled vector, N heads.
"""
from collections import OrderedDict
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import linear, pad, scaled_dot_product_attention
from transformers import AutoTokenizer, CLIPTextConfig, CLIPTextModelWithProjection, T5Config, T5EncoderModel

from models import checkpoint
from models.checkpoint import InputError, Tensors, open_shards, open_tensors
from models.mmdit import timestep_embedding

# Attribute of SD3Text and SDXLText -> name in SD3's original files, folder in the diffusers layout.
FILES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
# Groups of a single file, SD3's and SDXL's.
PREFIXES = {f"text_encoders.{file}.transformer.": name for name, file in FILES.items()} | {
    "conditioner.embedders.0.transformer.": "clip_l", "conditioner.embedders.1.model.": "clip_g"}
# What files hold and the networks do not: CLIP-L is used unprojected, and T5's embedding is stored twice.
EXTRAS = {
    "clip_l": ("text_projection.weight", "logit_scale", "*position_ids"),
    "clip_g": ("logit_scale", "*position_ids"),
    "t5": ("encoder.embed_tokens.weight", "scaled_fp8"),
}
T5_MINIMUM = 77  # tokens that the original pads T5 to


class Cond(NamedTuple):
    context: Tensor  # B L D
    pooled: Tensor  # B P


# ---- files -------------------------------------------------------------------------------------------------

def text_parts(*paths: str | Path) -> dict[str, Tensors]:
    """The encoders in these paths, "clip_l", "clip_g", "t5" -> tensors; a later path replaces an earlier one.

    A path is a single file with text_encoders.* or conditioner.embedders.* groups, one encoder's file
    (clip_l*, clip_g*, t5xxl*), a folder of those (of two T5 files the float16 one), or a diffusers-layout
    folder.
    Raises InputError for a path without any."""
    parts = {}
    for path in map(Path, paths):
        found = folder_parts(path) if path.is_dir() else file_parts(path)
        if not found:
            raise InputError(f"{path}: no text encoders; expected text_encoders.clip_l.transformer.* or "
                             "conditioner.embedders.0.transformer.* in a file, clip_l.safetensors, "
                             "clip_g.safetensors and t5xxl_fp16.safetensors in a folder, or text_encoder/, "
                             "text_encoder_2/ and text_encoder_3/")
        parts |= {name: t5_tensors(found[name]) if name == "t5" else found[name] for name in found}
    return parts


def file_parts(path: Path) -> dict[str, Tensors]:
    tensors = open_tensors(path)
    groups = {name: tensors.group(prefix) for prefix, name in PREFIXES.items()
              if any(key.startswith(prefix) for key in tensors)}
    return groups or {name: tensors for name, file in FILES.items() if path.name.startswith(file)}


def folder_parts(folder: Path) -> dict[str, Tensors]:
    hub = {name: folder / inside for name, inside in FOLDERS.items() if (folder / inside).is_dir()}
    if hub:
        return {name: hub_tensors(inside) for name, inside in hub.items()}
    folder = folder / "text_encoders" if (folder / "text_encoders").is_dir() else folder
    files = {name: sorted(folder.glob(f"{file}*.safetensors")) for name, file in FILES.items()}
    return {name: open_tensors(found[0]) for name, found in files.items() if found}


def hub_tensors(folder: Path) -> Tensors:
    """A complete download holds the weights twice, once more as `fp16`."""
    for name in ("model.safetensors", "model.safetensors.index.json", "model.fp16.safetensors"):
        if (folder / name).is_file():
            return open_tensors(folder / name)
    half = folder / "model.safetensors.index.fp16.json"
    return open_shards(half) if half.is_file() else open_tensors(folder)


# ---- tokenizers --------------------------------------------------------------------------------------------

def load_tokenizers(source: str | Path, t5: bool = True) -> tuple:
    """(CLIP's tokenizer, T5's or None) from tokenizer/ and tokenizer_3/ of a folder or a hub repository.
    `t5=False` leaves tokenizer_3/ alone, which SDXL's and CogVideoX's repositories lack; a folder may lack it
    in any case. (In CogVideoX's, tokenizer/ is T5's.)

    tokenizer_2/ is not used: it has the vocabulary of tokenizer/, but takes every "!" in a prompt for its
    padding token, which the original does not.  # [choice]
    Raises InputError for a folder without tokenizer/, damaged files, a failed download."""
    folder = Path(source)
    wanted = ("tokenizer", "tokenizer_3") if t5 else ("tokenizer",)
    names = [name for name in wanted if not folder.is_dir() or (folder / name).is_dir()]
    if (folder / "spiece.model").is_file():  # T5's own folder, as CogVideoX's original release has it
        wanted = names = [""]
    expected = f"expected a folder with {'/ and '.join(wanted)}/, as in a diffusers-layout download"
    if not {"tokenizer", ""} & set(names):
        raise InputError(f"{source}: {expected}")
    try:
        tokenizers = [AutoTokenizer.from_pretrained(str(source), subfolder=name) for name in names]
    except (OSError, ValueError) as error:
        reason = (str(error) or type(error).__name__).splitlines()[0]
        raise InputError(f"{source}: no tokenizers ({reason}); {expected}") from error
    return tokenizers[0], tokenizers[1] if len(tokenizers) > 1 else None


def pad_ids(rows: list[list[int]], length: int, value: int) -> Tensor:
    """Token ids (B length), each row filled up on the right."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


def clip_ids(tokenizer, prompts: list[str], window: int) -> tuple[Tensor, Tensor]:
    """Ids (B window) for CLIP-L, padded with the end token, and for CLIP-G, padded with 0."""
    rows = tokenizer(prompts, truncation=True, max_length=window).input_ids
    return pad_ids(rows, window, tokenizer.eos_token_id), pad_ids(rows, window, 0)


# ---- encoders ----------------------------------------------------------------------------------------------

def shapes_of(tensors: Tensors, kind: str, names: list[str]) -> list[tuple]:
    missing = [tensors.prefix + name for name in names if name not in tensors]
    if missing:
        raise InputError(f"{tensors.path}: expected {kind}, but {missing[0]} is missing")
    return [tensors.shapes[name] for name in names]


class ResBlock(nn.Module):
    def __init__(self, width: int, hidden: int, heads: int):
        super().__init__()
        self.ln_1 = nn.LayerNorm(width)
        self.attn = nn.MultiheadAttention(width, heads)  # tensors only: its forward differs by head count
        self.ln_2 = nn.LayerNorm(width)
        self.mlp = nn.Sequential(OrderedDict(
            c_fc=nn.Linear(width, hidden), gelu=nn.GELU(), c_proj=nn.Linear(hidden, width)))

    def forward(self, x: Tensor) -> Tensor:
        qkv = linear(self.ln_1(x), self.attn.in_proj_weight, self.attn.in_proj_bias)
        q, k, v = rearrange(qkv, "B L (three N D) -> three B N L D", three=3, N=self.attn.num_heads)
        attention = scaled_dot_product_attention(q, k, v, is_causal=True)
        x = x + self.attn.out_proj(rearrange(attention, "B N L D -> B L (N D)"))
        return x + self.mlp(self.ln_2(x))


class OpenClip(nn.Module):
    """CLIP-G in open_clip's layout: q, k and v are one tensor, the projection is transposed."""

    def __init__(self, config: CLIPTextConfig):
        super().__init__()
        width, hidden, heads = config.hidden_size, config.intermediate_size, config.num_attention_heads
        self.config = config
        self.token_embedding = nn.Embedding(config.vocab_size, width)
        self.positional_embedding = nn.Parameter(torch.empty(config.max_position_embeddings, width))
        blocks = nn.ModuleList(ResBlock(width, hidden, heads) for _ in range(config.num_hidden_layers))
        self.transformer = nn.ModuleDict({"resblocks": blocks})
        self.ln_final = nn.LayerNorm(width)
        self.text_projection = nn.Parameter(torch.empty(width, config.projection_dim))

    def forward(self, ids: Tensor) -> tuple[Tensor, Tensor]:
        *blocks, last = self.transformer["resblocks"]
        x = self.token_embedding(ids) + self.positional_embedding  # B 77 width
        for block in blocks:
            x = block(x)
        return x, at_end(self.ln_final(last(x)), ids) @ self.text_projection


def clip_encoder(tensors: Tensors, activation: str, projected: bool, heads: int | None) -> nn.Module:
    """transformers' network or, for a CLIP-G in open_clip's names, OpenClip."""
    original = projected and any(name.startswith("transformer.resblocks.") for name in tensors)
    names = ["token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"]
    hub = ["embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"]
    (vocabulary, width), (window, _), (hidden, _) = shapes_of(
        tensors, "a CLIP text encoder", names if original else [f"text_model.{name}.weight" for name in hub])
    norm = ".ln_1.weight" if original else ".layer_norm1.weight"
    projection = tensors.shapes.get("text_projection" if original else "text_projection.weight", (width,))
    config = CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=window, hidden_size=width, intermediate_size=hidden,
        num_hidden_layers=sum(name.endswith(norm) for name in tensors),
        num_attention_heads=heads or max(1, width // 64), hidden_act=activation,
        projection_dim=projection[-1 if original else 0],
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
    if original:
        return OpenClip(config)
    clip = CLIPTextModelWithProjection(config)
    if not projected:
        clip.text_projection = nn.Identity()
    del clip.text_model.embeddings.position_ids  # a buffer that no file fills; `run_clip` has its own
    return clip


def layers(clip: nn.Module) -> list[nn.Module]:
    if isinstance(clip, OpenClip):
        return list(clip.transformer["resblocks"])
    return list(clip.text_model.encoder.layers)


def t5_tensors(tensors: Tensors) -> Tensors:
    """T5's embedding is stored as `shared`, as `encoder.embed_tokens`, or as both: here as `shared`."""
    alias, name = "encoder.embed_tokens.weight", "shared.weight"
    if name in tensors or alias not in tensors:
        return tensors
    shapes = {name if key == alias else key: shape for key, shape in tensors.shapes.items()}
    return Tensors(tensors.path, shapes, lambda key, rows: tensors.read(alias if key == name else key, rows),
                   tensors.metadata, tensors.prefix)


def t5_encoder(tensors: Tensors) -> nn.Module:
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    names = ["shared", f"{attention}.relative_attention_bias", f"{attention}.q", f"{feed}.wi_0"]
    (vocabulary, width), (buckets, heads), (inner, _), (hidden, _) = shapes_of(
        tensors, "a T5 v1.1 encoder", [f"{name}.weight" for name in names])
    t5 = T5EncoderModel(T5Config(
        vocab_size=vocabulary, d_model=width, d_kv=inner // heads, d_ff=hidden, num_heads=heads,
        num_layers=sum(name.endswith(".layer.0.layer_norm.weight") for name in tensors),
        relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", dropout_rate=0.0))
    t5.encoder.embed_tokens = None  # tied to `shared`; sharding would untie it
    return t5


def run_clip(clip: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(last layer but one without final norm (B 77 width), pooled (B P))."""
    if isinstance(clip, OpenClip):
        return clip(ids)
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    out = clip(input_ids=ids, position_ids=positions, output_hidden_states=True)
    return out.hidden_states[-2], clip.text_projection(at_end(out.last_hidden_state, ids))


def at_end(x: Tensor, ids: Tensor) -> Tensor:
    """x (B L D) at the end token (B D), which has the largest id; argmax finds the first of them."""
    return x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]


def both_clips(parts: dict[str, Tensors]) -> str:
    """The files of `parts`, for a sentence. Raises InputError unless both CLIP encoders are there."""
    given = ", ".join(dict.fromkeys(str(tensors.path) for tensors in parts.values())) or "no file"
    absent = [name for name in ("clip_l", "clip_g") if name not in parts]
    if absent:
        raise InputError(f"{given}: {' and '.join(absent)} missing; expected both CLIP encoders")
    return given


def check_vocabulary(tokenizer, net: nn.Module | None, given: str) -> None:
    if tokenizer and net and len(tokenizer) > net.config.vocab_size:
        raise InputError(f"{tokenizer.name_or_path}: a tokenizer of {len(tokenizer)} tokens; "
                         f"expected at most {net.config.vocab_size}, as in {given}")


class SD3Text(nn.Module):
    """Prompts -> Cond. Built on `meta` from the shapes in `parts`, filled by `load`, sharded between the two.

    Without "t5" in `parts` its `t5_length` tokens are zeros of width `context_dim`, as in diffusers.
    `t5_length` is exact, 256 in diffusers: all conditions have one shape, guidance and batches can mix them.
    None is the original's own rule: pad to at least 77 and never truncate, so that a batch is as long as its
    longest prompt. Nothing is masked, so another length is another conditioning. CLIP takes the first 75
    tokens, as in diffusers; the original only drops parentheses and differs in words that straddle the 75th.
    `heads`: {"clip_l": n, "clip_g": n} where a head is not 64 wide. `device` is where the token ids go.
    Raises InputError for a missing CLIP, another architecture, tokenizers of another vocabulary."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None,
                 t5_length: int | None = None, context_dim: int = 4096, heads: dict[str, int] = {},
                 device: torch.device | str = "cpu"):
        super().__init__()
        self.tokenizers, self.t5_length, self.device = tokenizers, t5_length, device
        given = both_clips(parts)
        with torch.device("meta"):
            self.clip_l = clip_encoder(parts["clip_l"], "quick_gelu", False, heads.get("clip_l"))
            self.clip_g = clip_encoder(parts["clip_g"], "gelu", True, heads.get("clip_g"))
            self.t5 = t5_encoder(parts["t5"]) if "t5" in parts else None
        self.requires_grad_(False).eval()
        self.window = self.clip_l.config.max_position_embeddings
        self.context_dim = self.t5.config.d_model if self.t5 else context_dim
        clip_width = self.clip_l.config.hidden_size + self.clip_g.config.hidden_size
        if clip_width > self.context_dim:
            raise InputError(f"{given}: CLIP-L and CLIP-G are {clip_width} wide together; expected at most "
                             f"{self.context_dim}, the width of the context")
        for tokenizer, net in zip(tokenizers or (), (self.clip_l, self.t5)):
            check_vocabulary(tokenizer, net, given)

    def blocks(self) -> list[nn.Module]:
        t5 = list(self.t5.encoder.block) if self.t5 else []
        return [*layers(self.clip_l), *layers(self.clip_g), *t5]

    def load(self, parts: dict[str, Tensors], fill: Callable = checkpoint.load) -> "SD3Text":
        """Fill every encoder by `fill(net, tensors, ignore=patterns)`: sharded by `parallel.load_sharded`.

        Raises InputError for missing, extra and mis-shaped tensors."""
        for name, net in self.named_children():
            fill(net, parts[name], ignore=EXTRAS[name])
        return self

    def forward(self, l_ids: Tensor, g_ids: Tensor, t5_ids: Tensor) -> Cond:
        l_states, l_pooled = run_clip(self.clip_l, l_ids)
        g_states, g_pooled = run_clip(self.clip_g, g_ids)
        clip = torch.cat([l_states, g_states], dim=-1)
        clip = pad(clip, (0, self.context_dim - clip.shape[-1]))  # B 77 D
        if self.t5 is None:
            t5 = clip.new_zeros(*t5_ids.shape, self.context_dim)
        else:  # no mask: padding attends and is attended to
            t5 = self.t5(inputs_embeds=self.t5.shared(t5_ids)).last_hidden_state  # B L D
        return Cond(torch.cat([clip, t5], dim=1), torch.cat([l_pooled, g_pooled], dim=-1))

    @torch.no_grad()
    def encode_ids(self, l_ids: Tensor, g_ids: Tensor, t5_ids: Tensor) -> Cond:
        """Ids (B 77), (B 77), (B L) -> context (B 77+L D) and pooled (B P), float32."""
        context, pooled = self(*(ids.to(self.device) for ids in (l_ids, g_ids, t5_ids)))
        return Cond(context.float(), pooled.float())

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> context (B 77+L D) and pooled (B P), float32. Raises InputError without tokenizers."""
        return self.encode_ids(*self.tokenize(prompts))

    def unconditional(self) -> Cond:
        """The encoded empty prompt, as a batch of one."""
        return self.encode([""])

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor, Tensor]:
        """Ids for CLIP-L (padded with the end token), CLIP-G (padded with 0) and T5 (padded with 0)."""
        clip, t5 = self.tokenizers or (None, None)
        if clip is None or self.t5 and t5 is None:
            raise InputError("no tokenizers: expected a folder with tokenizer/ and, for T5, tokenizer_3/")
        l_ids, g_ids = clip_ids(clip, prompts, self.window)
        if self.t5 is None:
            return l_ids, g_ids, torch.zeros(len(prompts), self.t5_length or T5_MINIMUM, dtype=torch.long)
        exact = dict(truncation=True, max_length=self.t5_length) if self.t5_length else {}
        rows = t5(prompts, **exact).input_ids
        return l_ids, g_ids, pad_ids(rows, self.t5_length or max(T5_MINIMUM, *map(len, rows)), 0)


class CogVideoXText(nn.Module):
    """Prompts -> Cond of T5's tokens, padded or cut to exactly `length`; there is no pooled vector (B 0).

    `null`: guidance's unconditional, "zeros" as the original was trained with, or "empty", the encoded empty
    prompt that diffusers uses. Used as SD3Text, its `tokenizers` being (T5's, None). Raises InputError for
    another architecture or vocabulary."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None, length: int = 226,
                 null: str = "zeros", device: torch.device | str = "cpu"):
        super().__init__()
        self.tokenizers, self.length, self.null, self.device = tokenizers, length, null, device
        with torch.device("meta"):
            self.t5 = t5_encoder(parts["t5"])
        self.requires_grad_(False).eval()
        check_vocabulary(tokenizers and tokenizers[0], self.t5, str(parts["t5"].path))

    def blocks(self) -> list[nn.Module]:
        return list(self.t5.encoder.block)

    def load(self, parts: dict[str, Tensors], fill: Callable = checkpoint.load) -> "CogVideoXText":
        """As SD3Text.load."""
        fill(self.t5, parts["t5"], ignore=EXTRAS["t5"])
        return self

    def forward(self, ids: Tensor) -> Tensor:
        """Ids (B L) -> context (B L D); no mask: padding attends and is attended to."""
        return self.t5(inputs_embeds=self.t5.shared(ids)).last_hidden_state

    @torch.no_grad()
    def encode_ids(self, ids: Tensor) -> Cond:
        """Ids (B L) -> context (B L D) and pooled (B 0), float32."""
        context = self(ids.to(self.device)).float()
        return Cond(context, context.new_zeros(len(ids), 0))

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> context (B L D) and pooled (B 0), float32. Raises InputError without tokenizers."""
        return self.encode_ids(self.tokenize(prompts))

    def unconditional(self) -> Cond:
        """As a batch of one."""
        if self.null == "empty":
            return self.encode([""])
        context = torch.zeros(1, self.length, self.t5.config.d_model, device=self.device)
        return Cond(context, context.new_zeros(1, 0))

    def tokenize(self, prompts: list[str]) -> Tensor:
        """Ids (B L), padded with 0; the last of a prompt that is cut is its end token."""
        if not self.tokenizers:
            raise InputError("no tokenizers: expected a folder with tokenizer/")
        rows = self.tokenizers[0](prompts, truncation=True, max_length=self.length).input_ids
        return pad_ids(rows, self.length, 0)


def size_embedding(numbers: Tensor) -> Tensor:
    """Pixels (B n), such as n = 2 heights and widths -> (B n*256): cosines and sines of each number."""
    return timestep_embedding(numbers.float().flatten()).reshape(len(numbers), -1)


class SDXLText(nn.Module):
    """Prompts -> Cond, its pooled part SDXL's vector y: CLIP-G pooled, then `size_embedding` of the original
    (height, width), the crop's (top, left) and the target (height, width). The first and the last are `size`,
    the crop is (0, 0): the picture was neither scaled nor cropped.

    Used as SD3Text: built on `meta` from the shapes in `parts`, filled by `load`, sharded between the two. Of
    `tokenizers` only CLIP's, the first, is used. Raises InputError for the same."""

    def __init__(self, parts: dict[str, Tensors], tokenizers: tuple | None = None,
                 size: tuple[int, int] = (1024, 1024), heads: dict[str, int] = {},
                 device: torch.device | str = "cpu"):
        super().__init__()
        self.tokenizers, self.size, self.device = tokenizers, size, device
        given = both_clips(parts)
        with torch.device("meta"):
            self.clip_l = clip_encoder(parts["clip_l"], "quick_gelu", False, heads.get("clip_l"))
            self.clip_g = clip_encoder(parts["clip_g"], "gelu", True, heads.get("clip_g"))
        self.requires_grad_(False).eval()
        self.window = self.clip_l.config.max_position_embeddings
        for net in (self.clip_l, self.clip_g):
            check_vocabulary(tokenizers and tokenizers[0], net, given)

    def blocks(self) -> list[nn.Module]:
        return [*layers(self.clip_l), *layers(self.clip_g)]

    def load(self, parts: dict[str, Tensors], fill: Callable = checkpoint.load) -> "SDXLText":
        """As SD3Text.load."""
        for name, net in self.named_children():
            fill(net, parts[name], ignore=EXTRAS[name])
        return self

    def forward(self, l_ids: Tensor, g_ids: Tensor) -> Cond:
        """Without the sizes."""
        l_states, _ = run_clip(self.clip_l, l_ids)
        g_states, g_pooled = run_clip(self.clip_g, g_ids)
        return Cond(torch.cat([l_states, g_states], dim=-1), g_pooled)

    @torch.no_grad()
    def encode_ids(self, l_ids: Tensor, g_ids: Tensor, sizes: Tensor | None = None) -> Cond:
        """Ids (B 77), (B 77) -> context (B 77 D) and y (B P+6*256), float32; sizes (B 6) replace `size`."""
        return self.with_sizes(self(l_ids.to(self.device), g_ids.to(self.device)), sizes)

    def with_sizes(self, cond: Cond, sizes: Tensor | None = None) -> Cond:
        if sizes is None:
            sizes = torch.tensor([[*self.size, 0, 0, *self.size]]).expand(len(cond.pooled), -1)
        embedded = size_embedding(sizes.to(cond.pooled.device))
        return Cond(cond.context.float(), torch.cat([cond.pooled.float(), embedded], dim=-1))

    def encode(self, prompts: list[str]) -> Cond:
        """Prompts -> context (B 77 D) and y (B P+6*256), float32. Raises InputError without tokenizers."""
        return self.encode_ids(*self.tokenize(prompts))

    def unconditional(self) -> Cond:
        """Zeros for all that comes of the prompt, as a batch of one; the sizes stay."""
        clip_l, clip_g = self.clip_l.config, self.clip_g.config
        context = torch.zeros(1, self.window, clip_l.hidden_size + clip_g.hidden_size, device=self.device)
        return self.with_sizes(Cond(context, context.new_zeros(1, clip_g.projection_dim)))

    def tokenize(self, prompts: list[str]) -> tuple[Tensor, Tensor]:
        """Ids for CLIP-L (padded with the end token) and CLIP-G (padded with 0)."""
        if not self.tokenizers:
            raise InputError("no tokenizers: expected a folder with tokenizer/")
        return clip_ids(self.tokenizers[0], prompts, self.window)
