"""The page: its sections in order, and what is still missing with the command that makes it."""

from __future__ import annotations

import shlex
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field

from jinja2 import Environment, PackageLoader, StrictUndefined
from markupsafe import Markup

from train.experiments.report import plots, tables
from train.experiments.report.data import RunData, dig, measured_elsewhere, reliability, temperatures_of
from train.experiments.report.kinds import COSTS, described, several_kinds, tau_curve
from train.experiments.report.lengths import length_table, measured_temperatures, speedup_curve
from train.experiments.report.svg import Panel, swatch
from train.experiments.report.tables import Table


@dataclass(frozen=True)
class Section:
    """A part of the page under a heading."""

    key: str
    title: str
    lead: str
    """A sentence on what it is about."""
    rows: list[tuple[RunData | None, list[Panel]]] = field(default_factory=list)
    """Panels that belong together; with a run where they are of it alone."""
    tables: list[list[Table]] = field(default_factory=list)
    """Rows of tables that are beside each other, where there is room."""
    folded: list[list[Table]] = field(default_factory=list)
    """Tables that a screen shows when asked to, and paper always."""
    missing: list[tuple[str, str]] = field(default_factory=list)
    """Figures that nobody measured, each with the command that does."""

    @property
    def shared(self) -> bool:
        """Panels show several runs, which need a key."""
        return any(run is None and panels for run, panels in self.rows)


