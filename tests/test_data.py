"""models/data.py: prompt files, draws that depend on counters alone, metrics."""
import itertools
import json
import os
import time

import numpy as np
import pytest
import torch

from models import data
from models.checkpoint import InputError
from models.data import append_jsonl, digest, noise, prompt_index, read_prompts, truncate_jsonl, uniform


def write(path, content: str | bytes):
    path.write_bytes(content.encode() if isinstance(content, str) else content)
    return path


# ---- prompt files ------------------------------------------------------------------------------------------

def jsonl(*records) -> str:
    return "".join(json.dumps(record, ensure_ascii=False) + "\n" for record in records)


GOOD = {
    "plain.txt": ("a red fox\n\n  a café at night \r\n\t\nthe last line has no end",
                  ["a red fox", "a café at night", "the last line has no end"]),
    "bom.txt": (b"\xef\xbb\xbfa red fox\r\n", ["a red fox"]),
    "upper.TXT": ("a red fox\n", ["a red fox"]),
    # As in JourneyDB's train_anno_realease_repath.jsonl, where Task2's caption was written by GPT.
    "journeydb.jsonl": (jsonl({"img_path": "./a.jpg", "prompt": "a fox --ar 3:2", "Task2": {"Caption": "No"}},
                              {"img_path": "./b.jpg", "prompt": None},
                              {"img_path": "./c.jpg", "prompt": " "},
                              {"img_path": "./d.jpg", "prompt": "「狐」"}),
                        ["a fox --ar 3:2", "「狐」"]),
    "bom.jsonl": (b'\xef\xbb\xbf{"text": "a"}\n\n{"caption": "b"}\n', ["a", "b"]),
    "all.jsonl": (jsonl({"text": "no", "caption": "no", "Prompt": "yes"}), ["yes"]),
    "coco.csv": ('image_id,caption\r\n42,"A man, with ""a hat"""\r\n43,Two dogs\r\n\r\n44,"two\nlines"\r\n',
                 ['A man, with "a hat"', "Two dogs", "two\nlines"]),
    "coco.tsv": ("file_name\tcaption\nCOCO_val2014_000000000042.jpg\tTwo dogs.\n", ["Two dogs."]),
    # As in google-research/parti's PartiPrompts.tsv, which quotes no cell.
    "PartiPrompts.tsv": ('Prompt\tCategory\tChallenge\tNote\n'
                         'bond\tAbstract\tBasic\tBiology-inspired concepts with multiple meanings\n'
                         'peace\tAbstract\tBasic\t\n'
                         '"G I G G L E" painted in thick letters\tIllustrations\tWriting & Symbols\t\n'
                         '"in" and "out"\tIllustrations\tWriting & Symbols\t\n'
                         'Dogs playing poker\tAnimals\tImagination\tDescription of "Dogs Playing Poker"\n',
                         ["bond", "peace", '"G I G G L E" painted in thick letters', '"in" and "out"',
                          "Dogs playing poker"]),
    "lines.tsv": ('id\tprompt\n1\t"two\nlines\tand a tab"\n2\t"a ""b"" c"\n3\t"d" and "e"\n',
                  ["two\nlines\tand a tab", 'a "b" c', '"d" and "e"']),
    "joined.txt": (b"a\n\xef\xbb\xbfb\nc\xef\xbb\xbf\n", ["a", "b", "c"]),  # cat bom.txt bom.txt
    "joined.jsonl": (b'{"text": "a"}\n\xef\xbb\xbf{"text": "b"}\n', ["a", "b"]),
    "joined.csv": (b"prompt\na\n\xef\xbb\xbfb\n\xef\xbb\xbf\n", ["a", "b"]),
    "twice.csv": (b"\xef\xbb\xbfprompt\na\n\xef\xbb\xbfprompt\nb\n", ["a", "b"]),  # cat bom.csv bom.csv
    "twice.tsv": ("id\tprompt\n1\ta\nid\tprompt\n1\tb\n", ["a", "b"]),
    "quoted.csv": (b'"prompt"\n"a"\n\xef\xbb\xbf"prompt"\n"b"\n', ["a", "b"]),
    "invisible.txt": ("a\n\u200b\n \u200d\u2060 \n\u200bb \u200b\nfamily \U0001f468\u200d\U0001f469\n",
                      ["a", "b", "family \U0001f468\u200d\U0001f469"]),
    "mac.txt": (b"a\rb\r\rc\r", ["a", "b", "c"]),
    "mac.csv": (b"id,prompt\r1,a\r2,b\r", ["a", "b"]),
    "OpenVid-1M.csv": ("video,caption,aesthetic score,motion score\r\nx_0.mp4,\"A man, talking.\",4.6,2.3\r\n",
                       ["A man, talking."]),
    "OpenSoraPlan.json": (json.dumps([{"path": "a.mp4", "cap": ["A man."], "fps": 24}, {"path": "b.mp4", "cap": "A dog."}]),
                          ["A man.", "A dog."]),
    "Vript.json": (json.dumps({"meta": {"video_id": "x"}, "data": {
        "x-Scene-001": {"clip_id": "x-Scene-001", "caption": {"shot_type": "close-up", "content": "A hand."}},
        "x-Scene-002": {"clip_id": "x-Scene-002", "caption": {"shot_type": "wide", "content": "A field."}}}}),
        ["A hand.", "A field."]),
    "Vript.jsonl": (jsonl({"clip_id": "1", "caption": {"content": "A hand."}}), ["A hand."]),
    "texts.json": ('["a", "b"]', ["a", "b"]),
    "pandas.tsv": ('id\tText\r\n1\t"a sign that says ""OPEN"""\r\n', ['a sign that says "OPEN"']),
}


