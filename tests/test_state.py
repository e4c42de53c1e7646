"""Saved states: what is saved is what is read, nothing in a state can run, and a damaged one is refused."""
import io
import json
import os
import pickle
import shutil
import sys
import tracemalloc
import zipfile
from enum import Enum
from types import ModuleType

import pytest
import torch
import torch.distributed.checkpoint as dcp
from conftest import refusal_of, says
from torch import nn
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, ChunkStorageMetadata, MetadataIndex

import adm
from models.parallel import adamw, init_distributed, update
from models.state import Named, complete_states, load_state, named_tensors, save_state

PROGRESS = dict(gen_iter=3, global_iter=4, skipped=1)


def roles(seed=0, betas=(0.0, 0.99), ema=0.0):
    """A small layer and its optimizer, after one step."""
    torch.manual_seed(seed)
    params = dict(nn.Linear(3, 5).named_parameters())
    opt = adamw((params, 0.1), betas=betas, ema=ema)
    sum(p.square().sum() for p in params.values()).backward()
    update(opt, torch.zeros(()))
    return {"theta": (params, opt)}


@pytest.fixture
def state(tmp_path):
    init_distributed()
    return save_state(tmp_path / "state", 4, roles(), PROGRESS)


@pytest.fixture
def mark(tmp_path):
    """A file that is there when a payload has run."""
    return tmp_path / "mark"


def assert_loads(state):
    expected, other = named_tensors(roles()), roles(1)
    assert load_state(state, other) == PROGRESS
    for name, found in named_tensors(other).items():
        assert torch.equal(found, expected[name]), name


def refusal(state) -> str:
    return says(load_state, state, roles(1))


def plan_of(state):
    return pickle.loads((state / ".metadata").read_bytes())


# ---- sound states ------------------------------------------------------------------------------------------

def test_what_is_saved_is_what_is_read(state):
    assert_loads(state)
    kept = [f"{name}.{key}" for name in ("weight", "bias") for key in ("step", "exp_avg_sq")]
    names = {"theta.weight", "theta.bias", *(f"opt.theta.{key}" for key in kept)}
    assert plan_of(state).state_dict_metadata.keys() == names


def test_a_state_that_kept_the_first_moment_although_beta_1_is_0(tmp_path):
    init_distributed()
    before = roles(betas=(0.5, 0.99))
    state, after = save_state(tmp_path / "state", 4, before, PROGRESS), roles(1)
    assert "opt.theta.weight.exp_avg" in plan_of(state).state_dict_metadata
    assert load_state(state, after) == PROGRESS
    expected = named_tensors(before)
    for name, found in named_tensors(after).items():
        assert torch.equal(found, expected[name]), name


@pytest.mark.parametrize("kept", [0.0, 0.9])
def test_a_moving_average_is_saved_and_begins_at_the_weights_where_a_state_has_none(tmp_path, kept):
    init_distributed()
    before, after = roles(ema=kept), roles(1, ema=0.9)
    load_state(save_state(tmp_path / "state", 4, before, PROGRESS), after)
    expected = named_tensors(before)
    for name, found in named_tensors(after).items():
        name = name.removeprefix("opt.").removesuffix(".ema") if name not in expected else name
        assert torch.equal(found, expected[name]), name
    assert kept == 0 or not torch.equal(expected["opt.theta.weight.ema"], expected["theta.weight"])


class OtherPython(pickle.Pickler):
    """Writes the member of an enum by getattr, as some versions do."""

    def reducer_override(self, value):
        return (getattr, (type(value), value.name)) if isinstance(value, Enum) else NotImplemented


@pytest.mark.parametrize("protocol", [4, 5])  # Python 3.14 took the fifth
def test_a_state_that_another_version_of_python_wrote(state, monkeypatch, protocol):
    local = ModuleType("pathlib._local")  # where Python 3.13 has its paths
    local.PosixPath = type("PosixPath", (), {"__module__": local.__name__,
                                             "__reduce__": lambda self: (local.PosixPath, ("a", "b"))})
    monkeypatch.setitem(sys.modules, local.__name__, local)
    plan, out = plan_of(state), io.BytesIO()
    plan.storage_meta.checkpoint_id = local.PosixPath()
    OtherPython(out, protocol).dump(plan)
    assert b"getattr" in out.getvalue() and b"pathlib._local" in out.getvalue()
    (state / ".metadata").write_bytes(out.getvalue())
    assert_loads(state)


