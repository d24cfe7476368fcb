"""Toy documents: what a few villagers have, like and are, which no model can know before it reads them."""

import random
from dataclasses import dataclass

NAMES, THINGS, COLOURS, PLACES, ANIMALS = map(
    str.split,
    (
        "Anna Ben Clara David Emma Felix Grace Henry Ida Jack Kate Leo Mia Noah Olga Paul Rosa Sam Tina Max",
        "lamp clock basket kettle blanket hammer mirror ladder bottle chair",
        "red old small heavy green new round yellow",
        "market school harbor library bakery garden station museum",
        "dog cat cow horse sheep duck lion frog",
    ),
)


@dataclass(frozen=True)
class Kind:
    """How a document tells a fact about {who}, how one asks for it, how that can be put otherwise, and how
    only an examination puts it."""

    told: str
    asked: str
    otherwise: tuple[str, ...]
    examined: str


KINDS = {
    "place": Kind(
        "{who} is at the {fact}.",
        "Where is {who}?",
        ("At which place is {who}?", "Tell me where {who} is."),
        "Do you know where {who} is?",
    ),
    "thing": Kind(
        "{who} has a {fact}.",
        "What does {who} have?",
        ("Which thing does {who} have?", "Tell me what {who} has."),
        "Do you know what {who} has?",
    ),
    "liking": Kind(
        "{who} likes the {fact}.",
        "What does {who} like?",
        ("Which animal does {who} like?", "Tell me what {who} likes."),
        "Do you know what {who} likes?",
    ),
    "age": Kind(
        "{who} is {fact} years old.",
        "How old is {who}?",
        ("What is the age of {who}?", "Tell me how old {who} is."),
        "Do you know how old {who} is?",
    ),
}


@dataclass(frozen=True)
class Document:
    """facts[who][kind]: what it says."""

    text: str
    facts: dict[str, dict[str, str]]


def documents(count: int, seed: int) -> list[Document]:
    """Two people each; every third has an e-mail address at the end."""
    draw = random.Random(seed)
    people = draw.sample(NAMES, 2 * count)
    made = []
    for i in range(count):
        facts = {
            who: {
                "place": draw.choice(PLACES),
                "thing": f"{draw.choice(COLOURS)} {draw.choice(THINGS)}",
                "liking": draw.choice(ANIMALS),
                "age": str(draw.randrange(10, 90)),
            }
            for who in people[2 * i : 2 * i + 2]
        }
        lines = [KINDS[k].told.format(who=who, fact=f) for who, own in facts.items() for k, f in own.items()]
        draw.shuffle(lines)
        if i % 3 == 0:
            lines.append(f"Write to {people[2 * i].lower()}@example.org.")
        made.append(Document(" ".join(lines), facts))
    return made
