"""Files of weights that would exhaust a reader are refused first, by a bound that the error names."""

from __future__ import annotations

import collections
import io
import json
import os
import pickle
import struct
import subprocess
import sys
import tarfile
import zipfile

import pytest
import torch
from checkpoint_helpers import official

from saccade.integrations import checkpoints
from saccade.integrations.checkpoints.pickle_bounds import BoundError, Limits
from saccade.integrations.checkpoints.untrusted import load_torch, open_regular, read_json

END = b"."
LEGACY = [pickle.dumps(0x1950A86A20F9469CFC6C, 2), pickle.dumps(1001, 2), pickle.dumps({}, 2)]


class Storage:
    """A reference to elements elsewhere in the file."""

    def __init__(self, key, numel):
        self.identity = ("storage", torch.FloatStorage, key, "cpu", numel)


class Rebuilt:
    """A tensor that is restored with these arguments."""

    def __init__(self, *arguments, function=torch._utils._rebuild_tensor_v2):
        self.reduced = function, arguments

    def __reduce__(self):
        return self.reduced


class Pickler(pickle.Pickler):
    def __init__(self, file, view):
        super().__init__(file, 2)
        self.view = view

    def persistent_id(self, value):
        return (*value.identity, *self.view) if isinstance(value, Storage) else None


def dump(content, view=()):
    file = io.BytesIO()
    Pickler(file, view).dump(content)
    return file.getvalue()


def as_plain(program):
    return program


def as_legacy(program, keys=(), storages=b""):
    return b"".join([*LEGACY, program, pickle.dumps(list(keys), 2), storages])


def as_archive(program, members=(), compression=zipfile.ZIP_STORED):
    file = io.BytesIO()
    with zipfile.ZipFile(file, "w", compression) as archive:
        archive.writestr("archive/data.pkl", program)
        archive.writestr("archive/version", "3\n")
        for name, content in dict(members).items():
            archive.writestr(f"archive/{name}", content)
    return file.getvalue()


def tensor(storage, offset, sizes, strides):
    return Rebuilt(storage, offset, sizes, strides, False, collections.OrderedDict())


def doubling(one, times=60):
    """Each level holds the one below it twice: 2^60 elements in 60 instructions."""
    return one + b"".join(b"q%c" % i + b"h%c" % i + b"\x86" for i in range(times))


def dict_of_itself(count=60):
    keys = b"".join(b"K%ch\x00" % i for i in range(count))
    return b"\x80\x02}q\x00(" + keys + b"u."


def colliding(count=20_000):
    """Integers that all have the hash 0."""
    prime = 2**61 - 1
    numbers = ((i * prime).to_bytes(12, "little") for i in range(count))
    return b"}(" + b"".join(b"\x8a\x0c" + number + b"N" for number in numbers) + b"u."


def global_name(module, name):
    return f"c{module}\n{name}\n".encode()


SET, ORDERED = global_name("builtins", "set"), global_name("collections", "OrderedDict")
ENCODE, BYTEARRAY = global_name("_codecs", "encode"), global_name("builtins", "bytearray")
TEXT = b"X\x00\x00\x10\x00" + b"a" * 2**20
LATIN1 = b"X\x06\x00\x00\x00latin1"
COLLIDING = colliding()[2:-2].replace(b"N\x8a", b"\x8a")
COLLIDING_PAIRS = colliding()[2:-2].replace(b"N\x8a", b"N\x86\x8a")[:-1] + b"N\x86"

