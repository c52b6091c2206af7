"""Figures of `exact-permutations`: how many networks it takes, and what one of them says."""

from collections.abc import Sequence

import altair as alt

from dynascope.report import Chart, draw
from dynascope.studies.exact_permutations.method import CLOSED_K, PAPERS_SIZES, SAMPLED_K
from dynascope.studies.harness import Runs
from dynascope.theory.permutations import Kernel, ensemble_size, permutation_predictor

KERNELS: dict[Kernel, str] = {"ntk": "tangent kernel (the theory)", "nngp": "NNGP kernel (last layer only)"}


def figures(runs: Sequence[Runs]) -> list[Chart]:
    """The paper's figure of ensemble sizes with both kernels beside it, the rates, and the means."""
    return [sizes(runs), rates(runs), means(runs)]


def sizes(runs: Sequence[Runs]) -> Chart:
    """Networks needed for inputs with two ones."""
    rows = [
        {"k": k, "networks": float(size), "what": "the paper's experiment", "delta": f"δ = {delta}"}
        for delta, of_delta in PAPERS_SIZES.items()
        for k, size in zip(SAMPLED_K, of_delta, strict=True)
    ]
    for kernel, name in KERNELS.items():
        for delta in PAPERS_SIZES:
            told = {"what": name, "delta": f"δ = {delta}"}
            rows += [{"k": k, "line": float(ensemble_size(k, delta, kernel=kernel)), **told} for k in SAMPLED_K]
            rows += [
                {"k": k, "networks": float(value), **told}
                for records in runs
                for k, value in zip(SAMPLED_K, records[f"sampled-{kernel}"][f"size/{delta}"].values, strict=True)
            ]
    base = alt.Chart(width=230, height=220)
    colour = alt.Color("what:N", title=None, legend=alt.Legend(orient="bottom", columns=1, labelLimit=300))
    y = {"scale": alt.Scale(type="log"), "title": "networks"}
    lines = (
        base.transform_filter("isValid(datum.line)")
        .mark_line()
        .encode(x=alt.X("k:Q", title="bits k"), y=alt.Y("line:Q", **y), color=colour)
    )
    points = base.mark_point(filled=True, size=35, opacity=0.7).encode(
        x="k:Q", y=alt.Y("networks:Q", **y), color=colour, shape=alt.Shape("what:N", legend=None)
    )
    about = "Lines: closed form. Points: drawn from the limit, one a seed, and the paper's own."
    chart = alt.layer(lines, points, data=alt.NamedData("rows")).facet(
        column=alt.Column("delta:N", title=None, sort="descending")
    )
    return draw("Networks needed for inputs with two ones", about, rows, chart)


def rates(runs: Sequence[Runs]) -> Chart:
    """Bounds over k, for one input and for all."""
    record = runs[0]["closed-form"]
    rows = [
        {"k": k, "networks": float(size), "for": name}
        for name in ("single", "all")
        for k, size in zip(CLOSED_K, record[f"size/{name}"].values[0], strict=True)
    ]
    chart = (
        alt.Chart(width=400, height=220)
        .mark_line(point=True)
        .encode(
            x=alt.X("k:Q", scale=alt.Scale(type="log", base=2), title="bits k"),
            y=alt.Y("networks:Q", scale=alt.Scale(type="log"), title="networks (bound, δ = 0.1)"),
            color=alt.Color("for:N", title="inputs"),
        )
    )
    return draw("One input wants k log k networks, all of them want k²", "Closed form.", rows, chart)


def means(runs: Sequence[Runs]) -> Chart:
    """What the mean network says at ones and zeros, by the number of ones."""
    rows = []
    for kernel, name in KERNELS.items():
        for count in range(1, 5):
            limit = permutation_predictor(5, count, kernel)
            for bit, line in (("one", limit.one), ("zero", limit.zero)):
                told = {"ones": count, "kernel": name, "bit": f"bits that should be {'1' if bit == 'one' else '0'}"}
                rows.append({"line": line, **told})
                rows += [
                    {"mean": float(records[f"trained-{kernel}"][f"mean/{bit}"].sel(step=count)), **told}
                    for records in runs
                ]
    base = alt.Chart(width=230, height=200)
    x, colour = (
        alt.X("ones:O", title="ones in the input"),
        alt.Color("kernel:N", title=None, legend=alt.Legend(orient="bottom")),
    )
    lines = (
        base.transform_filter("isValid(datum.line)")
        .mark_line()
        .encode(x=x, y=alt.Y("line:Q", title="mean output"), color=colour)
    )
    points = base.mark_point(filled=True, size=40).encode(x=x, y="mean:Q", color=colour)
    chart = (
        alt.layer(lines, points, data=alt.NamedData("rows"))
        .facet(column=alt.Column("bit:N", title=None))
        .resolve_scale(y="independent")
    )
    about = "Lines: infinite width. Points: trained networks of width 2048, one a seed. Zeros are right by a hair."
    return draw("Means of trained networks, five bits", about, rows, chart)
