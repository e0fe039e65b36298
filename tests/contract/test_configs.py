"""Every config parses, has the properties that MONAI asks for, and an expert has its hooks."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
from bundles_under_test import (
    BUNDLES,
    ROOT,
    errors_against,
    every_bundle,
    every_expert,
    is_composite,
    read_config,
    skip_opted_out,
)
from monai.bundle import ConfigParser, ConfigWorkflow, ReferenceResolver, create_workflow
from monai.utils import BundleProperty, BundlePropertyConfig

from vila_m3_common.expert import ModelCard
from vila_m3_common.hooks import quiet
from vila_m3_common.package import member_names

CONFIGS = {
    f"{name}/{path.stem}": path
    for name, bundle in BUNDLES.items()
    for path in sorted((bundle / "configs").glob("*.json"))
    if path.stem != "metadata"
}
NO_NETWORK = {
    name: "a composite wires other bundles, it has no network" for name, path in BUNDLES.items() if is_composite(path)
}
MODEL_CARDS = ROOT / "vila_m3_bundle/configs/model_cards.txt"


@pytest.fixture(scope="module")
def recorded_cards(shared: Path) -> str:
    benchmarks = json.loads((shared / "golden/data_eval/benchmarks.json").read_text())
    return benchmarks["model_list_texts"]["training_and_report"]


def open_workflow(bundle: Path, name: str, workflow_type: str, **overrides: Any) -> ConfigWorkflow:
    with quiet():
        return create_workflow(
            config_file=str(bundle / f"configs/{name}.json"),
            meta_file=str(bundle / "configs/metadata.json"),
            workflow_type=workflow_type,
            logging_file=False,
            **overrides,
        )


def problem_of(files: list[Path]) -> str | None:
    """Return why configs, each over the one before, make no whole; None when they do."""
    try:
        parser = ConfigParser()
        parser.read_config([str(file) for file in files])
        parser.parse()
    except (FileNotFoundError, KeyError, ValueError) as error:
        return str(error)
    references = {
        reference
        for text in strings_of(parser.config)
        for reference in ReferenceResolver.match_refs_pattern(text)
        if reference not in parser
    }
    missing = sorted(references) + ([] if "run" in parser else ["run"])
    return f"{', '.join(missing)} not found" if missing else None


@pytest.mark.parametrize("path", CONFIGS.values(), ids=list(CONFIGS))
def test_a_config_is_whole_alone_or_over_another(path: Path) -> None:
    """Over inference.json or train.json of its bundle, or of the bundles that a composite wires."""
    roots = [path.parents[1], *(BUNDLES[name] for name in member_names(path.parents[1]))]
    bases = [[root / "configs" / f"{name}.json"] for root in roots for name in ("inference", "train")]
    problems = {str(base): problem_of([*base, path]) for base in ([], *bases)}
    assert None in problems.values(), problems


def test_a_reference_to_nothing_is_noticed(tmp_path: Path) -> None:
    config = {"a": "@absent#b", "c": "$@a + @gone", "run": []}
    (tmp_path / "x.json").write_text(json.dumps(config))
    assert problem_of([tmp_path / "x.json"]) == "absent::b, gone not found"


@pytest.mark.parametrize("path", CONFIGS.values(), ids=list(CONFIGS))
def test_a_config_holds_no_logic(path: Path) -> None:
    texts = [text for text in strings_of(json.loads(path.read_text())) if text.startswith("$")]
    logic = re.compile(r"\blambda\b|\bfor\b|\bwhile\b|(?<!\.)\b(exec|eval|open)\(")
    assert [text for text in texts if logic.search(text)] == []


def strings_of(item: Any) -> list[str]:
    if isinstance(item, dict):
        return [text for value in item.values() for text in strings_of(value)]
    if isinstance(item, list):
        return [text for value in item for text in strings_of(value)]
    return [item] if isinstance(item, str) else []


@every_bundle
def test_the_bundle_finds_its_own_root(bundle: Path) -> None:
    parser = ConfigParser()
    parser.read_config(str(bundle / "configs/inference.json"))
    assert Path(parser.get_parsed_content("bundle_root")) == bundle
    assert "initialize" not in parser.config, "the bundle's package is not importable before run"


@every_bundle
def test_inference_has_monais_properties(bundle: Path) -> None:
    skip_opted_out(bundle, NO_NETWORK)
    workflow = open_workflow(bundle, "inference", "infer")
    assert workflow.check_properties() == []
    with quiet():
        workflow.finalize()


@every_bundle
def test_training_has_monais_properties(bundle: Path) -> None:
    """The ids are looked up and not built, which would draw the training data first."""
    skip_opted_out(bundle, NO_NETWORK)
    workflow = open_workflow(bundle, "train", "train")
    for name, rule in workflow.properties.items():
        is_required, config_id = rule[BundleProperty.REQUIRED], rule[BundlePropertyConfig.ID]
        assert not is_required or config_id in workflow.parser, f"{name} ({config_id}) is missing"
        assert is_required or workflow._check_optional_id(name, rule), f"{name} must be called {config_id}"


@every_expert
def test_an_expert_declares_its_hooks(bundle: Path) -> None:
    assert errors_against("expert_hooks_schema.json", read_config(bundle, "inference")) == []


@every_expert
def test_an_experts_card_is_the_one_that_the_weights_saw(bundle: Path, recorded_cards: str) -> None:
    fields = dict(read_config(bundle, "inference")["model_card"])
    fields.pop("_target_")
    card = ModelCard.from_config(fields)
    if f"<{card.name}(args)>" not in recorded_cards:
        pytest.skip(f"{card.name} came after the released weights; its card is added after theirs")
    assert card.render() in recorded_cards.splitlines()


def test_the_vlm_reads_the_recorded_cards(recorded_cards: str) -> None:
    assert MODEL_CARDS.read_bytes() == recorded_cards.encode()


def test_a_config_without_hooks_is_noticed() -> None:
    errors = errors_against("expert_hooks_schema.json", {"model_card": {"name": "lower"}})
    assert "$: 'expert_feedback' is a required property" in errors
    assert "$.model_card: 'overview' is a required property" in errors
    assert any(error.startswith("$.model_card.name: 'lower' does not match") for error in errors)
