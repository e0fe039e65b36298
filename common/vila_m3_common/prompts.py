"""The conversation formats that the released VILA-M3 weights were trained on, byte for byte.

Data preparation, training, serving and evaluation all call these functions. ``trained`` is the form
of the instruction data, ``served`` that of the reference's demonstration server, which differs in
small ways; it is kept so that the difference can be measured.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from typing import Any, Literal, get_args

Variant = Literal["trained", "served"]

# Order of the heads of TorchXRayVision's networks.
CXR_FINDINGS = (
    "Atelectasis",
    "Consolidation",
    "Infiltration",
    "Pneumothorax",
    "Edema",
    "Emphysema",
    "Fibrosis",
    "Effusion",
    "Pneumonia",
    "Pleural_Thickening",
    "Cardiomegaly",
    "Nodule",
    "Mass",
    "Hernia",
    "Lung Lesion",
    "Fracture",
    "Lung Opacity",
    "Enlarged Cardiomediastinum",
)

# Order of the lines in the trained expert turns: the reference's ensemble lists a finding when the first network
# that votes on it has run, and on pneumothorax only the last one votes.
CXR_TRAINED_ORDER = (*(name for name in CXR_FINDINGS if name != "Pneumothorax"), "Pneumothorax")

BRATS_LABELS = (1, 2, 4)


def spoken(name: str) -> str:
    """Return a finding or structure as texts spell it: ``Pleural_Thickening`` -> ``pleural thickening``."""
    return name.lower().replace("_", " ")


def prediction(finding: str, word: str) -> str:
    """Return what the chest X-ray expert's turn says of one finding (``edema: yes``), without the line's end."""
    return f"{spoken(finding)}: {word}"


def opening(modality: str, question: str, cards: str, variant: Variant = "trained") -> str:
    """Return the first user turn of a study, with the model cards before it.

    Args:
        modality: ``CXR``, ``CT``, ``MRI`` (four sequences: T1c, T1, T2, FLAIR), ``single MRI`` or
            ``unknown``; the last two are forms of this project, for images that no trained form fits.
        question: the user's question, already neutralised.
        cards: the text of the model cards.
        variant: see the module's docstring.
    """
    forms = {
        "CXR": ("<image> This is a CXR image.", "<image>This is a CXR image."),
        "CT": (" <image>This is a CT image.", "<image>This is a CT image."),
        "MRI": (_MRI_OPENING, _MRI_OPENING),
        "single MRI": (" <image>This is a single MRI sequence.", "<image>This is a single MRI sequence."),
        "unknown": (" <image>This is a medical image.", "<image>This is a medical image."),
    }
    trained, served = forms[modality]
    return f"{cards}{trained if variant == 'trained' else served}\n{question}"


_MRI_OPENING = (
    "T1(contrast enhanced): <image>, T1: <image>, T2: <image>, FLAIR: <image> These are different MRI modalities."
)


def ct_feedback(color_names: Mapping[str, str] | Sequence[tuple[str, str]], question: str, variant: Variant) -> str:
    """Return the expert turn of a CT segmentation.

    Args:
        color_names: (colour, structure) in the order of the label ids present in the slice.
        question: the user's question.
        variant: the served form has no final stop.
    """
    pairs = color_names.items() if isinstance(color_names, Mapping) else color_names
    described = ", ".join(f"{color}: {name}" for color, name in pairs)
    return f"The results are <image>. The colors in this image describe {described}. {_respond(question, variant)}"


def brats_feedback(labels: Sequence[int], colors: Mapping[int, str], question: str, variant: Variant) -> str:
    """Return the expert turn of a brain tumour segmentation.

    The trained form always names all three regions; a slice that lacks label 1, 2 or 4 gets the served
    text, which names only what is there.

    Args:
        labels: label ids present in the slice (1 necrotic core, 2 oedema, 4 enhancing tumour).
        colors: label id -> colour name in the overlay.
        question: the user's question.
        variant: see the module's docstring.
    """
    if variant == "trained" and set(BRATS_LABELS) <= set(labels):
        described = "yellow and red: tumor core, only yellow: enhancing tumor, all colors: whole tumor\n"
    else:
        described = _describe_regions(labels, colors)
    return f"The results are <image>. The colors in this image describe\n{described}{_respond(question, variant)}"


def _describe_regions(labels: Sequence[int], colors: Mapping[int, str]) -> str:
    regions = []
    if 1 in labels and 4 in labels:
        regions.append(f"{colors[1]} and {colors[4]}: tumor core")
    if 4 in labels:
        regions.append(f"only {colors[4]}: enhancing tumor")
    if set(labels) & set(BRATS_LABELS):
        regions.append("all colors: whole tumor")
    return ", ".join(regions) + "\n" if regions else ""


def cxr_feedback(scores: Mapping[str, float], question: str, variant: Variant, uncertain: Collection[str] = ()) -> str:
    """Return the expert turn of the chest X-ray classification.

    Args:
        scores: finding -> mean probability. The trained form keeps this order and says yes above 0.5;
            the served form sorts by name and says yes from 0.5 on.
        question: the user's question.
        variant: see the module's docstring.
        uncertain: findings that are called so in place of yes or no. The released weights never saw the word; name
            findings here only for a model that was trained on it.
    """
    is_trained = variant == "trained"
    findings = list(scores) if is_trained else sorted(scores)
    words = {name: "yes" if _is_positive(scores[name], is_trained) else "no" for name in findings}
    words.update(dict.fromkeys(set(uncertain) & words.keys(), "uncertain"))
    lines = "".join(f"{prediction(name, word)}\n" for name, word in words.items())
    if is_trained:
        instruction = (
            " Analyze the image and take these predictions into account when responding to this prompt:\n" + question
        )
    else:
        instruction = _respond(question, variant)
    return f"The resulting predictions are:\n{lines}.{instruction}"


def _is_positive(score: float, is_trained: bool) -> bool:
    return score > 0.5 if is_trained else score >= 0.5


def _respond(question: str, variant: Variant) -> str:
    stop = "." if variant == "trained" else ""
    return f"Use this result to respond to this prompt:\n{question}{stop}"


# More structures would fill the context (`everything` names 117).
MAX_MEASURED_STRUCTURES = 12


def add_measurements(text: str, measurements: Sequence[Mapping[str, Any]], question: str) -> str:
    """Return an expert turn with the measurements before its closing instruction.

    No released weights were trained on such text; it is for models that reason over numbers.

    Args:
        text: an expert turn that ends with the question, as the functions above make it.
        measurements: rows of :func:`vila_m3_common.measure.measure_labels`; the first
            ``MAX_MEASURED_STRUCTURES`` by volume are told, without rows the text stays as it is.
        question: the user's question.
    """
    endings = [_respond(question, variant) for variant in get_args(Variant)]
    ending = next((ending for ending in endings if text.endswith(ending)), "")
    if not measurements or not ending:
        return text
    largest = sorted(measurements, key=lambda row: -row.get("volume_ml", 0.0))[:MAX_MEASURED_STRUCTURES]
    told = "; ".join(_measurement_text(row) for row in largest)
    left_out = len(measurements) - len(largest)
    more = f"; and {left_out} smaller structures" if left_out else ""
    return f"{text.removesuffix(ending)}Measurements: {told}{more}. {ending}"


def _measurement_text(row: Mapping[str, Any]) -> str:
    """Tell what a row holds; experts of other makers may measure less."""
    parts = [row["name"]]
    if "volume_ml" in row:
        parts.append(f"{row['volume_ml']:g} mL")
    if row.get("component_count", 1) > 1:
        parts.append(f"{row['component_count']} separate parts")
    if "longest_diameter_mm" in row:
        perpendicular = f" x {row['perpendicular_diameter_mm']:g}" if "perpendicular_diameter_mm" in row else ""
        parts.append(f"longest {row['longest_diameter_mm']:g}{perpendicular} mm")
    if "mean_hu" in row:
        parts.append(f"mean {row['mean_hu']:g} HU")
    if "side" in row:
        parts.append("both sides" if row["side"] == "both" else f"{row['side']} side")
    return ", ".join(parts)


def not_available(name: str, available: Sequence[str]) -> str:
    """Return the expert turn for a card without a bundle (``<VISTA2D()>`` stands in the trained cards)."""
    return f"The expert {name} is not available. Available experts: {', '.join(available) or 'none'}."


def expert_error(name: str, reason: str, question: str) -> str:
    """Return the expert turn for a call that could not be carried out."""
    return f"The expert {name} could not be run: {reason}. Respond to this prompt without its result:\n{question}"


def trigger_reply(modality: str, argument: str = "") -> str:
    """Return the assistant turn that asks an expert for evidence, as trained."""
    return {
        "CXR": "This looks like an chest x-ray. Let me first trigger <CXR()>.",
        "CT": f"This looks like a CT image. Let me trigger <VISTA3D({argument})>. ",
        "MRI": "This looks like an MRI image sequence. Let me first trigger <BRATS()>.",
    }[modality]


BRATS_REPORT = "I segmented any brain tumors using <BRATS()>."
BRATS_REPORTED = "All tumors were segmented"


def ct_report(verb: str, structures: str, argument: str) -> str:
    """Return the assistant turn that reports a CT segmentation ("I outlined the organs using <VISTA3D(organs)>.")."""
    return f"I {verb} {structures} using <VISTA3D({argument})>."


# The reference's evaluation asks in forms of its own, which differ from the trained ones in small ways.
FINDING_FORMS = ("multi_choice", "binary", "binary_conv", "text_only")
EXPERT_FORMS = ("binary_conv", "text_only")
WHICH_FINDINGS = "What are the potential abnormalities according to the provided X-ray image?"


def is_there(finding: str) -> str:
    """Return the question whether a finding is present, as the reference's evaluation asks it."""
    return f"is there {finding.lower()} according to the provided X-ray image?"


