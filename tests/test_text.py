import json
import shutil

import pytest
import torch
from conftest import from_recipe, golden, near, read_golden
from safetensors.torch import save_file
from transformers import AutoTokenizer, T5Tokenizer

from models import text_encoders
from models.checkpoint import InputError, Tensors, open_tensors, save_safetensors
from models.checkpoint import load as fill
from models.text import SD3Text, SD15Text, SDXLText, size_embedding
from models.text_encoders import FILES, FOLDERS, PREFIXES, load_tokenizers, pad_ids, run_clip, text_parts

# The references differ from their own float64 runs by less than 1.5e-5; tanh-GELU in CLIP-G changes 7e-4 or
# more. SDXL's embedding of 2048 pixels moves by 6e-5 with the last bit of a frequency below 1/2, by 1.2e-4
# with that of a larger one, and exp differs in it between CPUs.
SIZES_TOLERANCE = 3e-4
MANIFESTS = [p for p in golden("sd3*.keys.json") if "shared.weight" in p.read_text()]


def equal(a, b):
    return torch.equal(a.context, b.context) and torch.equal(a.pooled, b.pooled)


# ---- against the original implementation -------------------------------------------------------------------

@pytest.fixture(params=golden("sd3_text_*.safetensors"), ids=lambda p: p.stem)
def sd3(request):
    tensors, meta = read_golden(request.param)
    heads = {name: meta["config"][name]["num_attention_heads"] for name in ("clip_l", "clip_g")}
    parts = text_parts(request.param)
    return SD3Text(parts, heads=heads).load(parts), parts, tensors, meta


def ids_of(g, case):
    return [g[f"in.{case}.{name}_ids"] for name in ("clip_l", "clip_g", "t5")]


@torch.no_grad()
def test_golden(sd3):
    text, _, g, meta = sd3
    seen = {}
    for name in ("clip_l", "clip_g"):
        clip = getattr(text, name)
        clip.text_model.final_layer_norm.register_forward_hook(lambda _, x, y, n=name: seen.update({n: y}))
        clip.text_projection.register_forward_pre_hook(lambda _, x, n=name: seen.update({n + "_in": x[0]}))
    for case in meta["cases"]:
        ids = dict(zip(FILES, ids_of(g, case)))
        for name in ("clip_l", "clip_g"):
            penultimate, pooled = run_clip(getattr(text, name), ids[name])
            near(penultimate, g[f"out.{case}.{name}.penultimate"])
            near(pooled, g[f"out.{case}.{name}.pooled"])
            for output, value in (("last_ln", seen[name]), ("pooled_unprojected", seen[name + "_in"])):
                if f"out.{case}.{name}.{output}" in g:  # not stored for every case
                    near(value, g[f"out.{case}.{name}.{output}"])
        cond = text.encode_ids(*ids.values())
        near(cond.context, g[f"out.{case}.context"])  # T5's hidden states are its last rows
        near(cond.pooled, g[f"out.{case}.y"])


def test_batch_equals_single_prompts(sd3):
    text, _, g, meta = sd3
    length = g[f"in.{meta['cases'][0]}.t5_ids"].shape[1]
    cases = [case for case in meta["cases"] if g[f"in.{case}.t5_ids"].shape[1] == length]
    ids = [torch.cat(rows) for rows in zip(*(ids_of(g, case) for case in cases))]
    context, pooled = text.encode_ids(*ids)
    near(context, torch.cat([g[f"out.{case}.context"] for case in cases]))
    near(pooled, torch.cat([g[f"out.{case}.y"] for case in cases]))


def test_without_t5(sd3):
    text, parts, g, meta = sd3
    width = g[f"out.{meta['cases'][0]}.context"].shape[-1]
    clips = {name: part for name, part in parts.items() if name != "t5"}
    heads = {name: getattr(text, name).config.num_attention_heads for name in clips}
    bare = SD3Text(clips, context_dim=width, heads=heads).load(clips)
    for case in meta["cases"]:
        ids = ids_of(g, case)
        context, pooled = bare.encode_ids(*ids)
        window = ids[0].shape[1]
        near(context[:, :window], g[f"out.{case}.context"][:, :window])
        near(pooled, g[f"out.{case}.y"])
        assert context.shape == g[f"out.{case}.context"].shape and not context[:, window:].any()
    assert len(bare.blocks()) == len(text.blocks()) - text.t5.config.num_layers


def test_half_precision_gives_float32(sd3):
    text, parts, g, meta = sd3
    heads = {name: getattr(text, name).config.num_attention_heads for name in ("clip_l", "clip_g")}

    def bf16(net, tensors, ignore):
        fill(net, tensors, torch.bfloat16, ignore)

    context, pooled = SD3Text(parts, heads=heads).load(parts, bf16).encode_ids(*ids_of(g, meta["cases"][0]))
    assert context.dtype == pooled.dtype == torch.float32
    # bf16 keeps 8 bits: a correct result is a few percent off, not more.
    expected = g[f"out.{meta['cases'][0]}.context"]
    assert (context - expected).norm() < 0.1 * expected.norm()


