"""The real command line in a process of its own: every refusal, and what a refusal must not do."""

import importlib.util
import os
import resource
import subprocess
import sys
from dataclasses import dataclass
from pathlib import Path

import pytest

from megatron_a3po.__main__ import main, parse_arguments
from megatron_a3po.errors import ConfigError, InputError, RewardError
from tests.run_files import write_model, write_rows, write_run

# Loaded by the interpreter before the command: notes processes that are started and heavy imports.
WATCHER = """
import os, sys
log = os.open(os.environ["WATCHER_LOG"], os.O_WRONLY | os.O_CREAT | os.O_APPEND)
STARTS = ("os.fork", "os.forkpty", "os.posix_spawn", "os.spawn", "os.exec", "os.system", "subprocess.Popen")
HEAVY = ("torch", "transformers", "megatron", "numpy")
def watch(event, arguments):
    if event in STARTS or event == "import" and arguments[0] in HEAVY:
        os.write(log, f"{event} {arguments[0]}\\n".encode())
sys.addaudithook(watch)
"""
LAUNCHER_VARIABLES = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "SLURM_PROCID")


@dataclass(frozen=True)
class Outcome:
    """How a command ended; `watched` holds the processes it started and the heavy modules it imported."""

    exit_code: int
    stdout: str
    stderr: str
    cpu_s: float
    watched: list[str]


@pytest.fixture
def run_file(tmp_path: Path) -> Path:
    return write_run(tmp_path)


def command(tmp_path: Path, *arguments: str, **variables: str) -> Outcome:
    (tmp_path / "sitecustomize.py").write_text(WATCHER)
    log = tmp_path / "watched.txt"
    inherited = {name: text for name, text in os.environ.items() if name not in LAUNCHER_VARIABLES}
    root = str(Path(__file__).parent.parent)
    environment = inherited | {"PYTHONPATH": f"{tmp_path}:{root}", "WATCHER_LOG": str(log)} | variables
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    done = subprocess.run(
        [sys.executable, "-m", "megatron_a3po", *arguments],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
        check=False,
    )
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    cpu_s = after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime
    return Outcome(done.returncode, done.stdout, done.stderr, cpu_s, log.read_text().splitlines())


def assert_refused(outcome: Outcome, *fragments: str) -> None:
    assert outcome.exit_code == 2, outcome.stderr
    assert "Traceback" not in outcome.stderr
    assert outcome.stdout == ""
    for fragment in fragments:
        assert fragment in outcome.stderr
    assert all(line.endswith((".", "?", "=...")) for line in outcome.stderr.splitlines()), outcome.stderr
    assert outcome.watched == []
    # A process's own time: a loaded machine makes the wall clock say nothing.
    assert outcome.cpu_s < 1.0


