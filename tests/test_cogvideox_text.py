"""CogVideoX's text conditioning: T5 without mask at exactly 226 tokens, and its two unconditionals."""
import json
import shutil

import pytest
import sentencepiece
import torch
from conftest import golden, read_golden
from safetensors.torch import save_file
from transformers import T5Tokenizer

from models.checkpoint import InputError, Tensors, open_tensors
from models.text import CogVideoXText
from models.text_encoders import EXTRAS, hub_tensors, load_tokenizers, t5_tensors

ALIAS = "encoder.embed_tokens.weight"


def parts_of(path):
    return {"t5": open_tensors(path).group("w/")}


@pytest.fixture(params=golden("cogvideox_t5_*.safetensors"), ids=lambda p: p.stem)
def t5(request):
    tensors, _ = read_golden(request.param)
    parts = parts_of(request.param)
    return parts, CogVideoXText(parts, length=tensors["in/ids"].shape[1]).load(parts), tensors


def test_every_position_equals_the_original(t5):
    _, text, tensors = t5
    context, pooled = text.encode_ids(tensors["in/ids"])
    # 1e-4 (cogvideox_t5.md); with a mask on the padding the real tokens would be off by 4.
    torch.testing.assert_close(context, tensors["out/hidden_nomask"], atol=1e-4, rtol=0)
    assert pooled.shape == (len(context), 0)


def test_full_size_names_and_shapes_are_the_manifests():
    for path in golden("cogvideox_t5*.keys.json"):
        shapes = {name: tuple(shape) for name, shape in json.loads(path.read_text())["keys"].items()}
        text = CogVideoXText({"t5": Tensors(path, shapes, None)})
        assert {name: tuple(p.shape) for name, p in text.t5.state_dict().items()} == shapes
        assert text.t5.config.num_heads == 64 and text.t5.config.d_kv == 64


def test_the_embedding_may_be_stored_under_either_name_or_both(t5, tmp_path):
    parts, text, tensors = t5
    expected = text.encode_ids(tensors["in/ids"]).context
    weights = dict(parts["t5"])
    shared = weights["shared.weight"]
    others = {name: w for name, w in weights.items() if name not in ("shared.weight", ALIAS)}
    for names in (["shared.weight"], [ALIAS], ["shared.weight", ALIAS]):
        (tmp_path / "text_encoder").mkdir(exist_ok=True)
        save_file(others | {name: shared.clone() for name in names},
                  tmp_path / "text_encoder" / "model.safetensors")
        again = {"t5": t5_tensors(hub_tensors(tmp_path / "text_encoder"))}
        other = CogVideoXText(again, length=text.windows["t5"]).load(again)
        assert torch.equal(other.encode_ids(tensors["in/ids"]).context, expected), names
    assert ALIAS in EXTRAS["t5"]


def test_prompts_are_padded_or_cut_to_the_length_and_the_unconditional_is_zeros_or_the_empty_prompt(t5, tmp_path):
    parts, _, _ = t5
    letters = "abcdefghijklmnopqrstuvwxyz"
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<unk>", 0.0), ("\u2581", -3.0), ("\u2581cat", -1.0)]
    T5Tokenizer(vocab=pieces + [(c, -3.0) for c in letters], extra_ids=0).save_pretrained(tmp_path / "tokenizer")
    tokenizers = load_tokenizers(tmp_path, t5=False)
    text = CogVideoXText(parts, tokenizers, length=6).load(parts)
    (ids,) = text.tokenize(["cat", "", "cat " * 9])
    assert ids.tolist() == [[4, 1, 0, 0, 0, 0], [1, 0, 0, 0, 0, 0], [4, 4, 4, 4, 4, 1]]
    zeros = text.unconditional()
    assert zeros.context.shape == (1, 6, text.t5.config.d_model) and not zeros.context.any()
    empty = CogVideoXText(parts, tokenizers, length=6, null="empty").load(parts).unconditional()
    assert torch.equal(empty.context, text.encode([""]).context) and empty.context.any()
    assert zeros.pooled.shape == empty.pooled.shape == (1, 0)


@pytest.mark.parametrize("layout", ["tokenizer", "."])
def test_the_published_tokenizer_is_a_spiece_model_alone(tmp_path, layout):
    """tokenizer/spiece.model in the published folder, beside T5's weights in the original release."""
    words = ["red", "fox", "snow", "runs", "the", "a", "in"]
    (tmp_path / "text.txt").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(7)) * 20)
    (tmp_path / layout).mkdir(exist_ok=True)
    sentencepiece.SentencePieceTrainer.train(
        input=str(tmp_path / "text.txt"), model_prefix=str(tmp_path / layout / "spiece"), vocab_size=24,
        pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (tmp_path / layout / "tokenizer_config.json").write_text(json.dumps(
        dict(tokenizer_class="T5Tokenizer", extra_ids=0, additional_special_tokens=[])))
    tokenizer, none = load_tokenizers(tmp_path, t5=False)
    pieces = sentencepiece.SentencePieceProcessor(model_file=str(tmp_path / layout / "spiece.model"))
    for text in ("the red fox runs in a snow", "fox", "a"):
        assert tokenizer(text).input_ids == [*pieces.encode(text), 1], text
    assert tokenizer("").input_ids == [1] and none is None


def test_errors_name_what_is_missing(t5, tmp_path):
    parts, text, _ = t5
    with pytest.raises(InputError, match="no tokenizers: expected a folder with tokenizer/"):
        text.encode(["a"])
    weights = dict(parts["t5"])
    del weights["encoder.block.1.layer.1.DenseReluDense.wo.weight"]
    save_file(weights, tmp_path / "model.safetensors")
    damaged = {"t5": open_tensors(tmp_path / "model.safetensors")}
    with pytest.raises(InputError, match=r"model\.safetensors.*missing.*block\.1\.layer\.1\.DenseReluDense\.wo"):
        CogVideoXText(damaged).load(damaged)
    shutil.rmtree(tmp_path)
