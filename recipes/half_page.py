"""The page of `half_straightening.py`: the grid, the plots, the sheets, and what they say."""

from __future__ import annotations

import statistics
from pathlib import Path
from typing import Any

from fluvial import sheets
from fluvial.show import page, plots

ORDER = ("none", "first", "second", "both")
COLOURS = dict(zip(ORDER, (plots.GREY, plots.BLUE, plots.ORANGE, plots.GREEN)))
CONFOUNDERS = (
    (
        "The state in the middle was one step past the split",
        "captured at exactly the split; the pairs' manifest says so",
    ),
    (
        "Targets lay in another image range than the data",
        "one normalisation, from the data, through pairs and measures",
    ),
    (
        "The half that was not trained was forgotten",
        "it is anchored to the teacher, and its loss is measured by itself",
    ),
    ("Pairs without guidance, sampling with it", "guided pairs, students without guidance, the teacher under the same"),
    ("Raw weights after few steps", "averaged weights everywhere"),
    (
        "The first evaluation far outside the trained range",
        "never asked beyond the levels of its own notation",
    ),
    ("Features of photographs for digits", "features of a classifier of the same data; floors and counts stated"),
    ("A single seed", "several seeds of training and sampling; mean and standard deviation"),
)


def write(folder: Path, results: dict[str, Any], samples: dict[Any, Any]) -> Path:
    """`report.html`."""
    settings = results["settings"]
    parts = [
        page.paragraph(
            "One teacher; three students, with the first half of every trajectory straightened, the second, or both. "
            "Each is sampled with Euler steps in the two halves as written: (first, second). "
            f"Split at t = {float(settings['split']):g}, {int(settings['pairs']):,} pairs under guidance "
            f"{float(settings['guidance']):g}, {settings['steps']} training steps a student, {settings['seeds']} "
            f"seeds, {int(settings['n']):,} samples behind every figure.",
            "lead",
        ),
        page.heading("What came out"),
        *(page.paragraph(line) for line in findings(results)),
        page.heading("Distance to the teacher's own samples"),
        page.figure(page.svg(lines(results, "to_teacher", results["teacher_floor"]), "distance to the teacher")),
        grid(results, "to_teacher"),
        page.paragraph(
            f"Squared Fréchet distance to {int(settings['n']):,} accurate samples of the teacher (Heun, 18 steps, the "
            f"same guidance), on {results['classifier']}; two such sets are {results['teacher_floor']:.3f} apart. Mean "
            "and standard deviation over the seeds."
        ),
        page.heading("Distance to the real data"),
        page.figure(page.svg(lines(results, "to_real", results["floor"]), "distance to the real data")),
        grid(results, "to_real"),
        page.paragraph(
            f"To all real samples; a perfect sampler would be at about {results['floor']:.3f} (from halves of the real "
            "data, scaled to these counts). Guidance changes the distribution by itself: compare down the columns."
        ),
        page.heading("Straightness and curvature of the two halves"),
        page.figure(page.svg(profile(results), "curvature along the trajectory")),
        bends(results),
        page.paragraph(
            "S of a half is measured against that half's own chord, S of the whole against the whole one. The peak at "
            "the split is where a student's velocity turns from one chord to the next."
        ),
        page.heading("The half that is kept"),
        kept(results),
        page.heading("Samples"),
        *pictures(samples),
        page.heading("What made the published experiment unsound, and what is done about it here"),
        *(page.paragraph(f"<em>{was}.</em> Here: {here}.") for was, here in CONFOUNDERS),
    ]
    made = f"half_straightening.py; model {results['pairs'].get('model')}; settings {settings}"
    return page.write(folder / "report.html", "Half-straightening", parts, made)


def values(results: dict[str, Any], arm: str, steps: Any, key: str) -> list[float]:
    return [c[key] for c in results["cells"] if c["arm"] == arm and tuple(c["steps"]) == tuple(steps)]


def mean(results: dict[str, Any], arm: str, steps: Any, key: str = "to_teacher") -> float:
    return statistics.fmean(values(results, arm, steps, key))


def shown(numbers: list[float]) -> str:
    spread = f" ± {statistics.stdev(numbers):.1g}" if len(numbers) > 1 else ""
    return f"{statistics.fmean(numbers):.2g}{spread}"


def findings(results: dict[str, Any]) -> list[str]:
    """Each in one sentence, with its figures."""
    floor, said = results["teacher_floor"], []

    def excess(arm: str, steps: tuple[int, int]) -> float:
        return mean(results, arm, steps) - floor

    ratio = mean(results, "none", (1, 1)) / mean(results, "both", (1, 1))
    said.append(
        f"At (1, 1) both halves straightened are {ratio:.1f} times nearer to the teacher's samples than the teacher "
        f"({mean(results, 'both', (1, 1)):.3g} against {mean(results, 'none', (1, 1)):.3g})."
    )
    first, none = mean(results, "first", (1, 9)), mean(results, "none", (1, 9))
    word = "no worse than" if first <= none else "worse than"
    said.append(f"First half straightened at (1, 9) is {word} none: {first:.3g} against {none:.3g}.")
    second, none = mean(results, "second", (9, 1)), mean(results, "none", (9, 1))
    word = "no worse than" if second <= none else "worse than"
    said.append(f"Second half straightened at (9, 1) is {word} none: {second:.3g} against {none:.3g}.")
    bent = [b["straightness"] for b in results["bends"] if b["arm"] == "none"]
    halves = [statistics.fmean(b[h] for b in bent) for h in (0, 1)]
    bends_most = halves.index(max(halves))
    gains = [excess("none", (1, 9)) - excess("first", (1, 9)), excess("none", (9, 1)) - excess("second", (9, 1))]
    pays_most = gains.index(max(gains))
    names = ("first", "second")
    said.append(
        f"The teacher bends most in its {names[bends_most]} half (straightness {halves[0]:.3g} and {halves[1]:.3g}); "
        f"straightening pays most in its {names[pays_most]} half (with one step there: {gains[0]:.3g} and "
        f"{gains[1]:.3g} nearer): the bend {'predicts' if bends_most == pays_most else 'does not predict'} which half "
        "to straighten."
    )
    return said