@pytest.mark.parametrize("path", MANIFESTS, ids=lambda p: p.stem)
def test_manifest(path):
    """Names and shapes of the published files; `shared` is stored twice there and owned once here."""
    tensors = {name: tuple(shape) for name, shape in json.loads(path.read_text())["tensors"].items()}
    parts = {}
    for name, file in FILES.items():
        for prefix in (f"text_encoders.{file}.transformer.", f"{file}/"):
            shapes = {k.removeprefix(prefix): shape for k, shape in tensors.items() if k.startswith(prefix)}
            if shapes:
                parts[name] = Tensors(path, shapes, None)
    text = SD3Text(parts)
    for name, part in parts.items():
        own = {key: tuple(value.shape) for key, value in getattr(text, name).state_dict().items()}
        twice = {"encoder.embed_tokens.weight": own["shared.weight"]} if name == "t5" else {}
        assert own | twice == part.shapes
    # Nothing but the file has to fill it, and sharding covers every layer.
    assert not list(text.buffers()) and all(p.is_meta and not p.requires_grad for p in text.parameters())
    config = json.loads(path.read_text())["_meta"].get("config", {})
    names = {"vocab": "vocab_size", "positions": "max_position_embeddings",
             "relative_buckets": "relative_attention_num_buckets",
             "relative_max_distance": "relative_attention_max_distance"}
    for name, file in FILES.items():
        for key, value in config.get(file, {}).items():
            assert getattr(getattr(text, name).config, names.get(key, key)) == value, (name, key)
    assert len(text.blocks()) == sum(getattr(text, name).config.num_hidden_layers for name in FILES)


# ---- tokens ------------------------------------------------------------------------------------------------

def test_padding_of_real_token_ids():
    """The plain CLIPTokenizer's rows, padded here, are what the original gives to both encoders."""
    for path in golden("sd3_clip_tokens.json"):
        same = 0
        for record in json.loads(path.read_text())["records"]:
            ids, end = record["hf_77"], max(record["hf_77"])
            row = ids[:ids.index(end) + 1]
            assert pad_ids([row, row], len(ids), end).tolist() == [ids, ids]
            if record["stability_l"][0] == ids:  # else the wrapper's parentheses or its cut between words
                same += 1
                assert pad_ids([row], len(ids), 0).tolist() == record["stability_g"][:1]
        assert same > 8


@pytest.fixture(scope="session")
def folder(tmp_path_factory):
    """A diffusers-layout folder of letters: tokenizer/, tokenizer_2/ as published (pad "!"), tokenizer_3/."""
    folder = tmp_path_factory.mktemp("tokenizers")
    letters = "!,abcdefghijklmnopqrstuvwxyz"
    tokens = [*letters, *(c + "</w>" for c in letters), "ca", "cat</w>", "<|startoftext|>", "<|endoftext|>"]
    for name, pad in (("tokenizer", "<|endoftext|>"), ("tokenizer_2", "!")):
        (folder / name).mkdir()
        (folder / name / "vocab.json").write_text(json.dumps({token: i for i, token in enumerate(tokens)}))
        (folder / name / "merges.txt").write_text("#version: 0.2\nc a\nca t</w>\n")
        config = dict(tokenizer_class="CLIPTokenizer", pad_token=pad, model_max_length=77)
        (folder / name / "tokenizer_config.json").write_text(json.dumps(config))
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("▁", -3.0), ("▁cat", -1.0)]
    pieces += [(c, -3.0) for c in letters]
    T5Tokenizer(vocab=pieces, extra_ids=0).save_pretrained(folder / "tokenizer_3")
    return folder


def random_encoders(l_width=32, g_width=48, t5_width=80, out=24, clip_tokens=60, t5_tokens=40, window=77):
    """Tiny encoders under the single file's names: two CLIP layers, one T5 block of two heads."""
    shapes = {}
    for name, width in (("clip_l", l_width), ("clip_g", g_width)):
        root = f"text_encoders.{name}.transformer.text_model"
        shapes |= {f"{root}.embeddings.token_embedding.weight": (clip_tokens, width),
                   f"{root}.embeddings.position_embedding.weight": (window, width)}
        inner = [f"encoder.layers.{i}.layer_norm{j}" for i in (0, 1) for j in (1, 2)]
        for norm in ("final_layer_norm", *inner):
            shapes |= {f"{root}.{norm}.weight": (width,), f"{root}.{norm}.bias": (width,)}
        for i in (0, 1):
            sizes = {f"self_attn.{p}_proj": (width, width) for p in ("q", "k", "v", "out")}
            sizes |= {"mlp.fc1": (2 * width, width), "mlp.fc2": (width, 2 * width)}
            for part, size in sizes.items():
                shapes |= {f"{root}.encoder.layers.{i}.{part}.weight": size,
                           f"{root}.encoder.layers.{i}.{part}.bias": size[:1]}
    shapes["text_encoders.clip_g.transformer.text_projection.weight"] = (out, g_width)
    root, block = "text_encoders.t5xxl.transformer", "encoder.block.0.layer"
    shapes |= {f"{root}.{name}.weight": (t5_tokens, t5_width) for name in ("shared", "encoder.embed_tokens")}
    shapes |= {f"{root}.{name}.weight": (t5_width,) for name in (
        "encoder.final_layer_norm", f"{block}.0.layer_norm", f"{block}.1.layer_norm")}
    shapes |= {f"{root}.{block}.0.SelfAttention.{p}.weight": (t5_width, t5_width) for p in "qkvo"}
    shapes[f"{root}.{block}.0.SelfAttention.relative_attention_bias.weight"] = (32, 2)
    shapes |= {f"{root}.{block}.1.DenseReluDense.{p}.weight": (64, t5_width) for p in ("wi_0", "wi_1")}
    shapes[f"{root}.{block}.1.DenseReluDense.wo.weight"] = (t5_width, 64)
    g = torch.Generator().manual_seed(0)
    tensors = {name: torch.randn(size, generator=g) * 0.3 ** (len(size) - 1) for name, size in shapes.items()}
    tensors[f"{root}.encoder.embed_tokens.weight"] = tensors[f"{root}.shared.weight"].clone()
    return tensors


