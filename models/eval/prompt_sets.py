"""The prompt sets that the papers evaluate on, from the files they were published as, or any prompt file.

    prompts = prompt_set("coco10k")                # from the hub
    prompts = prompt_set("PartiPrompts.tsv")       # a file
"""
import csv
import pickletools
import zipfile
from pathlib import Path
from typing import BinaryIO

from models.checkpoint import InputError, why
from models.data import cleaned, lines_of, read_prompts
from models.parse import parse_json, short
from models.presets import PROMPT_SETS
from models.videos import webvid_files

COCO = "coco10k/all_prompts.pkl"  # within the archive, beside the 10,000 pictures
LARGEST = 2 ** 26  # bytes of a pickled list; that of COCO has a hundredth
SOURCES = {
    "vbench": "https://github.com/Vchitect/VBench/blob/master/vbench/VBench_full_info.json",
    "webvid": "http://www.robots.ox.ac.uk/~maxbain/webvid/results_10M_val.csv",
}


def prompt_set(source: str | Path) -> list[str]:
    """The prompts, in the published order, of a name in PROMPT_SETS or of a file: DMD2's .zip or .pkl, VBench's
    .json, WebVid's .csv, or one of those of `models.data.read_prompts`. Raises InputError."""
    from models.eval import moving_shapes, shapes  # for these two sets alone
    name = str(source)
    if not name:
        raise InputError("--prompts '': expected a file or the name of a set")
    if name == "shapes":
        return shapes.evaluation_prompts(512)
    if name == "moving-shapes":
        return moving_shapes.evaluation_prompts(256)
    if name == "coco10k":
        return prompt_set(on_hub("tianweiy/DMD2", "data/coco/coco10k.zip"))
    if name == "parti":
        return prompt_set(on_hub("nateraw/parti-prompts", "PartiPrompts.tsv", "dataset"))
    if name in SOURCES:
        raise InputError(f"{name}: expected its file ({SOURCES[name]}) in place of the name")
    path = Path(source)
    if not path.exists() and not path.suffix:
        raise InputError(f"{name}: neither a file nor a prompt set; the sets are {', '.join(PROMPT_SETS)}")
    readers = {".zip": coco_archive, ".pkl": coco_pickle, ".json": vbench_prompts}
    if path.suffix in readers:
        if not path.is_file():
            raise InputError(f"{path}: no such file; expected prompts")
        prompts = readers[path.suffix](path)  # unchanged, because samples are named after them
        for number, prompt in enumerate(prompts, 1):
            if not cleaned(prompt, f"{path}: prompt {number}"):
                raise InputError(f"{path}: prompt {number} is blank; expected text")
        return prompts
    if path.suffix == ".csv" and path.is_file() and (rows := webvid(path)):
        prompts = [prompt for number, (_, caption) in enumerate(rows, 1)
                   if (prompt := cleaned(caption, f"{path}: record {number}"))]
        if not prompts:
            raise InputError(f"{path}: no prompt in this file")
        return prompts
    return read_prompts(path)


def on_hub(repo: str, file: str, kind: str = "model") -> Path:
    """A file of a repository, or of a "dataset", on the hub. Raises InputError."""
    from huggingface_hub import constants, hf_hub_download  # slow to import, seldom needed
    try:
        return Path(hf_hub_download(repo, file, repo_type=kind))
    except Exception as error:  # of many kinds, which differ between versions of huggingface_hub
        url = f"{constants.ENDPOINT}/{'datasets/' * (kind == 'dataset')}{repo}"
        raise InputError(f"{file} of {repo}: {why(error, url)}; --prompts FILE takes a local copy") from error


# What a pickled list of texts consists of.
TEXTS = ("BINUNICODE", "SHORT_BINUNICODE", "BINUNICODE8", "UNICODE")
FRAME = ("PROTO", "FRAME", "MARK", "APPEND", "APPENDS", "STOP")


