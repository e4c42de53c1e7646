"""The tiny image teachers, in the layouts of their big siblings, and what the training of every one shares.

Writes models/tiny/: tiny_sd3.safetensors (MMDiT, flow), tiny_sdxl.safetensors (UNet, epsilon),
tiny_sam.safetensors (a vision encoder in SAM's layout that has learned to outline the shapes), tokenizers and
prompts.

Letters: B pictures, H W pixels, Z h w latent, L tokens, D width.
"""
import copy
import json
import math
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from types import ModuleType

import torch
from einops import rearrange
from torch import Tensor, nn
from torch.nn.functional import binary_cross_entropy_with_logits, l1_loss, mse_loss, pixel_shuffle
from transformers import SamVisionConfig, SamVisionModel, T5Tokenizer

from models.eval import moving_shapes, shapes
from models.checkpoint import load, open_tensors, replacing, save_safetensors
from models.data import film_strip, noise, save_rows
from models.diffusion import Denoiser, generator_times, q, random_time, solve, target, teacher_times
from models.discriminator import VisionEncoder, original_name
from models.job.networks import FAMILIES, latent_shape
from models.presets import PRESETS, Preset
from models.eval.shapes import SIZE, Scenes, captions, coverage, draw, random_scenes
from models.text import Cond, SD3Text, SDXLText, load_tokenizers, text_parts
from models.vae import AutoencoderKL

FOLDER = Path(__file__).parent
BATCH, PICTURES = 64, 8192  # of a denoiser's training
LENGTH = 8  # tokens of each text encoder: start, six words, end
SAM = dict(hidden_size=64, num_hidden_layers=4, num_attention_heads=2, mlp_dim=256, image_size=SIZE,
           patch_size=4, window_size=4, global_attn_indexes=[1, 3])
STEPS = {"sd3": 5000, "sdxl": 5000, "sam": 2000, "vae": 2500}


# ---- networks before training ------------------------------------------------------------------------------

def position_table(grid: int, width: int) -> Tensor:
    """2D sinusoids (1 grid*grid width), half of the channels for y, half for x, periods from 2 patches up."""
    k = torch.arange(width // 4) / (width // 4)
    angles = torch.arange(grid)[:, None] * math.pi * (1 / (2 * grid)) ** k
    axis = torch.cat([angles.sin(), angles.cos()], dim=1)  # grid D/2
    table = torch.cat([axis[:, None].expand(-1, grid, -1), axis[None].expand(grid, -1, -1)], dim=2)
    return rearrange(table, "y x D -> 1 (y x) D").contiguous()


def new_mmdit(config: dict) -> nn.Module:
    """Initialised as diffusion transformers are: gates and output zero, so every block starts as identity."""
    net = FAMILIES["mmdit"][0](**config)
    for name, p in net.named_parameters():
        if "adaLN_modulation" in name or "final_layer.linear" in name or name.endswith("bias"):
            nn.init.zeros_(p)
        elif p.ndim >= 2:
            nn.init.xavier_uniform_(p.view(p.shape[0], -1))
    net.pos_embed.copy_(position_table(config["pos_grid"], config["width"]))
    return net


def new_unet(config: dict) -> nn.Module:
    """Initialised as the original: what each residual branch adds, and the output, start at zero."""
    net = FAMILIES["unet"][0](**config)
    for name, p in net.named_parameters():
        if "out_layers.3." in name or "proj_out." in name or name.startswith("out.2."):
            nn.init.zeros_(p)
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
    return len(tokens), write_t5_tokenizer(folder / "tokenizer_3", words, LENGTH)


def write_t5_tokenizer(folder: Path, words: list[str], length: int) -> int:
    """One token for each word, letters for others. Returns the size of the vocabulary."""
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -4.0)]
    pieces += [("▁" + word, -2.0) for word in words] + [(c, -4.0) for c in "abcdefghijklmnopqrstuvwxyz"]
    T5Tokenizer(vocab=pieces, extra_ids=0, model_max_length=length).save_pretrained(folder)
    return len(pieces)


def random_matrix(tensors: dict, g: torch.Generator, name: str, *shape: int, std: float | None = None,
                  bias: bool = False) -> None:
    tensors[f"{name}.weight"] = torch.randn(shape, generator=g) * (std or shape[1] ** -0.5)
    tensors.update({f"{name}.bias": torch.zeros(shape[0])} if bias else {})