@pytest.fixture(scope="session")
def tiny(tmp_path_factory):
    path = tmp_path_factory.mktemp("tiny") / "tiny_sd3.safetensors"
    save_safetensors(path, random_encoders() | {"first_stage_model.decoder.conv_in.bias": torch.zeros(3)})
    return path


def test_tokenize(folder, tiny):
    text = SD3Text(text_parts(tiny), load_tokenizers(folder), t5_length=91)
    prompts = ["a cat!", "", "cat " * 90]
    l_ids, g_ids, t5_ids = text.tokenize(prompts)
    hf = AutoTokenizer.from_pretrained(folder / "tokenizer")
    assert l_ids.tolist() == hf(prompts, padding="max_length", max_length=77, truncation=True).input_ids
    start, cat, end = hf.bos_token_id, hf.convert_tokens_to_ids("cat</w>"), hf.eos_token_id
    assert l_ids[2].tolist() == [start] + [cat] * 75 + [end]
    length = (l_ids == end).int().argmax(dim=1) + 1  # of start, tokens and end
    inside = torch.arange(77) < length[:, None]
    assert torch.equal(g_ids, torch.where(inside, l_ids, 0))
    exclaimed = hf.convert_tokens_to_ids("!</w>")
    assert exclaimed in g_ids[0] and exclaimed != 0  # tokenizer_2's own reading would be its padding, 0
    assert t5_ids.shape == (3, 91) and t5_ids[2, -1] == 1 and (t5_ids[2] != 0).all()
    assert t5_ids[1].tolist() == [1] + [0] * 90


@pytest.mark.parametrize("length", [77, 256, 12])
def test_t5_length(folder, tiny, length):
    text = SD3Text(text_parts(tiny), load_tokenizers(folder), t5_length=length)
    assert text.tokenize(["cat"])[2].tolist() == [[4, 1] + [0] * (length - 2)]
    long = text.tokenize(["cat " * 300, "cat"])[2]
    assert long.shape == (2, length) and long[0, -2:].tolist() == [4, 1] and long[1, 2:].sum() == 0


def test_encode_with_tiny_widths(folder, tiny):
    parts = text_parts(tiny)
    text = SD3Text(parts, load_tokenizers(folder), t5_length=16).load(parts)
    cond = text.encode(["a cat", "", "a red dog"])
    assert cond.context.shape == (3, 77 + 16, 80) and cond.pooled.shape == (3, 32 + 24)
    assert cond.context.dtype == cond.pooled.dtype == torch.float32 and not cond.context.requires_grad
    assert cond.context.isfinite().all() and cond.context.std() > 0.1
    for i, prompt in enumerate(["a cat", "", "a red dog"]):
        single = text.encode([prompt])
        near(cond.context[i:i + 1], single.context)
        near(cond.pooled[i:i + 1], single.pooled)
    assert (cond.context[0] - cond.context[1]).abs().max() > 0.1
    narrow = random_encoders(g_width=32)  # 32 + 32 of 80: zeros on the right of the CLIP tokens
    save_file(narrow, tiny.with_name("narrow.safetensors"))
    parts = text_parts(tiny.with_name("narrow.safetensors"))
    context = SD3Text(parts, load_tokenizers(folder), 77).load(parts).encode(["a cat"]).context
    assert not context[:, :77, 64:].any() and context[:, :77, :64].abs().min() > 0 and context.shape[1] == 154


def test_no_t5_needs_no_t5_tokenizer(folder, tiny):
    parts = text_parts(tiny)
    del parts["t5"]
    text = SD3Text(parts, (load_tokenizers(folder)[0], None), t5_length=20, context_dim=96).load(parts)
    context, pooled = text.encode(["a cat"])
    assert context.shape == (1, 97, 96) and not context[:, 77:].any() and context[:, :77, :80].any()


# ---- files -------------------------------------------------------------------------------------------------

