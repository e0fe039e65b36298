import pickle
from pathlib import Path

import pytest
import torch

from vila_m3_common.errors import UserError
from vila_m3_common.weights import load_weights, read_state_dict, save_weights


class RunsCode:
    """What a hostile pickle holds: loading it would call a function."""

    def __reduce__(self):
        return (print, ("code was run",))


def network(width: int = 3) -> torch.nn.Module:
    return torch.nn.Sequential(torch.nn.Linear(2, width), torch.nn.Linear(width, 1))


def test_weights_come_back_as_they_were_saved(tmp_path: Path) -> None:
    saved = network()
    path = save_weights(saved, tmp_path / "models/model.safetensors")
    loaded = load_weights(network().train(), path)
    assert not loaded.training
    for key, value in saved.state_dict().items():
        torch.testing.assert_close(loaded.state_dict()[key], value)


@pytest.mark.parametrize("wrapper", [None, "model", "state_dict"])
def test_state_dicts_are_found_inside_a_training_checkpoint(wrapper: str | None, tmp_path: Path) -> None:
    state = network().state_dict()
    torch.save({wrapper: state, "epoch": 3} if wrapper else state, tmp_path / "model.pt")
    assert list(read_state_dict(tmp_path / "model.pt")) == list(state)


def test_without_a_checkpoint_the_initial_weights_stay() -> None:
    module = network()
    assert load_weights(module, None) is module


def test_a_missing_file_is_refused_with_the_command_that_fetches_it(tmp_path: Path) -> None:
    with pytest.raises(
        UserError, match="models/x.pt do not exist; get them with `python -m monai.bundle download_large_files"
    ):
        read_state_dict(tmp_path / "models/x.pt")


@pytest.mark.parametrize("name", ["x.safetensors", "x.pt"])
def test_a_damaged_file_is_refused(name: str, tmp_path: Path) -> None:
    (tmp_path / name).write_bytes(b"\x01\x02damaged" * 20)
    with pytest.raises(UserError, match=f"weights .*{name} are damaged"):
        read_state_dict(tmp_path / name)


@pytest.mark.parametrize("write", [torch.save, lambda value, path: path.write_bytes(pickle.dumps(value))])
def test_a_pickle_that_would_run_code_is_refused(write, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    write({"model": RunsCode()}, tmp_path / "x.pt")
    with pytest.raises(UserError, match="are damaged or no state dict"):
        read_state_dict(tmp_path / "x.pt")
    assert "code was run" not in capsys.readouterr().out


def test_weights_of_another_network_are_refused_by_name_and_shape(tmp_path: Path) -> None:
    path = save_weights(network(width=4), tmp_path / "x.safetensors")
    with pytest.raises(UserError, match=r"do not fit the network: 0.weight is \(4, 2\), needed \(3, 2\); .*1.weight"):
        load_weights(network(), path)
    path = save_weights(torch.nn.Linear(2, 3), tmp_path / "y.safetensors")
    with pytest.raises(UserError, match="missing 0.weight; .*unexpected bias; and 1 more"):
        load_weights(network(), path)


def test_a_checkpoint_without_a_state_dict_is_refused(tmp_path: Path) -> None:
    for content in ([1, 2], {"epoch": 3}):
        torch.save(content, tmp_path / "x.pt")
        with pytest.raises(UserError, match=r"x.pt hold no state dict \(tensors by name\); give another checkpoint"):
            load_weights(network(), tmp_path / "x.pt")
