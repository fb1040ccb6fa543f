"""Files of weights: opened without running them, in every form in which they are published."""

from __future__ import annotations

import argparse
import collections
import doctest
import errno
import json
import os
import pickle
import time
import warnings
from concurrent import futures
from pathlib import Path

import pytest
import torch
from checkpoint_helpers import D2, THREE, check_same, layers, official, official_file

from saccade.integrations import checkpoints
from saccade.integrations.checkpoints.untrusted import load_torch


def test_an_allowance_that_was_there_stays(tmp_path):
    torch.save(official_file(official()), tmp_path / "r50.pth")
    with torch.serialization.safe_globals([argparse.Namespace]):
        checkpoints.load(tmp_path / "r50.pth")
        assert argparse.Namespace in torch.serialization.get_safe_globals()


def test_several_state_dicts_are_not_chosen_between(tmp_path):
    path = tmp_path / "file.pth"
    torch.save({"model": official(), "ema": {"module": official()}}, path)
    with pytest.raises(ValueError, match=r"entry: expected one of 'model', 'ema.module', because"):
        checkpoints.load(path)
    assert checkpoints.load(path, entry="ema.module").entry == "ema.module"
    with pytest.raises(ValueError, match="expected entry 'ema' with .* got model, ema"):
        checkpoints.load(path, entry="ema")


def test_numbers_that_are_not_numbers_are_the_same_in_a_copy(tmp_path):
    weights = official()
    prefix = checkpoints.attention_prefixes(weights)[0]
    weights[f"{prefix}.sampling_offsets.bias"][0] = float("nan")
    torch.save({"model": weights}, tmp_path / "once.pth")
    modules = checkpoints.load(tmp_path / "once.pth")
    assert modules.state_dict[f"{prefix}.sampling_offsets.bias"][0].isnan()
    # A copy in another order, under other prefixes.
    copy = {f"model.{name}": weights[name].clone() for name in reversed(list(weights))}
    torch.save({"model": weights, "state_dict": copy}, tmp_path / "twice.pth")
    assert checkpoints.load(tmp_path / "twice.pth").entry == "model"
    copy[f"model.{prefix}.sampling_offsets.bias"][0] = 0
    torch.save({"model": weights, "state_dict": copy}, tmp_path / "twice.pth")
    with pytest.raises(ValueError, match="expected one of 'model', 'state_dict', because"):
        checkpoints.load(tmp_path / "twice.pth")


@pytest.mark.parametrize(
    "dtype", [torch.bfloat16, torch.float64, torch.complex64, torch.int8, torch.bool]
)
def test_copies_of_every_type_are_compared(tmp_path, dtype):
    weights = {"a.sampling_offsets.weight": torch.ones(2, 3).to(dtype), "a.count": torch.tensor(3)}
    copy = {name: tensor.clone() for name, tensor in weights.items()}
    torch.save({"model": weights, "ema": copy}, tmp_path / "file.pth")
    assert checkpoints.load(tmp_path / "file.pth").entry == "model"
    copy["a.sampling_offsets.weight"][1, 2] = 0
    torch.save({"model": weights, "ema": copy}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match="'model' and 'ema' of .* differ"):
        checkpoints.load(tmp_path / "file.pth")


def test_state_dicts_are_found_by_their_depth(tmp_path):
    weights = official()
    path = tmp_path / "file.pth"
    torch.save({"runs/2024.05.01.r50.seed.0": {"model": weights}}, path)
    assert checkpoints.load(path).entry == "runs/2024.05.01.r50.seed.0.model"
    torch.save({"a": {"b": {"c": {"d": weights}}}}, path)
    assert checkpoints.load(path, entry="a.b.c.d").entry == "a.b.c.d"
    torch.save({"a": {"b": {"c": {"d": {"e": weights}}}}}, path)
    with pytest.raises(ValueError, match=r"expected a state dict .* got a \(1 in all\)"):
        checkpoints.load(path)
    # Two places with one path: neither is chosen in silence.
    torch.save({"a.b": weights, "a": {"b": official()}}, path)
    with pytest.raises(
        ValueError, match=r"expected one of 'a.b', because 'a.b' and 'a.b' of .* differ"
    ):
        checkpoints.load(path, entry="a.b")
    torch.save({1: weights, "1": official()}, path)
    with pytest.raises(ValueError, match="because '1' and '1' of .* differ"):
        checkpoints.load(path)