@pytest.fixture
def layouts(tiny, tmp_path):
    """The same encoders as separate original files and as a complete diffusers-layout download."""
    parts = {name: dict(part) for name, part in text_parts(tiny).items()}
    separate, hub = tmp_path / "repo" / "text_encoders", tmp_path / "hub"
    separate.mkdir(parents=True)
    for name, part in parts.items():
        (hub / FOLDERS[name]).mkdir(parents=True)
        save_file(part, separate / f"{FILES[name]}{'_fp16' if name == 't5' else ''}.safetensors")
    for name in ("clip_l", "clip_g"):
        part = parts[name] | {"text_model.embeddings.position_ids": torch.arange(77)[None]}
        width = part["text_model.final_layer_norm.bias"].shape[0]
        part.setdefault("text_projection.weight", torch.eye(width))  # diffusers stores an identity for CLIP-L
        save_file(part, hub / FOLDERS[name] / "model.safetensors")
        half = {key: value.half() for key, value in part.items()}
        save_file(half, hub / FOLDERS[name] / "model.fp16.safetensors")
    t5 = {key: value for key, value in parts["t5"].items() if key != "encoder.embed_tokens.weight"}
    for kind in ("", ".fp16"):
        shards = [f"model{kind}-0000{i}-of-00002.safetensors" for i in (1, 2)]
        places = {key: shards[i % 2] for i, key in enumerate(t5)}
        for shard in shards:
            save_file({key: t5[key].half() if kind else t5[key] for key in t5 if places[key] == shard},
                      hub / FOLDERS["t5"] / shard)
        index = hub / FOLDERS["t5"] / f"model.safetensors.index{kind}.json"
        index.write_text(json.dumps({"weight_map": places}))
    return tiny, separate, hub, parts


def test_sources_agree(layouts, folder):
    single, separate, hub, _ = layouts
    files = [separate / f"{name}.safetensors" for name in ("clip_l", "clip_g", "t5xxl_fp16")]
    conds = []
    for paths in ([single], [separate], [separate.parent], files, [hub], [separate, hub]):
        parts = text_parts(*paths)
        assert set(parts) == set(FILES)
        conds.append(SD3Text(parts, load_tokenizers(folder)).load(parts).encode(["a cat", ""]))
    assert all(equal(conds[0], cond) for cond in conds[1:])
    # A download of the float16 variant alone.
    for file in ("text_encoder/model.safetensors", "text_encoder_2/model.safetensors",
                 "text_encoder_3/model.safetensors.index.json"):
        (hub / file).unlink()
    parts = text_parts(hub)
    assert parts["t5"]["shared.weight"].dtype == torch.float16
    half = SD3Text(parts, load_tokenizers(folder)).load(parts).encode(["a cat", ""])
    # The weights are rounded to 11 bits.
    assert (half.context - conds[0].context).norm() < 0.02 * conds[0].context.norm()


@pytest.mark.parametrize("encoder, settings, said", [
    ("text_encoder", {"hidden_act": "gelu"}, "hidden_act gelu; expected quick_gelu"),
    ("text_encoder", {"num_attention_heads": 3}, "num_attention_heads 3; expected 1"),
    ("text_encoder_2", {"hidden_act": "quick_gelu"}, "hidden_act quick_gelu; expected gelu"),
    ("text_encoder_3", {"feed_forward_proj": "relu", "model_type": "t5"}, "feed_forward_proj relu; expected gated-gelu")])
def test_settings_that_no_shape_tells(layouts, folder, encoder, settings, said):
    hub, config = layouts[2], layouts[2] / encoder / "config.json"
    config.write_text(json.dumps({"model_type": "clip_text_model", "vocab_size": 7} | settings))
    with pytest.raises(InputError, match=f"{encoder}/config.json: {said}"):
        SD3Text(text_parts(hub), load_tokenizers(folder))


def test_single_file_may_lack_t5(layouts):
    _, separate, _, parts = layouts
    (separate / "t5xxl_fp16.safetensors").unlink()
    assert set(text_parts(separate)) == {"clip_l", "clip_g"}
    save_file(parts["t5"], separate / "t5xxl_fp8_e4m3fn.safetensors")
    assert text_parts(separate)["t5"].path.name == "t5xxl_fp8_e4m3fn.safetensors"
    save_file(parts["t5"], separate / "t5xxl_fp16.safetensors")
    assert text_parts(separate)["t5"].path.name == "t5xxl_fp16.safetensors"


def test_fp8_and_repackaged_extras(layouts, folder, tmp_path):
    """fp8 values are cast; scaled fp8 is scaled back; what repackaged files add is left alone."""
    single, *_, parts = layouts
    linear = {key for key, value in parts["t5"].items() if "SelfAttention" in key and "bias" not in key}
    fp8 = torch.float8_e4m3fn
    plain = parts["t5"] | {key: parts["t5"][key].to(fp8) for key in linear}
    expected = {key: value.float() for key, value in plain.items()}
    scaled = expected | {key: (expected[key] * 4).to(fp8) for key in linear}  # exact: a power of two
    scaled |= {key.replace("weight", "scale_weight"): torch.tensor(0.25) for key in linear}
    scaled |= {"scaled_fp8": torch.zeros(2).to(fp8)}
    save_file(plain, tmp_path / "t5xxl_plain.safetensors")
    save_file(scaled, tmp_path / "t5xxl_scaled.safetensors")
    save_file(expected, tmp_path / "t5xxl_expected.safetensors")
    extras = parts["clip_l"] | {"text_projection.weight": torch.randn(32, 32), "logit_scale": torch.ones(()),
                                "text_model.embeddings.position_ids": torch.arange(77)[None]}
    save_file(extras, tmp_path / "clip_l_extras.safetensors")
    conds = []
    for file in ("plain", "scaled", "expected"):
        t5 = tmp_path / f"t5xxl_{file}.safetensors"
        found = text_parts(single, t5, tmp_path / "clip_l_extras.safetensors")
        conds.append(SD3Text(found, load_tokenizers(folder)).load(found).encode(["a cat"]))
    assert equal(conds[0], conds[2]) and equal(conds[1], conds[2])


