"""The text encoders CLIP-L, CLIP-G, T5 v1.1 and UMT5: their files, their tokenizers and their networks.

`models/text.py` makes the conditioning of each model from them. Each encoder keeps the tensor names of its
file; what a single file puts before them, one of PREFIXES, is removed. The networks are transformers', but
for a CLIP-G in open_clip's names, which SDXL's single file has: that is OpenClip.

Letters: B prompts, L tokens, D width, P width of the pooled vector, N heads.
"""
import json
import re
from collections import OrderedDict
from pathlib import Path

import torch
import transformers  # loads a class when it is first used: each takes seconds
from einops import rearrange
from sentencepiece.sentencepiece_model_pb2 import ModelProto
from torch import Tensor, nn
from torch.nn.functional import linear, scaled_dot_product_attention

from models.checkpoint import InputError, Tensors, find, open_shards, open_tensors, renamed

# Encoder -> its name in SD3's original files, and its folder in the diffusers layout.
FILES = {"clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5xxl"}
FOLDERS = {"clip_l": "text_encoder", "clip_g": "text_encoder_2", "t5": "text_encoder_3"}
# What stands before an encoder's tensor names in the single files of SD3, SDXL and SD1.5.
PREFIXES = {f"text_encoders.{file}.transformer.": name for name, file in FILES.items()} | {
    "conditioner.embedders.0.transformer.": "clip_l", "conditioner.embedders.1.model.": "clip_g",
    "cond_stage_model.transformer.": "clip_l"}
# What files hold and the networks do not: CLIP-L is used unprojected, and T5's embedding is stored twice.
EXTRAS = {
    "clip_l": ("text_projection.weight", "logit_scale", "*position_ids"),
    "clip_g": ("logit_scale", "*position_ids"),
    "t5": ("encoder.embed_tokens.weight", "scaled_fp8"),
    "umt5": ("encoder.embed_tokens.weight", "scaled_fp8", "spiece_model"),
}
# Modules of a block in Wan's file of UMT5 -> in transformers.
UMT5 = {f"attn.{name}": f"0.SelfAttention.{name}" for name in "qkvo"} | {
    "norm1": "0.layer_norm", "pos_embedding.embedding": "0.SelfAttention.relative_attention_bias", "norm2": "1.layer_norm",
    "ffn.gate.0": "1.DenseReluDense.wi_0", "ffn.fc1": "1.DenseReluDense.wi_1", "ffn.fc2": "1.DenseReluDense.wo"}
# Class of transformers -> the files that it needs unless there is a tokenizer.json.
TOKENIZERS = {"CLIPTokenizer": ("vocab.json", "merges.txt"), "T5Tokenizer": ("spiece.model",)}
LARGEST = 2 ** 25  # bytes of a tokenizer's file; T5's multilingual one, the largest in use, has half of them


# ---- files -------------------------------------------------------------------------------------------------

def text_parts(*paths: str | Path) -> dict[str, Tensors]:
    """The encoders in these paths, "clip_l", "clip_g", "t5" -> tensors; a later path replaces an earlier one.

    A path is a single file with groups named as in PREFIXES, one encoder's file (clip_l*, clip_g*, t5xxl*), a
    folder of those (of two T5 files the float16 one), or a diffusers-layout folder.
    Raises InputError for a path without any."""
    parts = {}
    for path in map(Path, paths):
        found = folder_parts(path) if path.is_dir() else file_parts(path)
        if not found:
            raise InputError(f"{path}: no text encoders; expected text_encoders.clip_l.transformer.*, "
                             "conditioner.embedders.0.transformer.* or cond_stage_model.transformer.* in a "
                             "file, clip_l.safetensors, clip_g.safetensors and t5xxl_fp16.safetensors in a "
                             "folder, or text_encoder/, text_encoder_2/ and text_encoder_3/")
        parts |= found
    return {name: t5_tensors(part) if name == "t5" else clip_tensors(part) for name, part in parts.items()}


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
    for stem in ("model", "diffusion_pytorch_model"):
        for kind in ("safetensors", "safetensors.index.json", "fp16.safetensors"):
            if (folder / f"{stem}.{kind}").is_file():
                return open_tensors(folder / f"{stem}.{kind}")
        half = folder / f"{stem}.safetensors.index.fp16.json"
        if half.is_file():
            return open_shards(half)
    return open_tensors(folder)


