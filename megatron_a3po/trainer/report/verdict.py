"""What is said of a run before any curve: what ran, whether it learned, what it cost, and a table of figures."""

from dataclasses import dataclass
from typing import Any

from megatron_a3po.trainer.report.past import Past
from megatron_a3po.trainer.summary import duration, mean_of

NOTHING = "-"
EDGE_STEPS = 10  # the first and the last few steps, whose rewards are compared
GIB = 2.0**30
MEMORY = {
    "a rank": "memory/rank_bytes",
    "the rollout process": "memory/rollout_bytes",
    "a GPU": "memory/device_bytes",
}
MOVED = 0.005  # an accuracy or a reward that changed by less stayed where it was


@dataclass(frozen=True)
class Verdict:
    """Three sentences on a run."""

    status: str
    ran: str
    learned: str
    cost: str
    error: str | None  # of a run that stopped or crashed


def verdict(past: Past) -> Verdict:
    return Verdict(status(past), _ran(past), _learned(past), _cost(past), past.error)


def figures(past: Past) -> dict[str, str]:
    """Label -> text of one run."""
    rows, summary = past.rows, past.summary or {}
    before, after = before_and_after(past)
    gain = None if before is None or after is None else after - before
    seconds, waited = mean_of(rows, "time/step"), mean_of(rows, "time/wait_for_samples")
    tokens = mean_of(rows, "tokens/trained")
    stalest = [row["staleness/max"] for row in rows if row.get("staleness/max") is not None]
    multi_version = summary.get("multi_version_fraction", mean_of(rows, "rollout/multi_version_fraction"))
    return {
        "status": status(past),
        "starts": _number(rows[-1].get("attempt"), ".0f") if rows else NOTHING,
        "wall time": _wall_time(past) or NOTHING,
        "accuracy, before": _number(before, ".3f"),
        "accuracy, latest": _number(after, ".3f"),
        "gain": _number(gain, "+.3f"),
        f"reward, first {EDGE_STEPS} steps": _number(mean_of(rows[:EDGE_STEPS], "reward/avg"), ".3f"),
        f"reward, last {EDGE_STEPS} steps": _number(mean_of(rows[-EDGE_STEPS:], "reward/avg"), ".3f"),
        "staleness, mean": _number(mean_of(rows, "staleness/avg"), ".2f"),
        "staleness, largest": _number(max(stalest, default=None), ".0f"),
        "of several versions": _number(multi_version, ".0%"),
        "forwards per token": _number(mean_of(rows, "forwards_per_token"), ".4g"),
        "updates skipped": _number(sum(row.get("steps_skipped") or 0 for row in rows), ".0f"),
        "seconds per step": _number(seconds, ".3g"),
        "trained tokens/s": _number(tokens / seconds if tokens and seconds else None, ",.0f"),
        "memory": ", ".join(_memory(past)) or NOTHING,
        "waiting for samples": _number(waited / seconds if waited is not None and seconds else None, ".0%"),
    }


def differing_keys(pasts: list[Past]) -> dict[str, list[str]]:
    """Key -> value in each run, of the keys in which they were configured differently."""
    table = {
        key: [str(past.config.get(key, NOTHING)) for past in pasts]
        for key in dict.fromkeys(key for past in pasts for key in past.config)
    }
    return {key: values for key, values in table.items() if key != "run_dir" and len(set(values)) > 1}


def before_and_after(past: Past) -> tuple[float | None, float | None]:
    """Accuracy before the first step, and the latest: after the last step, or where a run has got to."""
    if past.summary is not None:
        return past.summary.get("accuracy_before"), past.summary.get("accuracy_after")
    latest = max(past.accuracies, default=0)
    return past.accuracies.get(0), past.accuracies[latest] if latest > 0 else None


def status(past: Past) -> str:
    if past.summary is not None:
        return f"{past.summary['status']}, {past.summary['steps']} steps"
    reached, planned = past.rows[-1]["step"] if past.rows else 0, past.config.get("trainer.steps", "?")
    return f"{'running' if past.is_running else 'stopped or crashed'}, step {reached} of {planned}"


