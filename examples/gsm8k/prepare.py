"""Turn GSM8K as it is published into chats for an instruct model: `prepare.py FOLDER`.

FOLDER has GSM8K's own `train.jsonl` and `test.jsonl`, lines of a `question` and an `answer` that ends in `#### 72`.
What is written, `train.jsonl` and `held_out.jsonl` in inputs/ beside this file, has `messages` that ask for a form of
the answer, and the number alone as `answer`. The tokenizer's chat template does the rest when they are read.
"""

import json
import sys
from collections.abc import Iterator
from pathlib import Path

INPUTS = Path(__file__).parent / "inputs"
FILES = {"train.jsonl": "train.jsonl", "test.jsonl": "held_out.jsonl"}
FORM = "Please put your final answer within \\boxed{}."


def chat(question: str, answer: str) -> dict[str, object]:
    """One row. Thousands are written without commas, of which a checker could make a list."""
    number = answer.split("####")[-1].strip().replace(",", "")
    return {"messages": [{"role": "user", "content": f"{question}\n{FORM}"}], "answer": number}


def chats(file: Path) -> Iterator[str]:
    with file.open(encoding="utf-8") as lines:
        for line in lines:
            row = json.loads(line)
            yield json.dumps(chat(row["question"], row["answer"]), ensure_ascii=False) + "\n"


def main(folder: Path, out: Path = INPUTS) -> None:
    if missing := [str(folder / name) for name in FILES if not (folder / name).is_file()]:
        sys.exit(
            f"{' and '.join(missing)} not found: give the folder with GSM8K's train.jsonl and test.jsonl."
        )
    out.mkdir(parents=True, exist_ok=True)
    for name, written in FILES.items():
        rows = list(chats(folder / name))
        (out / written).write_text("".join(rows), encoding="utf-8")
        print(f"{out / written}: {len(rows)} problems")


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit("prepare.py wants one argument, the folder with GSM8K's train.jsonl and test.jsonl.")
    main(Path(sys.argv[1]))
