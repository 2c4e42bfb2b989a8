"""The `model` section: where the starting weights and the tokenizer are. Their shape is read in
`model_families.py`."""

from typing import Literal

from pydantic import Field

from megatron_a3po.config.section import Section


class ModelSection(Section):
    """The language model that is trained."""

    hf_path: str = Field(min_length=1)
    """Folder of a Hugging Face checkpoint: config.json, the tokenizer and, if pretrained, *.safetensors."""

    initialization: Literal["pretrained", "random"] = "pretrained"
    """`pretrained` loads the weights of the folder; `random` draws new ones from trainer.seed."""