def _ran(past: Past) -> str:
    config = past.config
    parts = [f"{_method(config)} on {config.get('model.hf_path', 'an unknown model')}"]
    if (fixed := config.get("rollout.fixed_staleness")) is not None:
        parts.append(f"every token {fixed} versions old")
    elif past.rows:
        stalest = max((row.get("staleness/max") or 0 for row in past.rows), default=0)
        bound = config.get("rollout.max_staleness")
        parts.append(
            f"tokens up to {stalest:.0f} versions old" + (f" (bound {bound})" if bound is not None else "")
        )
    shape = [config.get(f"trainer.{key}") for key in ("steps", "prompts_per_step")]
    if None not in shape:
        samples, minis = config.get("rollout.samples_per_prompt"), config.get("actor.num_mini_batches")
        parts.append(
            f"{shape[0]} steps of {shape[1]} prompts x {samples} samples in {minis} mini-batch"
            + "es" * (minis != 1)
        )
    return ", ".join(parts) + "."


def _method(config: dict[str, Any]) -> str:
    if config.get("actor.use_decoupled_loss") is False:
        return "Coupled loss"
    match config.get("actor.prox_logp_method"):
        case "loglinear" | "linear" as method:
            return f"A-3PO ({method})"
        case "recompute":
            return "Decoupled loss, proximal policy recomputed"
        case "metrics":
            return "Decoupled loss, proximal policy recomputed and its approximations measured"
        case _:
            return "A run"


def _learned(past: Past) -> str:
    sentences = []
    before, after = before_and_after(past)
    if before is not None and after is not None:
        sentences.append(f"Held-out accuracy {_went(before, after)}.")
    # Two edges of their own, however short the run.
    edge = min(EDGE_STEPS, len(past.rows) // 2)
    first, last = (
        mean_of(rows, "reward/avg") for rows in (past.rows[:edge], past.rows[len(past.rows) - edge :])
    )
    if first is not None and last is not None:
        steps = "step" if edge == 1 else f"{edge} steps"
        sentences.append(f"Sampled reward {_went(first, last)} (means of the first and the last {steps}).")
    return " ".join(sentences) or "Too little was recorded to say whether it learned."


def _went(before: float, after: float) -> str:
    if abs(after - before) < MOVED:
        return f"stayed at {after:.3f}"
    return f"{'rose' if after > before else 'fell'} from {before:.3f} to {after:.3f} ({after - before:+.3f})"


def _cost(past: Past) -> str:
    rows, parts = past.rows, []
    if wall_time := _wall_time(past):
        parts.append(wall_time)
    seconds, waited = mean_of(rows, "time/step"), mean_of(rows, "time/wait_for_samples")
    if seconds:
        share = f", {waited / seconds:.0%} of it waiting for samples" if waited is not None else ""
        parts.append(f"{seconds:.3g} s a step{share}")
    if tokens := sum(row.get("tokens/trained") or 0 for row in rows):
        parts.append(f"{tokens:,.0f} trained tokens")
    if (forwards := mean_of(rows, "forwards_per_token")) is not None:
        parts.append(f"{forwards:.4g} model forwards for each")
    if memory := _memory(past):
        parts.append(f"at most {', '.join(memory)}")
    return "; ".join(parts) + "." if parts else "No step was recorded."


def _wall_time(past: Past) -> str | None:
    """Of a run without a summary that of its recorded steps."""
    if past.summary is not None:
        seconds = past.summary.get("wall_seconds")
        return None if seconds is None else f"{duration(seconds)} in all"
    seconds = sum(row.get("time/step") or 0.0 for row in past.rows)
    return f"{duration(seconds)} in its steps so far" if seconds else None


def _memory(past: Past) -> list[str]:
    """The most of each kind of process."""
    most = {
        of: max((row[name] for row in past.rows if row.get(name) is not None), default=None)
        for of, name in MEMORY.items()
    }
    return [f"{bytes_ / GIB:.2g} GiB {of}" for of, bytes_ in most.items() if bytes_ is not None]


def _number(value: float | None, form: str) -> str:
    return NOTHING if value is None else f"{value:{form}}"
