"""MPS (Zhang et al., CVPR 2024): the preference score of a picture, with cross attention to the words of its
prompt that a condition selects, and a reader for its published file, which is a pickled module.

    tensors = open_module("MPS_overall_checkpoint.pth")  # model.* is a CLIP-H, cross_model.* is this
    net = load_mps(tensors)

Behaviour after https://github.com/Kwai-Kolors/MPS.
Letters: B samples, L text tokens, S image tokens, C the condition's, P width, N heads, D head's width.
"""
import pickle
import zipfile
from collections import OrderedDict
from pathlib import Path
from types import SimpleNamespace

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import cosine_similarity, scaled_dot_product_attention, silu

from models.checkpoint import InputError, Tensors, load, tensors_of
from models.eval.clip import IGNORED, clip_model, frozen
from models.parse import check_plain, check_stored, short
from models.text_encoders import shapes_of

# The condition of the "overall" preference.
CONDITION = ("light, color, clarity, tone, style, ambiance, artistry, shape, face, hair, hands, limbs, "
             "structure, instance, texture, quantity, attributes, position, number, location, word, things.")


# ---- network -----------------------------------------------------------------------------------------------

class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        x, gate = x.chunk(2, dim=-1)
        return silu(gate) * x


def attend(q: Tensor, k: Tensor, v: Tensor, mask: Tensor | None = None) -> Tensor:
    """q (B N L D) to the one head of k and v (B S D) -> (B L N*D)."""
    k, v = (x[:, None].expand(-1, q.shape[1], -1, -1) for x in (k, v))
    return rearrange(scaled_dot_product_attention(q, k, v, attn_mask=mask), "B N L D -> B L (N D)")


