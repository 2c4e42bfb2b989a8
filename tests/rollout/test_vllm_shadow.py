"""Weights staged in a shadow of a real vLLM model are those of a plain load, bit for bit, and not seen before their
time.

The model is in a process of its own, in vLLM's environment. Its head is not tied; that of the servers in
test_vllm_transports.py is, to which staged weights come the whole way.
"""

import subprocess
from pathlib import Path

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from megatron_a3po.environment import child_environment
from megatron_a3po.rollout.vllm.places import PLUGIN
from tests.vllm_server import NO_VLLM, vllm_python

IN_VLLM = """
import sys, threading, torch
from pathlib import Path
from safetensors.torch import load_file
from vllm import LLM, SamplingParams
from vllm.config import set_current_vllm_config
from a3po_vllm.loading import finish, load
from a3po_vllm.shadow import Shadow, can_be_shadowed

folder = Path(sys.argv[1])
weights = [list(load_file(folder / str(version) / "model.safetensors").items()) for version in range(3)]
llm = LLM(str(folder / "0"), enforce_eager=True, skip_tokenizer_init=True, dtype="float32", max_model_len=64,
          max_num_seqs=4, enable_prefix_caching=False)
worker = llm.llm_engine.model_executor.driver_worker.worker
model, config = worker.model_runner.get_model(), worker.vllm_config

def log_probs():
    sampling = SamplingParams(max_tokens=1, prompt_logprobs=0, detokenize=False)
    (answer,) = llm.generate({"prompt_token_ids": list(range(2, 40))}, sampling, use_tqdm=False)
    return torch.tensor([next(iter(one.values())).logprob for one in answer.prompt_logprobs[1:]])

def steered(act):
    with set_current_vllm_config(config):
        act()
        finish(model, config.model_config)

def loaded(version):
    steered(lambda: load(model, config.model_config, [[pair] for pair in weights[version]]))
    return log_probs()

plain = [loaded(version) for version in (1, 2, 0)]
plain = [plain[2], *plain[:2]]
assert all((plain[one] - plain[one - 1]).abs().max() > 0.1 for one in range(3))
assert can_be_shadowed(model)
shadow = Shadow(model, config.model_config)
for old, new in ((0, 1), (1, 2), (2, 0)):
    filling = threading.Thread(target=shadow.fill, args=([[pair] for pair in weights[new]],))
    filling.start()
    filling.join()
    assert torch.equal(log_probs(), plain[old])
    steered(shadow.place)
    assert torch.equal(log_probs(), plain[new])
# A plain load in between, and a transfer that ends too early.
assert torch.equal(loaded(1), plain[1])
try:
    shadow.fill([weights[2][:3]])
except ValueError as error:
    assert "lacks weights" in str(error)
else:
    raise AssertionError("three tensors are no model")
assert torch.equal(log_probs(), plain[1])
shadow.fill([weights[2]])
steered(shadow.place)
assert torch.equal(log_probs(), plain[2])
print("as loaded")
"""


def test_staged_weights_are_the_loaded_ones_and_not_before_they_are_placed(tmp_path: Path):
    python = vllm_python()
    if python is None:
        pytest.skip(NO_VLLM)
    config = LlamaConfig(
        vocab_size=64,
        hidden_size=64,
        intermediate_size=96,
        num_hidden_layers=2,
        num_attention_heads=2,
        num_key_value_heads=1,
        max_position_embeddings=64,
        tie_word_embeddings=False,
        dtype="float32",  # pyright: ignore[reportCallIssue]
    )
    for version in range(3):
        torch.manual_seed(version)
        model = LlamaForCausalLM(config)
        with torch.no_grad():
            for parameter in model.parameters():
                parameter.normal_(0.0, 0.15)
        model.save_pretrained(tmp_path / str(version))
    environment = child_environment(
        PYTHONPATH=str(PLUGIN),
        OMP_NUM_THREADS="1",
        VLLM_ENABLE_V1_MULTIPROCESSING="0",
        VLLM_CPU_KVCACHE_SPACE="1",
        VLLM_CPU_OMP_THREADS_BIND="nobind",
        VLLM_NO_USAGE_STATS="1",
    )
    done = subprocess.run(
        [python, "-c", IN_VLLM, str(tmp_path)], env=environment, capture_output=True, text=True, check=False
    )
    assert done.stdout.endswith("as loaded\n"), done.stderr[-3000:]
