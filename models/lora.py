"""LoRA (Hu et al. 2021): adapters on linear layers, and the LoRA files people already have.

A weight W (out, in) becomes W + alpha / rank * up @ down, with down (rank, in) and up (out, rank). Several adapters
share one set of base weights; which of them acts is an argument of forward. Read: plain LoRA as diffusers (with and
before peft), OneTrainer, SimpleTuner, kohya, ComfyUI and MotionLoRA spell it. Written: diffusers', kohya's, ComfyUI's.
"""
import json
import math
import re
import warnings
from pathlib import Path
from typing import NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.functional import linear

from models.checkpoint import InputError, Tensors, respelled, save_safetensors, some
from models.diffusers_names import Names, differences, spellings
from models.parallel import local_rows
from models.parse import parse_json, read_object, short


class LoRALinear(nn.Linear):
    """A linear layer that keeps its own parameters' names and carries any number of named adapters."""

    def __init__(self, base: nn.Linear):
        super().__init__(base.in_features, base.out_features, base.bias is not None, device="meta")
        self.weight, self.bias = base.weight, base.bias
        self.lora_A, self.lora_B = nn.ParameterDict(), nn.ParameterDict()
        self.alpha = {}  # of every adapter of the network: None where it leaves this layer alone

    def forward(self, x: Tensor, adapter: str | None = None) -> Tensor:
        """x (... in) -> (... out), with the adapter of that name or, without a name, the base alone."""
        y = linear(x, self.weight, self.bias)
        if adapter is None or self.alpha[adapter] is None:
            return y
        # Stored in float32, where steps of 1e-6 still move them; multiplied in the activations' dtype.
        down, up = self.lora_A[adapter].to(x.dtype), self.lora_B[adapter].to(x.dtype)
        rows = linear(x, down).flatten(0, -2)
        return torch.addmm(y.flatten(0, -2), rows, up.T, alpha=self.alpha[adapter] / len(down)).view_as(y)


def add_lora(net: nn.Module, names: Names, name: str, rank: int, alpha: float | None = None,
             targets: tuple[str, ...] | None = None, seed: int = 0) -> None:
    """Put a new adapter on every linear layer whose name ends in one of `targets` (by default those of the
    network's `names`); alpha None is the rank. On `meta` the values come from a later `init_lora`.

    Raises InputError for a target that is not adaptable, ValueError for an adapter name already in use.
    """
    targets = names.targets if targets is None else targets
    if rank < 1 or not targets or set(targets) - set(names.adaptable):
        raise InputError(f"LoRA of rank {rank} on {', '.join(targets) or 'nothing'}: "
                         f"expected a rank of at least 1 and targets among {', '.join(names.adaptable)}")
    for path, layer in list(net.named_modules()):
        kind = next((end for end in names.adaptable if f".{path}".endswith(f".{end}")), None)
        if kind is None or not isinstance(layer, nn.Linear):
            continue  # the patch embedding's proj is a convolution
        if not isinstance(layer, LoRALinear):
            layer = LoRALinear(layer)
            net.set_submodule(path, layer)
        if name in layer.alpha:
            raise ValueError(f"{path} already has an adapter called {name}")
        layer.alpha[name] = None
        if kind in targets:
            layer.alpha[name] = float(rank if alpha is None else alpha)
            empty = dict(dtype=torch.float32, device=layer.weight.device)
            layer.lora_A[name] = nn.Parameter(torch.empty(rank, layer.in_features, **empty))
            layer.lora_B[name] = nn.Parameter(torch.empty(layer.out_features, rank, **empty))
    init_lora(net, name, seed)


def lora_layers(net: nn.Module, name: str) -> dict[str, LoRALinear]:
    layers = {path: m for path, m in net.named_modules() if isinstance(m, LoRALinear) and name in m.lora_A}
    if not layers:
        raise ValueError(f"the network has no adapter called {name}")
    return layers


