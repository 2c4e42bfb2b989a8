"""The experiment's tables, in Markdown: ours as mean ± spread over seeds, the published figures beside them.

Pure text out of the rows of `reproduce_results.py`; the plots are in `reproduce_plots.py`.
"""

from collections.abc import Iterable, Iterator, Sequence

from reproduce_results import (
    ANCHORS,
    ERRORS,
    PARTS,
    PUBLISHED,
    PUBLISHED_STALENESS,
    Row,
    Setting,
    mean_and_spread,
    over_seeds,
)

NAMES = {"forced": "forced recompute", "metrics": "metrics"}

# title, quantity, its format
Column = tuple[str, str, str]
LEARNING: tuple[Column, ...] = (
    ("task reward", "reward", ".3f"),
    ("accuracy", "accuracy", ".3f"),
    ("entropy", "entropy", ".3f"),
    ("gradient norm", "grad_norm", ".2f"),
    ("KL to the sampler", "kl", ".4f"),
    ("sampler against trainer", "sampler_trainer", ".1e"),
)
TRUST_REGION: tuple[Column, ...] = (
    ("importance weight max", "importance_weight_max", ".2f"),
    ("min", "importance_weight_min", ".2f"),
    ("mean", "importance_weight_avg", ".4f"),
    ("behaviour weight max", "behave_imp_weight_max", ".2f"),
    ("min", "behave_imp_weight_min", ".2f"),
    ("mean", "behave_imp_weight_avg", ".4f"),
    ("clipped tokens", "clipped_tokens", ".1f"),
    ("of all, %", "clip_percent", ".2f"),
)
TIME: tuple[Column, ...] = (
    ("minutes", "minutes", ".2f"),
    ("a step, s", "step_s", ".3f"),
    ("proximal pass, s", "proximal_pass_s", ".4f"),
    ("forward, backward", "forward_backward_s", ".3f"),
    ("optimizer", "optimizer_s", ".3f"),
    ("waiting", "wait_for_samples_s", ".3f"),
    ("the rest", "other_s", ".3f"),
    ("forwards per token", "forwards_per_token", ".2f"),
)
GAIN: tuple[Column, ...] = (
    ("seconds", "samples_s", ".1f"),
    ("against synchronous", "speed_up", ".2f"),
    ("trainer idle, %", "trainer_idle_percent", ".0f"),
    ("generator idle, %", "generator_idle_percent", ".0f"),
    ("staleness, mean", "staleness_avg", ".2f"),
    ("max", "staleness_max", ".0f"),
    ("dropped groups", "dropped_groups", ".0f"),
    ("task reward", "reward", ".3f"),
)


def tables(rows: Sequence[Row]) -> Iterator[tuple[str, str]]:
    """(title, table) of everything there is."""
    settings = over_seeds([_derived(row) for row in rows])
    compared = {key: found for key, found in settings.items() if not key.gain and key.method != "metrics"}
    for m in sorted({key.mini_batches for key in compared}):
        of_m = {key: found for key, found in compared.items() if key.mini_batches == m}
        learned = {key: found for key, found in of_m.items() if key.method != "forced"}
        batches = f"{m} mini-batch{'es' if m > 1 else ''}"
        yield f"Learning, {batches}", _compare(learned, LEARNING)
        yield f"Trust region, {batches}", _compare(learned, TRUST_REGION)
        yield f"Time, {batches}", _compare(of_m, TIME)
    if errors := {key: found for key, found in settings.items() if key.method == "metrics"}:
        yield "Approximation errors", _errors(errors)
    if gain := {key: found for key, found in settings.items() if key.gain}:
        yield "Asynchronous gain", _gain(gain)


def _compare(settings: dict[Setting, list[Row]], columns: Sequence[Column]) -> str:
    lines = [["staleness", "method", "seeds", *(title for title, _, _ in columns)]]
    for key in sorted(settings, key=_order):
        found = settings[key]
        numbers = [_number(found, name, spec) for _, name, spec in columns]
        lines.append([_age(key, found), NAMES.get(key.method, key.method), str(len(found)), *numbers])
    for method, row in PUBLISHED.items():
        if any(name in row for _, name, _ in columns):
            numbers = [str(row.get(name, "")) for _, name, _ in columns]
            lines.append([str(PUBLISHED_STALENESS), f"*published: {method}*", "", *numbers])
    return _markdown(lines)


def _errors(settings: dict[Setting, list[Row]]) -> str:
    titles = ["log-prob", "the same, %", "importance weight", "behaviour weight"]
    lines = [["mini-batches", "staleness", "approximation", *(f"error: {title}" for title in titles)]]
    for key in sorted(settings, key=lambda key: (key.mini_batches, key.staleness)):
        for anchor in ANCHORS:
            numbers = [_number(settings[key], f"{anchor}/{error}", ".5f") for error in ERRORS]
            shown = "rollout (the behaviour policy itself)" if anchor == "rollout" else anchor
            lines.append([str(key.mini_batches), str(key.staleness), shown, *numbers])
    return _markdown(lines)


def _gain(settings: dict[Setting, list[Row]]) -> str:
    synchronous = [row for key, found in settings.items() if key.staleness == 0 for row in found]
    by_seed = {row["seed"]: row["samples_s"] for row in synchronous}
    lines = [["", "policy", *(title for title, _, _ in GAIN)]]
    for key in sorted(settings, key=lambda key: (key.staleness, key.policy != "wait", key.policy)):
        rows = [
            {**row, "speed_up": _over(by_seed.get(row["seed"]), row["samples_s"])} for row in settings[key]
        ]
        name = f"bound {key.staleness}" if key.staleness else "synchronous"
        numbers = [_number(rows, quantity, spec) for _, quantity, spec in GAIN]
        lines.append([name, key.policy if key.staleness else "", *numbers])
    return _markdown(lines)


def _derived(row: Row) -> Row:
    """What is shown in other units, and what the parts leave of a step."""
    parts = sum(row[f"{part}_s"] or 0.0 for part in PARTS)
    return {
        **row,
        "clip_percent": _percent(row["clip_ratio"]),
        "other_s": None if row["step_s"] is None else row["step_s"] - parts,
        "trainer_idle_percent": _percent(row["trainer_idle"]),
        "generator_idle_percent": _percent(row["generator_idle"]),
    }


def _percent(share: float | None) -> float | None:
    return None if share is None else 100 * share


def _over(one: float | None, other: float | None) -> float | None:
    return one / other if one and other else None


def _order(key: Setting) -> tuple[bool, int, int]:
    methods = ("loglinear", "linear", "recompute", "forced", "coupled")
    return key.mode != "fixed", key.staleness, methods.index(key.method)


def _age(key: Setting, rows: list[Row]) -> str:
    if key.mode == "fixed":
        return str(key.staleness)
    return f"bound {key.staleness} (was {_number(rows, 'staleness_avg', '.1f')})"


def _number(rows: list[Row], name: str, spec: str) -> str:
    if (found := mean_and_spread(rows, name)) is None:
        return ""
    mean, spread = found
    return f"{mean:{spec}} ± {spread:{spec}}" if len(rows) > 1 else f"{mean:{spec}}"


def _markdown(lines: Iterable[Sequence[str]]) -> str:
    head, *body = [f"| {' | '.join(line)} |" for line in lines]
    return "\n".join([head, "|" + "---|" * (head.count("|") - 1), *body])