ARGUMENT = r"an argument of \d+ bytes or less"
FRAME = r"a frame of \d+ bytes or less, got 1152921504606846976"
PROGRAMS = {
    "nested tuples as a key": (b"}(" + b")" + b"\x85" * 200_000 + b"Nu.", r"200 levels .*\(depth\)"),
    "nested lists": (b"]" * 20_000 + b"a" * 19_999 + END, r"200 levels .*\(depth\)"),
    "nested dicts": (b"}K\x00" * 5000 + b"}" + b"s" * 5000 + END, r"200 levels .*\(depth\)"),
    "a dict that holds itself": (dict_of_itself(), "do not hold themselves"),
    "a list that holds itself": (b"]q\x00h\x00a.", "do not hold themselves"),
    "a tuple that holds itself": (b"]q\x00h\x00\x85a.", "do not hold themselves"),
    "doubled tuples": (doubling(b")") + END, "5000000 objects"),
    "doubled tuples as a key": (b"}" + doubling(b")") + b"Ns.", "5000000 objects"),
    "doubled dicts": (
        b"}" + b"".join(b"q%c}(K\x00h%cK\x01h%cu" % (i, i, i) for i in range(60)) + END,
        "5000000 objects",
    ),
    "an index of the memo": (b"Nr\x00\x00\x00\x10.", "index of a memo"),
    "an index of the memo as text": (b"Np268435456\n.", "index of a memo"),
    "a long integer": (b"\x8b\x00\x00\x00\x7f" + b"\x01" * 99 + END, ARGUMENT),
    "a negative length": (b"\x8b\xff\xff\xff\xff.", ARGUMENT),
    "an integer of many digits": (b"L" + b"9" * 5000 + b"L\n.", "1024 bytes of an integer"),
    "an integer of many bytes": (b"\x8b\x00\x20\x00\x00" + b"\x01" * 8192 + END, "1024 bytes of an int"),
    "long bytes": (b"\x8e" + struct.pack("<Q", 2**62) + END, ARGUMENT),
    "a long text": (b"\x8d" + struct.pack("<Q", 2**40) + END, ARGUMENT),
    "a long array of bytes": (b"\x96" + struct.pack("<Q", 2**40) + END, ARGUMENT),
    "a long frame": (b"\x80\x04\x95" + struct.pack("<Q", 2**60) + b"N.", FRAME),
    "keys that collide": (colliding(), "1000 keys that are not strings or small integers"),
    "a set of keys that collide": (
        b"c__builtin__\nset\n" + colliding()[1:-2].replace(b"N\x8a", b"\x8a") + b"l\x85R.",
        "1000 keys that are not strings or small integers",
    ),
    "a slow codec": (b"c_codecs\nencode\nX\x04\x00\x00\x00aaaaX\x08\x00\x00\x00punycode\x86R.", "latin1"),
    "a slow codec of an array": (
        BYTEARRAY + b"X\x04\x00\x00\x00aaaaX\x08\x00\x00\x00punycode\x86R.", "latin1",
    ),
    "keys that collide, by a name of Python 2": (
        global_name("UserDict", "Counter") + b"](" + COLLIDING + b"e\x85R.", "1000 keys",
    ),
    "pairs whose keys collide": (ORDERED + b"](" + COLLIDING_PAIRS + b"e\x85R.", "1000 keys"),
    "attributes whose names collide": (
        ORDERED + b")R](" + COLLIDING_PAIRS + b"eb.", "a dict of attributes",
    ),
    "copies of bytes": (
        b"(" + BYTEARRAY + ENCODE + TEXT + LATIN1 + b"\x86Rq\x00\x85R"
        + (BYTEARRAY + b"h\x00\x85R") * 300 + b"t.",
        r"268435456 bytes beyond those of the file \(expansion\)",
    ),
    "copies of arguments": (
        b"(" + ENCODE + TEXT + LATIN1 + b"\x86q\x00R" + (ENCODE + b"h\x00R") * 300 + b"t.",
        r"268435456 bytes beyond those of the file \(expansion\)",
    ),
    "two gigabytes": (b"c__builtin__\nbytearray\nJ\xff\xff\xff\x7f\x85R.", "bytearray of bytes"),
    "copies of a text": (
        b"(X\x00\x00\x10\x00" + b"a" * 2**20 + b"q\x00" + b"h\x00" * 1000 + b"t.",
        r"268435456 bytes beyond those of the file \(expansion\)",
    ),
    "no end": (b"}", "STOP, got the end of the file"),
    "an empty stack": (b"0.", "a value on the stack, got none"),
    "no mark": (b"t.", "a mark on the stack, got none"),
}  # fmt: skip


