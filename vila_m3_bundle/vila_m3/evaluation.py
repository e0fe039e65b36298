"""Held-out evaluation on phantom conversations: is every reply word for word right, given what came before?"""

from __future__ import annotations

import json
from collections import defaultdict
from pathlib import Path

import torch
from tqdm import tqdm

from vila_m3_common.standalone import make_output_dir

from .model import VilaM3ForConditionalGeneration
from .phantom_conversations import ConversationMaker
from .processor import Encoded, VilaM3Processor
from .training import collate, prepare_batch, supervised_runs, tokens_right


@torch.inference_mode()
def evaluate_replies(
    model: VilaM3ForConditionalGeneration,
    processor: VilaM3Processor,
    maker: ConversationMaker,
    count: int,
    output_dir: str,
    first_seed: int = 0,
) -> dict[str, dict[str, float]]:
    """Score the replies of ``count`` conversations and write ``metrics.json``.

    A reply counts when greedy decoding would give exactly it, after the true earlier turns. The first reply of
    a conversation shows whether the right expert is triggered with the right argument.

    Args:
        model: the VLM.
        processor: its processor.
        maker: makes conversations from seeds.
        count: number of conversations.
        output_dir: folder of ``metrics.json``.
        first_seed: seed of the first conversation.

    Returns:
        For each modality and kind of first question: ``first_reply``, ``all_replies`` (0..1) and ``count``.
    """
    tallies: dict[str, list[tuple[bool, int, int]]] = defaultdict(list)
    for seed in tqdm(range(first_seed, first_seed + count), desc="evaluating"):
        sample = maker(seed)
        right = _replies_right(model, processor.encode(sample.conversation), sorted(processor.stop_ids))
        tallies[f"{sample.modality}: {sample.kind}"].append((right[0], sum(right), len(right)))
        tallies["all"].append((right[0], sum(right), len(right)))
    metrics = {name: _summary(rows) for name, rows in sorted(tallies.items())}
    folder = make_output_dir(output_dir)
    (folder / "metrics.json").write_text(json.dumps(metrics, indent=2))
    _print_table(metrics, folder)
    return metrics


def _replies_right(model: VilaM3ForConditionalGeneration, encoded: Encoded, stop_ids: list[int]) -> list[bool]:
    inputs, labels, _, keywords = prepare_batch(collate([encoded]), model.device)
    targets = labels[0, 1:]
    is_right = tokens_right(model(inputs, **keywords).logits[0, :-1].argmax(-1), targets, stop_ids)
    return [bool(is_right[start:end].all()) for start, end in supervised_runs(targets)]


def _summary(rows: list[tuple[bool, int, int]]) -> dict[str, float]:
    return {
        "first_reply": sum(first for first, _, _ in rows) / len(rows),
        "all_replies": sum(right for _, right, _ in rows) / sum(total for _, _, total in rows),
        "count": len(rows),
    }


def _print_table(metrics: dict[str, dict[str, float]], folder: Path) -> None:
    for name, row in metrics.items():
        print(f"{name:24} first reply {row['first_reply']:.3f}  all replies {row['all_replies']:.3f}  n {row['count']}")
    print(f"written to {folder / 'metrics.json'}")
