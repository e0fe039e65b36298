import numpy as np
import pytest
from PIL import Image

from vila_m3.data.record import Message, Record, format_row, parse_row, resolve_image, to_conversation
from vila_m3_common.errors import UserError

RECORD = Record(
    "7",
    (
        Message("user", "<image> This is a CXR image.\nIs there an effusion?"),
        Message("assistant", "Let me first trigger <CXR()>."),
        Message("expert", "effusion: yes"),
        Message("assistant", "Yes, très probable."),
    ),
    ("p1/a.png",),
    {"patient": "p1"},
)


def test_a_record_survives_its_line():
    assert parse_row(format_row(RECORD)) == RECORD


def test_one_image_is_written_as_llava_does_and_several_as_a_list():
    assert RECORD.to_row()["image"] == "p1/a.png"
    several = Record("1", RECORD.messages, ("a.png", "b.png"))
    assert several.to_row()["images"] == ["a.png", "b.png"]
    assert "image" not in Record("1", RECORD.messages).to_row()


def test_feedback_that_the_model_does_not_read_stays_out_of_context():
    record = Record("1", (Message("user", "q"), Message("expert", "kept", in_context=False)))
    assert not parse_row(format_row(record)).messages[1].in_context


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ("{", "not valid JSON"),
        ("[1]", "a row is a JSON object with id and conversations, not list"),
        ('{"id": "1"}', "the row has no conversations"),
        ('{"conversations": [{"from": "doctor", "value": "x"}]}', "needs a speaker in 'from'"),
        ('{"conversations": [{"from": "human", "value": "x"}], "image": [1]}', "neither a path nor a list"),
        ('{"conversations": [{"from": "human", "value": "x"}], "metadata": 3}', "metadata is a JSON object, not int"),
    ],
)
def test_a_bad_line_is_refused_with_what_is_wrong(line, message):
    with pytest.raises(UserError, match=message):
        parse_row(line)


@pytest.mark.parametrize(
    "name", ["../../etc/passwd", "/etc/passwd", "a/../../b.png", "a\\b.png", "C:a.png", "", "a\0b"]
)
def test_an_image_name_never_leaves_its_folder(name, tmp_path):
    with pytest.raises(UserError, match="leaves the image folder"):
        resolve_image(name, tmp_path)


def test_an_image_name_never_leaves_its_folder_through_a_link(tmp_path):
    (tmp_path / "outside.png").write_bytes(b"")
    (tmp_path / "images").mkdir()
    (tmp_path / "images" / "a.png").symlink_to(tmp_path / "outside.png")
    with pytest.raises(UserError, match="through a link"):
        resolve_image("a.png", tmp_path / "images")


def test_images_go_to_the_turns_that_show_them(tmp_path):
    for name, grey in (("a.png", 10), ("b.png", 20)):
        Image.new("L", (2, 2), grey).save(tmp_path / name)
    record = Record(
        "1",
        (Message("user", "<image>q"), Message("assistant", "t"), Message("expert", "<image> r")),
        ("a.png", "b.png"),
    )
    turns = to_conversation(record, tmp_path).turns
    assert [[int(np.mean(image)) for image in turn.images] for turn in turns] == [[10], [], [20]]


def test_placeholders_must_equal_images(tmp_path):
    with pytest.raises(UserError, match="record 7 has 1 <image> placeholders for 2 images"):
        to_conversation(Record("7", RECORD.messages, ("a.png", "b.png")), tmp_path)