def lora_state(net: nn.Module, name: str) -> dict[str, tuple[Tensor, Tensor]]:
    """{module path: (down, up)}, whole and on the CPU. On a sharded network every rank must call it."""
    def whole(p):
        return (p.full_tensor() if isinstance(p, DTensor) else p).detach().cpu()
    return {path: (whole(layer.lora_A[name]), whole(layer.lora_B[name]))
            for path, layer in lora_layers(net, name).items()}


@torch.no_grad()
def init_lora(net: nn.Module, name: str, seed: int = 0) -> None:
    """up = 0, so that the adapter starts as the identity; down ~ U(-1, 1) / sqrt(in), equal on every rank."""
    generator = torch.Generator().manual_seed(seed)
    for layer in lora_layers(net, name).values():
        down, up = layer.lora_A[name], layer.lora_B[name]
        if not down.is_meta:
            values = (2 * torch.rand(down.shape, generator=generator) - 1) / math.sqrt(layer.in_features)
            rows, first = local_rows(down)
            rows.copy_(values[first:first + len(rows)])
            local_rows(up)[0].zero_()


class Piece(NamedTuple):
    """scale * up @ down is added to rows start..stop of a weight (a convolution's kernel flattened)."""
    start: int
    stop: int
    down: Tensor  # rank in, or without `up` the whole difference of the weight
    up: Tensor | None  # stop-start rank
    scale: float


NOT_APPLIED = {"text-encoder tensors": ("lora_te", "text_encoder", "clip_l.", "clip_g.", "t5xxl."),
               "embeddings": ("bundle_emb.",)}
PREFIX = re.compile(r"(base_model\.model\.)?(transformer\.|unet\.|(model\.)?diffusion_model\.|pipe\.dit\.|"
                    r"lora_transformer_|lora_unet__?|lycoris_)?")
OLD = (  # spellings of diffusers before it used peft, and of MotionLoRA
    (re.compile(r"\.processor\.(to_[qkv]|to_out)_lora\.(down|up)\.weight$"), r".\1.lora_\2.weight"),
    (re.compile(r"\.lora(_linear_layer)?\.(down|up)\.weight$"), r".lora_\2.weight"),
    (re.compile(r"\.to_out\.lora_"), ".to_out.0.lora_"))
PART = re.compile(r"(.+)\.(lora_A|lora_down|lora_B|lora_up)(\.\w+)?\.weight|(.+)\.(alpha|diff|diff_[bm])")
SLOW = re.compile(r"\)[*+?{]|([*+?{][^*+?{]*){3}")  # a group repeated, or three repetitions in one pattern
OTHER = re.compile(r"\.(hada_|lokr_|oft_|dora_scale|lora_magnitude_vector|lora_mid|[wb]_norm$)")


def peft_config(tensors: Tensors) -> dict:
    """Peft's settings, from the metadata (diffusers) or the file beside the weights (peft); {} without.
    Raises InputError for damaged ones."""
    beside, what = Path(tensors.path).with_name("adapter_config.json"), "peft's settings of an adapter"
    if "lora_adapter_metadata" in tensors.metadata:
        place = f"{tensors.path}: its lora_adapter_metadata"
        try:
            config = parse_json(tensors.metadata["lora_adapter_metadata"])
        except ValueError as error:
            raise InputError(f"{place}: expected {what}, found damaged JSON ({short(error)})") from error
        if not isinstance(config, dict):
            raise InputError(f"{place}: expected {what}, found {short(config, 40)}")
    elif Path(tensors.path).stem == "adapter_model" and beside.exists():
        place, config = beside, read_object(beside, what)
    else:
        return {}
    config = {re.sub(r"^(transformer|unet)\.", "", key): value for key, value in config.items()}
    kind, dora, begun = (config.get(key) for key in ("peft_type", "use_dora", "init_lora_weights"))
    if kind not in (None, "LORA") or dora or re.match("pissa|olora|corda|loftq|lora_ga", str(begun).lower()):
        raise InputError(f"{place}: peft_type {short(kind, 20)}, use_dora {short(dora, 20)}, init_lora_weights "
                         f"{short(begun, 20)}; expected plain LoRA on the model's unchanged weights")
    try:
        patterns = dict(config.get("alpha_pattern") or {})
        if config.get("use_rslora") not in (None, False, True):
            raise ValueError(f"use_rslora {short(config['use_rslora'], 40)}")
        for pattern, alpha in patterns.items() | {("", config.get("lora_alpha", 1))}:
            if type(alpha) not in (int, float) or not math.isfinite(alpha) or alpha == 0:
                raise ValueError(f"{short(alpha, 40)} for a number that is not 0")
            if SLOW.search(pattern):
                raise ValueError(f"{short(pattern, 40)}, a pattern that may take forever")
        config["alphas"] = [(re.compile(rf"(.*\.)?({pattern})$"), alpha) for pattern, alpha in patterns.items()]
    except (TypeError, ValueError, OverflowError, RecursionError, re.error) as error:
        raise InputError(f"{place}: expected {what}, found one that is none ({short(error)})") from error
    return config


