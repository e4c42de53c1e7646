"""The papers' prompt sets, from files as they are published."""
import collections
import io
import json
import os
import pickle
import resource
import zipfile

import pytest

from models.eval import prompt_sets
from models.checkpoint import InputError
from models.eval.prompt_sets import prompt_set, webvid

CAPTIONS = ["A cat.", 'A sign that says "stop"', "Zwei H\u00fcte"]


def test_coco_pickle_and_archive(tmp_path):
    for protocol in range(pickle.HIGHEST_PROTOCOL + 1):
        (tmp_path / "all_prompts.pkl").write_bytes(pickle.dumps(CAPTIONS, protocol))
        assert prompt_set(tmp_path / "all_prompts.pkl") == CAPTIONS
    with zipfile.ZipFile(tmp_path / "coco10k.zip", "w") as archive:
        archive.writestr("coco10k/subset/000.jpg", b"")
        archive.write(tmp_path / "all_prompts.pkl", "coco10k/all_prompts.pkl")
    assert prompt_set(str(tmp_path / "coco10k.zip")) == CAPTIONS


class Program:
    def __reduce__(self):
        return os.system, ("touch ran",)


@pytest.mark.parametrize("content, message", [
    (pickle.dumps([Program()]), r"it calls (posix|nt)\.system"),
    (pickle.dumps(collections.OrderedDict()), r"it calls collections\.OrderedDict"),
    (pickle.dumps({"a": 1}), "expected a pickled list of texts, found"), (pickle.dumps([]), "found \\[\\]"),
    (pickle.dumps(["a", 1]), "found"), (pickle.dumps(CAPTIONS)[:-4], "refused or damaged"),
    (b"x", "refused or damaged")])
def test_pickles_cannot_run_code(tmp_path, monkeypatch, content, message):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "p.pkl").write_bytes(content)
    with pytest.raises(InputError, match=f"p.pkl: .*{message}"):
        prompt_set(tmp_path / "p.pkl")
    assert os.listdir(tmp_path) == ["p.pkl"]


