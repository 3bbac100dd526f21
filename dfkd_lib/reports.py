"""What a distillation came to, as one page that needs nothing beside it, and as a card that goes with the student."""

from __future__ import annotations

import html
import math
from collections.abc import Sequence
from pathlib import Path

from torch import nn

from .distilled import Distilled
from .distillers import UPDATES, needs_batch_norm
from .files import write_text
from .report_images import classified, mapped, named
from .training.progress import clock

SMALL_BATCH = 64  # that of the presets for small images
LOW = 0.8  # agreement below which the page says what to try
_CURVES = 6

_STYLE = """
body{font:16px/1.5 system-ui,sans-serif;margin:0 auto;padding:1rem;max-width:46rem;color:#222;background:#fff}
h1{font-size:1.5rem;line-height:1.2}h2{font-size:1.15rem;margin-top:2rem}
table{border-collapse:collapse;width:100%}td,th{padding:.2rem .5rem .2rem 0;text-align:left;vertical-align:top}
td.n,th.n{text-align:right;font-variant-numeric:tabular-nums}
.big{font-size:2rem;font-weight:600}.warn{border-left:4px solid #d55e00;padding:.2rem .8rem;background:#fdf3ec}
.row{display:flex;flex-wrap:wrap;gap:.6rem}figure{margin:0;width:5.5rem;font-size:.75rem;line-height:1.25}
figure img{width:5.5rem;height:5.5rem;object-fit:contain;image-rendering:pixelated;background:#eee;display:block}
.bar{background:#0072b2;height:.6rem}.track{background:#e5e5e5;min-width:4rem}
svg{width:100%;height:auto}code{overflow-wrap:anywhere}
"""


def write_report(
    path: Path, result: Distilled, teacher: nn.Module, *, names: Sequence[str] = (), class_names: Sequence[str] = ()
) -> None:
    """Write one HTML page: figures, warnings and advice, agreement by class, images, curves, what was spent.

    Args:
        teacher: the one that was distilled, in eval mode; it is asked what it says to the images.
        names: of teacher and student, as a person knows them.
        class_names: by index; empty for bare numbers.

    Raises:
        DFKDError: the file cannot be written.
    """
    asked, budget = result.record["parameters"], result.budget
    who = " to ".join(names) if names else "a teacher to a student"
    title = html.escape(f"{who}, by {asked['method']}")
    parts = [f"<h1>{title}</h1>", _headline(result), _told(result), _classes(result, class_names)]
    shown = mapped if "task" in asked else classified
    parts += [shown(result, teacher, class_names), _curves(result)]
    spent = {
        "student updates": f"{budget.student_updates:,}",
        "images": f"{budget.images:,}",
        "images through the teacher": f"{budget.teacher_passes:,}",
        "time of training": clock(result.seconds),
        "of it, synthesis": clock(budget.synthesis_seconds),
        "of it, the student's updates": clock(budget.distillation_seconds),
        "parameters of the teacher": f"{result.record['networks']['teacher']:,}",
        "parameters of the student": f"{result.record['networks']['student']:,}",
        "computed with": str(result.record["runtime"]),
    }
    parts += ["<h2>What was spent</h2>", _table(spent)]
    settings = {key: value for key, value in asked.items() if key != "settings"} | asked["settings"]
    folded = _table({key: str(value) for key, value in settings.items()} | {"seed": str(result.record["seed"])})
    parts += [f"<details><summary>All settings</summary>{folded}</details>"]
    page = (
        '<!doctype html><html lang="en"><head><meta charset="utf-8">'
        '<meta name="viewport" content="width=device-width, initial-scale=1">'
        f'<title>{title}</title><link rel="icon" href="data:,"><style>{_STYLE}</style></head>'
        f"<body>{''.join(parts)}</body></html>\n"
    )
    write_text(path, page)