def test_complete_states_are_told_from_what_else_lies_there(state):
    for name in ("iter_00000003", "iter_00000005.tmp", "iter_00000004.bak", "iter_00000004 (2)", "iter_old"):
        (state.parent / name).mkdir()
    assert [path.name for path in complete_states(state.parent)] == ["iter_00000003", "iter_00000004"]


def test_the_two_newest_states_are_kept_and_one_may_be_saved_again(tmp_path):
    """One of SDXL takes 41 GB: 8 bytes for each of 2.6 billion weights, of two networks."""
    init_distributed()
    for iteration in (4, 8, 12, 12):
        save_state(tmp_path, iteration, roles(), PROGRESS)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["iter_00000008", "iter_00000012"]


# ---- states that ask for code ------------------------------------------------------------------------------

class Call:
    """An object whose pickle has a function called; the function may be what another Call returns."""

    def __init__(self, function, *args):
        self.call = function, args

    def __reduce__(self):
        return self.call

    def __call__(self):  # pickle wants to see it
        raise AssertionError


def text(value: str) -> bytes:
    return b"\x8c" + bytes([len(value)]) + value.encode()


def by_getattr(command):
    """Names only what plans name: from a function to its module's variables, to `os`, to `system`."""
    variables = Call(getattr, torch.serialization._get_layout, "__globals__")
    module = Call(Call(getattr, variables, "__getitem__"), "os")
    return pickle.dumps(Call(Call(getattr, module, "system"), command))


# Name -> (a pickle that runs a command of the shell when Python reads it, what its refusal says).
PAYLOADS = {
    "system": (lambda command: pickle.dumps(Call(os.system, command)), "it asks for 'posix.system'"),
    "eval": (lambda command: pickle.dumps(Call(eval, f"__import__('os').system({command!r})")),
             "it asks for 'builtins.eval'"),
    "exec": (lambda command: pickle.dumps(Call(exec, f"import os; os.system({command!r})"), 5),
             "it asks for 'builtins.exec'"),
    "protocol 0": (lambda command: f"cos\nsystem\n(S'{command}'\ntR.".encode(), "it asks for 'os.system'"),
    "INST": (lambda command: f"(S'{command}'\nios\nsystem\n.".encode(), "it asks for 'os.system'"),
    # A module that plans name, and one of its imports.
    "STACK_GLOBAL": (lambda command: b"\x80\x04" + text("torch.serialization") + text("os.system") + b"\x93"
                     + text(command) + b"\x85R.", "it asks for 'torch.serialization.os.system'"),
    "getattr": (by_getattr, "'Named' object is not callable"),
}


@pytest.mark.parametrize("kind", PAYLOADS)
def test_a_plan_that_asks_for_a_call_is_refused(state, mark, kind):
    make, words = PAYLOADS[kind]
    program = make(f"touch {mark}")
    pickle.loads(program)
    assert mark.exists()  # it is a program
    mark.unlink()
    (state / ".metadata").write_bytes(program)
    assert refusal(state) == (f"{state / '.metadata'}: refused or damaged ({words}); expected the plan of a "
                              "saved state, which names nothing but tensors")
    assert not mark.exists()


HIDING_PLACES = {
    "planner_data": lambda plan, call: plan.planner_data.update(x=call),
    "version": lambda plan, call: setattr(plan, "version", call),
    "modules": lambda plan, call: plan.storage_meta.modules.append(call),
    "offsets": lambda plan, call: setattr(plan.state_dict_metadata["theta.bias"].chunks[0], "offsets", call),
    "dtype": lambda plan, call: setattr(plan.state_dict_metadata["theta.bias"].properties, "dtype", call),
    "key": lambda plan, call: plan.storage_data.update({call: 0}),
}


@pytest.mark.parametrize("place", HIDING_PLACES)
def test_a_call_inside_a_sound_plan_is_refused(state, mark, place):
    plan = plan_of(state)
    HIDING_PLACES[place](plan, Call(os.system, f"touch {mark}"))
    program = pickle.dumps(plan)
    pickle.loads(program)
    assert mark.exists()
    mark.unlink()
    (state / ".metadata").write_bytes(program)
    assert "'posix.system'" in refusal(state) and not mark.exists()