def finding_lines(scores: Mapping[str, float], starts_with_blank: bool = True) -> str:
    """Return an expert's findings as the reference's evaluation tells them: in the order given, yes above 0.5.

    Args:
        scores: finding -> mean probability.
        starts_with_blank: as in classification; the lines of report generation start without.
    """
    blank = " " if starts_with_blank else ""
    return "".join(f"{blank}{prediction(name, 'yes' if score > 0.5 else 'no')}\n" for name, score in scores.items())


def finding_turns(
    form: str, findings: Sequence[str], finding: str, lines: str = "", cards: str = ""
) -> tuple[str, ...]:
    """Return the turns (user, assistant, expert, in turn) that ask for findings in a chest X-ray.

    Args:
        form: one of ``FINDING_FORMS``; those of ``EXPERT_FORMS`` need an expert.
        findings: names in the order of their letters, for ``multi_choice``.
        finding: the name that the other forms ask for.
        lines: :func:`finding_lines` of the expert; empty without one.
        cards: text of the model cards, for ``binary_conv``.
    """
    if form == "multi_choice":
        return (_multi_choice(findings, lines),)
    name = finding.lower()
    told = "The following is a question about findings in"
    if form == "binary":
        if not lines:
            asked = "chest X-ray in the frontal view. Please reply with yes or no."
            return (f"<image>\n{told} {asked}\nQuestion: {is_there(name)}\n",)
        return (f"<image>\n{told} {_INCORPORATE}{lines}Question: {is_there(name)}\nPlease reply with yes or no.\n",)
    if form == "text_only":
        asked = (
            "a chest X-ray in the frontal view. When answering the question, please incorporate the results generated"
        )
        question = f"Question: is there {name} according to the results?\nPlease reply with yes or no.\n"
        return (f"{told} {asked} by an expert classification model:\n{lines}{question}",)
    question = f"Question: is there {name} according to the image?\n Please reply with yes or no.\n"
    # The cards of this form lack one blank.
    spelled = cards.replace("'hepatic tumor', 'pancreatic tumor'", "'hepatic tumor','pancreatic tumor'")
    return (
        opening("CXR", question, spelled),
        "This looks like a chest x-ray. Let me first trigger <CXR()>.",
        f"The resulting predictions are:\n{lines}{_ANALYZE}{question}",
    )


