import builtins
import io
import os
import pickle
import struct
import zipfile

import pytest
import torch
from xrv_files import save_released, torchxrayvision_models

from cxr_expert.pickled import MODULE_CLASSES, read_pickled_network
from vila_m3_common.errors import UserError

MAGIC = pickle.dumps(0x1950A86A20F9469CFC6C, 2) + pickle.dumps(1001, 2) + pickle.dumps({"little_endian": True}, 2)
STATE = {
    "features.conv0.weight": torch.arange(18.0).reshape(2, 1, 3, 3),
    "features.norm0.weight": torch.ones(2),
    "features.norm0.bias": torch.zeros(2),
    "features.norm0.running_mean": torch.tensor([0.5, -0.5]),
    "features.norm0.running_var": torch.tensor([1.5, 2.5]),
    "features.norm0.num_batches_tracked": torch.tensor(7),
    "features.denseblock1.denselayer1.conv1.weight": torch.full((2, 2, 1, 1), 3.0),
    "classifier.weight": torch.eye(2),
    "classifier.bias": torch.tensor([1.0, 2.0]),
}


class Call:
    """Pickles as a call of ``function`` with ``arguments``."""

    def __init__(self, function, *arguments):
        self.function, self.arguments = function, arguments

    def __reduce__(self):
        return self.function, self.arguments


def legacy_file(path, pickled, keys=()):
    path.write_bytes(MAGIC + pickled + pickle.dumps(list(keys), 2))
    return path


def zip_file(path, pickled, **extra):
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("net/data.pkl", pickled)
        for name, data in extra.items():
            archive.writestr(f"net/{name}", data)
    return path


@pytest.fixture(params=[legacy_file, zip_file], ids=["legacy", "zip"])
def write(request, tmp_path):
    return lambda pickled: request.param(tmp_path / "net.pt", pickled)


@pytest.mark.filterwarnings("ignore:Couldn't retrieve source code")
@pytest.mark.parametrize("is_legacy", [True, False], ids=["legacy", "zip"])
def test_tensors_of_a_whole_module_come_out_by_name(tmp_path, is_legacy):
    state = read_pickled_network(save_released(STATE, tmp_path / "net.pt", is_legacy))
    assert state.keys() == STATE.keys()
    assert all(torch.equal(state[name], tensor) for name, tensor in STATE.items())


@pytest.mark.parametrize("is_legacy", [True, False], ids=["legacy", "zip"])
def test_windows_on_one_storage_and_transposed_tensors_keep_their_numbers(tmp_path, is_legacy):
    whole = torch.arange(12.0).reshape(3, 4)
    state = {"whole": whole, "row": whole[1], "turned": whole.T, "empty": torch.empty(0)}
    torch.save(state, tmp_path / "net.pt", _use_new_zipfile_serialization=not is_legacy)
    read = read_pickled_network(tmp_path / "net.pt")
    assert {name: tensor.tolist() for name, tensor in read.items()} == {
        name: tensor.tolist() for name, tensor in state.items()
    }


@pytest.mark.parametrize(
    ("call", "name"),
    [
        (lambda mark: Call(os.system, f"touch {mark}"), f"{os.system.__module__}.system"),
        (lambda mark: Call(eval, f"open({str(mark)!r}, 'w')"), "__builtin__.eval"),
        (lambda mark: Call(exec, f"open({str(mark)!r}, 'w')"), "__builtin__.exec"),
        (lambda mark: Call(getattr, Call(__import__, "os"), "system"), "__builtin__.getattr"),
        (lambda mark: {"x": torch.nn.Linear(1, 1), "y": [Call(open, str(mark), "w")]}, r"\S+"),
        (lambda mark: Call(builtins.set, [Call(Call, Call(os.system, f"touch {mark}"))]), r"\S+"),
        (lambda mark: Call(torch.load, str(mark)), "torch.serialization.load"),
        (lambda mark: Call(torch.hub.load, "a", "b"), "torch.hub.load"),
    ],
    ids=["system", "eval", "exec", "getattr", "hidden in a list", "nested reduce", "torch.load", "torch.hub"],
)
def test_a_file_that_asks_for_a_call_is_refused_and_nothing_runs(write, tmp_path, call, name):
    mark = tmp_path / "ran"
    path = write(pickle.dumps(call(mark), 2))
    with pytest.raises(UserError, match=f"net.pt are refused, and nothing in them was run: it asks for {name}, which"):
        read_pickled_network(path)
    assert not mark.exists()