def peft_scale(config: dict, module: str, rank: int) -> float:
    """alpha / rank by peft's rules. rank_pattern is not needed: the tensors' shapes hold the ranks."""
    matching = (alpha for pattern, alpha in config.get("alphas", ()) if pattern.match(module))
    alpha = next(matching, config.get("lora_alpha", rank))
    return alpha / (math.sqrt(rank) if config.get("use_rslora") else rank)


def plain_alpha(tensors: Tensors) -> float | None:
    """An alpha that trainers note beside the tensors; None where there is none that is a number."""
    # musubi-tuner's converter multiplies its alpha into the weights and leaves the note.
    converted = any(key.startswith("diffusion_model.") for key in tensors)
    for key in ("lora_alpha", "network_alpha", *["ss_network_alpha"] * (not converted)):
        try:
            alpha = float(tensors.metadata.get(key, ""))
        except ValueError:
            continue
        if math.isfinite(alpha):
            return alpha
    return None


def read_lora(tensors: Tensors, net: nn.Module, names: Names) -> dict[str, list[Piece]]:
    """A LoRA file for `net` (which may be on `meta`) -> {weight name: pieces to add}.

    Alpha is that of `.alpha` tensors, of peft's settings, of plain metadata or, as a warning says, the rank. `.diff`,
    `.diff_b` and `.diff_m` are whole differences of a module's weight, bias and modulation. Text-encoder parts and
    embeddings are not applied, as warnings say. Raises InputError for LyCORIS, DoRA, other models' keys, incomplete
    pairs, wrong shapes and values that are not finite.
    """
    def refuse(problem, keys):
        raise InputError(f"{tensors.path}: {problem}: {', '.join(map(short, keys[:3]))}" + " ..." * (len(keys) > 3))

    def warn(sentence):
        warnings.warn(f"{tensors.path}: {sentence}", stacklevel=3)

    aside = {what: [key for key in tensors if key.startswith(starts)] for what, starts in NOT_APPLIED.items()}
    keys = [key for key in tensors if not any(map(key.startswith, NOT_APPLIED.values()))]
    if other := [key for key in keys if OTHER.search(key)]:
        refuse("only plain LoRA is read, not LoHa, LoKr, DoRA and their like", other)
    table, whole, found, unknown, lora = spellings(net, names), differences(net), {}, [], {}
    sides = {"lora_A": "down", "lora_down": "down", "lora_B": "up", "lora_up": "up", None: "alpha"}
    for key in keys:
        match, part = PART.fullmatch(respelled(key, OLD)), key.rpartition(".")[2]
        module = PREFIX.sub("", match[1] or match[4], count=1) if match else None
        module = module if module in table or not module else module.replace(".", "_")  # or dots and underscores
        # Of original modules: diffusers has no such keys, and its norm3 is Wan's norm2.
        name = whole.get((module, part)) if module and not key.startswith(
            ("transformer.", "lora_transformer_")) else None
        if name in lora:
            refuse("the same weight is given twice", [key])
        elif name:
            value, shape = tensors[key], net.get_parameter(name).shape
            if value.shape != shape or not value.is_floating_point() or not value.float().isfinite().all():
                refuse(f"expected finite values of the shape of {name}, {(*shape,)}", [key])
            lora[name] = [Piece(0, len(value), value.float(), None, 1.0)]
        elif module not in table or part.startswith("diff"):
            unknown.append(key)
        elif sides[match[2]] in found.setdefault(module, {}):
            refuse("the same weight is given twice", [key])
        else:
            value, side = tensors[key], sides[match[2]]
            if side != "alpha" and not value.is_floating_point():
                refuse("expected floating-point weights, found whole numbers", [key])
            found[module][side] = value.float()
    if unknown or not (found or lora):
        refuse("expected LoRA keys of this model's modules, found",
               unknown or sum(aside.values(), []) or ["no tensors"])
    for what, left in aside.items():
        if left:
            warn(f"its {len(left)} {what} are not applied")

    config = peft_config(tensors)
    with_alphas = any("alpha" in parts for parts in found.values())
    noted = None if with_alphas else plain_alpha(tensors)
    for module, parts in found.items():
        if not {"down", "up"} <= parts.keys():
            refuse("expected a down and an up weight together, found one alone or an alpha", [module])
        name, shape, cuts = table[module]
        down, up = parts["down"], parts["up"]
        rank, rows = up.shape[1:2].numel(), sum(stop - start for start, stop in cuts)
        # Numbers of elements, because a convolution's down carries the kernel and its up is 1x1.
        expected = (rows * rank, rank * math.prod(shape[1:]))
        if rank == 0 or up.shape[:1] != (rows,) or (up.numel(), down.numel()) != expected:
            refuse(f"down {(*down.shape,)} and up {(*up.shape,)} do not fit {name} {shape}", [module])
        down, up = down.reshape(rank, -1), up.reshape(rows, rank)
        # kohya's split qkv stacks three ranks in one down; alpha / rows of down is how every reader takes it.
        alpha = parts.get("alpha", torch.tensor(float(rank) if noted is None else noted))
        if alpha.numel() != 1 or not alpha.all() or not all(part.isfinite().all() for part in (down, up, alpha)):
            refuse("expected finite values and an alpha of one number that is not 0", [module])
        scale = peft_scale(config, module, rank) if config and "alpha" not in parts else alpha.item() / rank
        pieces = lora.setdefault(name, [])
        for (start, stop), part in zip(cuts, up.split([stop - start for start, stop in cuts])):
            if any(start < p.stop and p.start < stop for p in pieces):
                refuse("the same weight is given twice, under two names", [module])
            pieces.append(Piece(start, stop, down, part, scale))
    if found and not config and not with_alphas and noted is None:
        warn("says no alpha; strength 1 is assumed, alpha = rank")
    return lora