def advice(result: Distilled) -> list[str]:
    """What to try next, a sentence each; empty if the figures ask for nothing."""
    asked = result.record["parameters"]
    method, settings = asked["method"], asked["settings"]
    if "task" in asked:
        return _advice_on_maps(result)
    tips = []
    if few_classes(result):
        tips.append(
            "The teacher names few of its classes on these images. Check mean and std, and that the weights are the "
            "right ones; then try method nayer or fast, which ask for every class, or pictures of your own (images)."
        )
    if result.agreement < LOW:
        tips.append(
            f"Train longer: this run took {result.budget.student_updates:,} updates, and preset 'paper' takes "
            f"{UPDATES['paper']:,}."
        )
        if "minutes" in asked and settings["batch_size"] > SMALL_BATCH:
            tips.append(
                f"The same minutes hold more updates of smaller batches: here one had {settings['batch_size']} images "
                f"(--set batch_size={SMALL_BATCH})."
            )
        if method == "kd":
            tips.append("Give more pictures, or pictures more like those that the teacher was trained on.")
        elif "images" in asked:
            tips.append("Give more pictures, or try them alone, with method kd.")
        elif not needs_batch_norm(method):
            tips.append(
                f"{method} asks the teacher's logits alone. If the teacher has batch norm, fast, nayer or cmi use its "
                "statistics; if pictures of any kind are at hand, train on them (images)."
            )
        else:
            tips.append("Try another method (nayer, cmi), a larger student, or pictures of your own (images).")
        if "bn_scale" in settings and settings["bn_scale"] != "relative":
            tips.append("Look at the curve of the batch-norm term: where it drowns the class term, lower bn.")
    if result.accuracy:
        teacher, student = result.accuracy["teacher"], result.accuracy["student"]
        if teacher < 2 / asked["num_classes"]:
            tips.append(
                f"The teacher itself is right on {teacher:.1%} of the test images, which is near guessing: mean and "
                "std, the order of the classes or the weights are not what they should be."
            )
        elif result.agreement >= LOW and student < teacher - 0.1:
            tips.append(
                "The student agrees on the images that it was trained with and falls behind on real ones: these images "
                "are too narrow. Try another method, a longer run, or pictures of your own (images)."
            )
    return tips


def _advice_on_maps(result: Distilled) -> list[str]:
    tips = []
    if few_classes(result):
        tips.append("The teacher names few of its classes on these images. Check mean and std, and the weights.")
    if result.agreement < LOW / 2:
        tips.append(
            f"Train longer: this run took {result.budget.student_updates:,} updates. If pictures of any kind are at "
            "hand, give them, or more of them (images)."
        )
    return tips


def few_classes(result: Distilled) -> bool:
    """Whether the teacher names less than half of the classes that as many random draws would name."""
    n_classes, shown = result.record["parameters"]["num_classes"], sum(n for n, _ in _by_class(result).values())
    return result.classes_named < n_classes * (1 - (1 - 1 / n_classes) ** shown) / 2


def model_card(result: Distilled, *, names: Sequence[str] = (), files: Sequence[str] = ()) -> str:
    """What a person must know who is given the student: Markdown.

    Args:
        names: of teacher and student, as a person knows them.
        files: what lies beside the card, a line each.
    """
    asked, record = result.record["parameters"], result.record
    teacher, student = names or ("a trained classifier", "a smaller one")
    if asked["method"] == "kd":
        made_of = f"on {asked['images'].split(',')[0]} without their labels"
    elif "images" in asked:
        made_of = (f"on {asked['images'].split(',')[0]} of other things and on {result.budget.images:,} images made of "
                   "their patches")  # fmt: skip
    else:
        made_of = f"without any data: {result.budget.images:,} images were synthesised from the teacher"
    seen, kind = _compared_on(result), "classifier"
    agreed = f"It names the teacher's class on {result.agreement:.1%} of {seen}"
    right = "On labelled test images it is right on {student:.1%}, the teacher on {teacher:.1%}."
    if "task" in asked:
        kind, agreed = "segmenter", f"Its maps have a mean IoU of {result.agreement:.1%} with the teacher's on {seen}"
        right = "On labelled test images it has a mean IoU of {student:.1%}, the teacher {teacher:.1%}."
    shape = "x".join(map(str, asked["image_shape"]))
    normal = "as they are" if asked["mean"] is None else f"normalised with mean {asked['mean']} and std {asked['std']}"
    lines = [
        f"# {student}, distilled from {teacher}",
        "",
        f"A {kind} of {asked['num_classes']} classes for images {shape} in [0, 1], {normal}. It has "
        f"{record['networks']['student']:,} parameters, the teacher {record['networks']['teacher']:,}.",
        "",
        "## How it was made",
        "",
        f"Method {asked['method']}, {made_of}. {result.budget.student_updates:,} updates of the student in "
        f"{clock(result.seconds)} of training, seed {record['seed']}, with dfkd-lib {record['code']['version']} and "
        f"torch {record['packages']['torch']}. `record.json` has every setting.",
        "",
        "## How good it is",
        "",
        f"{agreed}, where the teacher names {result.classes_named} of {asked['num_classes']} classes.",
    ]
    if result.accuracy:
        lines += ["", right.format(**result.accuracy)]
    lines += ["", "## Limits", ""]
    if not result.accuracy:
        lines.append("- It was never tried on labelled images. Agreement is no accuracy: measure before you use it.")
    lines += [
        "- What the teacher gets wrong, and whom it treats unfairly, the student learns as well.",
        "- How sure it is of an answer was not measured, nor how it does on images unlike the teacher's.",
        "- The licence of the teacher, and of its data, may bind the student.",
        *(f"- {warning}" for warning in record["warnings"]),
    ]
    if files:
        lines += ["", "## Files", "", *(f"- {line}" for line in files)]
    return "\n".join(lines) + "\n"


# --- parts of the page ----------------------------------------------------------------------------------------------