REFUSED = {
    "unknown key": (["actor.learning_rat=1"], ["actor.learning_rat is not a key"]),
    "mistyped key": (["actor.num_mini_batchs=2"], ["did you mean actor.num_mini_batches?"]),
    "mistyped section": (["actr.lr=1"], ["actr is not a key", "did you mean actor?"]),
    "key of another section": (["actor.temperature=1"], ["did you mean rollout.temperature?"]),
    "key deep in a union": (["reward.timeout=1"], ["did you mean reward.timeout_s?"]),
    "no override": (["actor.lr"], ['"actor.lr" is not an override', "key=value"]),
    "yes for a rate": (["actor.lr=yes"], ["actor.lr is true", "a number"]),
    "text for a rate": (["actor.lr=fast"], ['actor.lr is "fast"', "a number"]),
    "fraction for a count": (["trainer.steps=1.5"], ["trainer.steps is 1.5", "a whole number"]),
    "quoted number": (["trainer.steps='\"5\"'"], ["trainer.steps", "a whole number"]),
    "number for text": (["data.train=5"], ["data.train is 5", "text"]),
    "number for a switch": (["actor.bf16=1"], ["actor.bf16 is 1", "true or false"]),
    "negative count": (["trainer.steps=-1"], ["trainer.steps is -1", "at least 1"]),
    "infinite rate": (["actor.lr=.inf"], ["actor.lr", "finite"]),
    "value for a section": (["actor=3"], ["actor is 3", "a section"]),
    "unknown choice": (["actor.advantage=gae"], ["actor.advantage", "'grpo'"]),
    "unknown reward": (["reward.type=guess"], ["reward.type", "'exact_number'"]),
    "missing key": (["warm_start.lr=1e-3"], ["warm_start.steps is missing"]),
    "wiring": (["run_dir=runs/${trainer.seed}"], ["run_dir", "write the value itself"]),
    "method without the decoupled loss": (
        ["actor.use_decoupled_loss=false", "actor.prox_logp_method=loglinear"],
        ["actor.prox_logp_method", "actor.use_decoupled_loss"],
    ),
    "metrics without the decoupled loss": (
        ["actor.use_decoupled_loss=false", "actor.prox_logp_method=metrics"],
        ["actor.prox_logp_method", "actor.use_decoupled_loss"],
    ),
    "mask without the decoupled loss": (
        ["actor.use_decoupled_loss=false", "actor.behave_weight=mask"],
        ["actor.behave_weight"],
    ),
    "rollout as a method": (
        ["actor.prox_logp_method=rollout"],
        ["actor.prox_logp_method", "actor.use_decoupled_loss=false"],
    ),
    "forced recompute without recompute": (
        ["actor.recompute_every_token=true", "actor.prox_logp_method=linear"],
        ["actor.recompute_every_token"],
    ),
    "no correction": (
        ["actor.behave_weight=off"],
        ["a staleness bound of 1, so stale samples would go uncorrected", "off_at_any_staleness"],
    ),
    "dr_grpo with the token mean": (["actor.advantage=dr_grpo"], ["actor.loss_mean=constant"]),
    "group advantages of one sample": (["rollout.samples_per_prompt=1"], ["rollout.samples_per_prompt"]),
    "filter that leaves nothing": (
        ["rollout.samples_per_prompt=1", "actor.advantage=reinforce_pp"],
        ["rollout.filter_no_signal=false"],
    ),
    "two bounds": (
        ["rollout.fixed_staleness=2", "rollout.max_staleness=2"],
        ["rollout.max_staleness", "rollout.fixed_staleness"],
    ),
    "policy for a fixed staleness": (
        ["rollout.fixed_staleness=2", "rollout.staleness_policy=drop"],
        ["rollout.staleness_policy", "rollout.fixed_staleness"],
    ),
    "negative staleness": (["rollout.max_staleness=-1"], ["rollout.max_staleness", "at least 0"]),
    "top-p": (["rollout.top_p=0.9"], ["rollout.top_p is 0.9", "must be 1.0"]),
    "top-k": (["rollout.top_k=50"], ["rollout.top_k is 50"]),
    "repetition penalty": (["rollout.repetition_penalty=1.1"], ["rollout.repetition_penalty is 1.1"]),
    "temperature": (["rollout.temperature=0"], ["rollout.temperature is 0", "greater than 0"]),
    "KL": (["actor.kl_coef=-0.1"], ["actor.kl_coef is -0.1", "at least 0"]),
    "dropout": (["actor.hidden_dropout=0.1"], ["actor.hidden_dropout is 0.1", "must be 0"]),
    "attention dropout": (["actor.attention_dropout=0.1"], ["actor.attention_dropout is 0.1"]),
    "context parallelism": (["actor.context_parallel_size=2"], ["actor.context_parallel_size is 2"]),
    "expert parallelism": (["actor.expert_model_parallel_size=2"], ["actor.expert_model_parallel_size is 2"]),
    "mini-batches": (
        ["actor.num_mini_batches=3"],
        ["actor.num_mini_batches is 3", "trainer.prompts_per_step=8"],
    ),
    "more copies than trajectories": (
        ["actor.data_parallel_size=65"],
        ["actor.data_parallel_size is 65", "64 trajectories"],
    ),
    "TP against heads": (["actor.tensor_model_parallel_size=3"], ["divide the model's 4 attention heads"]),
    "TP against key-value heads": (
        ["actor.tensor_model_parallel_size=4"],
        ["actor.tensor_model_parallel_size is 4", "2 key-value heads"],
    ),
    "PP against layers": (["actor.pipeline_model_parallel_size=3"], ["divide the model's 4 layers"]),
    "VPP against layers": (
        ["actor.pipeline_model_parallel_size=2", "actor.virtual_pipeline_model_parallel_size=4"],
        ["actor.virtual_pipeline_model_parallel_size is 8", "4 layers"],
    ),
    "VPP without PP": (
        ["actor.virtual_pipeline_model_parallel_size=2"],
        ["actor.virtual_pipeline_model_parallel_size is 2", "actor.pipeline_model_parallel_size is 1"],
    ),
    "SP without TP": (["actor.sequence_parallel=true"], ["actor.sequence_parallel is true"]),
    "overlap alone": (["actor.overlap_param_gather=true"], ["actor.overlap_grad_reduce=true"]),
    "rate below its end": (["actor.min_lr=1"], ["actor.min_lr is 1", "actor.lr"]),
    "endless warm-up": (["actor.lr_warmup_iters=10"], ["actor.lr_warmup_iters is 10"]),
    "endless supervised warm-up": (["warm_start.steps=10"], ["warm_start.lr_warmup_iters is 10"]),
    "micro-batch below a trajectory": (
        ["actor.max_tokens_per_micro_batch=47"],
        ["actor.max_tokens_per_micro_batch is 47", "48 tokens"],
    ),
    "more tokens than positions": (
        ["rollout.max_response_tokens=241"],
        ["257", "256 positions"],
    ),
    "no reward": (["reward=null"], ["reward is missing"]),
    "reward module": (["reward={type: function, path: 'not_there:f'}"], ["reward.path", "not_there"]),
    "reward function": (
        ["reward={type: function, path: 'json.decoder:lods'}"],
        ["reward.path", "decoder.py has no lods"],
    ),
    "reward submodule": (["reward={type: function, path: 'json.loads:f'}"], ["json has no module loads"]),
    "reward path": (["reward={type: function, path: not_there}"], ["reward.path", "must be"]),
    "evaluation without data": (["trainer.evaluate_every=5"], ["data.held_out is missing"]),
    "pretrained without weights": (["model.initialization=pretrained"], ["safetensors"]),
    "no model": (["model.hf_path=nowhere"], ["model.hf_path", "nowhere"]),
    "no data": (["data.train=nowhere.jsonl"], ["data.train", "nowhere.jsonl is not there"]),
    "no held-out data": (["data.held_out=nowhere.jsonl"], ["data.held_out", "nowhere.jsonl is not there"]),
    "no batches": (["trainer.replay=nowhere"], ["trainer.replay", "nowhere is not there"]),
    "evaluation of a replay": (
        ["trainer.replay=model", "trainer.evaluate_every=1"],
        ["trainer.evaluate_every", "trainer.replay"],
    ),
}


