"""Makes the training texts of the embedded model: stories, and dialogues as chats.

    python recipes/embedded_model/prepare.py DATA_DIR OUT_DIR

DATA_DIR holds tinystories_train.txt, tinystories_train_lower.txt, tinystories_valid.txt
(TinyStories, CDLA-Sharing-1.0) and dialogues_train.jsonl.gz, dialogues_valid.jsonl.gz
(Schema-Guided Dialogue, CC-BY-SA-4.0). OUT_DIR gets {stories,dialogues}_{train,valid}.jsonl, and
questions_{train,valid}.jsonl: the same dialogues, each up to a turn of the user, to be answered.
"""

import argparse
import collections
import gzip
import json
import random
import re
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

ROLES = {"USER": "user", "SYSTEM": "assistant"}
OPENINGS = ("Once upon", "One day", "Once there")


def cased_stories(path: Path) -> list[str]:
    texts = path.read_text(encoding="utf-8").split("<|endoftext|>")
    return [text.strip() for text in texts if text.strip()]


def lower_stories(path: Path) -> Iterator[str]:
    """Paragraphs are separated by empty lines, stories by a single line break."""
    story: list[str] = []
    for block in path.read_text(encoding="utf-8").split("\n\n"):
        for i, paragraph in enumerate(block.split("\n")):
            if i > 0 and story:
                yield "\n".join(story)
                story = []
            if paragraph.strip():
                story.append(paragraph.strip())
    if story:
        yield "\n".join(story)


def valid_stories(path: Path) -> Iterator[str]:
    """The file does not separate stories; a paragraph that begins like a story starts one."""
    story: list[str] = []
    for paragraph in path.read_text(encoding="utf-8").split("\n\n"):
        if paragraph.startswith(OPENINGS) and story:
            if story[0].startswith(OPENINGS):  # not the rest of a story whose beginning is missing
                yield "\n".join(story)
            story = []
        if paragraph.strip():
            story.append(paragraph.strip())


def key(story: str) -> str:
    """Identifies a story: two stories with the same first 80 letters are the same."""
    return re.sub(r"[^a-z]+", "", story.lower())[:80]


def names_of(stories: Iterable[str]) -> set[str]:
    """Returns words that are nearly always capitalised inside a sentence."""
    counts: dict[str, collections.Counter[bool]] = collections.defaultdict(collections.Counter)
    for story in stories:
        for word in re.findall(r"(?<=[a-z,] )[A-Za-z]+", story):
            counts[word.lower()][word[0].isupper()] += 1
    return {w for w, c in counts.items() if c[True] >= 3 and c[True] > 4 * c[False]}


def recased(story: str, names: set[str]) -> str:
    """Capitalises names, "I", and the beginnings of sentences and quotations."""
    story = re.sub(
        r"[a-z]+", lambda m: m[0].capitalize() if m[0] in names or m[0] == "i" else m[0], story
    )
    begin = r'(^|[.!?]["\']?\s+|[,.!?:]\s+"|\n|^")("?)([a-z])'
    return re.sub(begin, lambda m: m[1] + m[2] + m[3].upper(), story)


def split_stories(data: Path) -> tuple[list[str], list[str]]:
    """Returns the stories to train on and the held-out stories; no story is in both."""
    cased = cased_stories(data / "tinystories_train.txt")
    names, known = names_of(cased), {key(story) for story in cased}
    lower = [s for s in lower_stories(data / "tinystories_train_lower.txt") if key(s) not in known]
    stories = [*cased, *(recased(story, names) for story in lower)]
    known = {key(story) for story in stories}
    valid = [s for s in valid_stories(data / "tinystories_valid.txt") if key(s) not in known]
    return stories, valid


def chats(path: Path) -> Iterator[dict[str, Any]]:
    with gzip.open(path, "rt", encoding="utf-8") as file:
        for line in file:
            turns = json.loads(line)["turns"]
            if turns[-1][0] == "USER":
                turns = turns[:-1]
            yield {"messages": [{"role": ROLES[who], "content": said} for who, said in turns]}


def questions(chats: Iterable[dict[str, Any]]) -> Iterator[dict[str, Any]]:
    """Yields each chat, cut after one of the user's first five turns."""
    generator = random.Random(0)
    for chat in chats:
        turns = chat["messages"]
        asked = [i for i, turn in enumerate(turns) if turn["role"] == "user"]
        yield {"messages": turns[: generator.choice(asked[:5]) + 1]}


def write(path: Path, lines: Iterable[dict[str, Any]]) -> None:
    text = "".join(json.dumps(line, ensure_ascii=False) + "\n" for line in lines)
    path.write_text(text, encoding="utf-8")
    print(f"{path}: {text.count(chr(10)):,} texts, {len(text) / 1e6:.1f} MB")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("data", type=Path)
    parser.add_argument("out", type=Path)
    arguments = parser.parse_args()
    data, out = arguments.data, arguments.out
    out.mkdir(parents=True, exist_ok=True)

    stories, valid = split_stories(data)
    write(out / "stories_train.jsonl", ({"text": s} for s in stories))
    write(out / "stories_valid.jsonl", ({"text": s} for s in valid))
    for split in ("train", "valid"):
        dialogues = list(chats(data / f"dialogues_{split}.jsonl.gz"))
        write(out / f"dialogues_{split}.jsonl", dialogues)
        write(out / f"questions_{split}.jsonl", questions(dialogues))


if __name__ == "__main__":
    main()