def clip_tensors(tensors: Tensors) -> Tensors:
    """Old single files of SD1.5 lack the `text_model.` before CLIP-L's names."""
    if "embeddings.token_embedding.weight" not in tensors:
        return tensors
    return renamed(tensors, {
        name if name in EXTRAS["clip_l"] else f"text_model.{name}": name for name in tensors})


def t5_tensors(tensors: Tensors) -> Tensors:
    """T5's embedding is stored as `shared`, as `encoder.embed_tokens`, or as both: here as `shared`."""
    alias, name = "encoder.embed_tokens.weight", "shared.weight"
    if name in tensors or alias not in tensors:
        return tensors
    return renamed(tensors, {name if key == alias else key: key for key in tensors})


def umt5_tensors(tensors: Tensors) -> Tensors:
    """UMT5 of Wan's file (`blocks.0.attn.q`) or of transformers', under the names of transformers."""
    ends, names = {"token_embedding.weight": "shared.weight", "norm.weight": "encoder.final_layer_norm.weight"}, {}
    for name in tensors:
        block = re.fullmatch(r"blocks\.(\d+)\.(.+)\.weight", name)
        inner = block and UMT5.get(block[2])
        names[f"encoder.block.{block[1]}.layer.{inner}.weight" if inner else ends.get(name, name)] = name
    return t5_tensors(renamed(tensors, names))


# ---- tokenizers --------------------------------------------------------------------------------------------

def load_tokenizers(source: str | Path, t5: bool = True) -> tuple:
    """(the tokenizer in tokenizer/, that in tokenizer_3/ or None) of a folder or a hub repository: SD3's has
    CLIP's and T5's, SDXL's and SD1.5's CLIP's alone, CogVideoX's T5's alone. `t5=False` leaves tokenizer_3/
    alone, which a folder may lack in any case.

    tokenizer_2/ is not used: it has the vocabulary of tokenizer/, but takes every "!" in a prompt for its
    padding token, which the original does not.  # [choice]
    Raises InputError for a folder without tokenizer/, a failed download, and as `open_tokenizer`."""
    folder, wanted = Path(source), ("tokenizer", "tokenizer_3") if t5 else ("tokenizer",)
    if (folder / "spiece.model").is_file():  # T5's folder in CogVideoX's original release
        wanted = ("",)
    try:
        if re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", str(source)) and not folder.exists():
            folders = [find(f"{name}/", None, str(source)) for name in wanted]
        else:
            folders = [folder / name for name in wanted if (folder / name).is_dir()]
            if folder / wanted[0] not in folders:
                raise InputError(f"{source}: expected a folder with {'/ and '.join(wanted)}/, as in a "
                                 "diffusers-layout download")
        tokenizers = [open_tokenizer(path) for path in folders]
    except InputError as error:
        message = str(error).replace("--ckpt PATH", "--tokenizers PATH")
        raise InputError(f"no tokenizers: {message}") from error
    return tokenizers[0], tokenizers[1] if len(tokenizers) > 1 else None


def open_tokenizer(folder: Path) -> "transformers.CLIPTokenizer | transformers.T5Tokenizer":
    """CLIP's or T5's tokenizer in `folder`. No code of the folder runs: transformers' AutoTokenizer, which
    would offer to, is not used, and what asks for it is refused.

    Raises InputError for such a folder, another tokenizer, missing and damaged files."""
    kind = "T5Tokenizer" if (folder / "spiece.model").is_file() else "CLIPTokenizer"  # if no file says it
    for path in sorted(path for path in folder.glob("[!.]*") if path.is_file()):
        if path.suffix in (".json", ".txt", ".model", ".jinja") and path.stat().st_size > LARGEST:
            raise InputError(f"{path}: {path.stat().st_size} bytes; expected at most {LARGEST}")
        if path.name.endswith("config.json"):
            kind = checked_class(path) or kind
    absent = [file for file in TOKENIZERS[kind] if not (folder / file).is_file()]
    if absent and not (folder / "tokenizer.json").is_file():
        raise InputError(f"{folder}: no {' and no '.join(absent)} in this folder; expected a {kind}'s files")
    try:
        if kind == "T5Tokenizer" and not absent:  # transformers would take a damaged one for another format
            spiece = ModelProto.FromString((folder / "spiece.model").read_bytes())
            if not (spiece.HasField("trainer_spec") and spiece.HasField("normalizer_spec")):
                raise ValueError("spiece.model is truncated")
        Tokenizer = transformers.CLIPTokenizer if kind == "CLIPTokenizer" else transformers.T5Tokenizer
        tokenizer = Tokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
        for ids in tokenizer(["a", "", "\u2603"], truncation=True, max_length=3).input_ids:
            if ids[-1] != tokenizer.eos_token_id:
                raise ValueError("a prompt does not end in the end token")
        if kind == "CLIPTokenizer":
            check_merges(folder, tokenizer)
    except Exception as error:  # of many kinds, from the files' parsers
        reason = " ".join(f"{type(error).__name__}: {error}".split())[:200]
        raise InputError(f"{folder}: damaged tokenizer files ({reason}); expected a {kind}'s") from error
    return tokenizer