def clip_encoder(root: str, words: int, g: torch.Generator) -> dict[str, Tensor]:
    """A random CLIP of two layers and one head of 64, transformers' names.

    Random is enough: token embeddings of unit variance keep words apart, the denoiser learns the rest."""
    tensors = {}
    random_matrix(tensors, g, root + "embeddings.token_embedding", words, 64, std=1.0)
    random_matrix(tensors, g, root + "embeddings.position_embedding", LENGTH, 64, std=0.5)
    for norm in ("final_layer_norm", *(f"encoder.layers.{i}.layer_norm{j}" for i in "01" for j in "12")):
        tensors |= {f"{root}{norm}.weight": torch.ones(64), f"{root}{norm}.bias": torch.zeros(64)}
    for layer in (f"{root}encoder.layers.0.", f"{root}encoder.layers.1."):
        for part in ("q_proj", "k_proj", "v_proj", "out_proj"):
            random_matrix(tensors, g, f"{layer}self_attn.{part}", 64, 64, bias=True)
        random_matrix(tensors, g, layer + "mlp.fc1", 256, 64, bias=True)
        random_matrix(tensors, g, layer + "mlp.fc2", 64, 256, bias=True)
    return tensors


def t5_text(root: str, words: int, g: torch.Generator) -> dict[str, Tensor]:
    """A random T5 v1.1 of one block and two heads of 64, transformers' names."""
    tensors = {}
    random_matrix(tensors, g, root + "shared", words, 128, std=1.0)
    for norm in ("final_layer_norm", "block.0.layer.0.layer_norm", "block.0.layer.1.layer_norm"):
        tensors[f"{root}encoder.{norm}.weight"] = torch.ones(128)
    attention = root + "encoder.block.0.layer.0.SelfAttention."
    feed = root + "encoder.block.0.layer.1.DenseReluDense."
    random_matrix(tensors, g, attention + "relative_attention_bias", 32, 2, std=1.0)
    # q carries the 1 / sqrt(64) that T5 leaves out.
    random_matrix(tensors, g, attention + "q", 128, 128, std=128 ** -0.5 / 8)
    for name in [attention + part for part in "kvo"] + [feed + part for part in ("wi_0", "wi_1", "wo")]:
        random_matrix(tensors, g, name, 128, 128)
    return tensors


def sd3_text(clip_words: int, t5_words: int) -> dict[str, Tensor]:
    """Random, frozen CLIP-L, CLIP-G and T5, names of SD3's single file."""
    tensors, g = {}, torch.Generator().manual_seed(0)
    for name in ("clip_l", "clip_g"):
        tensors |= clip_encoder(f"text_encoders.{name}.transformer.text_model.", clip_words, g)
    random_matrix(tensors, g, "text_encoders.clip_g.transformer.text_projection", 64, 64)
    root = "text_encoders.t5xxl.transformer."
    tensors |= t5_text(root, t5_words, g)
    tensors[root + "encoder.embed_tokens.weight"] = tensors[root + "shared.weight"].clone()
    return tensors


def sdxl_text(clip_words: int, _: int) -> dict[str, Tensor]:
    """Random, frozen CLIP-L and CLIP-G, names of SDXL's single file: the second in open_clip's."""
    g = torch.Generator().manual_seed(0)
    tensors = clip_encoder("conditioner.embedders.0.transformer.text_model.", clip_words, g)
    hub, root = clip_encoder("", clip_words, g), "conditioner.embedders.1.model."
    tensors[root + "token_embedding.weight"] = hub["embeddings.token_embedding.weight"]
    tensors[root + "positional_embedding"] = hub["embeddings.position_embedding.weight"]
    tensors[root + "text_projection"] = torch.randn(64, 64, generator=g) / 8
    for kind in ("weight", "bias"):
        tensors[f"{root}ln_final.{kind}"] = hub[f"final_layer_norm.{kind}"]
        for i in range(2):
            ours, theirs = f"{root}transformer.resblocks.{i}.", f"encoder.layers.{i}."
            for a, b in (("ln_1", "layer_norm1"), ("ln_2", "layer_norm2"), ("mlp.c_fc", "mlp.fc1"),
                         ("mlp.c_proj", "mlp.fc2"), ("attn.out_proj", "self_attn.out_proj")):
                tensors[f"{ours}{a}.{kind}"] = hub[f"{theirs}{b}.{kind}"]
            tensors[f"{ours}attn.in_proj_{kind}"] = torch.cat(
                [hub[f"{theirs}self_attn.{part}_proj.{kind}"] for part in "qkv"])
    return tensors


def open_teacher(row: Preset) -> tuple[Denoiser, AutoencoderKL, SD3Text | SDXLText]:
    """Denoiser, autoencoder and text encoders of a tiny preset's checkpoint."""
    denoiser, vae = FAMILIES[row.family][0](**row.config), AutoencoderKL(**row.vae)
    for net, prefix in ((denoiser, "model.diffusion_model."), (vae, "first_stage_model.")):
        load(net, open_tensors(row.ckpt).group(prefix))
    parts, tokenizers = text_parts(row.ckpt), load_tokenizers(row.tokenizers)
    text = (SDXLText(parts, tokenizers, row.size) if row.family == "unet"
            else SD3Text(parts, tokenizers, row.t5_length))
    return Denoiser(denoiser, row.predicts, row.schedule), vae, text.load(parts)