# ---- errors ------------------------------------------------------------------------------------------------

def test_file_errors(tiny, tmp_path):
    tensors = dict(open_tensors(tiny))

    def attempt(change):
        save_file(change(dict(tensors)), tmp_path / "x.safetensors")
        parts = text_parts(tmp_path / "x.safetensors")
        return SD3Text(parts).load(parts)

    attempt(lambda t: t)
    deep = "text_encoders.clip_g.transformer.text_model.encoder.layers.1.mlp.fc2.bias"
    with pytest.raises(InputError, match=rf"x\.safetensors.*missing.*{deep}"):
        attempt(lambda t: {name: value for name, value in t.items() if name != deep})
    shared = "text_encoders.t5xxl.transformer.shared.weight"
    with pytest.raises(InputError, match=f"T5 v1.1.*{shared}"):
        attempt(lambda t: {name: value for name, value in t.items()
                           if name != shared and "encoder.embed_tokens" not in name})
    with pytest.raises(InputError, match="not expected.*odd"):
        attempt(lambda t: t | {"text_encoders.clip_l.transformer.odd": torch.zeros(1)})
    with pytest.raises(InputError, match="another shape.*text_projection"):
        projection = "text_encoders.clip_g.transformer.text_projection.weight"
        attempt(lambda t: t | {projection: torch.zeros(24, 47)})
    with pytest.raises(InputError, match="no text encoders"):
        attempt(lambda t: {name: value for name, value in t.items() if name.startswith("first_stage_model")})
    with pytest.raises(InputError, match="clip_l missing"):
        attempt(lambda t: {name: value for name, value in t.items() if "clip_l" not in name})
    with pytest.raises(InputError, match="CLIP text encoder"):  # another kind of network in the group
        attempt(lambda t: {name: value for name, value in t.items() if "clip_l." not in name}
                | {"text_encoders.clip_l.transformer.vision_model.post_layernorm.bias": torch.zeros(3)})
    with pytest.raises(InputError, match="no text encoders"):
        text_parts(tmp_path)
    with pytest.raises(InputError, match="no such file"):
        text_parts(tmp_path / "absent.safetensors")
    parts = text_parts(tiny)
    with pytest.raises(InputError, match="80 wide.*at most 79"):
        SD3Text({name: parts[name] for name in ("clip_l", "clip_g")}, context_dim=79)


def test_tokenizer_errors(tiny, folder, tmp_path):
    parts = text_parts(tiny)
    with pytest.raises(InputError, match="no tokenizers"):
        SD3Text(parts).load(parts).encode(["a cat"])
    with pytest.raises(InputError, match="tokenizer_3"):
        SD3Text(parts, (load_tokenizers(folder)[0], None)).encode(["a cat"])
    with pytest.raises(InputError, match="expected a folder with tokenizer/"):
        load_tokenizers(tmp_path)
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "tokenizer_config.json").write_text("{")
    with pytest.raises(InputError, match="no tokenizers"):
        load_tokenizers(tmp_path)
    save_file(random_encoders(clip_tokens=50), tmp_path / "small.safetensors")
    with pytest.raises(InputError, match="tokenizer of 60 tokens; expected at most 50"):
        SD3Text(text_parts(tmp_path / "small.safetensors"), load_tokenizers(folder))
    save_file(random_encoders(clip_tokens=61), tmp_path / "large.safetensors")  # another's ids would be ids here too
    with pytest.raises(InputError, match="tokenizer of 60 tokens; expected at most 61"):
        SD3Text(text_parts(tmp_path / "large.safetensors"), load_tokenizers(folder))


# ---- SDXL --------------------------------------------------------------------------------------------------

SIZES = "original_size_as_tuple", "crop_coords_top_left", "target_size_as_tuple"


@pytest.fixture(params=golden("sdxl_text_*.safetensors"), ids=lambda p: p.stem)
def sdxl(request, tmp_path):
    tensors, meta = read_golden(request.param)
    about, path = meta["golden"], request.param
    if not about.get("weights_stored", True):
        path = tmp_path / path.name
        save_file(tensors | from_recipe(about), path)
    heads = {"clip_l": about["config"]["clip_l"]["heads"], "clip_g": about["config"]["open_clip"]["heads"]}
    parts = text_parts(path)
    return SDXLText(parts, heads=heads), parts, tensors


def xl_ids(g):
    return g["in.ids.clip_l"], g["in.ids.open_clip"]


