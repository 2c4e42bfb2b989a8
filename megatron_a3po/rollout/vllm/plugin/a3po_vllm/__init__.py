"""What megatron_a3po adds to a vLLM server: weights that a trainer publishes, a bearer token on every route.

This folder is an import path of its own: put the folder above on PYTHONPATH of the environment vLLM is installed in,
which need not be the trainer's, and vLLM finds the plugin by the metadata beside it. Nothing here imports
megatron_a3po. Next: `weights.py` and `access.py`; `__main__.py` is how servers are launched.
"""

from a3po_vllm.lifetime import end_with_launcher

BACKEND = "a3po"


def register() -> None:
    """Called by vLLM in each of its processes, more than once in some."""
    from vllm.distributed.weight_transfer.factory import WeightTransferEngineFactory

    end_with_launcher()
    if BACKEND not in WeightTransferEngineFactory._registry:
        WeightTransferEngineFactory.register_engine(BACKEND, "a3po_vllm.weights", "PublishedWeights")