@pytest.mark.parametrize("protocol", [2, 4, 5])
def test_arrays_as_detectron2_publishes_them(tmp_path, protocol):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    state_dict = layers(D2, "", "", THREE, count=2)
    arrays = {name: tensor.numpy() for name, tensor in state_dict.items()}
    arrays["by_columns"] = numpy.asfortranarray(arrays[D2.format(0) + ".value_proj.weight"])
    arrays["count"], arrays["empty"] = numpy.array(7), numpy.zeros((0, 3), "f2")
    file = {"model": arrays, "__author__": "third_party", "iteration": numpy.float64(3)}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(file, protocol))
    found = checkpoints.load(tmp_path / "model.pkl").state_dict
    assert found.keys() == arrays.keys()
    assert all(torch.equal(found[name], torch.tensor(arrays[name])) for name in arrays)
    modules = checkpoints.attention_modules(found, num_heads=4, num_levels=3)
    check_same(modules, state_dict)


REAL = [
    "?",
    "u1",
    "i1",
    "<i2",
    ">i2",
    "<i4",
    ">i4",
    ">i8",
    ">u2",
    "<u2",
    ">u4",
    ">u8",
    ">f2",
    "<f4",
]
REAL += [">f4", ">f8", "<c8", ">c8", ">c16"]


@pytest.mark.parametrize("protocol", [2, 5])
@pytest.mark.parametrize("kind", REAL)
def test_arrays_of_every_type_of_number(tmp_path, protocol, kind):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    values = numpy.array([[0, 1, 2], [3, 100, 120]], dtype=kind)
    if values.dtype.kind == "c":
        values += 2j
    arrays = {
        "a.sampling_offsets.weight": values,
        "a.columns": numpy.asfortranarray(values),
        "a.scalar": values[1, 1],
        "a.no_dimension": numpy.array(values[1, 2]),
        "a.empty": values[:, :0],
        "a.every_second": values[:, ::2],
        "a.bytes": numpy.frombuffer(values.tobytes(), values.dtype),
    }
    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": arrays}, protocol))
    state_dict = checkpoints.load(tmp_path / "model.pkl").state_dict
    assert state_dict.keys() == arrays.keys()
    for name, array in arrays.items():
        native = numpy.asarray(array)
        assert torch.equal(
            state_dict[name], torch.from_numpy(native.astype(native.dtype.newbyteorder("=")))
        )


@pytest.mark.parametrize("as_zip", [True, False])
def test_arrays_in_files_of_torch(tmp_path, as_zip):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    path, bias = tmp_path / "best.pth", numpy.array([1, 2], ">f4")
    weights = official()
    content = {
        "model": {**weights, "bias": bias},
        "best": numpy.float64(0.5),
        "random": numpy.random.RandomState(0).get_state(),
    }
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    state_dict = checkpoints.load(path).state_dict
    assert torch.equal(state_dict.pop("bias"), torch.tensor([1.0, 2.0]))
    assert all(torch.equal(state_dict[name], weights[name]) for name in weights)
    content["model"]["bias"] = numpy.array(["text"])
    torch.save(content, path, _use_new_zipfile_serialization=as_zip)
    with pytest.raises(ValueError, match="best.pth: model.bias: .* got numpy's type <U4"):
        checkpoints.load(path)


def test_numpy_that_the_caller_allows_is_not_replaced(tmp_path):
    numpy = pytest.importorskip("numpy")
    number = numpy.float64(0.5)
    torch.save({"model": official(), "best": number}, tmp_path / "best.pth")
    allowed = [number.__reduce__()[0], numpy.dtype, type(number.dtype)]
    with torch.serialization.safe_globals(allowed):
        before = set(torch.serialization.get_safe_globals())
        assert checkpoints.load(tmp_path / "best.pth").entry == "model"
        assert set(torch.serialization.get_safe_globals()) == before


