"""A step's metrics from a dumped batch and log-probs, in plain numpy and float64: the other implementation.

Nothing of the package is used. `step_metrics` takes what `numpy.load` gives for a file of `trainer.dump_batches`, and
for each token of the batch its log-probs: t (the target's, in its own mini-batch) and g (the weights the step began
with), and the entropy at t.
"""

import numpy as np

UPDATE = "ppo_actor/update"
EPS, CAP = 0.2, 5.0
Vector = np.ndarray


def responses(batch: dict[str, Vector]) -> list[slice]:
    """Where each trajectory's response lies in the flat token fields."""
    ends = np.cumsum(batch["lengths"])
    starts = ends - batch["lengths"] + batch["prompt_lengths"]
    return [slice(start, end) for start, end in zip(starts, ends)]


def per_token(batch: dict[str, Vector], values: Vector) -> Vector:
    """One value per trajectory at each of its response tokens."""
    return np.concatenate([np.full(s.stop - s.start, v) for s, v in zip(responses(batch), values)])


def grpo(batch: dict[str, Vector]) -> Vector:
    rewards = batch["reward"].reshape(len(batch["group_sizes"]), -1)
    centred = rewards - rewards.mean(1, keepdims=True)
    return (centred / (rewards.std(1, ddof=1, keepdims=True) + 1e-5)).ravel()


def anchors(b: Vector, t: Vector, d: Vector) -> dict[str, Vector]:
    share = 1.0 / np.maximum(d, 1)
    stale = d > 1
    return {
        "loglinear": np.where(stale, share * b + (1 - share) * t, b),
        "linear": np.where(stale, np.log(share * np.exp(b) + (1 - share) * np.exp(t)), b),
        "rollout": b,
    }


def step_metrics(
    batch: dict[str, Vector], t: Vector, g: Vector, entropy: Vector, num_mini_batches: int
) -> dict[str, float]:
    """The row of a step in `metrics` mode: the anchor is g, three approximations are measured against it."""
    where = responses(batch)
    b = np.concatenate([batch["behave_logp"][s] for s in where]).astype(np.float64)
    d = int(batch["current_version"]) - np.concatenate([batch["versions"][s] for s in where])
    part = per_token(batch, np.repeat(np.arange(num_mini_batches), len(where) // num_mini_batches))
    advantage = per_token(batch, grpo(batch))

    ratio, weight = np.exp(t - g), np.exp(g - b)
    plain, clipped = ratio * advantage, np.clip(ratio, 1 - EPS, 1 + EPS) * advantage
    loss = -np.minimum(weight, CAP) * np.minimum(plain, clipped)
    fresh = (d == 0) & (part == 0)
    row = {
        "loss": np.mean([loss[part == one].mean() for one in range(num_mini_batches)]),
        "tokens/trained": len(b),
        "staleness/avg": d.mean(),
        "staleness/max": d.max(),
        f"{UPDATE}/clipped_tokens": np.sum(clipped < plain),
        f"{UPDATE}/clip_ratio": np.mean(clipped < plain),
        f"{UPDATE}/entropy/avg": entropy.mean(),
        f"{UPDATE}/kl/avg": np.mean(np.exp(t - b) - 1 - (t - b)),
        "sampler_trainer/tokens": fresh.sum(),
        "sampler_trainer/abs_diff/avg": np.abs(t - b)[fresh].mean(),
        "sampler_trainer/abs_diff/max": np.abs(t - b)[fresh].max(),
        f"{UPDATE}/compute_logp/prox_logp_gt/avg": g.mean(),
    }
    for name, values in (("importance_weight", ratio), ("behave_imp_weight", weight)):
        row |= {f"{UPDATE}/{name}/{of.__name__}": of(values) for of in (np.min, np.max)}
        row[f"{UPDATE}/{name}/avg"] = values.mean()
    row = {name.replace("/amin", "/min").replace("/amax", "/max"): value for name, value in row.items()}
    for method, a in anchors(b, t, d).items():
        for column, values in approximation_columns(a, b, t, g).items():
            row[f"{UPDATE}/compute_logp/{method}/{column}/avg"] = values.mean()
    return {name: float(value) for name, value in row.items()}


def approximation_columns(a: Vector, b: Vector, t: Vector, g: Vector) -> dict[str, Vector]:
    def percent(found: Vector, truth: Vector) -> Vector:
        return 100 * np.abs(found - truth) / (np.abs(truth) + 1e-8)

    weight, ratio = np.exp(a - b), np.exp(t - a)
    true_weight, true_ratio = np.exp(g - b), np.exp(t - g)
    return {
        "approx_logp": a,
        "behave_imp_weight": weight,
        "importance_weight": ratio,
        "abs_error": np.abs(a - g),
        "squared_error": (a - g) ** 2,
        "rel_error": percent(a, g),
        "behave_imp_weight_abs_error": np.abs(weight - true_weight),
        "behave_imp_weight_rel_error": percent(weight, true_weight),
        "importance_weight_abs_error": np.abs(ratio - true_ratio),
        "importance_weight_rel_error": percent(ratio, true_ratio),
    }
