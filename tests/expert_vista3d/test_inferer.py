"""Windows, blending and the label map, checked against MONAI's sliding window and its whole VISTA3D."""

import pytest
import torch
from monai.data import MetaTensor
from monai.inferers import sliding_window_inference

from vista3d_expert.inferer import PromptInferer, best_labels, project, window_starts
from vista3d_expert.labels import argument_ids
from vista3d_expert.network import class_vectors, image_features

LABELS = [1, 3, 26, 33, 118]


@pytest.fixture(scope="module")
def volume():
    return torch.rand(1, 1, 22, 16, 29, generator=torch.Generator().manual_seed(1))


def reference_labels(network, volume, roi, overlap, mode):
    """Blend the logits of every class, as MONAI does, then take the largest positive one."""

    def predict(window):
        prompts = torch.tensor(LABELS)[:, None].repeat(1, 1)
        return network(window, class_vector=prompts, transpose=True)

    with torch.no_grad():
        logits = sliding_window_inference(
            volume, roi, 1, predict, overlap=overlap, mode=mode, padding_mode="replicate"
        )[0]
    best, index = logits.max(dim=0)
    return torch.where(best > 0, torch.tensor(LABELS)[index], 0)


@pytest.mark.parametrize("mode", ["constant", "gaussian"])
@pytest.mark.parametrize(("roi", "overlap"), [((12, 12, 12), 0.25), ((8, 16, 12), 0.3), ((24, 24, 32), 0.25)])
def test_label_map_is_that_of_blended_logits(network, volume, roi, overlap, mode):
    inferer = PromptInferer(roi, overlap, mode, sw_batch_size=2)
    labels = inferer(volume, network, label_ids=LABELS)
    expected = reference_labels(network, volume, roi, overlap, mode)
    assert labels.dtype == torch.uint8
    assert labels.shape == volume.shape
    # a handful of voxels may lie within rounding of two classes or of the threshold
    assert (labels[0, 0] != expected).float().mean() < 1e-3
    assert len(torch.unique(labels)) > 2


def test_logits_from_features_and_vectors_are_those_of_the_network(network):
    window = torch.rand(1, 1, 8, 8, 8)
    with torch.no_grad():
        whole = network(window, class_vector=torch.tensor(LABELS)[:, None])
        parts = torch.einsum("kc,bcxyz->kbxyz", class_vectors(network, LABELS), image_features(network, window))
    torch.testing.assert_close(parts, whole, atol=1e-4, rtol=1e-4)


def test_without_prompts_everything_is_segmented(network, volume):
    """MONAI Label's stock app calls an inferer with the image and the network only."""
    inferer = PromptInferer((24, 24, 32))
    assert torch.equal(inferer(volume, network), inferer(volume, network, label_ids=argument_ids("everything")))


def test_single_prompt_works(network, volume):
    labels = PromptInferer((12, 12, 12))(volume, network, label_ids=[3])
    assert set(torch.unique(labels).tolist()) <= {0, 3}


def test_larger_overlap_changes_the_windows():
    assert window_starts(127, 64, 0.25) == [0, 48, 63]
    assert window_starts(127, 64, 0.3) == [0, 44, 63]


@pytest.mark.parametrize(("size", "roi", "starts"), [(64, 64, [0]), (30, 64, [0]), (112, 64, [0, 48])])
def test_last_window_ends_at_the_border(size, roi, starts):
    assert window_starts(size, roi, 0.25) == starts


def test_label_map_keeps_the_metadata_of_the_image(network):
    image = MetaTensor(torch.rand(1, 1, 8, 8, 8), affine=torch.diag(torch.tensor([3.0, 3, 3, 1]))[None])
    labels = PromptInferer((8, 8, 8))(image, network, label_ids=[1])
    assert isinstance(labels, MetaTensor)
    assert labels.affine[0, 0, 0] == 3


def test_background_where_no_logit_is_positive():
    features = torch.tensor([[[1.0, -1.0, 2.0]], [[-1.0, -1.0, 3.0]]])
    logits = project(features, torch.tensor([[1.0, 0.0], [0.0, 1.0]]))
    labels = best_labels(logits, torch.tensor([7, 9], dtype=torch.uint8))
    assert labels.tolist() == [[7, 0, 9]]


def test_network_is_run_once_per_window_whatever_the_number_of_classes(network, volume, monkeypatch):
    calls = []
    encoder = network.image_encoder.forward
    monkeypatch.setattr(
        network.image_encoder, "forward", lambda *args, **kw: (calls.append(1), encoder(*args, **kw))[1]
    )
    PromptInferer((12, 16, 16), overlap=0.25)(volume, network, label_ids=list(range(22, 118)))
    assert len(calls) == 3 * 1 * 3


def test_impossible_overlap_is_refused():
    with pytest.raises(ValueError, match="overlap is 1; it must be at least 0 and below 1"):
        PromptInferer((8, 8, 8), overlap=1)