@pytest.mark.parametrize("protocol", [2, 5])
def test_arrays_that_torch_has_no_type_for(tmp_path, protocol):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    for wrong, kind in (
        (numpy.array([{}], object), "O8"),
        (numpy.array(["a", "bc"]), "<U2"),
        (numpy.array([b"abc"]), "S3"),
        (numpy.array(["2024-01-01"], "M8[s]"), "<M8"),
        (numpy.zeros(2, [("a", "f4"), ("b", "i4")]), "V8"),
    ):
        (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": {"x": wrong}}, protocol))
        message = (
            f"model.pkl: model.x: expected numbers of a type that torch has, got numpy's .*{kind}$"
        )
        with pytest.raises(ValueError, match=message):
            checkpoints.load(tmp_path / "model.pkl")


@pytest.mark.parametrize(
    ("shape", "content", "message"),
    [
        ((2, 3), bytes(8), r"expected 24 bytes for a numpy array of shape \(2, 3\) and .* got 8"),
        ((2,), bytes(12), "expected 8 bytes for a numpy array .* got 12"),
        ((0, 3), bytes(12), "expected 0 bytes"),
        ((2**62, 2**62), bytes(8), "expected 85070591730234615865843651857942052864 bytes"),
        ((1,) * 65, bytes(4), "expected 4 bytes for a numpy array"),
        ((-2,), bytes(8), "expected the shape of a numpy array, got tuple"),
        ([2], bytes(8), "expected the shape of a numpy array, got list"),
        ((2,), 7, "expected a numpy array as bytes, got int"),
        ((2,), [1.0, 2.0], "expected a numpy array as bytes, got list"),
    ],
)
def test_arrays_whose_bytes_do_not_fit(tmp_path, shape, content, message):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")

    class Array:
        def __reduce__(self):
            begin, arguments, _ = numpy.zeros(2).__reduce__()
            return begin, arguments, (1, shape, numpy.dtype("f4"), False, content)

    (tmp_path / "model.pkl").write_bytes(pickle.dumps({"model": Array()}, 2))
    with pytest.raises(ValueError, match=f"model.pkl: model: {message}"):
        checkpoints.load(tmp_path / "model.pkl")


def test_truth_values_are_0_or_1(tmp_path):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    array = numpy.array([0, 1, 2, 255], "u1").view("?")
    arrays = {"a.sampling_offsets.weight": array}
    (tmp_path / "model.pkl").write_bytes(pickle.dumps(arrays, 2))
    (tensor,) = checkpoints.load(tmp_path / "model.pkl").state_dict.values()
    assert tensor.view(torch.uint8).tolist() == [0, 1, 1, 1]


class Touch:
    """Makes a file when it is unpickled."""

    def __init__(self, path):
        self.path = str(path)

    def __reduce__(self):
        return os.mkdir, (self.path,)


class Settings:
    """Harmless, but nothing that a reader could know."""


@pytest.mark.parametrize("write", ["zip", "legacy", "pickle"])
@pytest.mark.parametrize("where", ["args", "inside args", "model"])
def test_nothing_in_a_file_is_run(tmp_path, write, where):
    proof, path = tmp_path / "proof", tmp_path / "file.pth"
    file = official_file(official() if write != "pickle" else {})
    if where == "args":
        file["args"] = Touch(proof)
    elif where == "inside args":
        file["args"].lr = Touch(proof)
    else:
        file["model"]["backbone.weight"] = Touch(proof)
    if write == "pickle":
        path.write_bytes(pickle.dumps(file | {"optimizer": {}}))
    else:
        torch.save(file, path, _use_new_zipfile_serialization=write == "zip")
    name = r"(posix|nt)\.mkdir|argparse\.Namespace"  # the latter is unknown to the reader of arrays
    with pytest.raises(ValueError, match=rf"got a pickled ({name})\. .*nothing was run"):
        checkpoints.load(path)
    assert not proof.exists()
    torch.load(path, weights_only=False) if write != "pickle" else pickle.loads(path.read_bytes())
    assert proof.exists()  # the file is as bad as it should be


@pytest.mark.filterwarnings("ignore:TypedStorage is deprecated")
@pytest.mark.parametrize("new", [True, False])
def test_what_torch_writes_beside_weights_is_read(tmp_path, new):
    with_attribute = torch.ones(2)
    with_attribute.is_buffer = True
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch calls quantized tensors old
        quantized = torch.quantize_per_tensor(torch.ones(2), 0.1, 0, torch.qint8)
        per_channel = torch.quantize_per_channel(
            torch.ones(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
        )
    shared = torch.arange(12.0)
    beside = {
        "sparse": torch.eye(3).to_sparse(), "complex": torch.ones(2, dtype=torch.complex64),
        "unsigned": torch.ones(2, dtype=torch.uint8), "half": torch.ones(2, dtype=torch.bfloat16),
        "empty": torch.zeros(0, 3), "scalar": torch.tensor(1), "expanded": torch.ones(1, 3).expand(9, 3),
        "views": [shared[2:5], shared[::2], shared.view(3, 4).T], "meta": torch.ones(3, device="meta"),
        "parameter": torch.nn.Parameter(torch.ones(2)), "attribute": with_attribute,
        "quantized": [quantized, per_channel],
        "plain": [torch.float16, torch.Size([2]), torch.device("cpu"), {1, 2}, b"bytes", bytearray(b"a"),
                  complex(1, 2), 2**70, None, (1, (2,)), collections.Counter("aab"), torch.strided],
        "optimizer": {"state": {i: {"step": torch.tensor(1.0)} for i in range(3)}, (0, 1): "b", 1.5: "c"},
    }  # fmt: skip
    if new:
        beside["wide"] = torch.ones(2, dtype=torch.uint16)
    file = {"model": official(), **beside}
    torch.save(file, tmp_path / "file.pth", _use_new_zipfile_serialization=new)
    checkpoint = checkpoints.load(tmp_path / "file.pth")
    assert checkpoint.entry == "model"
    assert checkpoint.state_dict.keys() == file["model"].keys()
    torch.save(
        torch.nn.ModuleDict({"a": torch.nn.Linear(2, 2)}).state_dict(), tmp_path / "other.pth"
    )
    with pytest.raises(ValueError, match=r"got a.weight, a.bias \(2 in all\)"):
        checkpoints.load(tmp_path / "other.pth")


def test_pickled_objects_are_named(tmp_path):
    torch.save({"model": official(), "args": Settings()}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"got a pickled \S*\.Settings\. .*If you trust") as caught:
        checkpoints.load(tmp_path / "file.pth")
    assert "weights_only=False" not in str(caught.value)
    with torch.serialization.safe_globals([Settings]):
        assert checkpoints.load(tmp_path / "file.pth").config == {}
    for content in (b"", b"not a checkpoint", b"PK\x03\x04 not a zip archive"):
        (tmp_path / "file.pth").write_bytes(content)
        with pytest.raises(
            ValueError, match="expected a file that torch.save or safetensors wrote"
        ):
            checkpoints.load(tmp_path / "file.pth")
    torch.save([1], tmp_path / "file.pth")
    with pytest.raises(ValueError, match="expected a mapping, got list"):
        checkpoints.load(tmp_path / "file.pth")
    torch.save({"model": {"fc.weight": torch.zeros(1)}}, tmp_path / "file.pth")
    with pytest.raises(ValueError, match=r"that end in sampling_offsets.weight, got model \(1 in"):
        checkpoints.load(tmp_path / "file.pth")
    with pytest.raises(FileNotFoundError):
        checkpoints.load(tmp_path / "none.pth")


def test_safetensors(tmp_path, monkeypatch):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path, state_dict = tmp_path / "model.safetensors", official()
    safetensors.save_file(state_dict, path)
    checkpoint = checkpoints.load(str(path))
    assert (checkpoint.config, checkpoint.entry) == ({}, "")
    assert all(torch.equal(checkpoint.state_dict[name], state_dict[name]) for name in state_dict)
    path.write_bytes(b"broken")
    with pytest.raises(ValueError, match="expected a file that torch.save or safetensors wrote"):
        checkpoints.load(path)
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(ModuleNotFoundError, match="needs safetensors, .* pip install safetensors"):
        checkpoints.load(path)


def test_folders_of_older_transformers(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"a folder with one of model.safetensors, .*index"):
        checkpoints.load(tmp_path)
    state_dict = official()
    torch.save(state_dict, tmp_path / "one.bin")
    index = tmp_path / "pytorch_model.bin.index.json"
    index.write_text(json.dumps({"weight_map": dict.fromkeys(state_dict, "one.bin")}))
    (tmp_path / "config.json").write_text('{"encoder_attention_heads": 4, "architectures": []}')
    checkpoint = checkpoints.load(tmp_path)
    assert checkpoint.config == {"encoder_attention_heads": 4}
    assert checkpoint.state_dict.keys() == state_dict.keys()
    # An index is read from the same folder, and from nowhere else.
    for shard in ("../one.bin", str(tmp_path / "one.bin"), "folder/one.bin"):
        index.write_text(json.dumps({"weight_map": {"a": shard}}))
        with pytest.raises(ValueError, match="expected names of files beside it, got"):
            checkpoints.load(tmp_path)


def test_settings_that_contradict_each_other_say_nothing(tmp_path):
    file = {"model": official(), "args": {"nheads": 4}, "model_config": {"nheads": 8}}
    torch.save(file, tmp_path / "file.pth")
    assert checkpoints.load(tmp_path / "file.pth").config == {"nheads": None}


def test_the_page_runs():
    page = Path(__file__).parent.parent / "docs/checkpoints.md"
    result = doctest.testfile(str(page), module_relative=False)
    assert result.attempted > 10
    assert not result.failed


@pytest.mark.parametrize(
    "content",
    [
        b"(S'true'\nios\nsystem\n.",  # the old ways to call a function
        b"(cos\nsystem\nS'true'\no.",
        b"\x80\x04\x8c\x05numpy\x8c\x0fndarray.__new__\x93.",  # a name within a name
        b"\x80\x02cnumpy\nndarray\nN}U\x01xK\x01s\x86b.",  # an attribute of a class that is allowed
        b"\x80\x02c__builtin__\nbytes\nJ\xff\xff\xff\x7f\x85R.",  # two gigabytes
        b"Pname\n.",
    ],
)
def test_plain_pickles_get_nothing_but_arrays(tmp_path, content):
    (tmp_path / "model.pkl").write_bytes(content)
    with pytest.raises(ValueError, match="model.pkl: expected"):
        checkpoints.load(tmp_path / "model.pkl")
    from saccade.integrations.checkpoints import pickles

    assert not any(hasattr(stand_in, "x") for stand_in in pickles._STAND_INS.values())


def test_values_that_torch_saves_are_read(tmp_path):
    content = {
        "counter": collections.Counter("aab"),
        "ordered": collections.OrderedDict([("a", 1), (2, "b")]),
        "set": {1, "a", (2, 3)},
        "bytes": [b"short", b"long" * 100, bytearray(b""), bytearray(b"long" * 100)],
        "parameter": torch.nn.Parameter(torch.ones(2)),
        "size": torch.Size([1, 2]),
    }
    tied = content["bytes"][1]
    content["tied"] = [tied, tied]
    for old in (False, True):
        torch.save(content, tmp_path / "model.pth", _use_new_zipfile_serialization=not old)
        loaded = load_torch(tmp_path / "model.pth")
        assert torch.equal(loaded.pop("parameter"), torch.ones(2))
        assert loaded == {name: value for name, value in content.items() if name != "parameter"}


@pytest.mark.filterwarnings("ignore")  # torch calls some of these new, and others old
def test_tensors_that_torch_saves_are_read(tmp_path):
    layer = torch.nn.Linear(3, 3)
    layer(torch.zeros(1, 3)).sum().backward()
    optimizer = torch.optim.AdamW(layer.parameters())
    optimizer.step()
    with_attribute = torch.nn.Parameter(torch.zeros(2))
    with_attribute.attribute = {"a": 1}
    content = [
        layer.state_dict(),
        optimizer.state_dict(),
        with_attribute,
        torch.eye(3).to_sparse(),
        torch.eye(3).to_sparse_csr(),
        torch.quantize_per_tensor(torch.zeros(2), 0.1, 0, torch.qint8),
        torch.quantize_per_channel(
            torch.zeros(2, 2), torch.ones(2), torch.zeros(2), 0, torch.qint8
        ),
        torch.empty(3, device="meta"),
        torch.zeros(3, dtype=torch.complex64).conj(),
        torch.zeros(1).expand(1000),
        torch.zeros(3).storage(),
        torch.device("cpu"),
        torch.bfloat16,
        1j,
    ]
    for number, value in enumerate(content):
        for old in (False, True):
            torch.save(value, tmp_path / "model.pth", _use_new_zipfile_serialization=not old)
            assert type(load_torch(tmp_path / "model.pth")) is type(value), (number, old)
    torch.save(
        torch.zeros(3, dtype=torch.float8_e4m3fn), tmp_path / "model.pth"
    )  # not in old files
    assert load_torch(tmp_path / "model.pth").dtype == torch.float8_e4m3fn


def test_threads_do_not_take_the_allowed_names_from_each_other(tmp_path, monkeypatch):
    path, load = tmp_path / "model.pth", torch.load
    torch.save({"model": official(), "args": argparse.Namespace(nheads=4)}, path)

    def load_slowly(*arguments, **options):
        time.sleep(0.1)
        return load(*arguments, **options)

    monkeypatch.setattr(torch, "load", load_slowly)
    with futures.ThreadPoolExecutor() as pool:
        first = pool.submit(checkpoints.load, path)
        time.sleep(0.05)
        second = pool.submit(checkpoints.load, path)
        assert first.result().config == second.result().config == {"nheads": 4}
    assert not torch.sparse.check_sparse_tensor_invariants.is_enabled()
    assert argparse.Namespace not in torch.serialization.get_safe_globals()


def test_files_of_a_file_system_that_maps_none_are_read(tmp_path, monkeypatch):
    def refuse(*arguments, **options):
        raise OSError(errno.ENODEV, "No such device")

    monkeypatch.setattr("mmap.mmap", refuse)
    for old in (False, True):
        torch.save({"a": 1}, tmp_path / "model.pth", _use_new_zipfile_serialization=not old)
        assert load_torch(tmp_path / "model.pth") == {"a": 1}
