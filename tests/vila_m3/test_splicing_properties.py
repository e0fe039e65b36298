"""Whatever images and texts come in whatever order: splice, pad, cache and save change nothing."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from vila_m3.answer import Answerer
from vila_m3.checkpoint import load_checkpoint
from vila_m3.configuration import IGNORED_LABEL, IMAGE_TOKEN_ID
from vila_m3.export import save_released
from vila_m3.model import VilaM3ForConditionalGeneration, build_model
from vila_m3.packing import collapse_image_places, expand_image_places, pack, splice
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation

# The fixtures hold no state that an example could change.
relaxed = settings(max_examples=25, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
tokens = st.lists(st.one_of(st.just(IMAGE_TOKEN_ID), st.integers(0, 60)), min_size=1, max_size=30)
texts = st.text(st.characters(codec="utf-8", exclude_characters="<>[]"), min_size=1, max_size=20)
parts = st.lists(st.one_of(st.integers(0, 3), texts), min_size=1, max_size=6)


@given(tokens, st.integers(1, 5))
def test_unsplicing_undoes_splicing(ids: list[int], per_image: int) -> None:
    expanded, labels = expand_image_places(ids, per_image, [IGNORED_LABEL if id_ < 0 else id_ for id_ in ids])
    assert len(expanded) == len(labels) == len(ids) + ids.count(IMAGE_TOKEN_ID) * (per_image - 1)
    assert collapse_image_places(expanded, per_image) == ids
    assert [label for label in labels if label != IGNORED_LABEL] == [id_ for id_ in ids if id_ >= 0]


@given(tokens)
def test_a_broken_run_of_places_is_noticed(ids: list[int]) -> None:
    expanded, _ = expand_image_places([*ids, IMAGE_TOKEN_ID], 4)
    with pytest.raises(ValueError, match="are no multiple of 4"):
        collapse_image_places(expanded[:-1], 4)


@relaxed
@given(ids=tokens, seed=st.integers(0, 99))
def test_features_stand_where_their_images_stood(model: Any, ids: list[int], seed: int) -> None:
    count = model.tokens_per_image
    features = torch.randn(ids.count(IMAGE_TOKEN_ID), count, 32, generator=torch.Generator().manual_seed(seed))
    expanded, _ = expand_image_places(ids, count)
    with torch.no_grad():
        spliced = iter(model.embed(torch.tensor([expanded]), features if len(features) else None)[0])
        images = iter(features)
        for token in ids:
            expected = next(images) if token == IMAGE_TOKEN_ID else model.get_input_embeddings().weight[[token]]
            torch.testing.assert_close(torch.stack([next(spliced) for _ in expected]), expected, rtol=0, atol=0)


@relaxed
@given(lengths=st.lists(st.integers(1, 12), min_size=1, max_size=5), side=st.sampled_from(["left", "right"]))
def test_a_padded_row_equals_the_row_alone(model: Any, lengths: list[int], side: str) -> None:
    torch.manual_seed(sum(lengths))
    rows = [torch.randn(length, 32) for length in lengths]
    batch = splice(rows, [torch.zeros(length, dtype=torch.long) for length in lengths], side)
    with torch.no_grad():
        logits = model(
            inputs_embeds=batch.inputs_embeds,
            attention_mask=batch.attention_mask.long(),
            position_ids=batch.position_ids,
        ).logits
        for row, mask, padded in zip(rows, batch.attention_mask, logits, strict=True):
            torch.testing.assert_close(padded[mask], model(inputs_embeds=row[None]).logits[0], rtol=0, atol=2e-5)


@given(st.lists(st.integers(1, 12), min_size=1, max_size=8))
def test_packing_loses_and_mixes_nothing(lengths: list[int]) -> None:
    rows = [torch.full((length, 3), float(index)) for index, length in enumerate(lengths)]
    labels = [torch.full((length,), index) for index, length in enumerate(lengths)]
    packed = pack(splice(rows, labels))
    assert packed.labels.shape[1] == max(lengths)
    assert int(packed.attention_mask.sum()) == sum(lengths)
    kept = packed.attention_mask
    torch.testing.assert_close(packed.inputs_embeds[kept][:, 0], packed.labels[kept].float())
    starts = (packed.position_ids == 0).sum()
    assert int(starts) == len(lengths)
    assert (packed.position_ids[~kept] == -1).all()
    assert (packed.labels[~kept] == IGNORED_LABEL).all()


def build(turn_parts: list[int | str]) -> tuple[str, list[np.ndarray]]:
    text = "".join(IMAGE_TOKEN if isinstance(part, int) else part for part in turn_parts)
    seeds = [part for part in turn_parts if isinstance(part, int)]
    return text, [np.random.default_rng(seed).integers(0, 255, (9, 7, 3), dtype=np.uint8) for seed in seeds]


@relaxed
@given(turns=st.lists(parts, min_size=1, max_size=4))
def test_cached_turns_equal_uncached_ones_token_by_token(model: Any, processor: Any, turns: list[Any]) -> None:
    cached = Answerer(model, processor, max_new_tokens=5)
    talk = Conversation()
    for turn in turns:
        talk.add("user", *build(turn))
        uncached = Answerer(model, processor, max_new_tokens=5, kept_conversations=0)
        ids = list(cached.generate(talk))
        assert ids == list(uncached.generate(talk))
        talk.add("assistant", processor.decode(ids).replace(IMAGE_TOKEN, ""))


sizes = st.sampled_from([16, 32])


@settings(max_examples=6, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    tower=st.sampled_from(["siglip_vision_model", "clip_vision_model", "intern_vit_6b"]),
    projector=st.sampled_from(["linear", "mlp2x_gelu", "mlp3x_gelu", "mlp_downsample"]),
    width=sizes,
    is_tied=st.booleans(),
    dtype=st.sampled_from([torch.float32, torch.bfloat16, torch.float16]),
)
def test_loading_undoes_saving(
    tmp_path_factory: pytest.TempPathFactory, tower: str, projector: str, width: int, is_tied: bool, dtype: torch.dtype
) -> None:
    heads = {"num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    model = build_model(
        {
            "projector_type": projector,
            "vision_feature_select": "cls_patch" if tower.startswith("siglip") else "patch",
            "text_config": {**heads, "vocab_size": 40, "hidden_size": width, "tie_word_embeddings": is_tied},
            "vision_config": {**heads, "model_type": tower, "hidden_size": width, "image_size": 28, "patch_size": 14},
        }
    ).to(dtype)
    folder: Path = tmp_path_factory.mktemp("saved")
    save_released(model, None, folder)
    loaded: VilaM3ForConditionalGeneration = load_checkpoint(folder, dtype="stored")
    assert sorted(loaded.state_dict()) == sorted(model.state_dict())
    for name, value in model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
        assert loaded.state_dict()[name].dtype == dtype
    ours, theirs = loaded.config.to_dict(), model.config.to_dict()
    for key in ("projector_type", "vision_feature_layer", "vision_feature_select", "image_aspect_ratio"):
        assert ours[key] == theirs[key]