if importlib.util.find_spec("transformer_engine") is None:
    REFUSED["Transformer Engine"] = (
        ["actor.transformer_impl=transformer_engine"],
        ["actor.transformer_impl"],
    )


@pytest.mark.parametrize(("overrides", "fragments"), REFUSED.values(), ids=REFUSED)
def test_refusal(run_file: Path, overrides: list[str], fragments: list[str]):
    assert_refused(command(run_file.parent, "train", str(run_file), *overrides), *fragments)


@pytest.mark.parametrize(
    ("changes", "fragments"),
    [
        ({"model_type": "phi3"}, ['model_type is "phi3"', "qwen2", "gemma3_text"]),
        ({"model_type": "qwen2_moe", "num_experts": 8}, ['model_type is "qwen2_moe"', "num_experts is 8"]),
        ({"num_local_experts": 8}, ["num_local_experts is 8", "has no experts"]),
        ({"attention_dropout": 0.1}, ["attention_dropout is 0.1", "dropout is not supported"]),
        ({"resid_pdrop": 0.1}, ["resid_pdrop is 0.1", "dropout is not supported"]),
        ({"rope_parameters": {"rope_type": "yarn", "rope_theta": 1e4}}, ['"yarn"']),
        ({"hidden_act": "gelu"}, ["hidden_act"]),
        ({"vocab_size": None}, ["vocab_size"]),
    ],
    ids=str,
)
def test_refused_model(run_file: Path, changes: dict, fragments: list[str]):
    write_model(run_file.parent / "model", **changes)
    outcome = command(run_file.parent, "train", str(run_file))
    assert_refused(outcome, "model.hf_path: ", "config.json", *fragments)