@torch.no_grad()
def merge_lora(target: nn.Module | dict[str, Tensor], lora: dict[str, list[Piece]], scale: float = 1) -> None:
    """Add a LoRA to the weights of a network (sharded or not) or of a dict: in place, one after the other,
    in float32 whatever they are stored in."""
    weights = dict(target.named_parameters()) if isinstance(target, nn.Module) else target
    for name, pieces in lora.items():
        rows, first = local_rows(weights[name])
        delta = torch.zeros(weights[name].shape, device=rows.device)
        for start, stop, down, up, piece_scale in pieces:
            product = down.to(delta.device) if up is None else up.to(delta.device) @ down.to(delta.device)
            delta[start:stop] += scale * piece_scale * product.view_as(delta[start:stop])
        rows.copy_(rows.float() + delta[first:first + len(rows)])


@torch.no_grad()
def load_lora(net: nn.Module, names: Names, name: str, tensors: Tensors) -> None:
    """Give an adapter of `net`, sharded or not, the values of a file of one on the same layers and of the
    same rank. Raises InputError for other layers, another rank, and q, k and v each with another down."""
    layers, lora = lora_layers(net, name), read_lora(tensors, net, names)
    other = {path + ".weight" for path in layers} ^ lora.keys()
    if other:
        raise InputError(f"{tensors.path}: expected an adapter on the same {len(layers)} layers as this "
                         f"run's; found another on or without {some(sorted(other))}")
    for path, layer in layers.items():
        pieces = sorted(lora[path + ".weight"], key=lambda piece: piece.start)
        down, rank = pieces[0].down, len(layer.lora_A[name])
        if any(piece.up is not None and len(piece.down) != rank for piece in pieces):
            raise InputError(f"{tensors.path}: an adapter of rank {len(down)}, and --lora-rank is {rank}; "
                             "expected the same")
        covered = sum(piece.stop - piece.start for piece in pieces if piece.up is not None)
        if covered != layer.out_features or any(not torch.equal(piece.down, down) for piece in pieces):
            raise InputError(f"{tensors.path}: not one adapter on {path}; expected one, as this project exports it")
        up = torch.cat([piece.up * (piece.scale * (rank / layer.alpha[name])) for piece in pieces])
        for param, value in ((layer.lora_A[name], down), (layer.lora_B[name], up)):
            rows, first = local_rows(param)
            rows.copy_(value[first:first + len(rows)])