@pytest.mark.parametrize("name", PROGRAMS)
@pytest.mark.parametrize("write", [as_plain, as_legacy, as_archive])
def test_pickles_that_would_exhaust_their_reader(tmp_path, name, write):
    program, message = PROGRAMS[name]
    path = tmp_path / "model.pth"
    path.write_bytes(write(program))
    with pytest.raises(ValueError, match=f"(?s)^{path}: expected .*{message}"):
        checkpoints.load(path)


def test_functions_that_walk_a_list_again_and_again(tmp_path):
    path = tmp_path / "model.pkl"
    make_set = b"c__builtin__\nset\nh\x00\x85R0"
    path.write_bytes(b"(" + b"K\x00" * 9999 + b"lq\x00" + make_set * 9999 + b"h\x00.")
    with pytest.raises(BoundError, match="at most 100000 objects, got functions that walk more"):
        checkpoints.load(path, limits=Limits(objects=100_000))


FLOATS = b"\0\0\x80\x3f" * 4


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((Storage("0", 4), 0, (2**40,), (0,)), r"268435456 bytes beyond .*\(expansion\)"),
        ((Storage("0", 4), 0, (2**62, 2**62), (0, 0)), r"268435456 bytes beyond .*\(expansion\)"),
        ((Storage("0", 4), 0, (2**62, 4), (4, 1)), r"\(expansion\)"),
        ((Storage("0", 4), 0, (100,), (1,)), "not resizable|wrong byte size"),
        ((Storage("0", 4), 100, (4,), (1,)), "not resizable|wrong byte size"),
        ((Storage("0", 4), 0, (2, 2), (2**62, 2**62)), "overflow"),
        ((Storage("0", 4), 3, (4,), (-1,)), "overflow|negative"),
        ((Storage("0", 4), -1, (4,), (1,)), "offset"),
        ((Storage("0", 4), 0, (-4,), (1,)), "sizes of a tensor that are integers from 0 on"),
        ((Storage("0", 4), 0, ("a",), (1,)), "sizes of a tensor that are integers from 0 on"),
        ((Storage("0", 4), 0, 7, 7), "a storage, an offset, sizes and strides"),
        ((Storage("0", 2**33), 0, (4,), (1,)), "does not match|wrong byte size|allocate memory"),
        ((Storage("0", -4), 0, (0,), (1,)), "incompatible|wrong byte size|egative"),
        ((Storage("1", 4), 0, (4,), (1,)), "elements of storage '1' in the file, got none"),
    ],
)
@pytest.mark.parametrize("old", [False, True])
def test_tensors_that_are_not_in_the_file(tmp_path, arguments, message, old):
    content = {"a.sampling_offsets.weight": tensor(*arguments)}
    if old:
        storages = struct.pack("<q", 4) + FLOATS
        file = as_legacy(dump(content, view=(None,)), ["0"], storages)
    else:
        file = as_archive(dump(content), {"data/0": FLOATS})
    (tmp_path / "model.pth").write_bytes(file)
    with pytest.raises(ValueError, match=f"model.pth: expected .*{message}"):
        checkpoints.load(tmp_path / "model.pth")


def test_the_builders_of_this_page_write_what_torch_reads(tmp_path):
    content = {"a.sampling_offsets.weight": tensor(Storage("0", 4), 0, (2, 2), (1, 2))}
    (tmp_path / "new.pth").write_bytes(as_archive(dump(content), {"data/0": FLOATS}))
    storages = struct.pack("<q", 4) + FLOATS
    old = as_legacy(dump(content, view=(None,)), ["0"], storages)
    (tmp_path / "old.pth").write_bytes(old)
    for name in ("new.pth", "old.pth"):
        (weight,) = checkpoints.load(tmp_path / name).state_dict.values()
        assert torch.equal(weight, torch.ones(2, 2))