@pytest.mark.parametrize(
    ("text", "fragments"),
    [
        ('{"prompt": "a", "answer": "1"}\n{"prompt": \n', ["train.jsonl:2", "JSON"]),
        ('{"answer": "b"}\n', ["train.jsonl:1", "no prompt"]),
        ('{"prompt": "a"}\n', ["train.jsonl:1", "no answer"]),
        ('{"prompt": 3, "answer": "b"}\n', ["train.jsonl:1", "prompt=3"]),
        ('{"messages": [{"role": "user"}], "answer": "b"}\n', ["train.jsonl:1", "messages"]),
        ('["a", "b"]\n', ["train.jsonl:1", "JSON object"]),
        (
            '{"prompt": "a", "answer": 1}\n{"prompt": "a", "answer": "b"}\n',
            ["train.jsonl:2", '"b"', "reward.type"],
        ),
        ('{"prompt": "a", "answer": "18 by\\n#### two"}\n', ["train.jsonl:1", '"two" without a number']),
        ("\n\n", ["is empty"]),
        ("\udcff", ["not readable as text"]),
    ],
    ids=str,
)
def test_refused_data(run_file: Path, text: str, fragments: list[str]):
    (run_file.parent / "train.jsonl").write_bytes(text.encode(errors="surrogateescape"))
    assert_refused(command(run_file.parent, "train", str(run_file)), "data.train: ", *fragments)


def test_warm_start_needs_responses(run_file: Path):
    write_rows(run_file.parent / "bare.jsonl", [{"prompt": "a", "answer": "b"}])
    overrides = ["warm_start.steps=20", "warm_start.data=bare.jsonl"]
    outcome = command(run_file.parent, "train", str(run_file), *overrides)
    assert_refused(outcome, "warm_start.data: bare.jsonl:1 has no response")


@pytest.mark.parametrize(
    ("name", "text", "fragments"),
    [
        ("absent.yaml", None, ["absent.yaml is not there"]),
        ("broken.yaml", "model: {hf_path: a\ndata: [", ["broken.yaml:", "YAML"]),
        ("double.yaml", "trainer: {steps: 1}\ntrainer: {steps: 2}\n", ["double.yaml:", "duplicate"]),
        ("list.yaml", "- 1\n", ["list.yaml holds a list"]),
        ("empty.yaml", "", ["model.hf_path is missing", "data.train is missing", "trainer.steps is missing"]),
    ],
)
def test_refused_file(tmp_path: Path, name: str, text: str | None, fragments: list[str]):
    if text is not None:
        (tmp_path / name).write_text(text)
    assert_refused(command(tmp_path, "train", name), *fragments)


def test_all_problems_at_once(run_file: Path):
    overrides = [
        "actor.lr=yes",
        "actor.num_mini_batchs=2",
        "rollout.top_p=0.9",
        "trainer.steps=0",
        "no_override",
    ]
    overrides += ["actor.tensor_model_parallel_size=3", "data.train=nowhere.jsonl", "reward=null"]
    outcome = command(run_file.parent, "train", str(run_file), *overrides)
    keys = [override.split("=")[0] for override in overrides]
    assert_refused(outcome, *keys)
    # TP = 3 divides neither the heads nor the key-value heads nor the MLP.
    assert len(outcome.stderr.splitlines()) == len(overrides) + 2