def _headline(result: Distilled) -> str:
    asked = result.record["parameters"]
    agreed, right = ("mean IoU", "mean IoU") if "task" in asked else ("agreement", "accuracy")
    said = (
        f'<p><span class="big">{result.agreement:.1%}</span> {agreed} with the teacher on {_compared_on(result)}, '
        f"where the teacher names {result.classes_named} of {asked['num_classes']} classes.</p>"
    )
    if result.accuracy:
        said += (
            f'<p><span class="big">{result.accuracy["student"]:.1%}</span> {right} on the test images; the teacher '
            f"has {result.accuracy['teacher']:.1%}.</p>"
        )
    else:
        said += (
            f"<p>No test images were given, and {agreed} with the teacher says little of {right} on real ones: try the "
            "student before you use it.</p>"
            if "task" in asked
            else "<p>No test images were given, and agreement is no accuracy: try the student before you use it.</p>"
        )
    if "adv" in asked["settings"] or "k" in asked["settings"]:
        said += (
            "<p>This method looks for images on which the networks still differ: on others they agree more often.</p>"
        )
    teacher, student = result.record["networks"]["teacher"], result.record["networks"]["student"]
    return f"{said}<p>The student has {student:,} parameters, {teacher / max(1, student):.1f} times fewer.</p>"


def _compared_on(result: Distilled) -> str:
    return "held-back pictures" if result.record["parameters"]["method"] == "kd" else "fresh synthetic images"


def _told(result: Distilled) -> str:
    said = "".join(f'<p class="warn">{html.escape(line)}</p>' for line in result.record["warnings"])
    if tips := advice(result):
        said += "<h2>What to try next</h2><ul>" + "".join(f"<li>{html.escape(tip)}</li>" for tip in tips) + "</ul>"
    return said


def _by_class(result: Distilled) -> dict[int, list[int]]:
    return {int(c): counts for c, counts in result.record["by class"].items()}


def _classes(result: Distilled, class_names: Sequence[str]) -> str:
    rows = []
    for c, (n, agreed) in sorted(_by_class(result).items(), key=lambda row: row[1][1] / row[1][0]):
        bar = f'<div class="track"><div class="bar" style="width:{100 * agreed / n:.0f}%"></div></div>'
        rows.append(f'<tr><td>{named(c, class_names)}</td><td class="n">{agreed} of {n}</td><td>{bar}</td></tr>')
    return (
        "<h2>Agreement by class</h2><p>By the class that the teacher names, the worst first.</p>"
        f"<table>{''.join(rows)}</table>"
    )


def _curves(result: Distilled) -> str:
    history = result.fit.history
    terms = [key for key in dict.fromkeys(k for row in history for k in row) if key not in ("step", "seconds")]
    terms.sort(key=lambda term: term not in ("distillation loss", "discrepancy"))
    text = "<h2>Training</h2><p>Each curve against the method's outer iterations.</p>"
    for term in terms[:_CURVES]:
        points = [(row["step"], row[term]) for row in history if term in row and math.isfinite(row[term])]
        text += f"<p>{html.escape(term)}</p>{_svg(points)}" if points else ""
    return text


def _svg(points: Sequence[tuple[float, float]]) -> str:
    """A line through (step, value), with the ends of both axes written on."""
    steps, values = zip(*points, strict=True)
    low, high = min(values), max(values)
    wide, tall, left = 360, 120, 56

    def at(step: float, value: float) -> str:
        x = left + (wide - left - 8) * (step - steps[0]) / max(1e-12, steps[-1] - steps[0])
        return f"{x:.1f},{8 + (tall - 32) * (1 - (value - low) / (high - low or 1)):.1f}"

    line = " ".join(at(*point) for point in points)
    text = 'font-size="11" fill="#444"'
    return (
        f'<svg viewBox="0 0 {wide} {tall}" role="img" aria-label="from {values[0]:.3g} to {values[-1]:.3g}">'
        f'<path d="M{left} 8V{tall - 24}H{wide - 8}" fill="none" stroke="#999"/>'
        f'<polyline points="{line}" fill="none" stroke="#0072b2" stroke-width="2"/>'
        f'<text x="{left - 6}" y="16" text-anchor="end" {text}>{high:.3g}</text>'
        f'<text x="{left - 6}" y="{tall - 24}" text-anchor="end" {text}>{low:.3g}</text>'
        f'<text x="{left}" y="{tall - 8}" {text}>{steps[0]:,.0f}</text>'
        f'<text x="{wide - 8}" y="{tall - 8}" text-anchor="end" {text}>{steps[-1]:,.0f}</text></svg>'
    )


def _table(rows: dict[str, str]) -> str:
    lines = (f"<tr><td>{html.escape(k)}</td><td><code>{html.escape(v)}</code></td></tr>" for k, v in rows.items())
    return f"<table>{''.join(lines)}</table>"
