"""The exception tree and the exit codes: every way in which a command can end.

    A3POError                 exit code
    |-- ConfigError               2      a configuration that cannot be run; holds every problem at once
    |-- InputError                2      a data, model or checkpoint file that is missing or wrong
    |-- OutputError               3      a file that cannot be written: the disk is full
    `-- RunError                  3      the run stopped and needs a person
        |-- TrainingError                  non-finite numbers, too many skipped steps, a dead rank
        |   `-- AbsentRank         70      a rank that did not come: a machine's doing, so a Slurm job tries again
        |-- RolloutError                   the rollout process or an engine failed
        |   `-- ServersGone                no vLLM server is left; what they had finished still is
        |-- RewardError                    a reward function kept failing
        `-- FencedError                    a later start has taken the run over

A problem is one clear sentence: the key or path, what was found, what is wanted, the mend.
What is not in the tree is a bug of ours and ends with a traceback. Next: `__main__.py`, where they are
caught.
"""

from collections.abc import Iterable

EXIT_DONE = 0
EXIT_DIFFERENT = 1
EXIT_BAD_INPUT = 2
EXIT_NEEDS_PERSON = 3
EXIT_CRASHED = (
    70  # of a rank under a launcher: an error nobody foresaw, a broken device, a rank that does not come
)
EXIT_STOPPED = 75
EXIT_INTERRUPTED = 130


class A3POError(Exception):
    """Anything this package raises on purpose. `problems` holds one sentence each."""

    exit_code = EXIT_NEEDS_PERSON

    def __init__(self, problems: str | Iterable[str]):
        self.problems: list[str] = [problems] if isinstance(problems, str) else list(problems)
        super().__init__("\n".join(self.problems))

    def __reduce__(self):
        # Exceptions cross process boundaries here, and pickle would otherwise call the class with the joined
        # text.
        return type(self), (self.problems,)


class ConfigError(A3POError):
    """The configuration is wrong: unknown key, wrong type, impossible combination."""

    exit_code = EXIT_BAD_INPUT


class InputError(A3POError):
    """A file the configuration points at is missing, malformed or of a kind that is not supported."""

    exit_code = EXIT_BAD_INPUT


class OutputError(A3POError):
    """A file cannot be written. Nothing of it is left under its final name."""


class RunError(A3POError):
    """The run cannot go on by itself."""

    exit_code = EXIT_NEEDS_PERSON


class TrainingError(RunError):
    """The trainer's side failed."""


class AbsentRank(TrainingError):
    """A rank never started."""

    exit_code = EXIT_CRASHED


class RolloutError(RunError):
    """The generating side failed; the message carries its own traceback."""


class ServersGone(RolloutError):
    """No vLLM server has been there for too long. The rollout process is: a checkpoint can be written."""


class RewardError(RunError):
    """A reward function failed too often in a row; the message carries its own traceback."""


class FencedError(RunError):
    """A later start has taken the run over: this one must write nothing more."""