class CrossBlock(nn.Module):
    """Image tokens to text tokens, beside a feed-forward of the same normed input."""

    def __init__(self, width: int, hidden: int, heads: int, head: int):
        super().__init__()
        self.heads = heads
        self.norm = nn.LayerNorm(width)
        self.to_q = nn.Linear(width, heads * head, bias=False)
        self.to_kv = nn.Linear(width, 2 * head, bias=False)
        self.to_out = nn.Linear(heads * head, width, bias=False)
        self.ff = nn.Sequential(
            nn.Linear(width, 2 * hidden, bias=False), SwiGLU(), nn.Linear(hidden, width, bias=False))

    def forward(self, x: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        h = self.norm(x)
        q = rearrange(self.to_q(h), "B S (N D) -> B N S D", N=self.heads)
        k, v = self.to_kv(text).chunk(2, dim=-1)  # B L D
        return x + self.to_out(attend(q, k, v, keep[:, None, None])) + self.ff(h)


class SelfBlock(nn.Module):
    """Image tokens to each other, beside a feed-forward; one projection gives q, k, v and what that takes."""

    def __init__(self, width: int, hidden: int, heads: int, head: int):
        super().__init__()
        self.heads, self.sizes = heads, (heads * head, head, head, 2 * hidden)
        self.norm = nn.LayerNorm(width)
        self.rotary_emb = nn.Module()
        self.rotary_emb.register_buffer("inv_freq", torch.empty(head // 2))
        self.fused_attn_ff_proj = nn.Linear(width, sum(self.sizes), bias=False)
        self.attn_out = nn.Linear(heads * head, width, bias=False)
        self.ff_out = nn.Sequential(SwiGLU(), nn.Linear(hidden, width, bias=False))

    def rotate(self, x: Tensor) -> Tensor:
        """x (... S D), its halves turned as a complex number by the position of the token."""
        frequencies = self.rotary_emb.inv_freq.float()
        angles = torch.arange(x.shape[-2], device=x.device)[:, None] * frequencies  # S D/2
        cos, sin = angles.cos().to(x.dtype), angles.sin().to(x.dtype)
        a, b = x.chunk(2, dim=-1)
        return torch.cat([a * cos - b * sin, b * cos + a * sin], dim=-1)

    def forward(self, x: Tensor) -> Tensor:
        q, k, v, h = self.fused_attn_ff_proj(self.norm(x)).split(self.sizes, dim=-1)
        q = rearrange(q, "B S (N D) -> B N S D", N=self.heads)
        return x + self.attn_out(attend(self.rotate(q), self.rotate(k), v)) + self.ff_out(h)


class CrossModel(nn.Module):
    def __init__(self, depth: int, *sizes: int):
        super().__init__()
        self.layers = nn.ModuleList(  # the original's residual connection is a module of its own, named fn
            nn.ModuleList(nn.ModuleDict({"fn": block(*sizes)}) for block in (CrossBlock, SelfBlock))
            for _ in range(depth))

    def forward(self, image: Tensor, text: Tensor, keep: Tensor) -> Tensor:
        """Image tokens (B S P), text tokens (B L P), keep (B L): which of those are seen -> (B S P)."""
        for cross, among in self.layers:
            image = among["fn"](cross["fn"](image, text, keep))
        return image


def cross_model(tensors: Tensors) -> CrossModel:
    """The network on `meta`, its sizes from the shapes. Raises InputError for another architecture."""
    names = [f"layers.0.0.fn.{name}.weight" for name in ("to_q", "to_kv", "ff.2")]
    (inner, _), (both, _), (width, hidden) = shapes_of(tensors, "the cross_model of MPS", names)
    depth, head = sum(name.endswith(".to_q.weight") for name in tensors), both // 2
    with torch.device("meta"):
        return CrossModel(depth, width, hidden, inner // head, head)


# ---- score -------------------------------------------------------------------------------------------------

def selected(text: Tensor, condition: Tensor, threshold: float) -> Tensor:
    """Text tokens (B L P) and tokens of the condition (C P) -> (B L): is the token about the condition?

    Its likeness is the largest dot product with a token of the condition, in units of the prompt's largest.
    The original takes the largest of the whole batch, but meets prompts one by one."""
    likeness = (text.float() @ condition.float().T).amax(dim=-1)  # B L
    return likeness / likeness.amax(dim=-1, keepdim=True) > threshold


def mps_score(cross: CrossModel, image: Tensor, text: Tensor, vector: Tensor, condition: Tensor,
              logit_scale: Tensor, threshold: float) -> Tensor:
    """Projected tokens of images (B S P), prompts (B L P) and condition (C P), pooled prompts (B P) and the
    logarithm of the scale -> scores (B,), float32. Tokens of the padding count too."""
    seen = cross(image, text, selected(text, condition, threshold))[:, 0]
    return logit_scale.float().exp() * cosine_similarity(seen.float(), vector.float(), dim=-1)


def load_mps(tensors: Tensors) -> nn.ModuleDict:
    """The CLIP "model" and the "cross_model". Raises InputError unless the file holds exactly these."""
    net = nn.ModuleDict({"model": clip_model(tensors.group("model."), "gelu"),
                         "cross_model": cross_model(tensors.group("cross_model."))})
    load(net, tensors, ignore=IGNORED)
    return frozen(net)


# ---- pickled modules ---------------------------------------------------------------------------------------

class NoCall(type):
    """Of the stand-ins for classes and functions that a pickle names: it may have them made into objects
    without contents and may fill those, but none of them is ever looked up or called."""

    def __call__(cls, *args, **kwargs):
        raise InputError(f"reading it would run code (it calls {cls.__name__})")


class TensorUnpickler(pickle._Unpickler):
    """Builds tensors, containers and objects that do nothing. Imports nothing. Of Python's own class: the one in
    C takes as much memory as the largest number of a memo says."""

    def find_class(self, module: str, name: str):
        known = {  # wrapped, so that no state that a pickle sets reaches torch's own functions
            "torch._utils._rebuild_tensor_v2": lambda storage, *place: torch._utils._rebuild_tensor(
                storage, *place[:3]),
            "torch._utils._rebuild_parameter": lambda data, *_: data,
            "collections.OrderedDict": OrderedDict, "builtins.set": set, "__builtin__.set": set,
        }
        path, made = f"{module}.{name}", lambda cls, *args, **kwargs: object.__new__(cls)
        return known.get(path) or NoCall(path, (), {"__new__": made})


def open_module(path: str | Path) -> Tensors:
    """The tensors of a pickled module under the names of its state_dict(), of its classes nothing; also those
    of a dictionary name -> tensor. Raises InputError, and runs nothing, for a file that asks for a call."""
    path = Path(path)
    if not zipfile.is_zipfile(path):  # older files are many pickles in a row
        raise InputError(f"{path}: expected a PyTorch file in zip format, found another or half of one")
    try:
        check_stored(path, True)
    except InputError:
        raise
    except Exception as error:  # a damaged archive or pickle can raise anything
        raise InputError(f"{path}: not a pickled module, or damaged ({short(error)})") from error
    try:
        if any(name.endswith("/constants.pkl") for name in zipfile.ZipFile(path).namelist()):
            raise InputError("it is a TorchScript program")
        reader = SimpleNamespace(__name__="restricted", Unpickler=TensorUnpickler)
        root = torch.load(path, map_location="cpu", pickle_module=reader, weights_only=False, mmap=True)
        tensors = tensors_of(root) if isinstance(root, dict) else module_tensors(root)
    except InputError as error:
        raise InputError(f"{path}: refused, {error}; expected a pickled module or tensors only") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path}: not a pickled module, or damaged ({type(error).__name__})") from error
    if not tensors:
        raise InputError(f"{path}: no tensors in this file; expected a pickled module")
    check_plain(path, tensors)
    return Tensors(path, {name: tuple(t.shape) for name, t in tensors.items()},
                   lambda name, rows: (tensors[name] if rows is None else tensors[name][rows]).clone())


def module_tensors(root, most: int = 10 ** 5) -> dict[str, Tensor]:
    """Name -> tensor of a module and those in it. Raises ValueError for `most` modules or more: 38 levels that share
    their branches are 2^38."""
    found, left = {}, [("", root)]
    while left:
        prefix, module = left.pop()
        parts, most = vars(module), most - 1
        if not most:
            raise ValueError("too many modules")
        passing = parts.get("_non_persistent_buffers_set", ())
        saved = parts["_parameters"] | {name: t for name, t in parts["_buffers"].items() if name not in passing}
        found |= {prefix + name: t.detach() for name, t in saved.items() if t is not None}
        left += [(f"{prefix}{name}.", child) for name, child in parts["_modules"].items() if child is not None]
    return found