@torch.no_grad()
def test_sdxl_golden(sdxl):
    text, parts, g = sdxl
    text.load(parts)
    seen = {}
    text.clip_l.text_model.final_layer_norm.register_forward_hook(lambda _, x, y: seen.update(clip_l=y))
    text.clip_g.ln_final.register_forward_pre_hook(lambda _, x: seen.update(clip_g=x[0]))
    near(run_clip(text.clip_l, xl_ids(g)[0])[0], g["out.clip_l.hidden11"])
    near(seen["clip_l"], g["out.clip_l.last_hidden_state"])
    penultimate, pooled = run_clip(text.clip_g, xl_ids(g)[1])
    near(penultimate, g["out.open_clip.penultimate"])
    near(seen["clip_g"], g["aux.open_clip.last_pre_ln"])
    near(pooled, g["out.open_clip.pooled"])
    near(size_embedding(g["in.size_values"]), g["out.size_emb"], SIZES_TOLERANCE)
    sizes = torch.cat([g[f"in.{name}"] for name in SIZES], dim=1)
    cond = text.encode_ids(*xl_ids(g))
    near(cond.context, g["out.context"])
    near(torch.cat([cond.pooled[:, :pooled.shape[1]], size_embedding(sizes)], dim=1), g["out.y"], SIZES_TOLERANCE)
    plain = (sizes[:, :2] == sizes[:, 4:]).all(dim=1) & ~sizes[:, 2:4].any(dim=1)  # not scaled, not cropped
    assert plain.any()
    for i in plain.nonzero()[:, 0].tolist():
        text.size = tuple(sizes[i, :2].tolist())
        pooled = text.encode_ids(*(rows[i:i + 1] for rows in xl_ids(g))).pooled
        near(pooled, g["out.y"][i:i + 1], SIZES_TOLERANCE)


def test_sdxl_half_precision_gives_float32(sdxl):
    text, parts, g = sdxl
    text.load(parts, lambda net, tensors, ignore: fill(net, tensors, torch.bfloat16, ignore))
    text.size = (1026, 2047)
    cond = text.encode_ids(*xl_ids(g))
    assert cond.context.dtype == cond.pooled.dtype == torch.float32
    # bf16 keeps 8 bits: a correct result is a few percent off, not more. The sizes never become bf16.
    assert (cond.context - g["out.context"]).norm() < 0.1 * g["out.context"].norm()
    width = g["out.open_clip.pooled"].shape[1]
    expected = size_embedding(torch.tensor([[1026, 2047, 0, 0, 1026, 2047]]))
    assert torch.equal(cond.pooled[:, width:], expected.expand(len(cond.pooled), -1))


@pytest.mark.parametrize("path", golden("sdxl*.keys.json"), ids=lambda p: p.stem)
def test_sdxl_manifest(path):
    """Names and shapes of the published file; `position_ids` and `logit_scale` are in no network."""
    tensors = {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text())["tensors"].items()}
    file = Tensors(path, tensors, None)
    parts = {name: file.group(prefix) for prefix, name in PREFIXES.items() if "conditioner" in prefix}
    text = SDXLText(parts)
    spare = {"clip_l": {"text_model.embeddings.position_ids"}, "clip_g": {"logit_scale"}}
    for name, part in parts.items():
        own = {key: tuple(value.shape) for key, value in getattr(text, name).state_dict().items()}
        assert own == {key: shape for key, shape in part.shapes.items() if key not in spare[name]}
        assert spare[name] <= set(part)
    assert not list(text.buffers()) and all(p.is_meta and not p.requires_grad for p in text.parameters())
    assert (text.clip_l.config.num_attention_heads, text.clip_g.config.num_attention_heads) == (12, 20)
    assert text.windows["clip_l"] == 77 and len(text.blocks()) == 12 + 32
    context, pooled = text.unconditional()  # needs no weights
    assert context.shape == (1, 77, 2048) and pooled.shape == (1, 2816)


def test_sdxl_padding_of_real_token_ids():
    for path in golden("sdxl_text_*.safetensors"):
        g, _ = read_golden(path)
        for l_ids, g_ids in zip(g["tokens.clip_l"].tolist(), g["tokens.open_clip"].tolist()):
            end = max(l_ids)
            row = l_ids[:l_ids.index(end) + 1]
            assert pad_ids([row], len(l_ids), end).tolist() == [l_ids]
            assert pad_ids([row], len(l_ids), 0).tolist() == [g_ids]


def open_clip_names(part):
    """transformers' CLIP as open_clip stores it."""
    words = {"text_model.embeddings.position_embedding.weight": "positional_embedding",
             "text_model.embeddings.": "", "text_model.final_layer_norm": "ln_final", "layer_norm": "ln_",
             "text_model.encoder.layers": "transformer.resblocks", "self_attn.q_proj.": "attn.in_proj_",
             "self_attn": "attn", "fc1": "c_fc", "fc2": "c_proj", "text_projection.weight": "text_projection"}
    found = {}
    for name, value in part.items():
        if "q_proj" in name:
            value = torch.cat([part[name.replace("q_proj", p)] for p in ("q_proj", "k_proj", "v_proj")])
        if "text_projection" in name:
            value = value.T.contiguous()
        for old, new in words.items():
            name = name.replace(old, new)
        if "k_proj" not in name and "v_proj" not in name:
            found[name] = value
    return found


