"""The class table: prompts of arguments, names and ids. Numbers come from the recorded table of the reference."""

import json
import re

import pytest

from vila_m3_common.errors import UserError
from vila_m3_common.expert import ModelCard
from vista3d_expert.labels import argument_ids, label_table, mapped_classes, prompt_ids, spoken_names, tumor_names


@pytest.fixture(scope="module")
def recorded(shared):
    return json.loads((shared / "golden/experts/vista3d/labels.json").read_text())


def test_table_holds_the_132_recorded_names(recorded):
    assert {name: label for label, name in label_table().names.items()} == recorded["name_to_id"]


def test_everything_prompts_the_117_recorded_classes(recorded):
    assert argument_ids("everything") == recorded["everything_labels"]


def test_groups_equal_the_recorded_groups(recorded):
    for group, members in recorded["label_groups"].items():
        if group not in ("everything", "hepatoma"):
            assert label_table().groups[group] == tuple(sorted(members.values()))


def test_accepted_prompts_are_the_recorded_ones(recorded):
    for label in recorded["label_prompt_accepted_without_points"]:
        assert prompt_ids(label)
    for label in recorded["label_prompt_rejected_without_points"]:
        with pytest.raises(UserError, match=r"cannot segment .* from a class prompt, only from points"):
            prompt_ids(label)


@pytest.mark.parametrize("argument", ["", " ", "everything"])
def test_empty_argument_means_everything(argument):
    assert len(argument_ids(argument)) == 117


@pytest.mark.parametrize("argument", ["hepatic tumor", "hepatoma", "Hepatoma", "liver mass"])
def test_hepatoma_is_another_word_for_hepatic_tumor(argument):
    assert argument_ids(argument) == [1, 26]


def test_other_words_lead_to_arguments_and_classes_that_exist_and_are_no_names_themselves():
    table = label_table()
    assert set(table.argument_synonyms.values()) <= set(table.groups)
    assert not set(table.argument_synonyms) & set(table.groups)
    assert {name for names in table.class_synonyms.values() for name in names} <= set(table.names.values())
    assert not set(table.class_synonyms) & set(table.ids_by_name())
    assert all(word == word.lower() for word in [*table.argument_synonyms, *table.class_synonyms])


def test_parent_classes_are_replaced_by_their_parts_once():
    assert prompt_ids([2]) == [14, 5]
    assert prompt_ids([20, 30]) == [28, 29, 30, 31, 32]
    assert argument_ids("lung tumor") == [28, 29, 30, 31, 32, 23]
    assert set(argument_ids("skeleton")) >= {33, 128}
    assert 21 not in argument_ids("skeleton")


def test_unknown_argument_reads_like_the_message_of_the_card():
    card = ModelCard("VISTA3D", "CT", "segmentation", "", "", tuple(label_table().groups))
    with pytest.raises(UserError) as caught:
        argument_ids("hepatic tumour")
    assert str(caught.value) == card.unknown_argument_message("hepatic tumour")


@pytest.mark.parametrize(
    ("prompt", "expected"),
    [
        (["liver", "hepatic tumor"], [1, 26]),
        ("['liver', 'hepatic tumor']", [1, 26]),
        ('["liver", 26]', [1, 26]),
        ("liver, Spleen", [1, 3]),
        ((1, 3), [1, 3]),
        (26, [26]),
        ("26", [26]),
        ("Vertebrae L5", [33]),
        ("muscles", [98, 99, 100, 101, 102, 103, 104, 105, 106, 107]),
        (["airway", "airway"], [132]),
        (["kidneys", "Gall bladder"], [14, 5, 10]),
        ("lung nodule", [28, 29, 30, 31, 32, 23]),
    ],
)
def test_label_prompt_takes_names_ids_and_groups(prompt, expected):
    assert prompt_ids(prompt) == expected


@pytest.mark.parametrize(
    ("prompt", "message"),
    [
        ("livr", "unknown VISTA3D class 'livr'; did you mean 'liver'? Valid: the names and ids (1..132)"),
        (133, "unknown VISTA3D class id 133; Valid: 1..132"),
        (0, "unknown VISTA3D class id 0"),
        ([], "label_prompt is empty"),
        ("['liver'", "is no list; write it as"),
        ([True], "unknown VISTA3D class 'True'"),
        ("liver tumor", "only from points; ask for 'hepatic tumor' (26) instead"),
        ("prostate or uterus", "only from points; ask for 'prostate' (118) instead"),
    ],
)
def test_unusable_prompt_says_what_to_give(prompt, message):
    with pytest.raises(UserError, match=re.escape(message)):
        prompt_ids(prompt)


def test_new_classes_of_a_fine_tuned_network_are_prompted_by_name_and_id():
    assert prompt_ids(["spleen lesion", "liver", 134], {"133": "spleen lesion", "134": "stent"}) == [133, 1, 134]
    with pytest.raises(UserError, match="unknown VISTA3D class id 135"):
        prompt_ids([135], {"134": "stent"})
    with pytest.raises(UserError, match=r"new class 'stent' cannot have the id '132'; free are 133 to 254"):
        prompt_ids([1], {"132": "stent"})


def test_ids_in_no_group_have_no_name_in_the_expert_turn(shared):
    glue = json.loads((shared / "golden/experts/glue/glue.json").read_text())
    recorded = {int(label): name for label, name in glue["label_id_to_name"].items() if name}
    assert spoken_names() == recorded


def test_tumors_are_named():
    assert tumor_names() == ("lung tumor", "pancreatic tumor", "hepatic tumor", "bone lesion")


def test_totalsegmentators_classes_are_mapped_as_recorded(bundle_root, shared):
    recorded = json.loads((shared / "golden/experts/glue/glue.json").read_text())["totalseg_to_vista3d_ids"]
    overlay = json.loads((bundle_root / "configs/totalsegmentator.json").read_text())
    assert dict(overlay["label_mappings"]["totalsegmentator"]) == {int(label): to for label, to in recorded.items()}
    assert mapped_classes(overlay["label_mappings"]) == sorted(recorded.values())


def test_fine_tuning_without_a_mapping_is_a_user_error():
    with pytest.raises(UserError, match=re.escape("label_mappings is empty; say which class of the data set")):
        mapped_classes({})
