"""A diagnosis for people: a table as text, and one self-contained HTML page with its picture."""

import base64
import html
import os
import pathlib
import textwrap
from collections.abc import Iterator, Mapping, Sequence

import numpy as np

from fm_distill.diagnosis.diagnose import Diagnosis, over_the_run
from fm_distill.diagnosis.evidence import Cka, Gradients
from fm_distill.errors import UserError
from fm_distill.system.files import replacing

WIDTH = 100  # letters of a line of text
CELL, MARGIN = 44, 130  # pixels of the picture
STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2em auto; max-width: 60em; padding: 0 1em }
table { border-collapse: collapse; margin: 1em 0 }
td, th { border: 1px solid #ccc; padding: .2em .7em; text-align: left; vertical-align: top }
img { max-width: 100% }
"""
Row = tuple[str, ...]
Rows = list[Row]


def text(found: Diagnosis) -> str:
    """The causes as a table, and what was not examined."""
    lines = [_title(found), *_cause_lines(found), ""]
    lines += [f"{name:<36} {value}" for name, value in figures(found)]
    for item in found.evidence.not_examined:
        lines += _wrapped(f"not examined: {item.what}: {item.why}", "  ")
    return "\n".join(lines)


def _title(found: Diagnosis) -> str:
    setting = found.evidence.setting
    state = "complete" if setting.complete else "not complete"
    return f"{found.run}: step {setting.step:,} of {setting.total_steps:,}, {state}"


def _cause_lines(found: Diagnosis) -> Iterator[str]:
    if not found.causes:
        yield "no cause was found: nothing that was examined is wrong"
    for number, cause in enumerate(found.causes, 1):
        yield f"{number}. {cause.name}"
        yield from _wrapped(f"found:  {cause.evidence}", "           ")
        yield from _wrapped(f"change: {cause.advice}", "           ")


def _wrapped(line: str, indent: str) -> list[str]:
    first = "   " if indent.strip() == "" and len(indent) > 3 else ""
    return textwrap.wrap(line, WIDTH, initial_indent=first, subsequent_indent=indent)


def figures(found: Diagnosis) -> Rows:
    """What was measured, a name and a value each."""
    evidence = found.evidence
    rows: Rows = []
    if (view := evidence.training) is not None:
        labelled = view.label >= 0
        rows += [
            ("agreement, training view", f"{view.same_class.mean():.1%}"),
            ("KL, training view and temperature", f"{view.kl_nats.mean():.4f} nats"),
        ]
        if labelled.any():
            accuracy = (view.label == view.teacher_class)[labelled].mean()
            rows.append(("teacher top-1, training view", f"{accuracy:.1%}"))
        entropy = f"{view.teacher_entropy.mean():.1%} of the maximum"
        rows.append(("entropy of the targets", entropy))
    if (central := evidence.central) is not None:
        rows.append(("KL, central crop", f"{central.kl_nats.mean():.4f} nats"))
    if evidence.gradients is not None:
        rows += gradient_rows(evidence.gradients)
    if (cka := evidence.cka) is not None:
        closest = cka.values.argmax(axis=1) if np.isfinite(cka.values).all() else None
        rows += [
            (
                f"CKA, student's {name}",
                f"most with {cka.teacher[closest[i]]}: {row[closest[i]]:.2f}",
            )
            for i, (name, row) in enumerate(zip(cka.student, cka.values, strict=True))
            if closest is not None
        ]
    return rows


def gradient_rows(found: Gradients) -> Rows:
    """Norm, deviation and share of each term's gradient; the cosine of each pair."""
    mean, deviation = found.norms.mean(axis=0), found.deviation
    spread = [""] * len(mean) if deviation is None else [f" ± {x:.2g}" for x in deviation]
    rows: Rows = [
        (
            f"gradient of {name}",
            f"norm {mean[i]:.3g}{spread[i]}, {found.shares[i]:.1%} of the sum",
        )
        for i, name in enumerate(found.terms)
    ]
    rows += [
        (f"cosine of {found.terms[i]}, {found.terms[j]}", f"{found.cosines[i, j]:+.2f}")
        for i in range(len(found.terms))
        for j in range(i + 1, len(found.terms))
    ]
    return rows


def refuse_place(out: str | os.PathLike[str], overwrite: bool) -> None:
    """Raises `UserError` where no page may be written at `out`.

    To be asked before the diagnosis too, which takes minutes.
    """
    out = pathlib.Path(out)
    if out.is_dir() or (out.exists() and not overwrite):
        raise UserError(f"{out} already exists; choose another --out, or give --overwrite")
    if not out.parent.is_dir():
        raise UserError(f"there is no folder {out.parent} for {out.name}; create it first")


def write_page(found: Diagnosis, out: str | os.PathLike[str], overwrite: bool) -> pathlib.Path:
    """The page at `out`, with the table, the figures and the picture of CKA. Raises `UserError`."""
    out = pathlib.Path(out)
    refuse_place(out, overwrite)
    try:
        with replacing(out) as temporary:
            temporary.write_text(page(found))
    except OSError as error:
        raise UserError(f"{out} cannot be written: {error}") from None
    return out


def page(found: Diagnosis) -> str:
    """One HTML page that needs nothing else."""
    evidence = found.evidence
    title = html.escape(_title(found))
    causes = [(str(i), x.name, x.evidence, x.advice) for i, x in enumerate(found.causes, 1)]
    sections = [
        f"<h1>{title}</h1>",
        _table(("", "cause", "evidence", "what to change"), causes)
        if causes
        else "<p>No cause was found: nothing that was examined is wrong.</p>",
        "<h2>Figures</h2>",
        _table(("figure", "value"), figures(found)),
    ]
    if evidence.cka is not None:
        picture = base64.b64encode(cka_picture(evidence.cka).encode()).decode()
        sections.append(
            "<h2>CKA</h2><figure><img alt='CKA' src='data:image/svg+xml;base64,"
            f"{picture}'><figcaption>Linear CKA, unbiased, of each tap of the student with each of "
            f"the teacher on {evidence.cka.examples:,} training views that both networks saw: "
            "about 0 for independent features, 1 where both order the examples in the same way."
            "</figcaption></figure>"
        )
    if parts_of_log := over_the_run(evidence.log):
        names = ("loss", "gradient_norm", "update_norm", "data_wait")
        rows = [
            (
                f"to {x['last_step']:,}",
                *("" if x[name] is None else f"{x[name]:.3g}" for name in names),
                ", ".join(
                    f"{term} {y['share']:.1%} ± {y['deviation']:.1%}"
                    for term, y in x["terms"].items()
                    if y["share"] is not None
                ),
                _means(x["term_gradients"]),
                _means(x["term_cosines"]),
            )
            for x in parts_of_log
        ]
        heads = (
            "steps",
            *(x.replace("_", " ") for x in names),
            "shares of the terms' values",
            "norms of the terms' gradients",
            "their cosines",
        )
        sections += ["<h2>Over the run</h2>", _table(heads, rows)]
    unexamined = [(x.what, x.why) for x in evidence.not_examined]
    if unexamined:
        sections += ["<h2>Not examined</h2>", _table(("what", "why"), unexamined)]
    return (
        f"<!DOCTYPE html>\n<html lang='en'><head><meta charset='utf-8'><title>{title}</title>"
        f"<style>{STYLE}</style></head><body>\n" + "\n".join(sections) + "\n</body></html>\n"
    )


def _means(found: Mapping[str, float | None]) -> str:
    values = {x.replace("_", " "): y for x, y in found.items() if y is not None}
    return ", ".join(f"{name} {value:.3g}" for name, value in values.items())


def _table(heads: Row, rows: Sequence[Row]) -> str:
    def row(tag: str, cells: Row) -> str:
        return "<tr>" + "".join(f"<{tag}>{html.escape(x)}</{tag}>" for x in cells) + "</tr>"

    return f"<table>{row('th', heads)}{''.join(row('td', x) for x in rows)}</table>"


def cka_picture(cka: Cka) -> str:
    """A square for each pair of taps as SVG, the student's downwards; the darker, the nearer."""
    width = MARGIN + CELL * len(cka.teacher) + 10
    height = MARGIN + CELL * len(cka.student) + 10
    lines = [
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" width="{width}" '
        f'height="{height}" font-family="sans-serif" font-size="12">',
        f'<rect width="{width}" height="{height}" fill="#ffffff"/>',
        f'<text x="4" y="{MARGIN - 6}" fill="#666666">student, teacher above</text>',
    ]
    for j, name in enumerate(cka.teacher):
        x = MARGIN + CELL * (j + 0.6)
        rotation = f'transform="translate({x:.0f} {MARGIN - 6}) rotate(-60)"'
        lines.append(f"<text {rotation}>{html.escape(name)}</text>")
    for i, name in enumerate(cka.student):
        y = MARGIN + CELL * i
        lines.append(
            f'<text x="{MARGIN - 6}" y="{y + CELL * 0.6:.0f}" text-anchor="end">'
            f"{html.escape(name)}</text>"
        )
        for j, value in enumerate(cka.values[i].tolist()):
            finite = np.isfinite(value)
            darkness = min(max(value, 0.0), 1.0) if finite else 0.0
            shade = "#dddddd" if not finite else f"hsl(225,60%,{100 - 65 * darkness:.0f}%)"
            label = f"{value:.2f}" if finite else "-"
            lines.append(
                f'<rect x="{MARGIN + CELL * j}" y="{y}" width="{CELL}" height="{CELL}" '
                f'fill="{shade}"/><text x="{MARGIN + CELL * (j + 0.5):.0f}" '
                f'y="{y + CELL * 0.6:.0f}" text-anchor="middle" '
                f'fill="{"#ffffff" if darkness > 0.5 else "#111111"}">{label}</text>'
            )
    return "\n".join([*lines, "</svg>", ""])