# A few bytes hold a tensor of 2^16 equal elements. Whoever iterates over it makes as many tensors: 5 GB for 2^23.
REPEATED = dump(tensor(Storage("0", 4), 0, (2**16,), (0,)))[2:-1]
SMALL = dump(tensor(Storage("0", 4), 0, (4,), (1,)))[2:-1]
SPARSE = b"ctorch._utils\n_rebuild_sparse_tensor\nctorch.serialization\n_get_layout\n"
SPARSE += b"X\x10\x00\x00\x00torch.sparse_coo\x85R"
ITERATED = {
    "as a set": (SET + REPEATED + b"\x85R.", "builtins.set of a container"),
    "as arguments": (SET + REPEATED + b"R.", "a tuple of arguments"),
    "as bytes": (BYTEARRAY + REPEATED + b"\x85R.", "bytearray of bytes"),
    "as sizes": (b"ctorch\nSize\n" + REPEATED + b"\x85R.", "torch.Size of a container"),
    "as items": (ORDERED + REPEATED + b"\x85R.", "OrderedDict of a container"),
    "as a pair": (ORDERED + b"](" + REPEATED + b"e\x85R.", "pairs of a key and a value"),
    "as attributes": (ORDERED + b")R" + REPEATED + b"b.", "a dict of attributes"),
    "as attributes of a storage": (
        b"ctorch\nFloatStorage\n)\x81" + REPEATED + b"b.", "a dict of attributes",
    ),
    "as a state": (SMALL + REPEATED + b"b.", "a tuple of arguments"),
    "as the parts of a sparse tensor": (SPARSE + REPEATED + b"\x86R.", "a tuple of arguments"),
    "of another tensor": (
        SMALL + b"(" + SMALL + b"K\x00\x8a\x06\0\0\0\0\0\x01\x85K\x00\x85tb.", "a storage, an offset",
    ),
}  # fmt: skip


@pytest.mark.parametrize("name", ITERATED)
def test_tensors_that_repeat_their_elements_are_not_iterated(tmp_path, name):
    program, message = ITERATED[name]
    (tmp_path / "model.pth").write_bytes(as_archive(b"\x80\x02" + program, {"data/0": FLOATS}))
    with pytest.raises(ValueError, match=f"model.pth: expected .*{message}"):
        checkpoints.load(tmp_path / "model.pth")


@pytest.mark.parametrize("protocol", [2, 4])
def test_arrays_that_share_their_bytes(tmp_path, protocol):
    numpy = pytest.importorskip("numpy", reason="writes the arrays; reading them needs no numpy")
    function, arguments, state = numpy.zeros(2**20, numpy.uint8).__reduce__()

    class Shared:
        def __reduce__(self):
            return function, arguments, state

    path = tmp_path / "model.pkl"
    path.write_bytes(pickle.dumps([Shared() for _ in range(300)], protocol))
    with pytest.raises(BoundError, match=r"268435456 bytes beyond those of the file \(expansion\)"):
        checkpoints.load(path)
    array = numpy.zeros(2**20, numpy.uint8)  # one array with many names is one tensor
    path.write_bytes(
        pickle.dumps({f"{i}.sampling_offsets.weight": array for i in range(250)}, protocol)
    )
    assert len({tensor.data_ptr() for tensor in checkpoints.load(path).state_dict.values()}) == 1


def many_members():
    file = io.BytesIO(as_archive(b"}."))
    with zipfile.ZipFile(file, "a") as archive:
        for number in range(300):
            archive.writestr(f"archive/data/{number}", b"")
    return file.getvalue()


def twice_the_same():
    file = io.BytesIO(as_archive(b"}."))
    with zipfile.ZipFile(file, "a") as archive, pytest.warns(UserWarning, match="Duplicate"):
        archive.writestr("archive/data.pkl", b"]q\x00h\x00a.")
    return file.getvalue()


def overlapping():
    """Many members of a directory that are the same bytes of the file."""
    plain = as_archive(b"}.", {"data/0": b"\0" * 2**20})
    start = plain.rindex(b"PK\x01\x02")
    end = plain.rindex(b"PK\x05\x06")
    entry = plain[start:end]
    entries = b"".join(entry.replace(b"data/0", b"dat%03x" % i) for i in range(1024))
    directory = plain[: plain.index(b"PK\x01\x02")]
    first = plain[plain.index(b"PK\x01\x02") : start]
    record = struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 1026, 1026, len(first + entries),
                         len(directory), 0)  # fmt: skip
    return directory + first + entries + record


