"""Just-in-time admission: how long the next group can wait and still be there when the trainer wants its batch.

    starts at    (when the trainer wants the batch) - (what a batch takes from its admission until it is finished)

Both come from what was observed: the trainer's own time from batch to batch, and the batches taken. The estimates
follow at once what makes a start more urgent, and slowly what makes it less so: a trainer that waits costs more than a
sample that is a little older. Where generation cannot keep up they grow until the staleness gate alone decides. Groups
that turn out to be without signal are reckoned with. Pure: `now` is the caller's clock. Used by `continuous.py`.
"""

import math
import statistics
from collections.abc import Callable, Iterable
from dataclasses import dataclass

RELAXING = 0.05  # the weight of a new observation that makes admission less urgent


@dataclass
class Stay:
    """One group between its admission and its end."""

    admitted: float
    finished: float | None = None


class Appetite:
    """What is known of the trainer's next wishes, of the groups under way, and of how long those take."""

    def __init__(self, groups_per_step: int) -> None:
        self.groups_per_step = groups_per_step
        self.period_s: float | None = None  # from a batch taken to the next one wanted
        self.lead_s: float | None = None  # from the admission of a batch to its last group
        self.kept_share = 1.0  # of finished groups those that are trained on
        self._wanted = True
        self._taken: float | None = None
        self._stays: dict[int, Stay] = {}

    def delay_s(self, now: float, num_finished: int, num_unfinished: int) -> float:
        """For how long the next group need not be admitted, behind so many that are here; infinite where nothing is
        known yet. It may change with every event that is told here."""
        batches_ahead = int((num_finished + self._surely_kept(num_unfinished)) // self.groups_per_step)
        if self.lead_s is None or self.period_s is None:
            return 0.0 if batches_ahead == 0 else math.inf
        # A trainer that is late says nothing about how fast it will be afterwards.
        next_wish_s = 0.0 if self._wanted or self._taken is None else self._taken + self.period_s - now
        return max(next_wish_s, 0.0) + batches_ahead * self.period_s - self.lead_s

    def want(self, now: float) -> None:
        """The trainer asks for a batch."""
        if self._taken is not None:
            self.period_s = _cautiously(self.period_s, now - self._taken, min)
        self._wanted = True

    def take(self, prompt_indices: Iterable[int], now: float) -> None:
        """The trainer has its batch, of these groups."""
        stays = [self._stays.pop(index) for index in prompt_indices if index in self._stays]
        finished = [stay.finished for stay in stays if stay.finished is not None]
        if finished:
            # The median: neither a straggler of long ago nor a late replacement speaks for the batch.
            admitted = statistics.median(stay.admitted for stay in stays)
            self.lead_s = _cautiously(self.lead_s, max(finished) - admitted, max)
        self._wanted, self._taken = False, now

    def admit(self, prompt_index: int, now: float) -> None:
        self._stays[prompt_index] = Stay(now)

    def finish(self, prompt_index: int, now: float) -> None:
        self._stays[prompt_index].finished = now
        self._count(1.0)

    def discard(self, prompt_index: int) -> None:
        """A group that will not be trained on: without signal, or failed."""
        del self._stays[prompt_index]
        self._count(0.0)

    def evict(self, prompt_index: int) -> None:
        """A finished group that is too old."""
        self._stays.pop(prompt_index, None)

    def _surely_kept(self, num_unfinished: int) -> float:
        """As many of those under way as will be trained on, two standard deviations of bad luck allowed for."""
        expected = self.kept_share * num_unfinished
        return max(0.0, expected - 2 * math.sqrt(expected * (1 - self.kept_share)))

    def _count(self, kept: float) -> None:
        self.kept_share += (kept - self.kept_share) / (2 * self.groups_per_step)


def _cautiously(known: float | None, observed: float, more_urgent: Callable[[float, float], float]) -> float:
    """An exponential average that a more urgent observation replaces."""
    if known is None:
        return observed
    return more_urgent(observed, known + RELAXING * (observed - known))