@pytest.mark.parametrize("name", GOOD)
def test_prompts(tmp_path, name):
    content, expected = GOOD[name]
    assert read_prompts(write(tmp_path / name, content)) == expected
    assert read_prompts(str(tmp_path / name)) == expected


BAD = {
    "latin1.txt": (b"a red fox\na caf\xe9\n", "line 2 is not UTF-8 (byte 6)"),
    "utf16.txt": ("a red fox\n".encode("utf-16"), "line 1 is not UTF-8 (byte 1)"),
    "latin1.csv": (b"prompt\na\nb\xe9\n", "line 3 is not UTF-8"),
    "empty.txt": ("", "no prompt in this file"),
    "records.txt": ('{"prompt": "a"}\n', "line 1 is JSON; expected prompts, or a name that ends in .jsonl or .json"),
    "texts.txt": ('a\n["b", "c"]\n', "line 2 is JSON"),
    "blank.txt": (" \n\r\n\t\n", "no prompt in this file"),
    "blank.jsonl": ('{"prompt": ""}\n', "no prompt in this file"),
    "header.tsv": ("Prompt\tCategory\n", "no prompt in this file"),
    "cut.jsonl": ('{"prompt": "a"}\n\n{"prompt": "b\n', "line 3 is not JSON"),
    "list.jsonl": ('["a red fox"]\n', 'line 1: expected a record {...}, found ["a red fox"]'),
    "number.jsonl": ('{"prompt": "a"}\n{"prompt": 3}\n', "line 2: expected text in 'prompt', found 3"),
    "captions.jsonl": ('{"caption": ["a", "b"]}\n', "line 1: expected text in 'caption', found ['a', 'b']"),
    "fields.jsonl": ('{"prompt": "a"}\n{"img_path": "x", "Task2": {"Caption": "b"}}\n',
                     "line 2: expected a field prompt or caption or text or cap, found img_path, Task2"),
    "fields.csv": ("id,url\n1,x\n", "line 1: expected a field prompt or caption or text or cap, found id, url"),
    "empty.csv": ("", "line 1: expected a field prompt or caption or text or cap, found nothing"),
    "comma.csv": ("prompt\na red fox\na red fox, in snow\n", "line 3 has 2 fields, the header 1"),
    "short.csv": ("id,prompt\n1,a\n2\n", "line 3 has 1 fields, the header 2"),
    "long.tsv": ("id\tprompt\n1\ta\tb\n", "line 2 has 3 fields, the header 2"),
    "quote.csv": ('prompt\na\n"b, never closed\nc\nd\n', "line 3 is not CSV"),
    "prompts.parquet": ("PAR1", "not a prompt file; expected one of .txt, .jsonl, .csv, .tsv, .json"),
    "deep.json": (300_000 * "[", "not JSON (nested too deep)"),
    "deep.jsonl": ('{"prompt": "a"}\n' + 300_000 * "[" + "\n", "line 2 is not JSON (nested too deep)"),
    "clips.json": (json.dumps([{"cap": "a"}, {"cap": ["b", "c"]}]), "line 2: expected text in 'cap', found ['b', 'c']"),
    "data.json": (json.dumps({"data": {"1": "a"}}), "line 1: expected a record {...}, found a"),
    "surrogate.jsonl": ('{"prompt": "a"}\n{"prompt": "blue \\ud83d square"}\n', "line 2: '\\ud83d' is no character"),
    "surrogate.json": ('["a", "\\udc00"]', "line 2: '\\udc00' is no character"),
    "zero.txt": ("a\nb\0c\n", "line 2: '\\x00' is no character"),  # as UTF-16 without its mark reads
    "open.tsv": ('id\tprompt\n1\ta\n2\t"b, never closed\n3\tc\n', "line 3: the quotes around a cell that begins"),
    "joined.tsv": ('id\tprompt\n1\t"a\n2\tb"\tc\n', "line 2 has 3 fields, the header 2"),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_prompt_files_are_named_with_the_line(tmp_path, name):
    content, expected = BAD[name]
    with pytest.raises(InputError) as caught:
        read_prompts(write(tmp_path / name, content))
    assert str(caught.value).startswith(f"{tmp_path / name}: {expected}") and "\n" not in str(caught.value)


def test_several_files_and_what_they_are_told_apart_by(tmp_path):
    files = [write(tmp_path / "a.txt", "a\nb\n"), write(tmp_path / "b.json", '["c"]')]
    assert read_prompts(files) == ["a", "b", "c"] and read_prompts(files[::-1]) == ["c", "a", "b"]
    assert len({digest(prompts) for prompts in (["a", "b"], ["b", "a"], ["a, b"], ["a"], [])}) == 5
    with pytest.raises(InputError, match="c.txt: no such file"):
        read_prompts([*files, tmp_path / "c.txt"])


def test_no_prompt_file(tmp_path):
    with pytest.raises(InputError, match="absent.txt: no such file; expected prompts"):
        read_prompts(tmp_path / "absent.txt")


# ---- stateless sampling ------------------------------------------------------------------------------------

@pytest.mark.parametrize("count", [1, 2, 3, 7, 8, 9, 64, 65, 1000])
def test_every_epoch_visits_every_prompt_once(count):
    for seed, epoch in itertools.product((0, 1), (0, 1, 17)):
        order = [prompt_index(seed, epoch * count + i, count) for i in range(count)]
        assert sorted(order) == list(range(count))


def test_epochs_and_seeds_have_orders_of_their_own():
    orders = {tuple(prompt_index(seed, epoch * 50 + i, 50) for i in range(50))
              for seed in range(10) for epoch in range(10)}
    assert len(orders) == 100


def test_all_orders_of_few_prompts_are_equally_frequent():
    epochs, orders = 1200, list(itertools.permutations(range(4)))
    drawn = [tuple(prompt_index(0, 4 * epoch + i, 4) for i in range(4)) for epoch in range(epochs)]
    expected = epochs / len(orders)
    chi2 = sum((drawn.count(order) - expected) ** 2 / expected for order in orders)
    assert chi2 < 49.7  # 23 degrees of freedom: exceeded by chance once in a thousand


def test_millions_of_prompts_need_no_table():
    count = 4_189_737  # JourneyDB's training set
    start = time.perf_counter()
    order = [prompt_index(0, 3 * count + i, count) for i in range(2000)]
    assert time.perf_counter() - start < 1  # 0.06 s; a table of this length takes seconds
    assert len(set(order)) == 2000 and 0 <= min(order) and max(order) < count
    assert abs(np.mean(order) / count - 0.5) < 0.03  # 4.6 standard errors of the mean of 2000 uniform draws


def test_draws_are_the_same_however_the_batch_is_cut():
    shape, args = (16, 8, 8), (5, 1000, "z")
    whole, times = noise(shape, *args, range(8)), uniform(*args, range(8))
    assert whole.shape == (8, *shape) and whole.dtype == times.dtype == torch.float32
    for ranks, micro in ((1, 8), (2, 4), (4, 1), (8, 1)):
        cut = [range(i, i + micro) for i in range(0, 8, micro)]
        assert torch.equal(torch.cat([noise(shape, *args, indices) for indices in cut]), whole)
        assert torch.equal(torch.cat([uniform(*args, indices) for indices in cut]), times)
    assert torch.equal(noise(shape, *args, [6, 1]), whole[[6, 1]])
    assert torch.equal(noise(shape, *args, torch.tensor([6, 1])), whole[[6, 1]])
    assert torch.equal(uniform(np.int64(5), torch.tensor(1000), "z", np.array([6, 1])), times[[6, 1]])


def test_draws_do_not_touch_or_read_the_global_generators():
    torch_state, numpy_state = torch.get_rng_state(), np.random.get_state()[1].copy()
    first, _ = noise((3,), 0, 0, "z", [0]), uniform(0, 0, "z", [0])
    assert torch.equal(torch.get_rng_state(), torch_state)
    assert (np.random.get_state()[1] == numpy_state).all()
    torch.manual_seed(99)
    np.random.seed(99)
    assert torch.equal(noise((3,), 0, 0, "z", [0]), first)


def test_every_part_of_the_counter_counts():
    """Near counters, and counters that read alike when run together, give other draws."""
    keys = [(0, 0, "z", 0), (1, 0, "z", 0), (0, 1, "z", 0), (0, 0, "z", 1), (0, 0, "z_hat", 0),
            (1, 11, "z", 0), (11, 1, "z", 0), (0, 0, "z', 0", 0), (0, 0, "z", 2 ** 32), (2 ** 32, 0, "z", 0),
            (-1, 0, "z", 0)]
    draws = torch.cat([noise((256,), *key[:3], [key[3]]) for key in keys])
    correlation = torch.corrcoef(draws) - torch.eye(len(keys))
    assert correlation.abs().max() < 0.3  # 4.8 standard errors at 256 values
    assert len({uniform(*key[:3], [key[3]]).item() for key in keys}) == len(keys)


def test_noise_ahead_is_the_noise_of_any_order_of_iterations(monkeypatch):
    """Also where an iteration is left out, as after a resume, or asked for twice; the next one's is ready."""
    ahead, made = data.NoiseAhead((3,), 5), []
    draw = ahead.draw
    monkeypatch.setattr(ahead, "draw", lambda *args: made.append(args[0]) or draw(*args))
    for iteration in (1, 2, 3, 3, 9, 10):
        for name, indices in (("z", [0, 1]), ("z", [2, 3]), ("z_f", [0, 1])):
            assert torch.equal(ahead(iteration, name, indices), noise((3,), 5, iteration, name, indices))
    ahead.thread.shutdown()
    assert made.count(2) == 3 and made.count(10) == 3  # once each, ahead


def test_draws_have_the_right_distribution():
    z = noise((1000,), 0, 0, "z", range(200)).double()
    # Bounds are 5 standard errors at 200 000 values.
    assert abs(z.mean()) < 0.0112 and abs(z.var() - 1) < 0.0158
    assert abs((z ** 3).mean()) < 0.0434 and abs((z ** 4).mean() - 3) < 0.11
    assert abs(z[:100].flatten() @ z[100:].flatten() / 1e5) < 0.0158  # samples do not resemble one another
    u = uniform(0, 0, "u", range(20_000)).double()
    assert 0 <= u.min() and u.max() < 1
    assert abs(u.mean() - 1 / 2) < 0.0102 and abs(u.var() - 1 / 12) < 0.0026  # 5 standard errors at 20 000
    assert torch.histc(u, 20, 0, 1).sub(1000).abs().max() < 155  # each bin 1000 +- 31


def test_draws_of_a_seed_stay_what_they_are():
    """When these change, no seed gives the run it gave, and a resumed run goes on with other draws."""
    assert [prompt_index(0, i, 10) for i in range(10)] == [8, 2, 5, 3, 4, 7, 9, 6, 0, 1]
    assert noise((4,), 1, 2, "z", [3])[0].tolist() == \
        pytest.approx([0.39466384, -0.10073141, 0.60605055, -0.33649561], abs=1e-6)  # float32 rounding
    assert uniform(1, 2, "t", [3, 4]).tolist() == [0.8181896805763245, 0.22406232357025146]


def test_a_small_batch_is_drawn_in_no_time():
    noise((16, 8, 8), 0, 0, "z", range(16))
    best = min(timed(lambda: noise((16, 8, 8), 0, 0, "z", range(16))) for _ in range(20))
    assert best < 0.02  # 0.0006 s on a busy core


def timed(call) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


# ---- metrics.jsonl -----------------------------------------------------------------------------------------

def rows_of(path) -> list:
    return [json.loads(line, parse_constant=pytest.fail) for line in path.read_text().splitlines()]


def test_append(tmp_path):
    path = tmp_path / "metrics.jsonl"
    append_jsonl(path, {"iteration": 1, "loss_psi": 0.5, "margin": [0.1, -0.2], "mode": "adm"})
    append_jsonl(path, {"iteration": 2, "loss_psi": float("nan"), "margin": [float("inf"), 1.0]})
    assert rows_of(path) == [{"iteration": 1, "loss_psi": 0.5, "margin": [0.1, -0.2], "mode": "adm"},
                             {"iteration": 2, "loss_psi": None, "margin": [None, 1.0]}]
    assert path.read_text().endswith("}\n")


@pytest.mark.parametrize("tail", ["", '{"iteration": 6, "lo', '{"iteration": 6', '{"iteration": 6}', "{"])
def test_a_resumed_run_leaves_every_iteration_once(tmp_path, tail):
    """Killed at 5 or while writing 6, resumed from the state of 3."""
    path = tmp_path / "metrics.jsonl"
    for iteration in (1, 2, 3, 4, 5):
        append_jsonl(path, {"iteration": iteration, "run": "killed"})
    with path.open("a") as file:
        file.write(tail)
    truncate_jsonl(path, "iteration", 3)
    for iteration in (4, 5, 6):
        append_jsonl(path, {"iteration": iteration, "run": "resumed"})
    assert [(row["iteration"], row["run"]) for row in rows_of(path)] == \
        [(i, "killed") for i in (1, 2, 3)] + [(i, "resumed") for i in (4, 5, 6)]
    assert os.listdir(tmp_path) == ["metrics.jsonl"]


def test_a_whole_last_row_without_its_newline_is_kept(tmp_path):
    path = write(tmp_path / "metrics.jsonl", '{"iteration": 1}\n{"iteration": 2}')
    truncate_jsonl(path, "iteration", 2)
    append_jsonl(path, {"iteration": 3})
    assert rows_of(path) == [{"iteration": 1}, {"iteration": 2}, {"iteration": 3}]


def test_truncate_without_a_file_and_with_a_damaged_one(tmp_path):
    truncate_jsonl(tmp_path / "absent.jsonl", "iteration", 3)
    assert os.listdir(tmp_path) == []
    content = '{"iteration": 1}\n{"loss": 2}\n{"iteration": 3}\n'
    path = write(tmp_path / "metrics.jsonl", content)
    with pytest.raises(InputError, match="metrics.jsonl: line 2: expected a record with a number"):
        truncate_jsonl(path, "iteration", 1)
    assert path.read_text() == content


def test_a_cell_of_a_tsv_is_quoted_whole_or_not_at_all(tmp_path):
    """One that only begins with a quote would take the rows after it into itself; and in bounded time."""
    path = tmp_path / "p.tsv"
    for text in ('prompt\n"Untitled\nb\nc 5" nail\nd\n', 'prompt\tid\n"Untitled\t1\nb\t2\nc 5" nail\t3\nd\t4\n',
                 'prompt\n"Untitled\n' + "a line of text\n" * 60000):
        path.write_text(text)
        with pytest.raises(InputError, match=r"p.tsv: line 2: the quotes around a cell that begins '\"Untitled"):
            read_prompts(path)
    path.write_text('prompt\tid\n"a ""b""\tc\nd"\t1\n"G I" painted\t2\n')
    assert read_prompts(path) == ['a "b"\tc\nd', '"G I" painted']