def test_a_call_hidden_behind_a_true_network_is_refused_before_any_tensor_comes_out(tmp_path):
    mark = tmp_path / "ran"
    with torchxrayvision_models() as models:
        network = models.DenseNet()
        network.classifier = torch.nn.Linear(2, 2)
        network.note = Call(os.system, f"touch {mark}")
        torch.save(network, tmp_path / "net.pt")
    with pytest.raises(UserError, match=r"refused, and nothing in them was run: it asks for \w+\.system"):
        read_pickled_network(tmp_path / "net.pt")
    assert not mark.exists()


@pytest.mark.parametrize(
    ("instructions", "reason"),
    [
        (b"cos\nsystem\n.", "it asks for os.system"),
        (b"(S'touch ran'\nios\nsystem\n.", "the pickle instruction STRING"),
        (b"(cos\nsystem\no.", "it asks for os.system"),
        (b"\x80\x04\x8c\x02os\x8c\x06system\x93.", "the pickle instruction SHORT_BINUNICODE"),
        (b"\x82\x01.", "the pickle instruction EXT1"),
        (
            b"ctorch.nn.modules.linear\nLinear\nccollections\nOrderedDict\n)Rb.",
            "sets the state of something",
        ),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81}X\x08\x00\x00\x00_modulesK\x05sb.", "the _modules of a .* are no"),
        (b"ctorch.nn.modules.linear\nLinear\n)\x81}X\x08\x00\x00\x00_modules}K\x05K\x06ssb.", "5 is no module"),
        (b"ctorch.nn.modules.linear\nLinear\n)R.", "it calls something that makes no tensor"),
        (b"ctorch.nn.modules.linear\nLinear\nK\x01\x85\x81.", "it makes an object that is no module"),
        (b"ccollections\nOrderedDict\n)\x81.", "it makes an object that is no module"),
        (b"ctorch._utils\n_rebuild_tensor_v2\n(K\x01K\x00))t\x86R.", "damaged or no network|makes no tensor"),
        (b"ccollections\nOrderedDict\n.", "it holds a _Name, no network"),
        (b"}.", "it holds no tensors"),
        (b"]K\x01a.", "it holds a list, no network"),
        (b"(.", "instructions are out of order"),
        (b"]}K\x01b.", "sets the state of something that is no module"),
        (b"}))s.", "sets an entry of something that is no dictionary with plain names"),
        (b")K\x01a.", "it appends to something that is no list"),
        (b"K\x01Q.", "refers to something that is neither a storage nor a class"),
    ],
)
def test_instructions_that_no_network_needs_are_refused(write, instructions, reason):
    with pytest.raises(UserError, match=reason):
        read_pickled_network(write(instructions))


def tensor_pickle(count=4, offset=0, size=(2, 2), stride=(2, 1), tail=(None,), dtype="FloatStorage"):
    """Write the pickle of ``{"a": tensor}`` by hand, so that its description may lie."""

    def number_tuple(values):
        return b"(" + b"".join(b"J" + struct.pack("<i", value) for value in values) + b"t"

    def text(value):
        return b"X" + struct.pack("<I", len(value)) + value.encode()

    view = b"".join(b"N" if part is None else text(part) for part in tail)
    storage = b"(" + text("storage") + b"ctorch\n" + dtype.encode() + b"\n" + text("0") + text("cpu")
    storage += b"J" + struct.pack("<i", count) + view + b"tQ"
    rebuilt = b"ctorch._utils\n_rebuild_tensor_v2\n(" + storage + b"J" + struct.pack("<i", offset)
    rebuilt += number_tuple(size) + number_tuple(stride) + b"\x89}tR"
    return b"}" + text("a") + rebuilt + b"s."


def test_a_tensor_written_by_hand_is_read(tmp_path):
    numbers = struct.pack("<4f", 1, 2, 3, 4)
    path = tmp_path / "net.pt"
    path.write_bytes(MAGIC + tensor_pickle() + pickle.dumps(["0"], 2) + struct.pack("<q", 4) + numbers)
    assert read_pickled_network(path)["a"].tolist() == [[1, 2], [3, 4]]
    zip_file(path, tensor_pickle(), **{"data/0": numbers})
    assert read_pickled_network(path)["a"].tolist() == [[1, 2], [3, 4]]