# ---- training ----------------------------------------------------------------------------------------------

def train(name: str, net: nn.Module, loss_at: Callable, steps: int, lr: float, out: Path,
          stop: int | None = None, look: Callable | None = None) -> nn.Module:
    """Warm-up and cosine decay on `loss_at(net, step)`: Muon for the matrices of a transformer's blocks,
    which learn faster by it, AdamW for everything else. Returns the moving average of the weights.

    Batches depend on the step alone, all else is in out/<name>.pt: a killed run goes on as if never stopped.
    `stop` ends early, for tests; `look(average, step)` is called now and then to show samples."""
    average = copy.deepcopy(net).requires_grad_(False)
    matrices = [p for path, p in net.named_parameters()
                if path.startswith(("joint_blocks.", "transformer_blocks.")) and p.ndim == 2]
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


def data_of(row: Preset) -> ModuleType:
    """Where a model's pictures or clips, captions and evaluator come from."""
    return moving_shapes if row.frames else shapes


def encode_captions(row: Preset, text: nn.Module) -> Cond:
    """Conditions of the data's `captions()`, the last of them guidance's unconditional."""
    known, null = text.encode(data_of(row).captions()[:-1]), text.unconditional()
    return Cond(*(torch.cat(pair) for pair in zip(known, null)))


def image_times(schedule: str, g: torch.Generator) -> Tensor:
    """Training times t (B,): of flow logit-normal, as outlines form at 0.3 to 0.8; else uniform."""
    if schedule == "flow":
        return torch.sigmoid(0.4 + torch.randn(BATCH, generator=g))
    return random_time(schedule, torch.rand(BATCH, generator=g))


def denoiser_loss(row: Preset, latents: Tensor, labels: Tensor, table: Cond,
                  share: float = 0.7, times: Callable | None = None) -> Callable:
    """Eq. (2) or (3) with prompt dropout, each attribute named at probability `share`. `table`: of
    `encode_captions`. `times(step, g)`: t (B,), by default `image_times`."""
    index = data_of(row).caption_index

    def loss_at(net: nn.Module, step: int) -> Tensor:
        g = torch.Generator().manual_seed(step)
        i = torch.randint(len(latents), (BATCH,), generator=g)
        named = torch.where(torch.rand(BATCH, labels.shape[1], generator=g) < share, labels[i], -1)
        prompt = torch.where(torch.rand(BATCH, generator=g) < 0.1, len(table.context) - 1, index(named))
        t = times(step, g) if times else image_times(row.schedule, g)
        x_0, eps = latents[i], torch.randn(BATCH, *latents.shape[1:], generator=g)
        prediction = net(q(row.schedule, x_0, t, eps), t, (table.context[prompt], table.pooled[prompt]))
        return mse_loss(prediction, target(row.predicts, row.schedule, x_0, t, eps))
    return loss_at


@torch.no_grad()
def generate(row: Preset, F: Denoiser, vae: nn.Module, table: Cond, prompts: list[str], tn: Tensor,
             cfg: float | None) -> Tensor:
    """Pictures (B 3 H W) or clips (B F 3 H W) for prompts among the captions; number i starts from the noise
    of index i."""
    data, samples = data_of(row), []
    for start in range(0, len(prompts), 64):
        index = data.caption_index(data.parse(prompts[start:start + 64]))
        z = noise(latent_shape(row, row), 0, 0, "sample", list(range(start, start + len(index))))
        c, null = Cond(table.context[index], table.pooled[index]), Cond(table.context[-1:], table.pooled[-1:])
        w = None if cfg is None else torch.full((len(index),), cfg)
        samples.append(vae.decode(solve(F, z, tn, c, null, w)))
    return torch.cat(samples)


def report(path: Path, row: Preset, F: Denoiser, vae: nn.Module, table: Cond, settings: list[tuple],
           count: int) -> None:
    """Print the figures of the data and of the teacher at each (steps, guidance), save samples of each."""
    data, rows = data_of(row), []
    prompts = data.evaluation_prompts(count)
    for setting in (None, *settings):
        label, samples = "data", data.reference(prompts, seed=3)
        if setting:
            steps, cfg = setting
            label = f"teacher, {steps} step{'s' * (steps > 1)}" + (f", guidance {cfg:g}" if cfg else "")
            tn = (teacher_times if steps >= 20 else generator_times)(steps, row.shift, row.schedule)
            samples = generate(row, F, vae, table, prompts, tn, cfg)
        figures = data.evaluate(samples, prompts)
        print(f"{label:30}" + "".join(f"  {name} {value:.4f}" for name, value in figures.items()), flush=True)
        rows.append((label, film_strip(samples[:4], 5) if row.frames else samples[:16]))
    save_rows(path, rows, least=64)


