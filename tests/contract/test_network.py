"""The network takes and gives what metadata.json says, and can be exported where TorchScript allows."""

from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from bundles_under_test import BUNDLES, every_bundle, every_expert, is_composite, read_config, skip_opted_out
from monai.bundle import ckpt_export, verify_net_in_out
from safetensors.torch import load_file

from vila_m3_common.hooks import quiet

COMPOSITES = {name: "a composite has no network of its own" for name, path in BUNDLES.items() if is_composite(path)}
NO_SINGLE_TENSOR = {
    **COMPOSITES,
    "vila_m3_bundle": "the network takes token ids and images, and MONAI's check gives one image tensor",
}
NO_TORCHSCRIPT = {
    **COMPOSITES,
    "vila_m3_bundle": "transformers' language models are not scriptable",
}
# Exported by tracing: scripting fails for the reason given.
TRACED = {
    "expert_cxr": "the ensemble looks its members up by name, which TorchScript cannot express",
    "expert_vista3d": "MONAI's VISTA3D takes **kwargs, which TorchScript cannot express",
}


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@every_bundle
def test_the_network_keeps_the_stated_data_format(bundle: Path) -> None:
    skip_opted_out(bundle, NO_SINGLE_TENSOR)
    with quiet():
        verify_net_in_out(
            net_id="network_def",
            meta_file=str(bundle / "configs/metadata.json"),
            config_file=str(bundle / "configs/inference.json"),
            device="cpu",
        )


@every_expert
def test_the_channels_are_all_described(bundle: Path) -> None:
    formats = read_config(bundle, "metadata")["network_data_format"]
    for side in ("inputs", "outputs"):
        for name, value in formats[side].items():
            # A segmentation is one channel of label ids, and channel_def names the ids.
            if "num_channels" in value and value["format"] != "segmentation":
                expected = [str(index) for index in range(value["num_channels"])]
                assert list(value["channel_def"]) == expected, f"{side} {name}"


@every_bundle
def test_the_checkpoint_is_exported_as_torchscript(bundle: Path, tmp_path: Path) -> None:
    skip_opted_out(bundle, NO_TORCHSCRIPT)
    torch.save(load_file(bundle / "models/model.safetensors"), tmp_path / "model.pt")
    with quiet():
        ckpt_export(
            net_id="network_def",
            filepath=str(tmp_path / "model.ts"),
            ckpt_file=str(tmp_path / "model.pt"),
            meta_file=str(bundle / "configs/metadata.json"),
            config_file=str(bundle / "configs/inference.json"),
            bundle_root=str(bundle),
            use_trace=bundle.name in TRACED,
        )
    assert torch.jit.load(tmp_path / "model.ts") is not None
