import json
import time
from pathlib import Path

from megatron_a3po.config import load_config
from megatron_a3po.rollout.client import RolloutClient


def write_config(folder: Path, versions: list[Path], *overrides: str):
    rows = [{"prompt": f"{a}+{a + 1}=", "answer": str(2 * a + 1)} for a in range(10, 50)]
    text = "".join(json.dumps(row) + "\n" for row in rows)
    for name in ("train.jsonl", "held_out.jsonl"):
        (folder / name).write_text(text)
    (folder / "config.yaml").write_text(
        f"""
run_dir: {folder}/run
model: {{hf_path: {versions[0]}}}
data: {{train: {folder}/train.jsonl, held_out: {folder}/held_out.jsonl, max_prompt_tokens: 16}}
reward: {{type: exact_number}}
rollout: {{samples_per_prompt: 2, max_response_tokens: 12, filter_no_signal: false, max_staleness: 2}}
trainer: {{steps: 4, prompts_per_step: 4}}
"""
    )
    return load_config(folder / "config.yaml", overrides)


def test_smoke(tmp_path, versions):
    config = write_config(tmp_path, versions)
    t = time.time()
    client = RolloutClient.start(config, tmp_path / "run", None, 0, versions[0])
    try:
        batch = client.next_batch(0)
        print(time.time() - t, batch.statistics)
        assert len(batch.groups) == 4
        client.publish(1, versions[1]).result(10)
        evaluation = client.evaluate(1).result(10)
        print(evaluation)
        state = client.state()
        print(state["producer"]["admission_order"], state["producer"]["cursor"])
        print(client.sampled_between(0, time.monotonic()), client.probe(1).result(3))
    finally:
        client.stop()