_INCORPORATE = (
    "chest X-ray in the frontal view. When answering the question, please analyze the image and incorporate the "
    "additional results generated by an expert classification model:\n"
)
_ANALYZE = "Analyze the image and take these predictions into account when responding to this prompt.\n"


def _multi_choice(findings: Sequence[str], lines: str) -> str:
    told = "<image>\nThe following is a multiple-choice question about findings in"
    reply = "Please reply with the corresponding answer choice letter(s).\n"
    names = [*findings, "None of the Above"]
    options = "".join(
        f"({chr(ord('A') + place)}) {name.lower() if lines else name}\n" for place, name in enumerate(names)
    )
    asked = f"Question: {WHICH_FINDINGS}\n{options}"
    if not lines:
        return f"{told} chest X-ray in the frontal view. {reply}{asked}"
    return f"{told} {_INCORPORATE}{lines}{asked}{reply}"


def report_turns(question: str, scores: Mapping[str, float], cards: str) -> tuple[str, ...]:
    """Return the turns of the reference's report generation with the expert; without, the question is asked alone."""
    lines = finding_lines(scores, starts_with_blank=False)
    feedback = f"The resulting predictions are:\n{lines}. {_ANALYZE}{question}"
    return opening("CXR", question, cards), trigger_reply("CXR"), feedback


MRI_DESCRIPTION = "This is a brain MRI scan."


def glioma_grade(is_low: bool) -> str:
    """Return the assistant turn that tells the grade of a glioma."""
    return f"The scan indicates {'lower' if is_low else 'high'} grade glioma."


def ct_description(described: str) -> str:
    """Return the assistant turn that tells what an expert found, ``described`` as in the expert turn; as trained."""
    return f"This a CT image. It contains several anatomical structures such as identified by VISTA3D: {described}."


def tumor_count(counts: Mapping[str, int]) -> str:
    """Return the assistant turn that counts tumours, kind -> count.

    As trained, one tumour "are" counted too. The trained data have one kind only, since the reference stops at two;
    more kinds are joined with commas here.
    """
    told = ", ".join(f"{count} {name}{'s' if count > 1 else ''}" for name, count in counts.items())
    return f"There are {told}."


def no_tumors(name: str) -> str:
    """Return the assistant turn for a kind of tumour of which none is counted; a form of this project."""
    return f"There are no {name}s."


def tumor_size(row: Mapping[str, Any]) -> str:
    """Return the assistant turn that tells the size of a kind of tumour, as the expert told it; a form of this project.

    Args:
        row: of :func:`vila_m3_common.measure.measure_labels`: mL of all of them together, longest and perpendicular
            diameter of the largest one in mm.
    """
    return f"The expert measured {_measurement_text(row)}."