def test_a_plan_changes_no_class(state):
    before = set(vars(ChunkStorageMetadata)), set(vars(Named))
    a = b"}X\x01\x00\x00\x00aK\x01s"  # {"a": 1}
    for fields in (a, b"N" + a + b"\x86"):  # (None, {"a": 1}) sets attributes
        program = b"\x80\x02ctorch.distributed.checkpoint.metadata\nChunkStorageMetadata\n" + fields + b"b."
        (state / ".metadata").write_bytes(program)
        refusal(state)
    assert (set(vars(ChunkStorageMetadata)), set(vars(Named))) == before


def test_a_plan_takes_no_memory_for_a_number_in_it(state):
    """LONG_BINPUT of 2^26: the memo of C's unpickler would be a table of a gigabyte."""
    (state / ".metadata").write_bytes(b"\x80\x04Nr" + (2 ** 26).to_bytes(4, "little") + b".")
    tracemalloc.start()
    assert "refused or damaged" in refusal(state)
    assert tracemalloc.get_traced_memory()[1] < 2 ** 24
    tracemalloc.stop()


def replace_piece(state, content: bytes, key="theta.bias", entry=None):
    """Put `content` at the end of the state's file, and in the plan in place of the tensor `key`."""
    file, plan = state / "__0_0.distcp", plan_of(state)
    index = MetadataIndex(key, [0]) if entry is None else MetadataIndex(key)
    plan.storage_data[index] = _StorageInfo(file.name, file.stat().st_size, len(content))
    if entry is not None:
        plan.state_dict_metadata[key] = entry
    with file.open("ab") as f:
        f.write(content)
    (state / ".metadata").write_bytes(pickle.dumps(plan))


def saved(value) -> bytes:
    out = io.BytesIO()
    torch.save(value, out)
    return out.getvalue()


def test_an_entry_of_bytes_which_torch_would_unpickle_is_refused(state, mark):
    replace_piece(state, saved(Call(os.system, f"touch {mark}")), entry=BytesStorageMetadata())
    dcp.load(named_tensors(roles()), checkpoint_id=state)
    assert mark.exists()
    mark.unlink()
    assert "asks for 'torch.distributed.checkpoint.metadata.BytesStorageMetadata'" in refusal(state)
    assert not mark.exists()


def test_a_tensor_that_is_a_pickle_does_not_run(state, mark):
    call = Call(os.system, f"touch {mark}")
    for content, words in ((saved(call), "archive/data/0"), (pickle.dumps(call), "not a zip file")):
        replace_piece(state, content)
        assert words in refusal(state)
    # The right elements beside a pickle that runs a program: that is not looked at.
    sound = zipfile.ZipFile(io.BytesIO(saved(named_tensors(roles())["theta.bias"])))
    out = io.BytesIO()
    with zipfile.ZipFile(out, "w") as archive:
        for name in sound.namelist():
            archive.writestr(name, pickle.dumps(call) if name.endswith(".pkl") else sound.read(name))
    replace_piece(state, out.getvalue())
    assert_loads(state)
    assert not mark.exists()
    torch.load(io.BytesIO(out.getvalue()), weights_only=False)
    assert mark.exists()


# ---- damaged states ----------------------------------------------------------------------------------------

def test_one_wrong_bit_in_a_tensor_is_refused(state):
    file = state / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[content.index(named_tensors(roles())["theta.weight"].numpy().tobytes()) + 7] ^= 1
    file.write_bytes(content)
    assert "Bad CRC-32" in refusal(state)


def moved(**place):
    def change(plan):
        for info in plan.storage_data.values():
            vars(info).update(place)
    return change


def resized(name, *size):
    return lambda plan: setattr(plan.state_dict_metadata[name], "size", torch.Size(size))


def cut_in_columns(plan):
    chunk = ChunkStorageMetadata(torch.Size([0, 0]), torch.Size([5, 2]))
    plan.state_dict_metadata["theta.weight"].chunks = [chunk]