@pytest.fixture(scope="session")
def xl_files(tmp_path_factory):
    """The same tiny encoders with windows of 8 tokens, as a single file and as a diffusers-layout folder."""
    folder = tmp_path_factory.mktemp("sdxl")
    save_file(random_encoders(window=8), folder / "sd3.safetensors")
    clip_l, clip_g = (dict(text_parts(folder / "sd3.safetensors")[name]) for name in ("clip_l", "clip_g"))
    single = {f"conditioner.embedders.0.transformer.{name}": value for name, value in clip_l.items()}
    clip_g_there = open_clip_names(clip_g)
    single |= {f"conditioner.embedders.1.model.{name}": value for name, value in clip_g_there.items()}
    save_file(single, folder / "single.safetensors")
    for name, part in (("text_encoder", clip_l), ("text_encoder_2", clip_g)):
        (folder / name).mkdir()
        save_file(part, folder / name / "model.safetensors")
    return folder / "single.safetensors", folder


def test_sdxl_sources_agree(xl_files, folder, tmp_path):
    prompts, heads = ["a cat!", "", "cat " * 90], {"clip_g": 2}
    conds = []
    for path in xl_files:
        parts = text_parts(path)
        assert set(parts) == {"clip_l", "clip_g"}
        text = SDXLText(parts, load_tokenizers(folder), (64, 96), heads).load(parts)
        assert len(text.blocks()) == 4 and text.windows["clip_l"] == 8
        conds.append(text.encode(prompts))
    (context, y), hub = conds
    near(context, hub.context)  # two implementations
    near(y, hub.pooled)
    assert context.shape == (3, 8, 32 + 48) and y.shape == (3, 24 + 6 * 256) and not y.requires_grad
    assert context.isfinite().all() and (context[0] - context[1]).abs().max() > 0.1
    assert torch.equal(y[:, 24:], size_embedding(torch.tensor([[64, 96, 0, 0, 64, 96]] * 3)))
    l_ids, g_ids = text.tokenize(prompts)
    clip = text.tokenizers[0]
    start, cat, end = clip.bos_token_id, clip.convert_tokens_to_ids("cat</w>"), clip.eos_token_id
    assert l_ids[1:].tolist() == [[start] + [end] * 7, [start] + [cat] * 6 + [end]]
    assert g_ids[1:].tolist() == [[start, end] + [0] * 6, [start] + [cat] * 6 + [end]]


def test_unconditional(xl_files, folder, tiny):
    parts = text_parts(tiny)
    text = SD3Text(parts, load_tokenizers(folder), t5_length=16).load(parts)
    assert equal(text.unconditional(), text.encode([""])) and text.unconditional().context.any()
    for path in xl_files:
        parts = text_parts(path)
        text = SDXLText(parts, load_tokenizers(folder, t5=False), (64, 96)).load(parts)
        null, cond = text.unconditional(), text.encode(["a cat"])
        assert null.context.shape == cond.context.shape and null.pooled.shape == cond.pooled.shape
        assert null.context.dtype == null.pooled.dtype == torch.float32
        assert not null.context.any() and not null.pooled[:, :24].any() and cond.pooled[:, :24].all()
        assert torch.equal(null.pooled[:, 24:], cond.pooled[:, 24:])


def test_sdxl_file_variants_and_errors(xl_files, folder, tmp_path):
    single = dict(open_tensors(xl_files[0]))
    l_root, g_root = "conditioner.embedders.0.transformer.", "conditioner.embedders.1.model."

    def attempt(change):
        save_file(change(dict(single)), tmp_path / "x.safetensors")
        parts = text_parts(tmp_path / "x.safetensors")
        return SDXLText(parts, load_tokenizers(folder)).load(parts).encode(["a cat"])

    extras = {l_root + "text_model.embeddings.position_ids": torch.arange(8)[None],
              g_root + "logit_scale": torch.ones(()), "denoiser.sigmas": torch.ones(5)}
    assert equal(attempt(lambda t: t), attempt(lambda t: t | extras))
    deep = g_root + "transformer.resblocks.1.attn.in_proj_weight"
    with pytest.raises(InputError, match=rf"x\.safetensors.*missing.*{deep}"):
        attempt(lambda t: {name: value for name, value in t.items() if name != deep})
    with pytest.raises(InputError, match=f"CLIP.*{g_root}positional_embedding is missing"):
        attempt(lambda t: {name: value for name, value in t.items() if "positional" not in name})
    with pytest.raises(InputError, match=f"missing.*{g_root}text_projection"):
        attempt(lambda t: {name: value for name, value in t.items() if "text_projection" not in name})
    with pytest.raises(InputError, match=f"not expected.*{g_root}odd"):
        attempt(lambda t: t | {g_root + "odd": torch.zeros(1)})
    with pytest.raises(InputError, match="clip_g missing"):
        attempt(lambda t: {name: value for name, value in t.items() if l_root in name})
    with pytest.raises(InputError, match="clip_l missing"):
        attempt(lambda t: {name: value for name, value in t.items() if g_root in name})
    with pytest.raises(InputError, match="no tokenizers: expected a folder with tokenizer/$"):
        SDXLText(text_parts(xl_files[0])).encode(["a cat"])
    with pytest.raises(InputError, match="tokenizer of 60 tokens; expected at most 59"):
        attempt(lambda t: t | {g_root + "token_embedding.weight": torch.zeros(59, 48)})


