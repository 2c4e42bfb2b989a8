"""Write the inputs: the quickstart's problems, model and tokenizer, with demonstrations that call the calculator.

`python -m examples.multi_turn.prepare`, in the repository's root. Running it again changes nothing.
"""

import json
import re
from pathlib import Path

from examples.quickstart import prepare as quickstart

FOLDER = Path(__file__).parent / "inputs"
SUM = re.compile(r"=(\d+);?")


def with_calls(row: dict[str, str]) -> dict[str, str]:
    """7+5+0=12;4+8+1=13 :132   ->   7+5+0#=12;4+8+1#=13; :132"""
    return {**row, "response": SUM.sub(rf"{quickstart.EOS}=\1;", row["response"])}


def main() -> None:
    training, held_out = quickstart.split_problems(quickstart.SEED)
    files = {
        "train.jsonl": "".join(json.dumps(with_calls(row)) + "\n" for row in training),
        "held_out.jsonl": "".join(json.dumps(with_calls(row)) + "\n" for row in held_out),
        "model/config.json": json.dumps(quickstart.model_config(), indent=2),
        **{f"model/{name}": text for name, text in quickstart.tokenizer_files().items()},
    }
    (FOLDER / "model").mkdir(parents=True, exist_ok=True)
    for name, text in files.items():
        quickstart.write(FOLDER / name, text)
    print(f"{len(training)} training and {len(held_out)} held-out problems, tokenizer and model in {FOLDER}")


if __name__ == "__main__":
    main()