def checked_class(path: Path) -> str | None:
    """The class that a *config.json beside a tokenizer names, without "Fast". Raises InputError."""
    try:
        settings = json.loads(path.read_bytes())
        code = {key: settings[key] for key in ("auto_map", "trust_remote_code") if settings.get(key)}
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise InputError(f"{path}: damaged; expected a JSON object") from error
    name, extra = settings.get("tokenizer_class"), settings.get("extra_ids", 0)
    if code:
        raise InputError(f"{path}: asks for code to be run ({json.dumps(code)[:200]}), which is never done; "
                         f"expected {' or '.join(TOKENIZERS)}, as in transformers")
    if name and str(name).removesuffix("Fast") not in TOKENIZERS:
        raise InputError(f"{path}: tokenizer_class {str(name)[:200]!r}; expected {' or '.join(TOKENIZERS)}")
    if not isinstance(extra, int) or not 0 <= extra <= 1000:  # transformers makes a list of as many tokens
        raise InputError(f"{path}: extra_ids {str(extra)[:20]}; expected a number from 0 to 1000")
    return name and name.removesuffix("Fast")


def check_merges(folder: Path, tokenizer: "transformers.CLIPTokenizer") -> None:
    """Raises ValueError for tokens of several letters that no merge makes: a merges.txt that ends too early
    reads as a whole one."""
    if (folder / "tokenizer.json").is_file():
        merges = json.loads((folder / "tokenizer.json").read_bytes())["model"]["merges"]
    else:
        merges = (folder / "merges.txt").read_text(encoding="utf-8").split("\n")
    made = {"".join(merge).replace(" ", "") for merge in merges}  # of "a b" or ["a", "b"]
    several = {token for token in tokenizer.get_vocab() if len(token.removesuffix("</w>")) > 1}
    lost = sorted(several - made - set(tokenizer.added_tokens_encoder))
    if lost:
        raise ValueError(f"no merge makes {len(lost)} of its tokens, such as {lost[0]}")


def check_vocabulary(tokenizer, net: nn.Module, given: str, spare: float = float("inf")) -> None:
    """Raises InputError unless every token of `tokenizer`, if there is one, is one of `net` from the file(s)
    `given`, and all but `spare` of the net's are its."""
    if tokenizer is None:
        return
    if isinstance(tokenizer, transformers.T5Tokenizer) != hasattr(net, "shared"):  # T5 and UMT5 have it
        raise InputError(f"{tokenizer.name_or_path}: a {type(tokenizer).__name__}; expected that of {given}")
    size = 1 + max(tokenizer.get_vocab().values())
    if not size <= net.config.vocab_size <= size + spare:
        raise InputError(f"{tokenizer.name_or_path}: a tokenizer of {size} tokens; "
                         f"expected at most {net.config.vocab_size}, as in {given}")


def pad_ids(rows: list[list[int]], length: int, value: int) -> Tensor:
    """Token ids (B length), each row filled up on the right."""
    return torch.tensor([row + [value] * (length - len(row)) for row in rows])


# ---- networks ----------------------------------------------------------------------------------------------

def shapes_of(tensors: Tensors, kind: str, names: list[str], first: int = 2) -> list[tuple]:
    """Shapes of the tensors `names`: matrices, but the first has `first` dimensions. Raises InputError for others."""
    for i, name in enumerate(names):
        shape = tensors.shapes.get(name, "missing")
        if shape == "missing" or len(shape) != (2 if i else first) or not all(shape):
            raise InputError(f"{tensors.path}: expected {kind}, but {tensors.prefix}{name} is {shape}")
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

    def __init__(self, config: "transformers.CLIPTextConfig"):
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
        """As `run_clip`."""
        *blocks, last = self.transformer["resblocks"]
        x = self.token_embedding(ids) + self.positional_embedding  # B 77 width
        for block in blocks:
            x = block(x)
        return x, at_end(self.ln_final(last(x)), ids) @ self.text_projection


