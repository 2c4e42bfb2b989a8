"""How many groups may be under way: the usual admission rule of asynchronous RL, and its book-keeping.

    admitted <= (max_staleness + version + 1) * groups_per_step

`version` is the one the engines serve and `admitted` counts consumed groups too. A group that will never be trained on
(filtered, failed, evicted) gives its slot back. Alone the rule does *not* bound staleness: a straggler is overtaken by
groups admitted after it. The policies in `buffer.py` make a bound of it. And it is a bound, not an aim: when within it
a group starts is decided in `appetite.py`.
"""


class StalenessGate:
    """Plain counting; `admitted` starts at the number of groups consumed before, after a resume."""

    def __init__(self, max_staleness: int, groups_per_step: int, consumed: int = 0) -> None:
        self.max_staleness = max_staleness
        self.groups_per_step = groups_per_step
        self.admitted = consumed

    def limit(self, version: int) -> int:
        return (self.max_staleness + version + 1) * self.groups_per_step

    def may_admit(self, version: int) -> bool:
        return self.admitted < self.limit(version)

    def is_next(self, version: int) -> bool:
        """Whether the next group is of a batch that `version` or the one after it trains on: while the trainer steps,
        nobody can make it younger by starting it later."""
        return self.admitted < (version + 2) * self.groups_per_step

    def admit(self) -> None:
        self.admitted += 1

    def give_back(self, num_groups: int = 1) -> None:
        self.admitted -= num_groups