def pickled_texts(content: bytes) -> list[str]:
    """The texts of a pickled list, from its opcodes alone: a pickle of ten bytes can make Python's own reader
    run code, or allocate all memory. Raises ValueError for one that holds anything else."""
    texts, memo, last, lists = [], {}, None, 0
    for opcode, value, _ in pickletools.genops(content):
        name = opcode.name
        if name in TEXTS:
            value.encode()  # no halves of a surrogate pair
            last = value
            texts.append(value)
        elif name in ("EMPTY_LIST", "LIST") and lists == 0:
            last, lists = None, 1
        elif name == "MEMOIZE":
            memo[len(memo)] = last
        elif name in ("PUT", "BINPUT", "LONG_BINPUT"):
            memo[value] = last
        elif name in ("GET", "BINGET", "LONG_BINGET") and memo.get(value) is not None:
            texts.append(memo[value])
        elif name in ("GLOBAL", "STACK_GLOBAL", "INST", "REDUCE"):
            named = value.replace(" ", ".") if isinstance(value, str) else ".".join(texts[-2:])
            raise ValueError(f"it calls {short(named)}")
        elif name not in FRAME:
            raise TypeError(f"{'a list within a list' if name == 'EMPTY_LIST' else name}")
    if not lists or not texts:
        raise TypeError(short(texts[:1] or []))
    return texts


def coco_list(file: BinaryIO, path: Path) -> list[str]:
    content = file.read(LARGEST + 1)
    if len(content) > LARGEST:
        raise InputError(f"{path}: more than {LARGEST} bytes; expected a pickled list of texts")
    try:
        return pickled_texts(content)
    except TypeError as error:
        raise InputError(f"{path}: expected a pickled list of texts, found {error}") from error
    except Exception as error:  # a damaged pickle can raise anything
        raise InputError(f"{path}: refused or damaged ({short(error)}); expected a pickled list of "
                         "texts") from error


def coco_pickle(path: Path) -> list[str]:
    with path.open("rb") as file:
        return coco_list(file, path)


def coco_archive(path: Path) -> list[str]:
    try:
        with zipfile.ZipFile(path) as archive, archive.open(COCO) as file:
            return coco_list(file, path)
    except InputError:
        raise
    except Exception as error:  # of many kinds, from a damaged or encrypted archive
        raise InputError(f"{path}: expected a zip archive with {COCO} ({short(error)})") from error


def vbench_prompts(path: Path) -> list[str]:
    """VBench's list of {prompt_en, dimension, ...}, unchanged, because the videos are named after them."""
    content = path.read_bytes()
    if b'"prompt_en"' not in content:
        return read_prompts(path)
    try:
        prompts = [entry["prompt_en"] for entry in parse_json(content)]
        if not prompts or not all(isinstance(prompt, str) for prompt in prompts):
            raise TypeError("prompt_en is no text")
    except (ValueError, TypeError, KeyError) as error:
        raise InputError(f'{path}: expected VBench_full_info.json, [{{"prompt_en": text, ...}}]') from error
    return prompts


def webvid(path: Path) -> list[tuple[str, str]]:
    """(file in the download, caption) of each row of WebVid's table; empty when the file is another table."""
    rows = csv.DictReader((line + "\n" for _, line in lines_of(path)), strict=True)
    try:
        if not {"videoid", "page_dir", "name"} <= set(rows.fieldnames or ()):
            return []
        if len(set(rows.fieldnames)) < len(rows.fieldnames):
            raise csv.Error("two columns have one name")
        found = []
        for row in rows:
            if None in row:
                raise csv.Error(f"{len(row[None])} more fields than the header has")
            if row["videoid"] == "videoid":  # the header again, of tables joined by cat
                continue
            found.append((webvid_files(row["page_dir"], row["videoid"])[0], row["name"].strip()))
        return found
    except (csv.Error, TypeError, AttributeError) as error:
        raise InputError(f"{path}: line {rows.line_num} is damaged ({short(error)}); expected a table with "
                         "videoid, page_dir and name") from error
