"""Folders of tokenizers are data: nothing in them runs, damaged or foreign ones are refused in a sentence."""
import io
import json
import os
import pickle
import shutil
import sys

import pytest
import sentencepiece
from conftest import ROOT, refusal_of

from models.checkpoint import InputError
from models.eval import scores
from models.presets import PRESETS
from models.text import CogVideoXText, SD3Text, SDXLText
from models.text_encoders import LARGEST, hub_tensors, load_tokenizers, text_parts

TINY = ROOT / "models" / "tiny"
PROMPTS = ["a small red circle", "", "\u00e9 \u2603 12"]


@pytest.fixture
def folder(tmp_path):
    """tokenizer/ and tokenizer_3/ of the tiny teachers, beside their files a program that leaves a trace."""
    for name in ("tokenizer", "tokenizer_3"):
        shutil.copytree(TINY / name, tmp_path / name)
        (tmp_path / name / "evil.py").write_text(
            f"open({str(tmp_path / 'trace')!r}, 'w').close()\n"
            "from transformers import CLIPTokenizer, PretrainedConfig\n"
            "class Evil(CLIPTokenizer): pass\n"
            "class EvilConfig(PretrainedConfig): model_type = 'evil'\n")
    return tmp_path


def refusal(path, capfd, monkeypatch):
    """The sentence about a folder, the same for training and scoring; nothing is printed, read or run."""
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    with pytest.raises(InputError) as caught:
        load_tokenizers(path.parent)
    if path.name == "tokenizer":
        with pytest.raises(InputError) as again:
            scores.load_tokenizer(path, "org/repo")
        assert f"no tokenizers: {again.value}" == f"{caught.value}, as in org/repo"
    assert sys.stdin.tell() == 0 and capfd.readouterr() == ("", "")
    assert not (path.parent / "trace").exists()
    sentence = str(caught.value)
    assert str(path) in sentence and "expected" in sentence and "\n" not in sentence and len(sentence) < 600
    return sentence


SLOW, FAST, REMOTE = ["evil.Evil", None], [None, "evil.Evil"], ["org/repo--evil.Evil", None]
ASKS = [{"auto_map": {"AutoTokenizer": value}} for value in (SLOW, FAST, SLOW[:1] * 2, REMOTE, "evil.Evil")]
ASKS += [{"auto_map": SLOW}, {"auto_map": "evil.Evil"}, ASKS[0] | {"trust_remote_code": True},
         ASKS[0] | {"tokenizer_class": "Evil"}, ASKS[0] | {"tokenizer_class": None},
         {"auto_map": {"AutoConfig": "evil.EvilConfig"}, "model_type": "evil"}]


@pytest.mark.parametrize("name", ["tokenizer", "tokenizer_3"])
@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json", "processor_config.json"])
@pytest.mark.parametrize("ask", ASKS, ids=str)
def test_code_in_the_folder_is_refused_and_never_runs(folder, name, file, ask, capfd, monkeypatch):
    path = folder / name / file
    settings = json.loads(path.read_text()) if path.exists() else {}
    path.write_text(json.dumps(settings | ask))
    sentence = refusal(folder / name, capfd, monkeypatch)
    assert f"{file}: asks for code to be run" in sentence and "auto_map" in sentence and "vil" in sentence


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
@pytest.mark.parametrize("named", ["Evil", "EvilFast", "evil.Evil", "BertTokenizer", ["Evil"]])
def test_classes_other_than_clips_and_t5s_are_refused(folder, file, named, capfd, monkeypatch):
    (folder / "tokenizer" / file).write_text(json.dumps({"tokenizer_class": named}))
    sentence = refusal(folder / "tokenizer", capfd, monkeypatch)
    assert f"{file}: tokenizer_class " in sentence and "expected CLIPTokenizer or T5Tokenizer" in sentence


def test_a_script_refuses_the_folder_with_exit_code_2(folder, monkeypatch):
    (folder / "tokenizer" / "tokenizer_config.json").write_text(json.dumps(ASKS[0]))
    monkeypatch.setattr(sys, "stdin", io.StringIO("y\n" * 9))
    sentence = refusal_of("sample.py", "--model", "tiny-sd3", "--tokenizers", folder, "--out", folder / "out",
                          printed="loading .*\n")
    assert sentence.count("\n") == 1 and "asks for code to be run" in sentence and "y/N" not in sentence
    assert not (folder / "trace").exists()