@pytest.mark.parametrize(
    ("lie", "reason"),
    [
        ({"size": (2, 3), "stride": (3, 1)}, "reaches beyond its storage '0'"),
        ({"offset": 1}, "reaches beyond its storage '0'"),
        ({"size": (2**30, 2**30), "stride": (0, 0)}, "reaches beyond its storage '0'"),
        ({"stride": (-2, 1)}, "with a negative size"),
        ({"offset": -1}, "with a negative size"),
        ({"count": 8}, "storage '0' has 16 bytes where 8 numbers are announced"),
        ({"count": -1}, "neither a storage nor a class"),
        ({"tail": ("view",)}, "storage '0' is a view of another"),
        ({"dtype": "Tensor"}, "it asks for torch.Tensor"),
        ({"size": (2,), "stride": (2, 1)}, "damaged or no network"),
    ],
)
def test_a_tensor_with_a_false_description_is_refused(tmp_path, lie, reason):
    path = zip_file(tmp_path / "net.pt", tensor_pickle(**lie), **{"data/0": struct.pack("<4f", 1, 2, 3, 4)})
    with pytest.raises(UserError, match=reason):
        read_pickled_network(path)


def test_a_storage_shorter_than_announced_is_refused(tmp_path):
    path = tmp_path / "net.pt"
    for count, reason in (
        (4, "has 4 bytes where 4 numbers"),
        (2**40, "has 1099511627776 numbers where 4 are announced"),
    ):
        path.write_bytes(MAGIC + tensor_pickle() + pickle.dumps(["0"], 2) + struct.pack("<q", count) + b"1234")
        with pytest.raises(UserError, match=reason):
            read_pickled_network(path)


def test_a_module_that_contains_itself_is_refused(tmp_path):
    network = torch.nn.Sequential(torch.nn.Linear(1, 1))
    network._modules["again"] = network
    torch.save(network, tmp_path / "net.pt")
    with pytest.raises(UserError, match="again. is no module of a network, or stands in it twice"):
        read_pickled_network(tmp_path / "net.pt")


def test_a_compressed_archive_is_refused(tmp_path):
    with zipfile.ZipFile(tmp_path / "net.pt", "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("net/data.pkl", b"}.")
    with pytest.raises(UserError, match="it holds compressed entries"):
        read_pickled_network(tmp_path / "net.pt")


def test_numbers_in_the_other_byte_order_are_refused(tmp_path):
    with pytest.raises(UserError, match="its numbers are not little-endian"):
        read_pickled_network(zip_file(tmp_path / "net.pt", b"}.", byteorder=b"big"))
    (tmp_path / "net.pt").write_bytes(MAGIC.replace(b"\x88", b"\x89"))
    with pytest.raises(UserError, match="its numbers are not little-endian"):
        read_pickled_network(tmp_path / "net.pt")


@pytest.mark.parametrize("content", [b"", b"<html>", b"PK\x03\x04", MAGIC, pickle.dumps({"a": 1}, 2)])
def test_a_file_of_another_kind_or_cut_short_is_explained(tmp_path, content):
    (tmp_path / "net.pt").write_bytes(content)
    with pytest.raises(UserError, match=r"weights net\.pt are (damaged|refused)"):
        read_pickled_network(tmp_path / "net.pt")


def test_every_cut_of_a_file_is_explained(tmp_path):
    whole = io.BytesIO()
    torch.save({"a": torch.ones(2)}, whole, _use_new_zipfile_serialization=False)
    path = tmp_path / "net.pt"
    for length in range(0, len(whole.getvalue()), 7):
        path.write_bytes(whole.getvalue()[:length])
        with pytest.raises(UserError, match=r"net\.pt are (damaged|refused)"):
            read_pickled_network(path)


def test_missing_file_is_explained(tmp_path):
    with pytest.raises(UserError, match="none.pt do not exist; check the path"):
        read_pickled_network(tmp_path / "none.pt")


def test_the_named_classes_are_of_two_packages_only():
    assert {name.rsplit(".", 2)[0] for name in MODULE_CLASSES} == {"torchxrayvision", "torch.nn.modules"}