def as_tar():
    """A header of tar whose name begins as an old file of torch.save."""
    header = bytearray(tarfile.TarInfo("name").tobuf(tarfile.USTAR_FORMAT))
    header[: len(LEGACY[0])] = LEGACY[0]
    header[148:156] = b"%06o\0 " % (256 + sum(header[:148]) + sum(header[156:]))
    return bytes(header) + bytes(512)


ARCHIVES = {
    "members that overlap": (overlapping, r"268435456 \(expansion\) beyond the file, got 1073"),
    "a name twice": (twice_the_same, "different names .* got a name twice"),
    "bytes after the end": (lambda: as_archive(b"}.") + b"PK", "one without its end"),
    "names that differ by case": (
        lambda: as_archive(b"}.", {"data/a": b"", "data/A": b""}), "different names",
    ),
    "bytes before the beginning": (
        lambda: as_archive(b"}.", {"data/0": b"PK"}).replace(b"PK\x01\x02", b"PKPK\x01\x02", 1),
        "one without its directory",
    ),
    "a cut file": (lambda: as_archive(b"}.")[:-30], "one without its end"),
    "a directory elsewhere": (
        lambda: as_archive(b"}.")[:-6] + b"\xff\xff\xff\x7f\0\0", "one without its directory",
    ),
    "no pickle": (lambda: as_archive(b"}.").replace(b"data.pkl", b"data.pkx"), "data.pkl"),
    "torchscript": (lambda: as_archive(b"}.", {"constants.pkl": b")."}), "a TorchScript archive"),
    "tar": (as_tar, "got a tar archive"),
}  # fmt: skip


@pytest.mark.parametrize("name", ARCHIVES)
def test_archives_that_would_exhaust_their_reader(tmp_path, name):
    make, message = ARCHIVES[name]
    (tmp_path / "model.pth").write_bytes(make())
    with pytest.raises(ValueError, match=f"model.pth: expected .*{message}"):
        checkpoints.load(tmp_path / "model.pth")


def test_the_number_of_members_is_bounded(tmp_path):
    (tmp_path / "model.pth").write_bytes(many_members())
    with pytest.raises(
        BoundError, match=r"at most 200 members .*\(objects / 10\), got a directory for"
    ):
        load_torch(tmp_path / "model.pth", limits=Limits(objects=2000))
    assert load_torch(tmp_path / "model.pth") == {}


@pytest.mark.parametrize("name", ["data.pkl", "data/0"])
def test_archives_that_expand(tmp_path, name):
    path, content = tmp_path / "model.pth", b"N" * 2**17
    program = b"(" + content + b"t." if name == "data.pkl" else b"}."
    members = {} if name == "data.pkl" else {name: content}
    path.write_bytes(as_archive(program, members, zipfile.ZIP_DEFLATED))
    with pytest.raises(BoundError, match=r"model.pth: .* 65536 \(expansion\) beyond the file"):
        checkpoints.load(path, limits=Limits(expansion=2**16))
    assert len(load_torch(path)) in (0, 2**17)


def test_the_number_of_tensors_is_bounded(tmp_path):
    safetensors = pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    weights = {f"{i}.sampling_offsets.weight": torch.zeros(0) for i in range(11)}
    safetensors.save_file(weights, tmp_path / "model.safetensors")
    with pytest.raises(BoundError, match=r"at most 10 tensors \(objects / 30\), got 11"):
        checkpoints.load(tmp_path / "model.safetensors", limits=Limits(objects=300))
    assert len(checkpoints.load(tmp_path / "model.safetensors").state_dict) == 11


def test_weights_that_are_shared_too_often(tmp_path):
    weight = torch.zeros(2**18)
    weights = {f"{i}.sampling_offsets.weight": weight for i in range(300)}
    torch.save(weights, tmp_path / "model.pth")
    with pytest.raises(
        BoundError, match="model.pth: .*attention weights of at most .*got 314572800"
    ):
        checkpoints.load(tmp_path / "model.pth")
    assert checkpoints.load(tmp_path / "model.pth", limits=Limits(expansion=2**30)).entry == ""


