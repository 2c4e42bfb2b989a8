"""Every knob once, typed, documented and checked before anything starts; imports without torch.

Read `config.py` for the tree, then the section you need; `load.py` reads it, `checks.py` refuses what
cannot be.
"""

from megatron_a3po.config.config import Config
from megatron_a3po.config.load import load_config, to_yaml
from megatron_a3po.config.model_families import read_model_shape
from megatron_a3po.config.model_shape import ModelShape

__all__ = ["Config", "ModelShape", "load_config", "read_model_shape", "to_yaml"]