def render(runs: Sequence[RunData], title: str | None = None) -> str:
    """Render the page as HTML; the same runs give the same bytes."""
    sections = [
        _summary(runs),
        _training(runs),
        _acceptance(runs),
        _confidence(runs),
        _lengths(runs),
        _costs(runs),
        _settings(runs),
    ]
    environment = Environment(
        loader=PackageLoader("train.experiments.report", ""),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    swatches = {run.index: swatch(run.index) for run in runs}

    def label(run: RunData) -> Markup:
        """Write a run's name, with its mark where there are several."""
        name = Markup('<span class="name">{}</span>').format(run.name)
        return (
            name
            if len(runs) == 1
            else Markup('<span class="run">{} {}</span>').format(swatches[run.index], name)
        )

    days = sorted({run.written for run in runs if run.written})
    page = environment.get_template("page.html.jinja").render(
        title=title or f"Draft report: {runs[0].name if len(runs) == 1 else f'{len(runs)} runs'}",
        targets=list(dict.fromkeys(filter(None, map(_target, runs)))),
        days=" to ".join(dict.fromkeys([*days[:1], *days[-1:]])),
        runs=runs,
        tiles=_tiles(runs[0]) if len(runs) == 1 else [],
        sections=sections,
        label=label,
        kinds=list(dict.fromkeys(run.kind for run in runs)),
        described=described if several_kinds(runs) else None,
    )
    return page.encode("utf-8", "replace").decode()  # names of files may hold what is no text


def _target(run: RunData) -> str | None:
    measured = run.evaluation.cache.target if run.evaluation and run.evaluation.cache else None
    return measured or dig(run.identity, "target", "name")


def _tiles(run: RunData) -> list[tuple[str, str, str]]:
    """List the main figures of a run alone, those that there are: what, how much, and a remark."""
    evaluation, live = run.evaluation, run.last_live
    untrained = tables.untrained_tau(run)
    before = "" if untrained is None else f", {plots.digits(untrained)} untrained"
    sampling, greedy = (_decoding(run, kind) for kind in ("sampling", "greedy"))
    promised = live.offline.tokens_per_round if live and live.offline else None
    beside = "" if promised is None else f"; {plots.digits(promised)} expected from held-out texts"
    kind = f"temperature {live.temperature:g}" if live and live.temperature else "greedy"
    states = reliability(run, "prefix")
    when, told = list(states.items())[-1] if states else ("", None)
    state = "calibrated" if when == "after" else when
    found = (
        ("tau", evaluation and evaluation.tau, "{:.3f}", f"tokens per round, held out{before}{sampling}"),
        (
            "greedy tau",
            evaluation and evaluation.greedy_tau,
            "{:.3f}",
            f"tokens per round, target greedy{greedy}",
        ),
        ("live", live and live.tokens_per_round, "{:.3f}", f"tokens per round, {kind}{beside}"),
        ("speed-up", live and live.speedup, "{:.2f}\u00d7", f"against plain decoding, {kind}"),
        ("calibration error", told and told.ece, "{:.3f}", f"of confidence products, {state}"),
    )
    return [(name, form.format(value), remark) for name, value, form, remark in found if value is not None]


def _decoding(run: RunData, kind: str) -> str:
    """Say what decoding is expected to yield, as a remark on the tau that it stays below."""
    tokens = tables.decoded(run, kind)
    return "" if tokens is None else f"; {plots.digits(tokens)} expected of decoding"


def _panels(*found: Panel | None) -> list[tuple[RunData | None, list[Panel]]]:
    """Make a row of the panels that there are, about all runs."""
    panels = [panel for panel in found if panel is not None]
    return [(None, panels)] if panels else []


def _present(rows: Iterable[Iterable[Table | None]]) -> list[list[Table]]:
    """Return rows of tables without those that there are not."""
    return [kept for row in rows if (kept := [table for table in row if table is not None])]


def _missing(
    runs: Iterable[RunData], lacks: Callable[[RunData], bool], what: str, command: str
) -> list[tuple[str, str]]:
    """Write the line for what some runs lack; the command names the run where only one does."""
    without = [run for run in runs if lacks(run)]
    if not without:
        return []
    run = shlex.quote(str(without[0].path)) if len(without) == 1 else "RUN"
    return [(f"{what} of {', '.join(run.name for run in without)}", command.replace("RUN", run))]


def _unmeasured(runs: Sequence[RunData], what: str) -> list[tuple[str, str]]:
    trained = [run for run in runs if run.training]
    return _missing(
        trained, lambda run: run.evaluation is None, what, "dspark evaluate --cache CACHE --run RUN"
    ) + _missing(runs, lambda run: not run.training, "A checkpoint", "dspark train --cache CACHE --run RUN")


def _summary(runs: Sequence[RunData]) -> Section:
    lead = (
        "Tau is the number of tokens that a round of speculative decoding is expected to yield, the "
        "target's own included: 1 means that the draft never helps. It is measured on samples held out of "
        "training."
    )
    imported = [run.name for run in runs if run.imported]
    if imported:
        which = "" if len(runs) == 1 else f" ({', '.join(imported)})"
        lead += f" An imported draft{which} may have learned from these samples where it was trained."
    return Section(
        "summary",
        "Summary",
        lead,
        rows=_panels(*(tau_curve(runs, cost) for cost in COSTS)) if len(runs) > 1 else [],
        tables=[[tables.summary(runs)]],
        missing=_unmeasured(runs, "Held-out figures"),
    )


def _training(runs: Sequence[RunData]) -> Section:
    panels = _panels(
        plots.training_curve(
            runs,
            "tau",
            "Tau",
            "tokens per round",
            "1 means that the draft never helps; higher is better.",
            lowest=1.0,
        ),
        plots.training_curve(
            runs,
            "accept_rate",
            "Acceptance",
            "mean over positions",
            "How much of what the draft says the target would accept; higher is better.",
            lowest=0.0,
        ),
        plots.training_curve(
            runs,
            "loss",
            "Loss",
            "weighted sum",
            "What is minimised: the terms that follow, weighted."
            + (" Kinds of draft minimise different sums." if several_kinds(runs) else ""),
        ),
        plots.training_curve(
            runs,
            "l1_loss",
            "L1 distance",
            "0 to 2",
            "Between draft and target distributions: 0 where they are the same, 2 where they share nothing.",
        ),
        plots.training_curve(
            runs,
            "ce_loss",
            "Cross entropy",
            "nats",
            "How surprised the draft is by the data's own tokens; lower is better.",
        ),
        plots.training_curve(
            runs,
            "soft_ce_loss",
            "Soft cross entropy",
            "nats",
            "How surprised the draft is by tokens drawn from the target's distribution; lower is better.",
        ),
        plots.training_curve(
            runs,
            "confidence_loss",
            "Confidence loss",
            "nats",
            "Binary cross entropy of the confidence head; it may rise as acceptance leaves 0.",
        ),
    )
    lead = (
        "Lines are means since the last log line; outlined marks, or thin dark lines where these are many, "
        "are measured on held-out samples."
    )
    imported = {run.index for run in runs if run.row["complete"] and run.row["step"] == 0}
    missing = _missing(
        [run for run in runs if run.index not in imported],
        lambda run: not run.log,
        "Log lines",
        "dspark train --cache CACHE --run RUN",
    )
    return Section("training", "Training", lead, panels, missing=missing)


def _acceptance(runs: Sequence[RunData]) -> Section:
    temperatures = temperatures_of(runs)
    panels = [
        plots.acceptance(
            runs,
            "accept_by_position",
            "Acceptance by position",
            "Higher is better; the dotted line is a draft with random weights.",
            untrained=True,
        ),
        plots.acceptance(
            runs,
            plots.GIVEN,
            "Acceptance given the tokens before",
            "The rate at a position once all earlier ones are accepted, as one counts it while decoding.",
        ),
    ]
    if len(runs) == 1 and len(temperatures) <= plots.MOST_TEMPERATURES:
        rows = _panels(*panels, plots.live(runs, temperatures))
    else:
        rows = _panels(*panels) + _panels(*(plots.live(runs, [each]) for each in temperatures))
    lead = "How often the target takes what the draft proposes, by the place of the token in its block."
    trained = [run for run in runs if run.training]
    live = _missing(
        trained,
        lambda run: not run.live,
        "Live decoding",
        "dspark speculate --target TARGET --cache CACHE --run RUN",
    )
    grouped = [
        tables.groups(runs, "by_source", "source"),
        tables.groups(runs, "by_length", "tokens"),
        tables.groups(runs, "by_context", "tokens of context"),
    ]
    found = [
        [tables.live_rounds(runs)],
        *([grouped] if len(runs) == 1 else [[table] for table in grouped]),
    ]
    missing = _unmeasured(trained, "Held-out acceptance") + live
    return Section("acceptance", "Acceptance", lead, rows, _present(found), missing=missing)


def _confidence(runs: Sequence[RunData]) -> Section:
    rows: list[tuple[RunData | None, list[Panel]]] = []
    for run in runs:
        found = (
            plots.reliability_diagram(
                run,
                "prefix",
                "Reliability of the products",
                "On the diagonal confidence is right, below it too high; bars show how often each is said.",
            ),
            plots.reliability_diagram(
                run,
                "slot",
                "Reliability of each position",
                "The same of single confidences, each given that the tokens before it are accepted.",
            ),
            plots.threshold_panel(run, runs),
        )
        panels = [panel for panel in found if panel is not None]
        if panels:
            rows.append((run, panels))
    table = tables.confidence(runs)
    headless = [run.name for run in runs if not run.has_confidence]
    lead = (
        "How well the draft tells what the target will accept: products of confidences up to a token decide "
        "what is worth verifying."
    )
    if headless:
        lead += f" No confidence head: {', '.join(headless)}."
    if any(run.calibration is not None for run in runs):
        lead += (
            " Figures before and after calibration are of the half of the held-out samples that it was not "
            "fitted on."
        )
    able = [run for run in runs if run.has_confidence and run.training]
    missing = _unmeasured(able, "Confidence figures") + _missing(
        able, lambda run: run.calibration is None, "Calibration", "dspark calibrate --cache CACHE --run RUN"
    )
    return Section(
        "confidence", "Confidence and thresholds", lead, rows, _present([[table]]), missing=missing
    )


def _lengths(runs: Sequence[RunData]) -> Section:
    panels = _panels(*(speedup_curve(runs, each) for each in measured_temperatures(runs)))
    lead = (
        "What drafting more or fewer tokens a round is expected to gain one request on the device that "
        "it was measured on. An engine with many requests is another matter: dspark schedule simulates one."
    )
    missing = _missing(
        [run for run in runs if run.training],
        lambda run: not measured_temperatures([run]),
        "Speed-up by drafted tokens",
        "dspark speculate --measure --target TARGET --cache CACHE --run RUN",
    )
    found = _present([[length_table(runs)]])
    return Section("lengths", "Drafted tokens a round", lead, panels, found, missing=missing)


def _costs(runs: Sequence[RunData]) -> Section:
    panels = _panels(
        plots.log_curve(
            runs, "tokens_per_s", "Speed", "tokens per second", "Context tokens that blocks draft from."
        ),
        plots.log_curve(
            runs,
            "data_wait_percent",
            "Waiting for data",
            "percent of the time",
            "Near zero the cache is read faster than the draft learns.",
            places=1,
        ),
        plots.log_curve(
            runs,
            "peak_memory_bytes",
            "Peak memory",
            "GB",
            "On a GPU what its tensors held at most since the session began; on a CPU the whole process.",
            scale=1e-9,
            places=2,
        ),
    )
    missing = _missing(
        [run for run in runs if run.training],
        lambda run: run.evaluation is None or run.evaluation.cache is None,
        "What the cache costs, in the evaluation",
        "dspark evaluate --cache CACHE --run RUN",
    )
    lead = "What training took, and what its cache takes on disk."
    elsewhere = [run.name for run in runs if measured_elsewhere(run)]
    if elsewhere:
        whose = "the draft" if len(runs) == 1 else ", ".join(elsewhere)
        lead = (
            f"What training took, and what caches take on disk: for {whose} the one measured on, which is "
            "not known to be the one trained on."
        )
    return Section(
        "costs", "Costs", lead, panels, [[tables.costs(runs)], *tables.caches(runs)], missing=missing
    )


def _settings(runs: Sequence[RunData]) -> Section:
    differing = tables.differing(runs)
    lead = "Everything a run was told, and what it ran on."
    if len(runs) > 1 and differing is None:
        lead += " These runs have the same settings and the same cache."
    found = _present([[differing], [tables.provenance(runs)]])
    every = tables.settings(runs)
    folded = [every] if len(runs) == 1 else [[table] for table in every]
    return Section("settings", "Settings", lead, tables=found, folded=folded)