def test_pickles_and_archives_that_would_take_all_memory_or_time(tmp_path):
    nested = []
    for _ in range(27):  # printed, it has 2^27 lists
        nested = [nested, nested]
    memo = b"\x80\x02]r\xf0\xff\xff\xff(X\x01\x00\x00\x00aX\x01\x00\x00\x00be."  # a table of 4e9 entries for pickle
    half = pickle.dumps(["a", "\ud83d"])
    for content, words in ((pickle.dumps(nested), "found a list within a list"), (half, "surrogates not allowed")):
        (tmp_path / "p.pkl").write_bytes(content)
        with pytest.raises(InputError, match=words):
            prompt_set(tmp_path / "p.pkl")
    (tmp_path / "p.pkl").write_bytes(memo)
    assert prompt_set(tmp_path / "p.pkl") == ["a", "b"]
    with zipfile.ZipFile(tmp_path / "p.zip", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("coco10k/all_prompts.pkl", bytes(2 ** 27))
    assert (tmp_path / "p.zip").stat().st_size < 2 ** 18
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(InputError, match="more than 67108864 bytes"):
        prompt_set(tmp_path / "p.zip")
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 160 * 1024  # KiB: what is read, and its parts


def test_videos_captions_in_json(tmp_path):
    (tmp_path / "x.json").write_text(json.dumps([{"path": "a.mp4", "cap": ["A man."]}]))
    assert prompt_set(tmp_path / "x.json") == ["A man."]


def test_parti_prompts_keep_their_quotes(tmp_path):
    path = tmp_path / "PartiPrompts.tsv"
    path.write_text("Prompt\tCategory\tChallenge\tNote\n"
                    '"G I G G L E" painted\tArts\tBasic\t\na cat\tAnimals\tBasic\tshort\n')
    assert prompt_set(path) == ['"G I G G L E" painted', "a cat"]


def test_vbench(tmp_path):
    path, texts = tmp_path / "VBench_full_info.json", ["a cat, front view", "a cat, front view", " a dog"]
    path.write_text(json.dumps([{"prompt_en": text, "dimension": ["scene"]} for text in texts]))
    assert prompt_set(path) == texts
    path.write_text('{"prompt_en": 3}')
    with pytest.raises(InputError, match="expected VBench_full_info.json"):
        prompt_set(path)


@pytest.mark.parametrize("extra", ["", ",page_idx"])
def test_webvid_by_its_header(tmp_path, extra):
    path = tmp_path / "results_10M_val.csv"
    path.write_text(f"videoid,contentUrl,duration,page_dir,name{extra}\n"
                    f'2117,https://x/a.mp4,PT00H00M11S,006001_006050,"Aerial shot, winter"{extra and ",3"}\n'
                    f"7,https://x/b.mp4,PT00H00M30S,000001_000050,A dog {extra and ',4'}\n")
    assert prompt_set(path) == ["Aerial shot, winter", "A dog"]
    assert [file for file, _ in webvid(path)] == ["006001_006050/2117.mp4", "000001_000050/7.mp4"]


def test_webvid_in_two_parts_joined(tmp_path):
    (tmp_path / "x.csv").write_text(2 * "videoid,page_dir,name\n1,a,A dog\n")
    assert prompt_set(tmp_path / "x.csv") == ["A dog", "A dog"]


def test_any_other_prompt_file(tmp_path):
    (tmp_path / "p.txt").write_text("a\nb\n")
    (tmp_path / "p.csv").write_text("caption,name\na,x\n")
    assert prompt_set(tmp_path / "p.txt") == ["a", "b"] and prompt_set(tmp_path / "p.csv") == ["a"]


def test_sets_by_name(monkeypatch):
    assert len(prompt_set("shapes")) == 512 and len(set(prompt_set("shapes"))) == 16
    assert len(prompt_set("moving-shapes")) == 256
    asked = []

    def download(repo: str, file: str, kind: str = "model"):
        asked.append((kind, repo, file))
        raise InputError("no network")

    monkeypatch.setattr(prompt_sets, "on_hub", download)
    for name in ("coco10k", "parti"):
        with pytest.raises(InputError, match="no network"):
            prompt_set(name)
    assert asked == [("model", "tianweiy/DMD2", "data/coco/coco10k.zip"),
                     ("dataset", "nateraw/parti-prompts", "PartiPrompts.tsv")]
    for name, source in (("vbench", "VBench_full_info.json"), ("webvid", "results_10M_val.csv")):
        with pytest.raises(InputError, match=f"{name}: expected its file .*{source}"):
            prompt_set(name)


def test_hub_failures_name_the_flag(monkeypatch):
    def unplugged(*_, **__):
        raise OSError("unplugged")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", unplugged)
    with pytest.raises(InputError, match=r"x.tsv of a/b: .*datasets/a/b \(unplugged\); --prompts FILE takes"):
        prompt_sets.on_hub("a/b", "x.tsv", "dataset")


@pytest.mark.parametrize("source, message", [
    ("coco30k", "the sets are coco10k, parti"), ("absent.pkl", "no such file"),
    ("absent.csv", "no such file"), ("absent.json", "no such file")])
def test_what_is_not_there(tmp_path, monkeypatch, source, message):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(InputError, match=message):
        prompt_set(source)
    (tmp_path / "x.zip").write_bytes(io.BytesIO(b"PK").getvalue())
    with pytest.raises(InputError, match="x.zip: expected a zip archive"):
        prompt_set("x.zip")


@pytest.mark.parametrize("text, words", [
    ("videoid,page_dir,name\n1,a,A man, talking\n2,b,dogs\n", "line 2 is damaged .1 more fields than the header has"),
    ('videoid,page_dir,name\n1,a,"A man\n2,b,dogs\n3,c,cats\n', "is damaged .unexpected end of data"),
    ("videoid,page_dir,name\n1,a,\ufeff\u200b\n", "no prompt in this file")])
def test_no_caption_of_webvid_is_cut_or_taken_into_another(tmp_path, text, words):
    path = tmp_path / "val.csv"
    path.write_text(text)
    with pytest.raises(InputError, match=words):
        prompt_set(path)


@pytest.mark.parametrize("prompt, words", [("blue \ud83d square", "no character of a text"), ("a\0b", "no character"),
                                           ("", "prompt 2 is blank"), ("\ufeff", "prompt 2 is blank")])
def test_what_no_text_encoder_takes_is_refused_in_vbench_too(tmp_path, prompt, words):
    path = tmp_path / "VBench_full_info.json"
    path.write_text(json.dumps([{"prompt_en": "a fox"}, {"prompt_en": prompt}]))
    with pytest.raises(InputError, match=words):
        prompt_set(path)


def test_an_empty_variable_is_no_prompt_set():
    with pytest.raises(InputError, match="expected a file or the name of a set"):
        prompt_set("")
