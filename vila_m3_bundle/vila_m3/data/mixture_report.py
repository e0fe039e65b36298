"""What a mixture is made of: a table and a bar chart."""

from __future__ import annotations

import csv
import random
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from vila_m3_common.chat_template import render
from vila_m3_common.conversation import IMAGE_TOKEN, Conversation
from vila_m3_common.errors import UserError

from ..configuration import IGNORED_LABEL
from ..processor import VilaM3Processor
from .mixture import DataSet, Mixture
from .record import Record

# Stands for any picture: tokens depend on how many there are, not on what they show.
_PICTURE = np.zeros((1, 1, 3), np.uint8)


def count_tokens(record: Record, processor: VilaM3Processor) -> tuple[int, int]:
    """Return tokens and supervised tokens of a record without reading its images."""
    conversation = Conversation()
    for message in record.messages:
        pictures = [_PICTURE] * message.text.count(IMAGE_TOKEN)
        conversation.add(message.role, message.text, pictures, message.in_context)
    _, labels = processor.encode_text(render(conversation, processor.template))
    return len(labels), sum(label != IGNORED_LABEL for label in labels)


def describe_mixture(mixture: Mixture, processor: VilaM3Processor, max_rows: int = 2000) -> list[dict[str, Any]]:
    """Return one row per data set.

    Args:
        mixture: the mixture.
        processor: counts tokens as the model reads them.
        max_rows: rows of a data set that are counted; of a larger one, a seeded draw is, and scaled up.

    Returns:
        ``data_set``, ``items`` (rows), ``repeats``, ``shown`` (rows an epoch shows), and of those ``images``,
        ``tokens``, ``supervised_tokens`` and ``share`` of all tokens.
    """
    quotas = mixture.quotas or [len(part) * mixture.repeats_of(part) for part in mixture.data_sets]
    rows = [
        _describe(data_set, mixture.repeats_of(data_set), shown, processor, max_rows)
        for data_set, shown in zip(mixture.data_sets, quotas, strict=True)
    ]
    total = sum(row["tokens"] for row in rows)
    return [{**row, "share": row["tokens"] / total if total else 0.0} for row in rows]


def _describe(data_set: DataSet, repeats: int, shown: int, processor: VilaM3Processor, max_rows: int) -> dict[str, Any]:
    count = len(data_set)
    counted = range(count) if count <= max_rows else sorted(random.Random(0).sample(range(count), max_rows))
    sums = np.zeros(3)
    for index in tqdm(counted, desc=data_set.name, unit="row"):
        record = data_set[index]
        sums += (record.placeholder_count, *count_tokens(record, processor))
    images, tokens, supervised = (round(float(value)) for value in sums * shown / max(1, len(counted)))
    told = {"data_set": data_set.name, "items": count, "repeats": repeats, "shown": shown}
    return {**told, "images": images, "tokens": tokens, "supervised_tokens": supervised}


def draw_shares(rows: Sequence[Mapping[str, Any]], path: Path) -> None:
    """Draw each data set's share of items shown, tokens and supervised tokens as bars."""
    from matplotlib.figure import Figure  # slow to import, and only a report needs it

    figure = Figure(figsize=(8, 1 + 0.6 * len(rows)), layout="constrained")
    axes = figure.subplots()
    for number, key in enumerate(("shown", "tokens", "supervised_tokens")):
        total = sum(row[key] for row in rows) or 1
        places = np.arange(len(rows)) + (number - 1) * 0.27
        axes.barh(places, [100 * row[key] / total for row in rows], height=0.25, label=key.replace("_", " "))
    axes.set_yticks(range(len(rows)), [row["data_set"] for row in rows])
    axes.invert_yaxis()
    axes.set_xlabel("share of an epoch in %")
    axes.legend()
    figure.savefig(path, dpi=120)


def report_mixture(mixture: Mixture, processor: VilaM3Processor, output_dir: str, max_rows: int = 2000) -> None:
    """Print the table of a mixture; write it as ``mixture.csv`` and draw it as ``mixture.png``.

    Raises:
        UserError: if matplotlib is not installed.
    """
    folder = Path(output_dir)
    folder.mkdir(parents=True, exist_ok=True)
    rows = describe_mixture(mixture, processor, max_rows)
    with (folder / "mixture.csv").open("w", newline="", encoding="utf-8") as file:
        writer = csv.DictWriter(file, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)
    print(f"| {' | '.join(rows[0])} |\n|{' --- |' * len(rows[0])}")
    for row in rows:
        print(f"| {' | '.join(f'{value:.1%}' if key == 'share' else str(value) for key, value in row.items())} |")
    for name in mixture.skipped:
        print(f"{name}: left out, its files are missing")
    try:
        draw_shares(rows, folder / "mixture.png")
    except ImportError as error:
        raise UserError("the chart needs matplotlib; install it, the table is written") from error