def lines(results: dict[str, Any], key: str, floor: float) -> Any:
    """Distance by allocation, a line for each arm."""
    figure, axes = plots.blank(7.4, 4.0)
    steps = list(dict.fromkeys(tuple(c["steps"]) for c in results["cells"]))
    steps.sort(key=lambda s: (sum(s), s))
    for arm in ORDER:
        cells = [values(results, arm, s, key) for s in steps]
        bars = [statistics.stdev(c) if len(c) > 1 else 0.0 for c in cells]
        axes.errorbar(range(len(steps)), [statistics.fmean(c) for c in cells], bars, fmt="o-", ms=4, capsize=3,
                      color=COLOURS[arm], label=f"{arm} straightened")  # fmt: skip
    axes.axhline(floor, color=plots.GREY, ls=":", label="floor")
    axes.set_xticks(range(len(steps)), [f"({a}, {b})" for a, b in steps])
    low, high = axes.get_ylim()
    best = min(ORDER, key=lambda arm: statistics.fmean(values(results, arm, (1, 1), key)))
    axes.set(yscale="log", xlabel="Euler steps in the first and in the second half", ylabel="squared Fréchet distance")
    ticks = [t for t in (0.05, 0.1, 0.2, 0.5, 1.0, 2.0, 5.0) if low <= t <= high]
    axes.set_yticks(ticks, [f"{t:g}" for t in ticks])
    axes.minorticks_off()
    axes.set_title(f"With one step in each half the nearest is: {best} straightened")
    axes.legend(fontsize=9)
    return figure


def grid(results: dict[str, Any], key: str) -> str:
    steps = sorted({tuple(c["steps"]) for c in results["cells"]}, key=lambda s: (sum(s), s))
    rows = [[arm, *(shown(values(results, arm, s, key)) for s in steps)] for arm in ORDER]
    return page.table(["straightened", *(f"({a}, {b})" for a, b in steps)], rows)


def profile(results: dict[str, Any]) -> Any:
    """Curvature along the trajectories of each arm, seeds averaged."""
    figure, axes = plots.blank(7.4, 3.6)
    for arm in ORDER:
        curves = [b["profile"] for b in results["bends"] if b["arm"] == arm]
        axes.plot(
            curves[0][0], [statistics.fmean(v) for v in zip(*(c[1] for c in curves))], color=COLOURS[arm], label=arm
        )
    split = float(results["settings"]["split"])
    axes.axvline(split, color=plots.GREY, lw=0.8, ls=":")
    suggested = statistics.fmean(b["split"] for b in results["bends"] if b["arm"] == "none")
    axes.set(yscale="log", xlabel="t (noise at 0, data at 1)", ylabel="curvature, root mean square of dv/dt")
    axes.set_title(f"Half of the teacher's curvature lies before t = {suggested:.2f}")
    axes.legend(fontsize=9)
    return figure


def bends(results: dict[str, Any]) -> str:
    rows = []
    for arm in ORDER:
        mine = [b for b in results["bends"] if b["arm"] == arm]
        figures = [[b[k][h] for b in mine] for k in ("straightness", "curvature") for h in (0, 1)]
        rows.append([arm, *map(shown, figures), shown([b["total"] for b in mine])])
    header = ["straightened", "S first half", "S second half", "curvature first", "curvature second", "S whole"]
    return page.table(header, rows)


def kept(results: dict[str, Any]) -> str:
    """A kept half in 9 Euler steps, the other accurate: the student's against the teacher's."""
    rows = []
    for arm, half in (("first", 1), ("second", 0)):
        own, base = (
            [k["to_teacher"] for k in results["kept"] if (k["arm"], k["half"]) == (a, half)] for a in (arm, "none")
        )
        loss = statistics.fmean(own) / statistics.fmean(base) - 1.0
        rows.append([f"{('first', 'second')[half]} half of '{arm}'", shown(own), shown(base), f"{100 * loss:+.1f} %"])
    told = "Nine Euler steps in the kept half, the teacher's accurate samples in the other: distance to the teacher."
    return page.table(["kept half", "student", "teacher", "loss"], rows) + page.paragraph(told)


def pictures(samples: dict[Any, Any]) -> list[str]:
    parts = []
    for arm in ORDER:
        figures = []
        for steps in ((1, 1), (1, 9), (9, 1), (9, 9)):
            x = samples[arm, steps]
            picture = sheets.sheet(x, columns=10)
            figures.append(page.figure(page.image(picture, f"{arm} {steps}"), f"({steps[0]}, {steps[1]})"))
        parts += [page.subheading(f"{arm} straightened"), page.row(figures, "wide")]
    return parts