class Trace:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def test_programs_pickles_and_templates_that_nothing_asks_for_are_not_read(folder):
    for name in ("vocab.pkl", "tokenizer.pkl", "pytorch_model.bin", "vocab.bin"):
        (folder / "tokenizer" / name).write_bytes(pickle.dumps(Trace(folder / "trace")))
    template = "{{ cycler.__init__.__globals__.os.system('touch %s') }}" % (folder / "trace")
    (folder / "tokenizer" / "chat_template.jinja").write_text(template)
    (folder / "tokenizer" / "additional_chat_templates").mkdir()
    (folder / "tokenizer" / "additional_chat_templates" / "x.jinja").write_text(template)
    settings = json.loads((TINY / "tokenizer_3" / "tokenizer_config.json").read_text())
    (folder / "tokenizer_3" / "tokenizer_config.json").write_text(
        json.dumps(settings | {"chat_template": template}))
    for ours, plain in zip(load_tokenizers(folder), load_tokenizers(TINY)):
        assert ours(PROMPTS).input_ids == plain(PROMPTS).input_ids
    assert not (folder / "trace").exists()


# ---- damaged files -----------------------------------------------------------------------------------------

@pytest.fixture
def layouts(folder):
    """Folders with tokenizer/ alone: CLIP's in two files and in one, T5's in one and as a spiece.model."""
    (folder / "clip").mkdir()
    (folder / "tokenizer").rename(folder / "clip" / "tokenizer")
    (folder / "t5").mkdir()
    (folder / "tokenizer_3").rename(folder / "t5" / "tokenizer")
    load_tokenizers(folder / "clip")[0].save_pretrained(folder / "clip_json" / "tokenizer")
    (folder / "spiece" / "tokenizer").mkdir(parents=True)
    words = ["red", "fox", "snow", "runs", "the", "a", "in"]
    (folder / "text.txt").write_text("\n".join(" ".join(words[i:] + words[:i]) for i in range(7)) * 20)
    sentencepiece.SentencePieceTrainer.train(
        input=str(folder / "text.txt"), model_prefix=str(folder / "spiece" / "tokenizer" / "spiece"),
        vocab_size=24, pad_id=0, eos_id=1, unk_id=2, bos_id=-1, minloglevel=2)
    (folder / "spiece" / "tokenizer" / "spiece.vocab").unlink()
    (folder / "spiece" / "tokenizer" / "tokenizer_config.json").write_text(json.dumps({"extra_ids": 0}))
    return [folder / name / "tokenizer" for name in ("clip", "clip_json", "t5", "spiece")]