@pytest.mark.parametrize("change, words", [
    (moved(relative_path="../secret.distcp"), "outside of the .distcp files"),
    (moved(relative_path="/etc/passwd"), "outside of the .distcp files"),
    (moved(relative_path=3), "expected string"),
    (moved(relative_path="__9_0.distcp"), "No such file"),
    (moved(offset=-1), "whole number"), (moved(offset=True), "whole number"),
    (moved(length=2 ** 63), "whole number"), (moved(length=9), "not a zip file"),
    (moved(offset=0, length=10 ** 9), "does not begin where the plan says"),  # the last archive of the file
    (resized("theta.bias", 6), "Size mismatch: theta.bias"), (resized("theta.bias", 5, 1), "not cut along"),
    (cut_in_columns, "not cut along its first dimension"),
    (lambda plan: plan.state_dict_metadata["theta.weight"].chunks.clear(), "5 rows of theta.weight are"),
    (lambda plan: plan.state_dict_metadata.pop("theta.bias"), "Missing key theta.bias"),
    (lambda plan: plan.storage_data.clear(), "theta.weight"),
    (lambda plan: setattr(plan, "storage_data", []), "items"),
    (lambda plan: vars(plan).clear(), "fields"),
])
def test_a_plan_that_cannot_be_right_is_refused(state, change, words):
    plan = plan_of(state)
    change(plan)
    (state / ".metadata").write_bytes(pickle.dumps(plan))
    message = refusal(state)
    assert message.startswith(str(state)) and words in message


def test_half_a_plan_and_none_are_refused(state):
    content = (state / ".metadata").read_bytes()
    for part in (content[:len(content) // 2], b"", pickle.dumps([1]), b"x" * 100):
        (state / ".metadata").write_bytes(part)
        assert refusal(state).startswith(f"{state / '.metadata'}: refused or damaged (")
    (state / ".metadata").unlink()
    assert "No such file" in refusal(state)


WRONG_PROGRESS = {
    "text": PROGRESS | {"gen_iter": "x"}, "list inside": PROGRESS | {"gen_iter": [3]},
    "negative": PROGRESS | {"gen_iter": -3}, "fraction": PROGRESS | {"gen_iter": 3.5},
    "truth": PROGRESS | {"gen_iter": True}, "nothing": PROGRESS | {"gen_iter": None},
    "NaN": PROGRESS | {"gen_iter": float("nan")}, "huge": PROGRESS | {"gen_iter": 10 ** 30},
    "missing": {"gen_iter": 3, "global_iter": 4}, "list": [3, 4, 1], "number": 7, "null": None,
    "deep": b"[" * 100_000, "empty": b"", "cut": b'{"gen_iter": 3, "glob', "not UTF-8": b"\xff\xfe",
}


@pytest.mark.parametrize("kind", WRONG_PROGRESS)
def test_wrong_counters_are_refused(state, kind):
    wrong = WRONG_PROGRESS[kind]
    (state / "progress.json").write_bytes(wrong if isinstance(wrong, bytes) else json.dumps(wrong).encode())
    message = refusal(state)
    assert message.startswith(f"{state / 'progress.json'}: not the counters of a saved state (")
    assert message.endswith("; expected whole numbers gen_iter, global_iter, skipped")


# ---- by the scripts ----------------------------------------------------------------------------------------

def test_resume_runs_nothing_and_says_why(tmp_path, mark):
    flags = ["--batch-size", 2, "--evaluate", 0, "--lora-rank", 4, "--fake-lora", 4, "--max-iter", 1,
             "--out", tmp_path / "run"]
    adm.main(adm.parse_args(list(map(str, flags))))
    state, = complete_states(tmp_path / "run" / "state")
    shutil.copy(state / ".metadata", tmp_path)
    (state / ".metadata").write_bytes(PAYLOADS["system"][0](f"touch {mark}"))
    before = "loading tiny-sd3\n(psi|theta|tau): .*"  # what is trained, printed before the state is read
    message = refusal_of("adm.py", *flags, "--resume", printed=before)
    assert message == (f"adm.py: {state / '.metadata'}: refused or damaged (it asks for 'posix.system'); "
                       "expected the plan of a saved state, which names nothing but tensors\n")
    shutil.copy(tmp_path / ".metadata", state)
    (state / "progress.json").write_text(json.dumps(WRONG_PROGRESS["text"]))
    message = refusal_of("adm.py", *flags, "--resume", printed=before)
    assert message.startswith(f"adm.py: {state / 'progress.json'}: not the counters of")
    assert message.count("\n") == 1 and not mark.exists()