HUGE = (Storage("0", 4), 0, (2**40,), (0,), False, collections.OrderedDict())
OTHER_SIZE = [
    tensor(Storage("0", 4), 0, (4,), (1,)),
    tensor(Storage("0", 2**40), 0, (2**40,), (0,)),
]
TYPED = torch._tensor._rebuild_from_type_v2
WRAPPED = (torch._utils._rebuild_tensor_v2, torch.Tensor, HUGE, {})
FUNCTIONS = [
    (Rebuilt(*WRAPPED, function=TYPED), "expansion"),
    (Rebuilt(TYPED, torch.Tensor, WRAPPED, {}, function=TYPED), "expansion"),
    (OTHER_SIZE, "one size of each storage, got two"),
    (Rebuilt(torch.Size((2,)), function=torch.Tensor), "with their elements, got torch.Tensor"),
    (Rebuilt(4, function=torch.FloatTensor), "with their elements, got torch.FloatTensor"),
    (Rebuilt(4, function=torch.UntypedStorage), "with their elements, got torch.storage.Untyped"),
    *(
        (Rebuilt(1, 2, 3, 4, function=function), f"with their elements, got .*{function.__name__}")
        for function in (
            torch._utils._rebuild_nested_tensor,
            torch._utils._rebuild_device_tensor_from_cpu_tensor,
            torch._utils._rebuild_wrapper_subclass,
        )
    ),
]


@pytest.mark.parametrize(("content", "message"), FUNCTIONS)
def test_functions_that_take_what_they_are_told(tmp_path, content, message):
    file = as_archive(dump({"a": content}), {"data/0": FLOATS})
    (tmp_path / "model.pth").write_bytes(file)
    with pytest.raises(ValueError, match=f"model.pth: expected .*{message}"):
        checkpoints.load(tmp_path / "model.pth")


class Shadowed:
    """An ordered dict with attributes that hide its methods."""

    def __init__(self, content):
        self.content = content

    def __reduce__(self):
        attributes = dict.fromkeys(("items", "values", "keys", "get"), 5)
        return collections.OrderedDict, (), attributes, None, iter(self.content.items())


@pytest.mark.slow
def test_attributes_that_hide_methods(tmp_path):
    state_dict = official()
    name = next(name for name in state_dict if name.endswith("sampling_offsets.weight"))
    for attribute in ("dim", "numel", "detach", "clone"):
        setattr(state_dict[name], attribute, 5)
    content = {"model": Shadowed(state_dict), "ema": Shadowed({"module": Shadowed(state_dict)})}
    torch.save(Shadowed(content), tmp_path / "model.pth")
    assert torch.load(tmp_path / "model.pth")["model"].items == 5
    checkpoint = checkpoints.load(tmp_path / "model.pth")
    modules = checkpoints.attention_modules(checkpoint, num_heads=4, num_levels=4)
    assert len(modules) == 12
    assert torch.equal(checkpoint.state_dict[name], state_dict[name])


def test_sparse_tensors_with_indices_outside(tmp_path):
    indices, values = torch.tensor([[7]]), torch.ones(1)
    wrong = torch.sparse_coo_tensor(indices, values, (2,), check_invariants=False)
    torch.save({"a.sampling_offsets.weight": wrong}, tmp_path / "model.pth")
    with pytest.raises(
        ValueError, match="model.pth: expected .* size is inconsistent with indices"
    ):
        checkpoints.load(tmp_path / "model.pth")


def test_bounds_can_be_set(tmp_path):
    nested = ()
    for _ in range(250):
        nested = (nested,)
    torch.save({"model": official(), "args": {"deep": nested}}, tmp_path / "model.pth")
    with pytest.raises(
        BoundError, match=r"at most 200 levels of nested containers \(depth\), got 201"
    ):
        checkpoints.load(tmp_path / "model.pth")
    checkpoint = checkpoints.load(tmp_path / "model.pth", limits=checkpoints.Limits(depth=300))
    assert checkpoint.entry == "model"
    limits = checkpoints.Limits(objects=4000, depth=300)
    with pytest.raises(BoundError, match="at most 4000 objects, got"):
        checkpoints.load(tmp_path / "model.pth", limits=limits)