def clip_encoder(tensors: Tensors, name: str, heads: int | None = None) -> nn.Module:
    """The network of "clip_l" or "clip_g", sizes from the shapes. `heads`: None where each is 64 wide, as in
    all published ones. Raises InputError for another architecture."""
    big = name == "clip_g"
    original = big and any(key.startswith("transformer.resblocks.") for key in tensors)
    names = ["token_embedding.weight", "positional_embedding", "transformer.resblocks.0.mlp.c_fc.weight"]
    hub = ["embeddings.token_embedding", "embeddings.position_embedding", "encoder.layers.0.mlp.fc1"]
    (vocabulary, width), (window, _), (hidden, _) = shapes_of(
        tensors, "a CLIP text encoder", names if original else [f"text_model.{key}.weight" for key in hub])
    norm = ".ln_1.weight" if original else ".layer_norm1.weight"
    projection = tensors.shapes.get("text_projection" if original else "text_projection.weight", (width,))
    config = transformers.CLIPTextConfig(
        vocab_size=vocabulary, max_position_embeddings=window, hidden_size=width, intermediate_size=hidden,
        num_hidden_layers=sum(key.endswith(norm) for key in tensors),
        num_attention_heads=heads or max(1, width // 64), hidden_act="gelu" if big else "quick_gelu",
        projection_dim=(projection or (width,))[-1 if original else 0],
        bos_token_id=vocabulary - 2, eos_token_id=vocabulary - 1)
    if original:
        return OpenClip(config)
    clip = transformers.CLIPTextModelWithProjection(config)
    if not big:
        clip.text_projection = nn.Identity()
    del clip.text_model.embeddings.position_ids  # a buffer that no file fills; `clip_outputs` has its values
    return clip


def t5_encoder(tensors: Tensors, name: str) -> nn.Module:
    """The network of "t5" or "umt5", sizes from the shapes. Raises InputError for another architecture."""
    attention, feed = "encoder.block.0.layer.0.SelfAttention", "encoder.block.0.layer.1.DenseReluDense"
    names = ["shared", f"{attention}.relative_attention_bias", f"{attention}.q", f"{feed}.wi_0"]
    (vocabulary, width), (buckets, heads), (inner, _), (hidden, _) = shapes_of(
        tensors, f"a {'T5 v1.1' if name == 't5' else 'UMT5'} encoder", [f"{name}.weight" for name in names])
    sizes = dict(vocab_size=vocabulary, d_model=width, d_kv=inner // heads, d_ff=hidden, num_heads=heads,
                 num_layers=sum(name.endswith(".layer.0.layer_norm.weight") for name in tensors),
                 relative_attention_num_buckets=buckets, feed_forward_proj="gated-gelu", dropout_rate=0.0)
    t5 = (transformers.T5EncoderModel(transformers.T5Config(**sizes)) if name == "t5"
          else transformers.UMT5EncoderModel(transformers.UMT5Config(**sizes)))
    t5.encoder.embed_tokens = None  # tied to `shared`; sharding would untie it
    return t5


def layers(net: nn.Module) -> list[nn.Module]:
    """The blocks of one of these encoders, as sharding takes them."""
    if isinstance(net, OpenClip):
        return list(net.transformer["resblocks"])
    return list(net.encoder.block if hasattr(net, "shared") else net.text_model.encoder.layers)


def clip_outputs(clip: "transformers.CLIPTextModelWithProjection", ids: Tensor):
    """transformers' outputs for ids (B 77), the hidden states of all layers among them."""
    positions = torch.arange(ids.shape[1], device=ids.device)[None]
    return clip(input_ids=ids, position_ids=positions, output_hidden_states=True)


def run_clip(clip: nn.Module, ids: Tensor) -> tuple[Tensor, Tensor]:
    """(last layer but one without final norm (B 77 D), pooled (B P))."""
    if isinstance(clip, OpenClip):
        return clip(ids)
    out = clip_outputs(clip, ids)
    return out.hidden_states[-2], clip.text_projection(at_end(out.last_hidden_state, ids))


def run_t5(t5: "transformers.T5EncoderModel", ids: Tensor, mask: Tensor | None = None) -> Tensor:
    """Ids (B L) -> (B L D). Without `mask` (B L), which is False at padding, that attends and is attended to."""
    return t5(inputs_embeds=t5.shared(ids), attention_mask=mask).last_hidden_state


def at_end(x: Tensor, ids: Tensor) -> Tensor:
    """x (B L D) at the end token (B D), which has the largest id; argmax finds the first of them."""
    return x[torch.arange(len(ids), device=ids.device), ids.argmax(dim=1)]