def test_truncated_files(layouts, capfd, monkeypatch):
    """Nowhere is a part taken for the whole; what a tokenizer does not need may be cut without harm."""
    refused = 0
    for path in layouts:
        expected = load_tokenizers(path.parent)[0](PROMPTS).input_ids
        for file in sorted(path.iterdir()):
            whole = file.read_bytes()
            if file.suffix == ".py":
                continue
            for length in {0, 1, len(whole) // 3, len(whole) // 2, 2 * len(whole) // 3, len(whole) - 2}:
                file.write_bytes(whole[:length])
                try:
                    assert load_tokenizers(path.parent)[0](PROMPTS).input_ids == expected
                except InputError:
                    refusal(path, capfd, monkeypatch)
                    refused += 1
            file.write_bytes(whole)
    assert refused >= 9 * 5  # of two files each, three of CLIP's first


def test_vocabularies_that_end_between_two_entries(layouts, capfd, monkeypatch):
    """Where the format cannot tell: lines of merges, pieces of a spiece.model."""
    merges = layouts[0] / "merges.txt"
    lines = merges.read_bytes().splitlines(keepends=True)
    for count in (1, 2, len(lines) // 2, len(lines) - 1):
        merges.write_bytes(b"".join(lines[:count]))
        assert "no merge makes" in refusal(layouts[0], capfd, monkeypatch)
    settings = json.loads((layouts[1] / "tokenizer.json").read_text())
    settings["model"]["merges"] = settings["model"]["merges"][:-1]
    (layouts[1] / "tokenizer.json").write_text(json.dumps(settings))
    assert "no merge makes 1 of its tokens" in refusal(layouts[1], capfd, monkeypatch)
    pieces = layouts[3] / "spiece.model"
    whole = pieces.read_bytes()
    ends, end = [], 0
    while whole[end] == 10:  # a byte that announces a piece, one for its size, the piece
        end += 2 + whole[end + 1]
        ends.append(end)
    assert len(ends) == 24
    for end in ends:
        pieces.write_bytes(whole[:end])
        assert "spiece.model is truncated" in refusal(layouts[3], capfd, monkeypatch)


JUNK = [b"", b"[]", b"null", b"3", b'"text"', b"{}", b"[" * 10 ** 6, b"\xff\xfe\x00", b'{"model": []}',
        b'{"model": {"type": "BPE", "vocab": [], "merges": 3}, "added_tokens": []}',
        b'{"a": "b"}', b'{"a": 99999999999999}', b"<html>not found</html>", b"version https://git-lfs"]


@pytest.mark.parametrize("junk", JUNK, ids=lambda junk: repr(junk[:20]))
def test_files_that_are_something_else(layouts, junk, capfd, monkeypatch):
    for path, file in zip(layouts, ("vocab.json", "tokenizer.json", "tokenizer.json", "spiece.model")):
        (path / file).write_bytes(junk)
        refusal(path, capfd, monkeypatch)


@pytest.mark.parametrize("junk", JUNK[:5] + JUNK[6:8] + JUNK[-2:], ids=lambda junk: repr(junk[:20]))
def test_settings_that_are_something_else(folder, junk, capfd, monkeypatch):
    (folder / "tokenizer" / "tokenizer_config.json").write_bytes(junk)
    assert "tokenizer_config.json: damaged" in refusal(folder / "tokenizer", capfd, monkeypatch)


def test_huge_files_and_numbers_are_refused_before_they_are_read(layouts, capfd, monkeypatch):
    for path, file in zip(layouts, ("merges.txt", "tokenizer.json", "chat_template.jinja", "spiece.model")):
        (path / file).touch()
        os.truncate(path / file, 2 ** 40)  # takes no space
        assert f"{file}: {2 ** 40} bytes; expected at most {LARGEST}" in refusal(path, capfd, monkeypatch)
    os.truncate(layouts[2] / "chat_template.jinja", 0)
    for number in (10 ** 12, -1, 1e3, "5"):
        (layouts[2] / "tokenizer_config.json").write_text(json.dumps(
            {"tokenizer_class": "T5Tokenizer", "extra_ids": number}))
        assert "expected a number from 0 to 1000" in refusal(layouts[2], capfd, monkeypatch)


def test_missing_files(layouts, capfd, monkeypatch):
    both = "no vocab.json and no merges.txt in"
    for path, file, named in zip(layouts, ("merges.txt", "tokenizer.json", "tokenizer.json", "spiece.model"),
                                 ("no merges.txt in", both, "no spiece.model in", both)):
        (path / file).unlink()
        assert named in refusal(path, capfd, monkeypatch)
    for source in (layouts[0].parent / "absent", "absent", "../a/b", layouts[0] / "vocab.json"):
        with pytest.raises(InputError, match="expected a folder with tokenizer/ and tokenizer_3/"):
            load_tokenizers(source)


def test_a_failed_download(monkeypatch):
    monkeypatch.setattr("huggingface_hub.snapshot_download", lambda *_, **__: 1 / 0)
    with pytest.raises(InputError, match="tokenizer/ of org/repo: could not be .*; --tokenizers PATH takes"):
        load_tokenizers("org/repo")


# ---- tokenizers and networks -------------------------------------------------------------------------------

def test_the_tokenizer_of_another_network(folder):
    sdxl, video = PRESETS["tiny-sdxl"], PRESETS["tiny-cogvideox"]
    clips, t5 = text_parts(sdxl.ckpt), {"t5": hub_tensors(video.ckpt / "text_encoder")}
    with pytest.raises(InputError, match="cogvideox/tokenizer: a T5Tokenizer; expected that of .*tiny_sdxl"):
        SDXLText(clips, load_tokenizers(video.tokenizers, t5=False))
    with pytest.raises(InputError, match="tiny/tokenizer: a CLIPTokenizer; expected that of .*text_encoder"):
        CogVideoXText(t5, load_tokenizers(TINY, t5=False))
    path = folder / "tokenizer" / "vocab.json"
    path.write_text(path.read_text().replace('"!": 0', '"!": 60000'))  # few tokens, one beyond the embedding
    with pytest.raises(InputError, match="a tokenizer of 60001 tokens; expected at most"):
        SDXLText(clips, load_tokenizers(folder, t5=False))


def test_prompts_that_are_cut_are_counted():
    """The tiny CLIPs take six words, their T5 seven, CogVideoX's eleven."""
    sd3, video = PRESETS["tiny-sd3"], PRESETS["tiny-cogvideox"]
    prompts = [" ".join(["red"] * count) for count in range(14)]
    parts = text_parts(sd3.ckpt)
    assert SD3Text(parts, load_tokenizers(TINY), 8).overlong(prompts) == 7  # of 7 to 13 words
    assert SD3Text(parts, load_tokenizers(TINY), 4).overlong(prompts) == 10  # of 4 to 13, which T5 cuts
    t5 = {"t5": hub_tensors(video.ckpt / "text_encoder")}
    text = CogVideoXText(t5, load_tokenizers(video.tokenizers, t5=False), 12)
    assert text.overlong(prompts) == 2 and text.overlong([]) == text.overlong(prompts[:12]) == 0
    assert text.overlong(prompts * 200) == 400  # in several batches
    with pytest.raises(InputError, match="no tokenizers"):
        SD3Text(parts).overlong(prompts)