def save_diffusers(path: str | Path, net: nn.Module, names: Names, name: str,
                   metadata: dict[str, str] | None = None) -> None:
    """The adapter as diffusers names it: q, k and v apart; fused ones each get a copy of the common down.

    An alpha other than the rank is in the metadata, which ComfyUI does not read: give it `save_kohya`'s file.
    Every rank must call this and `save_kohya`; rank 0 writes. `metadata`: strings to put beside.
    """
    tensors, modules, metadata = {}, [], dict(metadata or {})
    for module, (down, up) in lora_state(net, name).items():
        for spelling, cuts in names.to_diffusers(module, len(up), net).items():
            modules.append(spelling)
            tensors[f"{names.prefix}{spelling}.lora_A.weight"] = down
            tensors[f"{names.prefix}{spelling}.lora_B.weight"] = torch.cat([up[a:b] for a, b in cuts])
    alpha, rank = lora_layers(net, name)[module].alpha[name], len(down)
    metadata["lora_alpha"] = f"{alpha:g}"
    if alpha != rank:  # without this entry readers take alpha = rank
        config = dict(r=rank, lora_alpha=alpha, target_modules=modules)
        metadata["lora_adapter_metadata"] = json.dumps({names.prefix + key: config[key] for key in config})
    write(path, tensors, metadata)


def save_kohya(path: str | Path, net: nn.Module, names: Names, name: str, metadata: dict[str, str] | None = None,
               dotted: str = "") -> None:
    """The adapter as sd-scripts, musubi-tuner and ComfyUI name it: modules with underscores or, after `dotted`, with
    dots, qkv fused, alphas. Those of motion modules are MotionLoRA's, which has no alphas: readers pick their own
    by the names."""
    tensors, layers = {}, lora_layers(net, name)
    for module, (down, up) in lora_state(net, name).items():
        spelling, alpha = names.kohya(module, net), layers[module].alpha[name]
        if ".temporal_transformer." in spelling:
            block, projection = re.fullmatch(r"(.+)\.(to_[qkv]|to_out)(?:\.0)?", spelling).groups()
            key, ends = f"{block}.processor.{projection}_lora", ("down", "up")
            up = up * (alpha / len(down))
        else:
            key = dotted + spelling if dotted else "lora_unet_" + spelling.replace(".", "_")
            ends = "lora_down", "lora_up"
            tensors[f"{key}.alpha"] = torch.tensor(alpha)
        tensors[f"{key}.{ends[0]}.weight"], tensors[f"{key}.{ends[1]}.weight"] = down, up
    write(path, tensors, (metadata or {}) | {
        "modelspec.sai_model_spec": "1.0.0", "modelspec.architecture": f"{names.architecture}/lora",
        "modelspec.title": Path(path).stem, "modelspec.implementation": f"https://github.com/{names.implementation}",
        "ss_network_module": "networks.lora", "ss_network_dim": str(len(down)), "ss_network_alpha": f"{alpha:g}"}
        # A1111 hides a file from SDXL that has metadata and not this.
        | ({"ss_base_model_version": "sdxl_base_v1-0"} if "-xl-" in names.architecture else {}))


def write(path: str | Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    if not dist.is_initialized() or dist.get_rank() == 0:
        save_safetensors(path, tensors, metadata)
