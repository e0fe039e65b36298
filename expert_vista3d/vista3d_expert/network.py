"""The nano VISTA3D, and VISTA3D's class branch in two steps: image features, class vectors.

VISTA3D (https://arxiv.org/abs/2406.05285) answers a class prompt with the inner product of an image
feature and a class vector at every voxel. Taken apart, the features are computed once per window
for any number of prompts.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from monai.networks.nets import SegResNetDS2
from monai.networks.nets.vista3d import VISTA3D, ClassMappingClassify, PointMappingSAM

# Numbers of vista3d132: rows of the class embedding, and the last class id with trained weights.
CLASS_EMBEDDINGS = 512
LAST_SUPPORTED = 132


def nano_vista3d(init_filters: int = 8, feature_size: int = 16, blocks_down: Sequence[int] = (1, 1, 2, 2)) -> VISTA3D:
    """Build MONAI's VISTA3D with a small encoder; the heads are those of ``vista3d132`` at another width.

    Args:
        init_filters: channels of the first level; each level doubles them.
        feature_size: width of image features and class vectors; a multiple of 8 (attention heads).
        blocks_down: residual blocks per level; the input must be divisible by 2 per level but one.
    """
    encoder = SegResNetDS2(
        in_channels=1,
        blocks_down=tuple(blocks_down),
        norm="instance",
        out_channels=feature_size,
        init_filters=init_filters,
        dsdepth=1,
    )
    network = VISTA3D(
        image_encoder=encoder,
        class_head=ClassMappingClassify(n_classes=CLASS_EMBEDDINGS, feature_size=feature_size, use_mlp=True),
        point_head=PointMappingSAM(
            feature_size=feature_size, n_classes=CLASS_EMBEDDINGS, last_supported=LAST_SUPPORTED
        ),
    )
    # Channels-last halves the time of small 3-D convolutions on CPUs.
    return network.to(memory_format=torch.channels_last_3d)


def image_features(network: VISTA3D, window: torch.Tensor) -> torch.Tensor:
    """Return the features that class vectors are compared with.

    Args:
        network: any VISTA3D.
        window: ``(B, 1, X, Y, Z)``, intensities scaled to 0..1.

    Returns:
        ``(B, C, X, Y, Z)``.
    """
    _, features = network.image_encoder(window, with_point=False, with_label=True)
    return network.class_head.image_post_mapping(features)


def class_vectors(network: VISTA3D, label_ids: Sequence[int]) -> torch.Tensor:
    """Return the vectors of class prompts, ``(K, C)``; a voxel's logit is vector . feature."""
    head = network.class_head
    device = head.class_embeddings.weight.device
    embedding = head.class_embeddings(torch.tensor(list(label_ids), device=device)[:, None])
    if head.use_mlp:
        embedding = head.mlp(embedding)
    return embedding[:, 0]