@pytest.mark.slow
def test_files_without_an_end(tmp_path):
    # In another process, whose memory and time are limited: the fault is a read that does not return.
    code = f"""
import os, resource, signal
resource.setrlimit(resource.RLIMIT_AS, (8 << 30, 8 << 30))
signal.alarm(120)
from saccade.integrations import checkpoints
os.chdir({str(tmp_path)!r})
names = ["folder", "loop"]
for suffix in ("pth", "pkl", "safetensors"):
    names += ["pipe." + suffix, "zero." + suffix]
    os.mkfifo("pipe." + suffix)
    os.symlink("/dev/zero", "zero." + suffix)
os.mkdir("folder")
os.mkdir("folder/model.safetensors")
os.symlink("loop", "loop")
for name in names:
    try:
        checkpoints.load(name)
    except (ValueError, OSError) as error:
        print(error)
"""
    if not hasattr(os, "mkfifo"):
        pytest.skip("this system has no named pipes")
    result = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=True
    )
    folder, loop, *others = result.stdout.splitlines()
    path = os.path.join("folder", "model.safetensors")
    assert folder == f"{path} is a folder, not a file"
    assert "loop" in loop
    assert others == [
        f"{name}.{suffix} is a {kind}, not a file"
        for suffix in ("pth", "pkl", "safetensors")
        for name, kind in (("pipe", "FIFO"), ("zero", "device"))
    ]


def test_headers_of_safetensors_that_lie(tmp_path):
    pytest.importorskip("safetensors.torch", reason="safetensors is not installed")
    path = tmp_path / "model.safetensors"
    entry = b'{"a":{"dtype":"F32","shape":[1099511627776],"data_offsets":[0,4]}}'
    nested = b'{"a":' * 100_000 + b"1" + b"}" * 100_000
    for content in (
        struct.pack("<Q", 2**60) + b"{}",
        struct.pack("<Q", 10**8) + b"{}",
        struct.pack("<Q", len(entry)) + entry + b"\0" * 4,
        struct.pack("<Q", len(nested)) + nested,
    ):
        path.write_bytes(content)
        with pytest.raises(
            ValueError, match="model.safetensors: expected a file that torch.save or"
        ):
            checkpoints.load(path)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("[" * 100_000, "expected JSON, got RecursionError"),
        ("{", "expected JSON, got JSONDecodeError"),
        ("\udcff", "expected JSON, got UnicodeDecodeError"),
        ("[]", "expected a JSON object, got list"),
        (" " * 2**24 + "{}", "expected at most 16777216 bytes of JSON, got more"),
    ],
)
@pytest.mark.parametrize("name", ["config.json", "model.safetensors.index.json"])
def test_configurations_that_are_not_json(tmp_path, text, message, name):
    (tmp_path / name).write_bytes(text.encode("utf-8", "surrogateescape"))
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        checkpoints.load(tmp_path)
    with pytest.raises(ValueError, match=f"{name}: {message}"):
        read_json(tmp_path / name)


@pytest.mark.parametrize("weight_map", [[], 1, {"a": 1}, {"a": ".."}, {"a": "b\0c"}, {"a": ""}])
def test_indices_of_shards_that_name_no_files(tmp_path, weight_map):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))
    with pytest.raises(ValueError, match=r"index.json: expected names of files beside it, got"):
        checkpoints.load(tmp_path)


def test_files_are_opened_only_if_they_are_regular(tmp_path):
    with pytest.raises(FileNotFoundError):
        open_regular(tmp_path / "none")
    with pytest.raises(ValueError, match="is a folder"):
        open_regular(tmp_path)
    (tmp_path / "file").write_bytes(b"content")
    with open_regular(tmp_path / "file") as file:
        assert file.read() == b"content"