def train_vae(out: Path) -> dict[str, Tensor]:
    """Weights of the autoencoder that both image models use."""
    torch.manual_seed(0)
    vae = train("vae", AutoencoderKL(**PRESETS["tiny-sd3"].vae), vae_loss, STEPS["vae"], 2e-3, out)
    normalise(vae, draw(random_scenes(11, range(1024))))
    return vae.state_dict()


def train_teacher(name: str, out: Path) -> None:
    """sd3 or sdxl: write models/tiny/tiny_NAME.safetensors and samples of it."""
    row = PRESETS[f"tiny-{name}"]
    if name == "sd3":
        weights = {f"first_stage_model.{key}": p for key, p in train_vae(out).items()}
    else:  # of tiny-sd3; the 1x1 convolutions around SDXL's latent are identities
        shared = open_tensors(PRESETS["tiny-sd3"].ckpt).group("first_stage_model.")
        weights = {f"first_stage_model.{key}": p for key, p in shared.items()}
        for key, width in (("quant_conv", 2 * row.latent_channels), ("post_quant_conv", row.latent_channels)):
            weights[f"first_stage_model.{key}.weight"] = torch.eye(width)[:, :, None, None]
            weights[f"first_stage_model.{key}.bias"] = torch.zeros(width)
    weights |= (sd3_text if name == "sd3" else sdxl_text)(*write_tokenizers(FOLDER))
    (FOLDER / "prompts.txt").write_text("\n".join(captions()[:-1]) + "\n")

    def export(net: nn.Module) -> None:
        denoiser = {f"model.diffusion_model.{key}": p for key, p in net.state_dict().items()}
        save_safetensors(row.ckpt, {key: p.half() for key, p in (denoiser | weights).items()})

    torch.manual_seed(0)
    net = (new_mmdit if name == "sd3" else new_unet)(row.config)
    export(net)
    _, vae, text = open_teacher(row)
    table, scenes = encode_captions(row, text), random_scenes(11, range(PICTURES))
    with torch.no_grad():
        parts = zip(*(x.split(512) for x in scenes))
        latents = torch.cat([vae.encode(draw(Scenes(*part))) for part in parts])  # B Z h w

    def look(average: nn.Module, step: int) -> None:
        report(out / f"{name}_{step:06d}.png", row, Denoiser(average, row.predicts, row.schedule), vae, table,
               [(2, 3.0), (row.teacher_steps, 3.0)], 256)

    loss = denoiser_loss(row, latents, scenes.labels, table)
    export(train(name, net, loss, STEPS[name], 2e-3, out, look=look))
    F, vae, _ = open_teacher(row)
    settings = list(product((1, 2, 4, row.teacher_steps), (None, 3.0)))
    report(FOLDER / f"teacher_{name}.png", row, F, vae, table, settings, 1024)
    print(f"{row.ckpt}: {row.ckpt.stat().st_size / 1e6:.2f} MB", flush=True)


def mask_loss(net: nn.ModuleDict, step: int) -> Tensor:
    """Cross-entropy per pixel and kind of shape, on 64 fresh pictures with a little noise."""
    scenes = random_scenes(13, range(step * 64, step * 64 + 64))
    kinds = nn.functional.one_hot(scenes.labels[:, 0], 5)[:, :, None, None]
    masks = coverage(scenes.centre, scenes.radius) * kinds  # B 5 H W
    images = draw(scenes)
    images += 0.1 * torch.randn(images.shape, generator=torch.Generator().manual_seed(step))
    logits = net["head"](VisionEncoder(net["encoder"], "sam").features(images)[-1])
    return binary_cross_entropy_with_logits(pixel_shuffle(logits, SAM["patch_size"]), masks)


def train_sam(out: Path) -> None:
    """Write models/tiny/tiny_sam.safetensors, a vision encoder that has learned to outline the shapes."""
    torch.manual_seed(0)
    encoder = SamVisionModel(SamVisionConfig(**SAM)).vision_encoder
    encoder.neck = nn.Identity()
    head = nn.Conv2d(SAM["hidden_size"], 5 * SAM["patch_size"] ** 2, 1)
    net = train("sam", nn.ModuleDict(dict(encoder=encoder, head=head)), mask_loss, STEPS["sam"], 2e-3, out)
    weights = {f"image_encoder.{original_name('sam', name)}": p
               for name, p in net["encoder"].state_dict().items()}
    path = PRESETS["tiny-sdxl"].pixel_ckpt
    save_safetensors(path, {name: p.half() for name, p in weights.items()})
    print(f"{path}: {path.stat().st_size / 1e6:.2f} MB, loss on other pictures {mask_loss(net, 10 ** 6):.4f}")