@pytest.mark.parametrize(
    ("variables", "overrides", "fragments"),
    [
        (
            {"RANK": "0", "WORLD_SIZE": "4"},
            ["actor.data_parallel_size=3"],
            ["actor.data_parallel_size is 3", "4 ranks"],
        ),
        (
            {"RANK": "0", "WORLD_SIZE": "3"},
            ["actor.tensor_model_parallel_size=2"],
            ["3 ranks", "a multiple of 2"],
        ),
        (
            {"SLURM_PROCID": "1", "SLURM_STEP_ID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "7"},
            ["actor.data_parallel_size=1"],
            ["actor.data_parallel_size is 1", "2 ranks"],
        ),
        ({"RANK": "0"}, [], ["WORLD_SIZE", "missing"]),
    ],
    ids=["contradiction", "no multiple", "srun", "half an environment"],
)
def test_refused_launch(run_file: Path, variables: dict, overrides: list[str], fragments: list[str]):
    assert_refused(command(run_file.parent, "train", str(run_file), *overrides, **variables), *fragments)


def test_dry_run_prints_configuration_and_plan(run_file: Path):
    outcome = command(
        run_file.parent,
        "train",
        "--dry-run",
        str(run_file),
        "actor.lr=1e-6",
        "actor.tensor_model_parallel_size=2",
    )
    assert outcome.exit_code == 0, outcome.stderr
    assert outcome.watched == []
    assert "run_dir: runs/tiny" in outcome.stdout
    assert "2 ranks = data 1 x pipeline 1 x tensor 2" in outcome.stdout
    assert "8 prompts x 8 samples = 64 trajectories" in outcome.stdout
    assert not (run_file.parent / "runs").exists()


def test_dry_run_of_a_launched_rank_other_than_0_is_silent(run_file: Path):
    outcome = command(run_file.parent, "train", "--dry-run", str(run_file), RANK="1", WORLD_SIZE="2")
    assert (outcome.exit_code, outcome.stdout, outcome.stderr) == (0, "", "")


def test_options_and_overrides_may_be_mixed():
    arguments = parse_arguments(["train", "a.yaml", "x.y=1", "--resume", "never", "x.z=2", "--dry-run"])
    assert arguments.overrides == ["x.y=1", "x.z=2"]
    assert (arguments.resume, arguments.dry_run) == ("never", True)


def test_unknown_option_and_unknown_command(run_file: Path):
    for arguments in (["train", str(run_file), "--fast"], ["tarin"], []):
        outcome = command(run_file.parent, *arguments)
        assert outcome.exit_code == 2
        assert "Traceback" not in outcome.stderr


def test_doctor_reports(tmp_path: Path):
    outcome = command(tmp_path, "doctor")
    assert outcome.exit_code == 0, outcome.stderr
    for name in ("GPU", "torch", "Megatron-Core", "Transformer Engine", "NVIDIA Apex", "vLLM"):
        assert f"  {name} " in outcome.stdout
    for path in ("attention", "norm", "optimizer", "communication"):
        assert f"  {path} " in outcome.stdout
    # The watcher sees what it is there for.
    assert "import torch" in outcome.watched


def end_with(monkeypatch: pytest.MonkeyPatch, error: BaseException) -> int:
    def run(arguments):
        raise error

    monkeypatch.setattr("megatron_a3po.trainer.commands.doctor.run", run)
    return main(["doctor"])


def test_exit_codes_at_the_error_boundary(monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture):
    assert end_with(monkeypatch, ConfigError(["a", "b"])) == 2
    assert end_with(monkeypatch, InputError("a")) == 2
    assert end_with(monkeypatch, KeyboardInterrupt()) == 130
    assert caplog.text == ""
    assert end_with(monkeypatch, RewardError("the reward failed")) == 3
    assert "the reward failed" in caplog.text
    assert "Traceback" not in caplog.text
    assert end_with(monkeypatch, ZeroDivisionError("a bug")) == 3
    assert "Traceback" in caplog.text


INTERRUPTED_IN_EXEC = """
import sys
from types import SimpleNamespace
from megatron_a3po.__main__ import main
interrupted = SimpleNamespace(run=lambda arguments: exec("raise KeyboardInterrupt"))
sys.modules["megatron_a3po.trainer.commands.doctor"] = interrupted
sys.exit(main(["doctor"]))
"""


def test_an_interrupt_while_a_module_makes_its_classes_ends_with_its_code(tmp_path: Path):
    (tmp_path / "interrupted.py").write_text(INTERRUPTED_IN_EXEC)
    path = f"{tmp_path}:{Path(__file__).parent.parent}"
    done = subprocess.run(
        [sys.executable, "-m", "interrupted"], env=os.environ | {"PYTHONPATH": path}, check=False
    )
    assert done.returncode == 130  # not -2, which is death by the signal


def test_problems_are_lines_on_stderr(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture):
    end_with(monkeypatch, ConfigError(["one.", "two."]))
    assert capsys.readouterr() == ("", "one.\ntwo.\n")
