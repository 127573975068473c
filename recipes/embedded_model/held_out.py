"""Chooses the held-out prompts that come with the package, for `s3d bench`.

    python recipes/embedded_model/held_out.py TEXTS_DIR OUT_DIR

prepare.py writes TEXTS_DIR. A prompt comes from a held-out text that the training runs did not
decode (they decode the first 24 of each kind for their curves), and only if no training text
contains it. Of a story it takes the first two sentences, of a dialogue the user's last turn.
"""

import argparse
import json
import re
from pathlib import Path
from typing import Any

COUNT, CHECKED = 24, 24
LONGEST = 600  # characters


def read(path: Path) -> list[dict[str, Any]]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def stories(texts: Path) -> list[dict[str, Any]]:
    known = "\n".join(text["text"] for text in read(texts / "stories_train.jsonl"))
    prompts = []
    for text in read(texts / "stories_valid.jsonl")[CHECKED:]:
        beginning = re.match(r"(?:[^.!?]+[.!?]){2}", text["text"])
        if beginning and beginning[0] not in known:
            prompts.append({"prompt": beginning[0]})
    return prompts


def dialogues(texts: Path) -> list[dict[str, Any]]:
    train = read(texts / "dialogues_train.jsonl")
    known = {turn["content"] for chat in train for turn in chat["messages"]}
    return [
        chat
        for chat in read(texts / "questions_valid.jsonl")[CHECKED:]
        if chat["messages"][-1]["content"] not in known
        and sum(len(turn["content"]) for turn in chat["messages"]) <= LONGEST
    ]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    arguments.out.mkdir(parents=True, exist_ok=True)
    for name, prompts in (
        ("stories", stories(arguments.texts)),
        ("dialogues", dialogues(arguments.texts)),
    ):
        chosen = [prompts[i * len(prompts) // COUNT] for i in range(COUNT)]
        text = "".join(json.dumps(prompt, ensure_ascii=False) + "\n" for prompt in chosen)
        (arguments.out / f"{name}.jsonl").write_text(text, encoding="utf-8")
        print(f"{name}: {COUNT} of {len(prompts)}, {len(text.encode()):,} bytes")


if __name__ == "__main__":
    main()
