"""`train CONFIG [key=value ...] [--dry-run] [--resume auto|never|PATH]`: check everything, then start the run.

Up to the last line nothing heavy is imported and no process is started: whatever is wrong is said at once. Only a dry
run on pretrained weights that are fine so far goes on to compare them, tensor by tensor, with what the model needs.
"""

import argparse
import sys

from megatron_a3po.config import Config, load_config, read_model_shape, to_yaml
from megatron_a3po.config.checks import data_parallel_size
from megatron_a3po.config.plan import plan_lines
from megatron_a3po.environment import read_launch
from megatron_a3po.errors import EXIT_DONE


def run(arguments: argparse.Namespace) -> int:
    """Validate, then either print what would happen or make it happen."""
    launched = read_launch()
    config = load_config(arguments.config, arguments.overrides, world_size=launched.world_size)
    if arguments.dry_run:
        if launched.rank == 0:
            _print_plan(config, launched.world_size)
        return EXIT_DONE

    from megatron_a3po.trainer.launch import launch

    return launch(config, launched, arguments.stop, resume=arguments.resume)


def _print_plan(config: Config, world_size: int | None) -> None:
    if config.model.initialization == "pretrained":
        # What the weights must be is known where torch is; a run checks the same as its first deed.
        from megatron_a3po.weights.sources import check_weights

        check_weights(config.model)
    shape = read_model_shape(config.model.hf_path)
    lines = plan_lines(config, shape, data_parallel_size(config, world_size))
    sys.stdout.write(to_yaml(config) + "\n" + "\n".join(lines) + "\n")