def test_tokenizers_of_sdxl(folder, tmp_path, monkeypatch):
    shutil.copytree(folder / "tokenizer", tmp_path / "tokenizer")
    shutil.copytree(folder / "tokenizer_2", tmp_path / "tokenizer_2")
    for t5 in (True, False):  # a folder may lack tokenizer_3/ in any case
        clip, none = load_tokenizers(tmp_path, t5)
        assert len(clip) == 60 and none is None
    assert load_tokenizers(folder, t5=False)[1] is None
    asked = []

    def find(file, ckpt, repo):
        asked.append(file)
        return folder / file

    monkeypatch.setattr(text_encoders, "find", find)
    load_tokenizers("org/sdxl", t5=False)
    assert asked == ["tokenizer/"]
    load_tokenizers("org/sd3")
    assert asked[1:] == ["tokenizer/", "tokenizer_3/"]
    with pytest.raises(InputError, match="expected a folder with tokenizer/, as"):
        load_tokenizers(tmp_path / "tokenizer", t5=False)


# ---- SD1.5 -------------------------------------------------------------------------------------------------

@pytest.fixture(params=golden("sd15_text_*.safetensors"), ids=lambda p: p.stem)
def sd15(request):
    """With and without `text_model.` in the names of the file."""
    tensors, meta = read_golden(request.param)
    parts = text_parts(request.param)
    return parts, tensors, meta["golden"]


def test_sd15_golden(sd15):
    parts, g, meta = sd15
    text = SD15Text(parts, heads={"clip_l": meta["config"]["heads"]}).load(parts)
    context, pooled = text.encode_ids(g["in.ids"])
    near(context, g["out.last_hidden_state"])
    assert pooled.shape == (len(context), 0) and context.dtype == pooled.dtype == torch.float32
    assert len(text.blocks()) == meta["config"]["layers"] and not list(text.buffers())


def test_sd15_files_may_hold_more(sd15, tmp_path):
    parts, g, meta = sd15
    root = "cond_stage_model.transformer."
    weights = {name: value for name, value in g.items() if name.startswith(root)}
    places = next(name for name in weights if "position_embedding" in name)
    extras = places.replace("embedding.weight", "ids"), f"{root}text_projection.weight", f"{root}logit_scale"
    save_file(weights | {name: torch.zeros(1) for name in extras}, tmp_path / "x.safetensors")
    more = text_parts(tmp_path / "x.safetensors")
    SD15Text(more, heads={"clip_l": meta["config"]["heads"]}).load(more)


def test_sd15_token_ids_and_unconditional(sd15, tmp_path):
    """Prompts of invented words, one for each id that the golden file uses, are cut and padded as there."""
    parts, g, meta = sd15
    end, ids, alphabet = meta["config"]["vocab_size"] - 1, g["in.ids"].tolist(), "abcdefghijklmnopqrstuvwxyz"
    used = sorted({i for row in ids for i in row} - {end - 1, end})
    words = {i: alphabet[k // 26] + alphabet[k % 26] for k, i in enumerate(used)}
    letters = [letter + ending for letter in alphabet for ending in ("", "</w>")]
    vocabulary = dict(zip(letters, (i for i in range(end - 1) if i not in words)))
    vocabulary |= {f"{word}</w>": i for i, word in words.items()}
    vocabulary |= {"<|startoftext|>": end - 1, "<|endoftext|>": end}
    merges = "".join(f"{word[0]} {word[1]}</w>\n" for word in words.values())
    (tmp_path / "tokenizer").mkdir()
    (tmp_path / "tokenizer" / "vocab.json").write_text(json.dumps(vocabulary))
    (tmp_path / "tokenizer" / "merges.txt").write_text("#version: 0.2\n" + merges)
    tokenizers, heads = load_tokenizers(tmp_path, t5=False), {"clip_l": meta["config"]["heads"]}
    text = SD15Text(parts, tokenizers, heads).load(parts)
    prompts = [[words[i] for i in row[1:] if i != end] for row in ids]
    more = [length - len(prompt) for length, prompt in zip(meta["prompt_lens"], prompts)]
    assert more == [0, 0, 0, 0, 0, 15]  # that the golden file has cut off
    prompts = [" ".join(prompt + [words[used[0]]] * count) for prompt, count in zip(prompts, more)]
    assert torch.equal(text.tokenize(prompts)[0], g["in.ids"]) and text.overlong(prompts) == 1
    near(text.encode(prompts).context, g["out.last_hidden_state"])
    near(text.unconditional().context.squeeze(), g["out.empty"].squeeze())


@pytest.mark.parametrize("path", golden("sd15.keys.json"), ids=lambda p: p.stem)
def test_sd15_manifest(path):
    tensors = {name: tuple(shape) for name, (shape, _) in json.loads(path.read_text())["tensors"].items()}
    part = Tensors(path, tensors, None).group("cond_stage_model.transformer.")
    text = SD15Text({"clip_l": part})
    own = {name: tuple(value.shape) for name, value in text.clip_l.state_dict().items()}
    assert own | {"text_model.embeddings.position_ids": (1, 77)} == part.shapes
    assert text.clip_l.config.num_attention_heads == len(text.blocks()) == 12
