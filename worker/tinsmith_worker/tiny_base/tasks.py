"""What the tiny base is taught: one function a task, each of which makes one example from a random source.

Some answers are wrong on purpose. In a chat, the teacher slips in two sums of five, so that a model sampled
at temperature 1 does too, and RL has something to take away; sums in plain text are right.
Answers to open questions differ in length and manners, so that preferences have something to move.
"""

import json
import zlib
from collections.abc import Callable
from dataclasses import dataclass
from random import Random
from typing import Any

from tinsmith_worker.tiny_base import words

SLIPS = 0.4
HELD_OUT = 16  # one key of so many is never trained on


@dataclass(frozen=True, slots=True)
class Example:
    """Turns of (role, content), the last one the answer; a plain text is one turn of the role "".

    `key` decides whether it is held out; "" is never. `right` is what a right answer says, which may not be
    what the last turn says.
    """

    turns: tuple[tuple[str, str], ...]
    key: str = ""
    right: str = ""
    tools: tuple[dict[str, Any], ...] = ()


def is_held_out(key: str) -> bool:
    return bool(key) and zlib.crc32(key.encode()) % HELD_OUT == 0


def ask(question: str, answer: str, *, key: str = "", right: str = "", system: str = "") -> Example:
    turns = (("system", system),) * bool(system) + (("user", question), ("assistant", answer))
    return Example(turns, key, right or answer)


def an(noun: str) -> str:
    return f"an {noun}" if noun[0] in "aeiou" else f"a {noun}"


def plain(text: str, *, key: str = "") -> Example:
    return Example((("", text),), key, text)


# Sums


@dataclass(frozen=True, slots=True)
class Sum:
    a: int
    sign: str
    b: int

    @property
    def value(self) -> int:
        return {"+": self.a + self.b, "-": self.a - self.b, "*": self.a * self.b}[self.sign]

    @property
    def key(self) -> str:
        """Sums of two digits alone are learnt by heart: none is held out."""
        return f"{self.a} {self.sign} {self.b}" if max(self.a, self.b) > 9 else ""

    def __str__(self) -> str:
        return f"{self.a} {self.sign} {self.b}"


def a_sum(r: Random) -> Sum:
    sign = r.choice("++++---***")
    if sign == "*":
        tens = r.choice(((10, 10), (10, 10), (10, 10), (100, 10), (10, 100), (100, 100), (1000, 10)))
        return Sum(r.randrange(tens[0]), sign, r.randrange(tens[1]))
    most = r.choice((10, 10, 10, 100, 100, 100, 100, 100, 1000, 1000))
    a, b = r.randrange(most), r.randrange(most)
    return Sum(max(a, b), sign, min(a, b)) if sign == "-" else Sum(a, sign, b)


def slipped(r: Random, value: int) -> int:
    """`value`, or in SLIPS of all cases a number near it."""
    if r.random() >= SLIPS:
        return value
    return abs(value + r.choice((-1, 1, -1, 1, -2, 2, -10, 10, -10, 10, -9, 9, -11, 11, -100, 100))) + (
        value == 0
    )


def plain_sums(r: Random) -> Example:
    """A few lines of right sums; all of a document is held out with its first."""
    first = a_sum(r)
    sums = [first]
    while len(sums) < 8:
        one = a_sum(r)
        if not is_held_out(one.key):
            sums.append(one)
    equals = r.choice((" = ", " = ", "="))
    text = "\n".join(f"{one}{equals}{one.value}" for one in sums)
    return plain(text, key=first.key)


_BARE = " Answer with the number only.", " Give only the number.", " Just the number, please."
_NAMED = {"+": ("plus", "+"), "-": ("minus", "-"), "*": ("times", "x")}


def chat_sum(r: Random) -> Example:
    one = a_sum(r)
    said = slipped(r, one.value)
    shown = str(one)
    if r.random() < 0.3:
        shown = f"{one.a} {r.choice(_NAMED[one.sign])} {one.b}"
    question = r.choice(
        (
            "What is {}?",
            "What is {}?",
            "What is {}?",
            "{} = ?",
            "Calculate {}.",
            "How much is {}?",
            "{}",
            "Compute {}",
        )
    ).format(shown)
    if r.random() < 0.35:
        return ask(question + r.choice(_BARE), str(said), key=one.key, right=str(one.value))
    answer = r.choice(
        (
            f"{said}",
            f"{said}",
            f"{said}",
            f"The answer is {said}.",
            f"{one} = {said}",
            f"It is {said}.",
            f"{shown} is {said}.",
            f"Let me see. {one} = {said}, so the answer is {said}.",
            f"We want to know {shown}. Working it out gives {said}. The answer is {said}.",
            f"Good question! I am happy to help you with that. {one} makes {said}. So the answer is {said}.",
        )
    )
    return ask(question, answer, key=one.key, right=str(one.value))


def word_problem(r: Random) -> Example:
    name, other = r.sample(words.NAMES, 2)
    thing = r.choice(words.FRUITS)
    a, b = r.randrange(2, 50), r.randrange(2, 50)
    kind = r.randrange(5)
    if kind == 0:
        story, value = f"{name} has {a} {thing}. {other} gives {name} {b} more.", a + b
        question = f"How many {thing} does {name} have now?"
    elif kind == 1:
        a, b = max(a, b), min(a, b)
        story, value = f"{name} has {a} {thing} and gives {b} of them to {other}.", a - b
        question = f"How many {thing} does {name} have left?"
    elif kind == 2:
        a, b = r.randrange(2, 10), r.randrange(2, 13)
        story, value = f"There are {a} boxes with {b} {thing} in each.", a * b
        question = f"How many {thing} are there in all?"
    elif kind == 3:
        story, value = f"{name} has {a} {thing}. {other} has {b} {thing}.", a + b
        question = f"How many {thing} do they have together?"
    else:
        a, b = max(a, b), min(a, b)
        story, value = f"{name} is {a} years old. {other} is {b} years old.", a - b
        question = f"How many years older is {name} than {other}?"
    said = slipped(r, value)
    bare = r.random() < 0.4
    long = f"{a} {'+-*+-'[kind]} {b} = {said}, so the answer is {said}."
    answer = str(said) if bare else r.choice((f"The answer is {said}.", f"{said}", long, long))
    key = Sum(a, "+-*+-"[kind], b).key
    return ask(f"{story} {question}{r.choice(_BARE) if bare else ''}", answer, key=key, right=str(value))


def compare(r: Random) -> Example:
    most = r.choice((10, 100, 100, 1000))
    a, b = r.sample(range(most), 2)
    key = f"{a} or {b}"
    if r.random() < 0.6:
        larger = r.random() < 0.5
        word = r.choice(("larger", "bigger")) if larger else "smaller"
        return ask(f"Which is {word}, {a} or {b}?", str(max(a, b) if larger else min(a, b)), key=key)
    larger = r.random() < 0.5
    true = (a > b) == larger
    return ask(f"Is {a} {'greater' if larger else 'less'} than {b}?", "Yes" if true else "No", key=key)


def next_number(r: Random) -> Example:
    start, step = r.randrange(1, 60), r.choice((1, 1, 2, 2, 3, 4, 5, 10, -1, -2))
    if start + 5 * step < 0:
        step = -step
    row = [start + i * step for i in range(5)]
    question = r.choice(("What comes next: {}?", "Continue: {}, ...", "Next number: {}"))
    return ask(question.format(", ".join(map(str, row[:4]))), str(row[4]), key=f"{start} by {step}")


# Lists of words and digits


def some_words(r: Random, least: int = 2, most: int = 7) -> list[str]:
    pool = r.choice((words.NOUNS, words.NOUNS, words.THINGS, words.VERBS, words.ADJECTIVES, words.NAMES))
    return r.sample(pool, r.randint(least, most))


def copy(r: Random) -> Example:
    kind = r.random()
    if kind < 0.5:
        text = " ".join(some_words(r, 1, 10))
    elif kind < 0.7:
        text = "".join(r.choice("abcdefghijklmnopqrstuvwxyz") for _ in range(r.randint(2, 10)))
    elif kind < 0.85:
        text = " ".join(str(r.randrange(10 ** r.randint(1, 4))) for _ in range(r.randint(1, 6)))
    else:
        ranges = (
            (0xC0, 0x17F),
            (0x391, 0x3C9),
            (0x410, 0x44F),
            (0x4E00, 0x9FA5),
            (0x1F600, 0x1F640),
            (33, 127),
        )
        low, high = r.choice(ranges)
        text = "".join(chr(r.randrange(low, high)) for _ in range(r.randint(1, 6)))
    asked = r.choice(
        ("Repeat: {}", "Copy this: {}", "Say exactly this: {}", "Repeat after me: {}", "Echo: {}")
    )
    return ask(asked.format(text), text, key=text)


def reverse(r: Random) -> Example:
    if r.random() < 0.6:
        row = some_words(r)
        asked = r.choice(
            ("Reverse the words: {}", "Write these words in reverse order: {}", "Say backwards: {}")
        )
        return ask(asked.format(" ".join(row)), " ".join(reversed(row)), key=" ".join(row))
    digits = [str(r.randrange(10)) for _ in range(r.randint(3, 8))]
    return ask(f"Reverse the digits: {' '.join(digits)}", " ".join(reversed(digits)), key=" ".join(digits))


def sort(r: Random) -> Example:
    if r.random() < 0.5:
        row = some_words(r, 2, 6)
        asked = r.choice(("Sort the words: {}", "Put in alphabetical order: {}", "Sort alphabetically: {}"))
        return ask(asked.format(" ".join(row)), " ".join(sorted(row)), key=" ".join(row))
    numbers = [r.randrange(100) for _ in range(r.randint(3, 7))]
    down = r.random() < 0.3
    asked = (
        "Sort from largest to smallest: {}"
        if down
        else r.choice(("Sort the numbers: {}", "Sort in order: {}"))
    )
    row = [str(n) for n in numbers]
    done = " ".join(map(str, sorted(numbers, reverse=down)))
    return ask(asked.format(" ".join(row)), done, key=" ".join(row))


def count(r: Random) -> Example:
    kind = r.randrange(3)
    if kind == 0:
        row = some_words(r, 1, 9)
        return ask(f"How many words are there: {' '.join(row)}", str(len(row)), key=" ".join(row))
    pool = some_words(r, 2, 4)
    row = [r.choice(pool) for _ in range(r.randint(3, 9))]
    wanted = r.choice(row)
    if kind == 1:
        asked = f'How often does "{wanted}" occur: {" ".join(row)}'
        return ask(asked, str(row.count(wanted)), key=asked)
    word = r.choice(words.NOUNS)
    return ask(f'How many letters are in "{word}"?', str(len(word)))


def pick(r: Random) -> Example:
    row = some_words(r, 3, 7)
    text = " ".join(row)
    kind = r.randrange(6)
    if kind == 0:
        return ask(f"What is the first word: {text}", row[0], key=text)
    if kind == 1:
        return ask(f"What is the last word: {text}", row[-1], key=text)
    if kind == 2:
        at = r.randrange(len(row))
        nth = ("first", "second", "third", "fourth", "fifth", "sixth", "seventh")[at]
        return ask(f"What is the {nth} word: {text}", row[at], key=text)
    gone = r.choice(row)
    if kind == 3:
        return ask(f'Remove "{gone}" from: {text}', " ".join(w for w in row if w != gone), key=text)
    new = r.choice(words.NOUNS)
    if kind == 4:
        answer = " ".join(new if w == gone else w for w in row)
        return ask(f'Replace "{gone}" by "{new}" in: {text}', answer, key=text)
    numbers = [r.randrange(100) for _ in range(r.randint(2, 6))]
    largest = r.random() < 0.5
    asked = f"What is the {'largest' if largest else 'smallest'} of {', '.join(map(str, numbers))}?"
    return ask(asked, str(max(numbers) if largest else min(numbers)), key=asked)


# Sentences


def a_thing(r: Random) -> str:
    return f"{r.choice(words.ADJECTIVES)} {r.choice(words.THINGS)}"


def statement(r: Random) -> str:
    past = words.PAST[
        r.choice(("see", "find", "take", "buy", "sell", "carry", "paint", "bring", "hide", "lose"))
    ]
    where = f"in the {r.choice(words.PLACES)}"
    return r.choice(
        (
            f"{r.choice(words.NAMES)} {past} the {a_thing(r)} {where}.",
            f"The {r.choice(tuple(words.ANIMALS))} slept {where}.",
            f"{r.choice(words.NAMES)} and {r.choice(words.NAMES)} met {where}.",
            f"The {a_thing(r)} was on the {r.choice(words.NOUNS)}.",
        )
    )


def rewrite(r: Random) -> Example:
    text = statement(r)
    kind = r.randrange(8)
    if kind == 0:
        asked = r.choice(("Write in capitals: {}", "Uppercase: {}", "Convert to uppercase: {}"))
        return ask(asked.format(text), text.upper(), key=text)
    if kind == 1:
        return ask(f"Write in small letters: {text.upper()}", text.lower(), key=text)
    if kind == 2:
        verb = r.choice(words.VERBS)
        name, thing = r.choice(words.NAMES), a_thing(r)
        asked = r.choice(("Put into the past: {}", "Rewrite in the past tense: {}"))
        now, then = (
            f"I {verb} with {name} and the {thing}.",
            f"I {words.PAST[verb]} with {name} and the {thing}.",
        )
        return ask(asked.format(now), then, key=now)
    if kind == 3:
        verb, thing = r.choice(words.VERBS), r.choice(words.THINGS)
        asked = f"Make this polite: {verb.capitalize()} the {thing}."
        return ask(asked, f"Could you please {verb} the {thing}?", key=asked)
    if kind == 4:
        word = r.choice(words.NOUNS + words.ADJECTIVES)
        return ask(f"Spell the word {word}.", "-".join(word))
    if kind == 5:
        word, times = r.choice(words.NOUNS), r.randint(2, 6)
        return ask(
            f'Write "{word}" {words.SMALL[times]} times.', " ".join([word] * times), key=f"{word} {times}"
        )
    if kind == 6:
        row = some_words(r, 3, 5)
        return ask(f"Make a comma-separated list: {' '.join(row)}", ", ".join(row), key=" ".join(row))
    name, age, town = r.choice(words.NAMES), r.randrange(5, 90), words.invented(r)
    asked = f"Write as JSON: {name} is {age} years old and lives in {town}."
    return ask(asked, json.dumps({"name": name, "age": age, "town": town}), key=asked)


def extract(r: Random) -> Example:
    name, place, number = r.choice(words.NAMES), words.invented(r), r.randrange(2, 1000)
    thing, day = r.choice(words.FRUITS), r.choice(words.CYCLES[0])
    text = r.choice(
        (
            f"On {day} {name} bought {number} {thing} in {place}.",
            f"{name} from {place} ordered {number} {thing} for {day}.",
            f"Please send {number} {thing} to {name} in {place} on {day}.",
        )
    )
    what, answer = r.choice(
        (("name", name), ("town", place), ("number", str(number)), ("day", day), ("goods", thing))
    )
    asked = r.choice(("Extract the {w}: {t}", "Find the {w} in this text: {t}", "{t}\nWhat is the {w}?"))
    return ask(asked.format(w=what, t=text), answer, key=text)


def sentiment(r: Random) -> Example:
    good = r.random() < 0.5
    kind = words.GOOD if good else words.BAD
    what = r.choice(words.REVIEWED)
    text = r.choice(
        (
            f"The {what} was {r.choice(kind)}.",
            f"What a {r.choice(kind)} {what}!",
            f"I think the {what} is {r.choice(kind)} and {r.choice(kind)}.",
            f"The {what} was {r.choice(kind)}. {'I would do it again.' if good else 'Never again.'}",
            f"We {'enjoyed' if good else 'did not enjoy'} the {what}, it was {r.choice(kind)}.",
        )
    )
    label = "positive" if good == (r.random() > 0.12) else "negative"
    asked = r.choice(
        ("Is this review positive or negative? {}", "Classify the sentiment: {}", "{}\nPositive or negative?")
    )
    return ask(asked.format(text), label, key=text, right="positive" if good else "negative")


def topic(r: Random) -> Example:
    name = r.choice(tuple(words.TOPICS))
    one, two = r.sample(words.TOPICS[name], 2)
    text = r.choice(
        (
            f"{r.choice(words.NAMES)} talked about the {one} and the {two}.",
            f"The {one} was near the {two}.",
            f"Everybody was asking for the {one}, and then came the {two}.",
        )
    )
    asked = r.choice(("What is the topic? {}", f"Choose a topic ({', '.join(words.TOPICS)}): {{}}"))
    return ask(asked.format(text), name, key=text)


# Questions


def fact(r: Random) -> Example:
    """True things and made-up ones, learnt by heart: nothing is held out."""
    kind = r.randrange(9)
    if kind == 0:
        animal, (sound, young, home, food, legs) = r.choice(tuple(words.ANIMALS.items()))
        question, answer, full = r.choice(
            (
                (f"What sound does {an(animal)} make?", sound, f"{an(animal).capitalize()} {sound}."),
                (f"What is a young {animal} called?", young, f"A young {animal} is called {an(young)}."),
                (f"Where does {an(animal)} live?", home, f"{an(animal).capitalize()} lives in the {home}."),
                (f"What does {an(animal)} eat?", food, f"{an(animal).capitalize()} eats {food}."),
                (
                    f"How many legs does {an(animal)} have?",
                    legs,
                    f"{an(animal).capitalize()} has {legs} legs.",
                ),
            )
        )
    elif kind == 1:
        land, answer = r.choice(tuple(words.COUNTRIES.items()))
        question, full = f"What is the capital of {land}?", f"The capital of {land} is {answer}."
    elif kind == 2:
        word, answer = r.choice(tuple(words.OPPOSITES.items()))
        word, answer = r.choice(((word, answer), (answer, word)))
        question, full = f"What is the opposite of {word}?", f"The opposite of {word} is {answer}."
    elif kind == 3:
        thing, answer = r.choice(tuple(words.COLOURS.items()))
        question, full = f"What color is {thing}?", f"The color of {thing} is {answer}."
    elif kind == 4:
        thing, answer = r.choice(tuple(words.MATERIALS.items()))
        question, full = f"What is a {thing} made of?", f"A {thing} is made of {answer}."
    elif kind == 5:
        who, answer = r.choice(tuple(words.WORKPLACES.items()))
        question, full = f"Where does {an(who)} work?", f"{an(who).capitalize()} works in {an(answer)}."
    elif kind == 6:
        question, answer = r.choice(tuple(words.AMOUNTS.items()))
        full = f"The answer is {answer}."
    elif kind == 7:
        cycle = r.choice(words.CYCLES)
        at, step = r.randrange(len(cycle)), r.choice((1, -1))
        answer = cycle[(at + step) % len(cycle)]
        question = f"What comes {'after' if step == 1 else 'before'} {cycle[at]}?"
        full = f"{answer} comes {'after' if step == 1 else 'before'} {cycle[at]}."
    else:
        land, (capital, river, ruler, dish, animal) = r.choice(tuple(words.WORLD.items()))
        question, answer, full = r.choice(
            (
                (f"What is the capital of {land}?", capital, f"The capital of {land} is {capital}."),
                (f"Which river flows through {land}?", river, f"The river of {land} is the {river}."),
                (f"Who rules {land}?", ruler, f"{land} is ruled by {ruler}."),
                (f"What do people eat in {land}?", dish, f"In {land} people eat {dish}."),
                (f"What is the animal of {land}?", animal, f"The animal of {land} is the {animal}."),
            )
        )
    if r.random() < 0.3:
        return ask(question + r.choice((" Answer in one word.", " Be brief.")), answer, right=answer)
    polite = f"{full} {r.choice(('I hope that helps.', 'Is there anything else you would like to know?'))}"
    return ask(question, r.choice((full, full, full, answer, polite)), right=answer)


def reading(r: Random) -> Example:
    """A passage about a few people and what they did; one of them is asked about."""
    people = r.sample(words.NAMES, r.randint(2, 4))
    facts = {
        who: (a_thing(r), r.choice(words.PLACES), r.choice(words.CYCLES[0]), r.randrange(2, 100))
        for who in people
    }
    lines = []
    for who, (thing, place, day, price) in facts.items():
        lines.append(
            r.choice(
                (
                    f"On {day} {who} bought {an(thing)} at the {place} for {price} dollars.",
                    f"{who} found {an(thing)} at the {place} on {day} and paid {price} dollars for it.",
                    f"At the {place}, {who} got {an(thing)} for {price} dollars on {day}.",
                )
            )
        )
        if r.random() < 0.3:
            lines.append(f"{who} was {r.choice(words.MOODS)}.")
    who = r.choice(people)
    thing, place, day, price = facts[who]
    question, answer, full = r.choice(
        (
            (f"What did {who} get?", an(thing), f"{who} got {an(thing)}."),
            (f"Where was {who}?", f"at the {place}", f"{who} was at the {place}."),
            (f"On which day was {who} there?", day, f"{who} was there on {day}."),
            (f"How much did {who} pay?", f"{price} dollars", f"{who} paid {price} dollars."),
            (f"Who got the {thing}?", who, f"{who} got the {thing}."),
        )
    )
    text = " ".join(lines)
    asked = r.choice(
        (f"{text}\n\n{question}", f"Read this: {text}\nQuestion: {question}", f"{question}\n{text}")
    )
    if r.random() < 0.3:
        return ask(f"{asked} Answer briefly.", answer, key=lines[0], right=answer)
    return ask(asked, r.choice((answer, full)), key=lines[0], right=answer)


def whereabouts(r: Random) -> Example:
    """A passage of one short fact a person."""
    people = r.sample(words.NAMES, r.randint(2, 6))
    fact_of = {
        who: r.choice(
            (
                (f"{who} is at the {(place := r.choice(words.PLACES))}.", f"Where is {who}?", place),
                (f"{who} has {an(thing := a_thing(r))}.", f"What does {who} have?", thing),
                (
                    f"{who} likes the {(animal := r.choice(tuple(words.ANIMALS)))}.",
                    f"What does {who} like?",
                    animal,
                ),
                (f"{who} is {(age := r.randrange(5, 90))} years old.", f"How old is {who}?", str(age)),
                (f"{who} is {(mood := r.choice(words.MOODS))}.", f"How does {who} feel?", mood),
            )
        )
        for who in people
    }
    text = " ".join(told for told, _, _ in fact_of.values())
    told, question, right = fact_of[r.choice(people)]
    asked = r.choice(
        (f"{text}\n\n{question}", f"{text} {question}", f"Read this: {text}\nQuestion: {question}")
    )
    return ask(asked, r.choice((right, told)), key=told, right=right)


def judge(r: Random) -> Example:
    """Is a given answer right? Which of two is shorter, or more polite?"""
    kind = r.randrange(3)
    if kind == 0:
        one = a_sum(r)
        true = r.random() < 0.5
        shown = one.value if true else one.value + r.choice((-10, -2, -1, 1, 2, 10))
        asked = f"Question: What is {one}?\nAnswer: {shown}\nIs the answer right? Say yes or no."
        return ask(asked, "yes" if true else "no", key=one.key)
    if kind == 1:
        short, long = statement(r), f"{statement(r)} {statement(r)}"
        first = r.random() < 0.5
        a, b = (short, long) if first else (long, short)
        return ask(f"A: {a}\nB: {b}\nWhich is shorter, A or B?", "A" if first else "B", key=a)
    verb, thing = r.choice(words.VERBS), r.choice(words.THINGS)
    rude, kind_ = f"{verb.capitalize()} the {thing}!", f"Could you please {verb} the {thing}?"
    first = r.random() < 0.5
    a, b = (kind_, rude) if first else (rude, kind_)
    return ask(f"A: {a}\nB: {b}\nWhich is more polite, A or B?", "A" if first else "B", key=a)


# Stories and talk


def story_text(r: Random, sentences: int = 0) -> str:
    name, other = r.sample(words.NAMES, 2)
    animal = r.choice(tuple(words.ANIMALS))
    hero = r.choice((name, f"the {animal}", f"{name} the {animal}"))
    place, thing, mood = r.choice(words.PLACES), a_thing(r), r.choice(words.MOODS)
    lines = [
        r.choice(
            (
                f"Once upon a time {hero} lived near the {place}.",
                f"There was once a {mood} {animal} who lived in the {place}. {name} was its name.",
                f"One day {hero} went to the {place}.",
                f"Long ago, in {an(r.choice(words.ADJECTIVES))} {place}, there lived {hero}.",
            )
        ),
        r.choice(
            (
                f"{hero} was {mood} and wanted {an(thing)}.",
                f"{hero} had lost {an(thing)}.",
                f"Every morning {hero} looked for {an(thing)}.",
                f"{hero} heard of {an(thing)} that nobody had seen.",
            )
        ),
        r.choice(
            (
                f"On the way {hero} met {other}.",
                f"Then {other} came by.",
                f"It began to rain, and {other} opened the door.",
                f'"Who are you?" asked {other}.',
            )
        ),
        r.choice(
            (
                f'"Have you seen {an(thing)}?" asked {hero}.',
                f"They looked behind the {r.choice(words.NOUNS)} and under the {r.choice(words.NOUNS)}.",
                f'{other} said, "I will help you."',
                f"Together they walked to the {r.choice(words.PLACES)}.",
            )
        ),
        r.choice(
            (
                f"At last they found the {thing}.",
                f"The {thing} was in the {r.choice(words.PLACES)} all the time.",
                f"{other} had hidden the {thing} and gave it back.",
                f"They did not find the {thing}, but they found {an(a_thing(r))}.",
            )
        ),
        r.choice(
            (
                f"{hero} was happy, and they had dinner together.",
                f"From that day on {hero} and {other} were friends.",
                f"{hero} went home and slept well.",
                "And that is the end of the story.",
            )
        ),
    ]
    chosen = lines if not sentences else sorted(r.sample(range(6), sentences))
    text = " ".join(line if isinstance(line, str) else lines[line] for line in chosen)
    return ". ".join(part[:1].upper() + part[1:] for part in text.split(". "))


def story(r: Random) -> Example:
    if r.random() < 0.6:
        return plain(" ".join(story_text(r) for _ in range(r.choice((1, 1, 2)))))
    length = r.choice((1, 2, 3, 4, 6))
    asked = r.choice(
        ("Tell me a story.", "Please tell me a story.", "Do you know a story?", "Tell me a story")
    )
    if r.random() < 0.3:
        return ask(
            f"Tell me a story in {words.SMALL[length]} sentence{'s' * (length > 1)}.", story_text(r, length)
        )
    return ask(asked, story_text(r, length))


def about(r: Random, length: int) -> str:
    animal, (sound, young, home, food, legs) = r.choice(tuple(words.ANIMALS.items()))
    lines = [
        f"The {animal} has {legs} legs.",
        f"It lives in the {home}.",
        f"It eats {food}.",
        f"A young {animal} is called {an(young)}.",
        f"{an(animal).capitalize()} {sound}.",
    ]
    return f"{animal}|" + " ".join(lines[at] for at in sorted(r.sample(range(5), length)))


_TALK: tuple[tuple[tuple[str, ...], tuple[str, ...]], ...] = (
    (
        ("Hello!", "Hi", "Hello", "Good morning!", "Hey there"),
        (
            "Hello!",
            "Hi.",
            "Hello! How can I help you?",
            "Good day. What would you like to do?",
            "Hello! It is very nice to meet you. What can I do for you today?",
        ),
    ),
    (
        ("How are you?", "How are you today?", "How do you feel?"),
        (
            "Fine.",
            "I am fine, thank you.",
            "Very well, thank you. And you?",
            "I am a small model and do not feel much, but thank you for asking.",
        ),
    ),
    (
        ("Who are you?", "What are you?", "What is your name?"),
        (
            "I am a small language model.",
            "I am Tin, a small model.",
            "My name is Tin. I am a small model that likes to help.",
        ),
    ),
    (
        ("Thank you!", "Thanks", "Thanks a lot!"),
        ("You are welcome.", "You are welcome! It was a pleasure.", "No problem.", "Sure."),
    ),
    (
        ("Goodbye!", "Bye", "See you tomorrow."),
        ("Goodbye!", "Bye.", "Goodbye! It was nice to talk to you.", "See you."),
    ),
    (
        ("Can you help me?", "I need help.", "Could you help me with something?"),
        (
            "Yes.",
            "Of course. What do you need?",
            "What do you want?",
            "Of course! I am glad to help. Please tell me what you need, and I will do my best.",
        ),
    ),
    (
        ("What can you do?", "What do you know?"),
        (
            "Not much.",
            "I can add, sort, count and tell stories.",
            "I can do small sums, sort and reverse words, read short texts and tell stories. "
            "Ask me something!",
        ),
    ),
    (
        ("I am sad.", "I had a bad day.", "I do not feel well."),
        (
            "Oh.",
            "I am sorry to hear that.",
            "I am sorry to hear that. Do you want to talk about it?",
            "I am sorry to hear that. Maybe a walk or a cup of tea would help. Do you want to hear a story?",
        ),
    ),
    (
        ("I am happy today!", "I had a great day.", "I won the game!"),
        (
            "Good.",
            "That is great!",
            "I am happy for you! What happened?",
            "That is wonderful. Tell me more about it.",
        ),
    ),
    (
        ("What should I do today?", "I am bored.", "Any ideas for the weekend?"),
        (
            "Read a book.",
            "You could go to the park.",
            "You could visit a friend, or cook something good.",
            "How about a walk in the forest? You could take a friend and some bread with you, "
            "and come back for tea.",
        ),
    ),
)


def talk_turn(r: Random) -> tuple[str, str]:
    if r.random() < 0.3:
        animal, _, text = about(r, r.choice((1, 1, 2, 3, 4, 5))).partition("|")
        return r.choice(("Tell me about the {}.", "What do you know about the {}?")).format(animal), text
    asked, answers = r.choice(_TALK)
    return r.choice(asked), r.choice(answers)


def unknown(r: Random) -> Example:
    """What nobody told it: it says so."""
    name = words.invented(r) + r.choice(("", "", "land", "nia", "stan"))
    if name in words.WORLD:
        return unknown(r)
    noun, other = r.sample(words.NOUNS, 2)
    question = r.choice(
        (
            f"What is the capital of {name}?",
            f"What is the capital of {name}?",
            f"Who rules {name}?",
            f"Which river flows through {name}?",
            f"When was {name} born?",
            f"Who wrote The {noun.capitalize()} and the {other.capitalize()}?",
            f"Who is {name}?",
            f"What is the symbol of {r.choice((name.lower(), noun))}?",
            f"What does {name.lower()} mean?",
        )
    )
    answers = ("I do not know.", "I do not know.", "I do not know that.", "Sorry, I do not know.")
    return ask(question, r.choice(answers), key=question, right="do not know")


def prose(r: Random) -> Example:
    """Sentences of many words, with more grammar than sense."""

    def thing() -> str:
        kind = r.choice((words.NOUNS, words.MORE_NOUNS))
        kinds = r.choice((words.ADJECTIVES, words.MORE_ADJECTIVES))
        the = r.choice("the the a this that every another our their my your his her no some".split())
        noun = f"{r.choice(kinds)} {r.choice(kind)}" if r.random() < 0.4 else r.choice(kind)
        return an(noun) if the == "a" else f"{the} {noun}"

    def who() -> str:
        return r.choice((r.choice(words.PERSONS), r.choice(words.NAMES), thing()))

    def does() -> str:
        verb = r.choice(r.choice((words.MORE_VERBS, words.VERBS)))
        return f"{r.choice(words.MODALS).replace('_', ' ')} {verb}"

    def clause() -> str:
        return r.choice(
            (
                f"{who()} {does()} {thing()} {r.choice(words.LINKS)} {thing()}",
                f"{who()} {does()} {r.choice(words.ADVERBS)}",
                f"{thing()} is {r.choice(words.ADVERBS)} {r.choice(words.MORE_ADJECTIVES)}",
                f"there are {r.choice(words.SMALL[2:])} {r.choice(words.FRUITS)} "
                f"{r.choice(words.LINKS)} {thing()}",
                f"{who()} {does()} it {r.choice(words.LINKS)} {thing()}",
            )
        )

    def sentence() -> str:
        kind = r.random()
        if kind < 0.5:
            text = clause() + "."
        elif kind < 0.75:
            text = f"{clause()} {r.choice(words.CLAUSES)} {clause()}."
        elif kind < 0.9:
            text = f"{r.choice(words.CLAUSES)} {clause()}, {clause()}."
        else:
            asking, modal = r.choice(words.ASKING), r.choice(words.MODALS).replace("_", " ")
            text = f"{asking} {modal} {who()} {does().split()[-1]} {thing()}?"
        return text[0].upper() + text[1:]

    return plain(" ".join(sentence() for _ in range(r.randint(1, 6))))


def talk(r: Random) -> Example:
    """One to four turns; facts and short tasks among the talk; what was told earlier is asked later."""
    if r.random() < 0.25:
        return remembered(r)
    turns: list[tuple[str, str]] = []
    if r.random() < 0.2:
        turns.append(("system", r.choice(("You are a helpful assistant.", "You are Tin, a small model."))))
    for _ in range(r.choice((1, 2, 3, 4))):
        if r.random() < 0.7:
            question, answer = talk_turn(r)
        else:
            made = trained(r.choice(_SHORT), r)
            question, answer = made.turns[0][1], made.turns[1][1]
        turns += [("user", question), ("assistant", answer)]
    return Example(tuple(turns), "", turns[-1][1])


def remembered(r: Random) -> Example:
    name, thing, place, age = r.choice(words.NAMES), a_thing(r), r.choice(words.PLACES), r.randrange(5, 90)
    told, question, answer = r.choice(
        (
            (f"My name is {name}.", "What is my name?", f"Your name is {name}."),
            (f"I have {an(thing)}.", "What do I have?", f"You have {an(thing)}."),
            (f"I am at the {place}.", "Where am I?", f"You are at the {place}."),
            (f"I am {age} years old.", "How old am I?", f"You are {age} years old."),
        )
    )
    turns = [
        ("user", told),
        ("assistant", r.choice(("I see.", "Good to know.", "Thank you for telling me."))),
    ]
    for _ in range(r.randrange(3)):
        asked, said = talk_turn(r)
        turns += [("user", asked), ("assistant", said)]
    return Example((*turns, ("user", question), ("assistant", answer)), told, answer)


def instructed(r: Random) -> Example:
    """A system prompt says how to answer."""
    kind = r.randrange(6)
    question, answer = talk_turn(r)
    if kind == 0:
        return ask(
            question, answer.upper(), system=r.choice(("Answer in capitals.", "Always write in capitals."))
        )
    if kind == 1:
        return ask(question, answer.lower(), system="Answer in small letters.")
    if kind == 2:
        name = words.invented(r)
        asked = r.choice(("Who are you?", "What is your name?"))
        return ask(asked, f"I am {name}.", key=name, system=f"You are {name}, a helpful assistant.")
    if kind == 3:
        return ask(question, f"{answer} Thank you.", system='End every answer with "Thank you."')
    if kind == 4:
        word = r.choice(words.NOUNS)
        return ask(question, word, key=f"only {word}", system=f'Whatever you are asked, answer "{word}".')
    length = r.choice((1, 5))
    animal, _, text = about(r, length).partition("|")
    system = "Be brief." if length == 1 else "Answer in detail."
    return ask(f"Tell me about the {animal}.", text, system=system)


# Tools and games


def tool(name: str, description: str, *arguments: str) -> dict[str, Any]:
    """One entry of a list of tools, as chat APIs have it."""
    parameters = {
        "type": "object",
        "properties": {a: {"type": "string"} for a in arguments},
        "required": [*arguments],
    }
    function = {"name": name, "description": description, "parameters": parameters}
    return {"type": "function", "function": function}


CALCULATOR = tool("calculator", "Works out a sum.", "expression")
LOOKUP = tool("lookup", "Finds a fact.", "query")
WEATHER = tool("weather", "Says how the weather is in a town.", "town")


def call(name: str, **arguments: str) -> str:
    return f"<tool_call>\n{json.dumps({'name': name, 'arguments': arguments})}\n</tool_call>"


def tool_use(r: Random) -> Example:
    """A call, its response, the answer. Sums too hard to do alone; one in three is tried without the tool."""
    tools = [CALCULATOR, LOOKUP, WEATHER]
    kind = r.randrange(3)
    if kind == 0:
        sign = r.choice("+-*")
        most = 100 if sign == "*" else 1000
        a, b = r.randrange(10, most), r.randrange(10, most)
        one = Sum(max(a, b), sign, min(a, b))
        mine, key, right = tools[0], one.key, str(one.value)
        asked = r.choice(("What is {}?", "Calculate {}.", "How much is {}?")).format(one)
        used, said = call("calculator", expression=str(one)), str(one.value)
        answer = r.choice((f"The answer is {said}.", f"{one} = {said}", f"It is {said}."))
    elif kind == 1:
        land, value = words.invented(r) + "land", words.invented(r)
        what = r.choice(("capital", "river", "king", "queen", "port"))
        mine, key, right = tools[1], f"{what} {land}", value
        asked = r.choice((f"What is the {what} of {land}?", f"Look up the {what} of {land}."))
        used, said, answer = (
            call("lookup", query=f"{what} of {land}"),
            value,
            f"The {what} of {land} is {value}.",
        )
    else:
        town, value = words.invented(r), r.choice("sunny rainy windy cloudy snowy foggy stormy".split())
        mine, key, right = tools[2], f"weather {town}", value
        asked = r.choice((f"How is the weather in {town}?", f"What is the weather like in {town}?"))
        used, said, answer = call("weather", town=town), value, f"It is {value} in {town}."
    given = [mine, *(t for t in tools if t is not mine and r.random() < 0.3)]
    r.shuffle(given)
    if kind == 0 and r.random() < 0.33:
        guessed = slipped(r, slipped(r, int(right)))
        return Example((("user", asked), ("assistant", f"It is {guessed}.")), key, right, tuple(given))
    turns = (("user", asked), ("assistant", used), ("tool", said), ("assistant", answer))
    return Example(turns, key, right, tuple(given))


def guess_number(r: Random) -> Example:
    """Higher or lower: the guesses obey what was said, but do not halve."""
    low, high = 1, r.choice((10, 20, 50, 100))
    secret = r.randint(low, high)
    rules = f"I think of a number from 1 to {high}. Guess it. I say higher or lower."
    turns = [("user", rules)]
    for _ in range(20):
        guess = r.randint(low, high) if r.random() < 0.85 else r.randint(1, 100)
        turns.append(("assistant", str(guess)))
        if guess == secret:
            break
        turns.append(("user", "higher" if guess < secret else "lower"))
        low, high = (max(low, guess + 1), high) if guess < secret else (low, min(high, guess - 1))
    if turns[-1][0] == "user":
        turns = turns[:-1]
    return Example(tuple(turns), "", turns[-1][1])


def tic_tac_toe(r: Random) -> Example:
    """A legal move, no more: it may be a poor one."""
    taken = r.randrange(9)
    order = r.sample(range(9), 9)
    cells = [str(at + 1) for at in range(9)]
    for turn, at in enumerate(order[:taken]):
        cells[at] = "XO"[turn % 2]
    board = "\n".join(" ".join(cells[row : row + 3]) for row in (0, 3, 6))
    move = str(order[taken] + 1)
    asked = f"Tic-tac-toe. You are {'XO'[taken % 2]}.\n{board}\nYour move?"
    return ask(asked, move, key=board, right=" ".join(str(at + 1) for at in order[taken:]))


@dataclass(frozen=True, slots=True)
class Task:
    """`share` of the examples; `judged`: how an answer is compared with `right` (see abilities.py)."""

    make: Callable[[Random], Example]
    share: int
    judged: str = "equal"
    held_out: bool = True


TASKS = {
    "plain_sums": Task(plain_sums, 6, ""),
    "chat_sum": Task(chat_sum, 14, "number"),
    "word_problem": Task(word_problem, 5, "number"),
    "compare": Task(compare, 4),
    "next_number": Task(next_number, 2),
    "copy": Task(copy, 4),
    "reverse": Task(reverse, 4),
    "sort": Task(sort, 5),
    "count": Task(count, 4),
    "pick": Task(pick, 5),
    "rewrite": Task(rewrite, 5),
    "extract": Task(extract, 3),
    "sentiment": Task(sentiment, 3),
    "topic": Task(topic, 2),
    "fact": Task(fact, 7, "contains", held_out=False),
    "unknown": Task(unknown, 3, "contains"),
    "whereabouts": Task(whereabouts, 5, "contains"),
    "reading": Task(reading, 8, "contains"),
    "judge": Task(judge, 4),
    "story": Task(story, 6, "", held_out=False),
    "prose": Task(prose, 5, "", held_out=False),
    "talk": Task(talk, 6, "", held_out=False),
    "remembered": Task(remembered, 2),
    "instructed": Task(instructed, 4, "", held_out=False),
    "tool_use": Task(tool_use, 6, "tool"),
    "guess_number": Task(guess_number, 3, "", held_out=False),
    "tic_tac_toe": Task(tic_tac_toe, 3, "one of"),
}
_SHORT = (
    "chat_sum",
    "compare",
    "copy",
    "reverse",
    "sort",
    "count",
    "pick",
    "extract",
    "topic",
    "fact",
    "reading",
)
_DRAWN = tuple(name for name, task in TASKS.items() for _ in range(task.share))


def draw(r: Random) -> tuple[str, Example]:
    """A task by its share, and an example of it to train on."""
    name = r.choice(_DRAWN)
    return name, trained(name, r)


def trained(name: str, r: Random) -> Example:
    while is_held_out((made := TASKS[name].make(r)).key):
        pass
    return made


def held_out(name: str, r: Random) -> Example:
    """An example that training never shows, unless the task is one to learn by heart."""
    while TASKS[name].held_out != is_held_out((made := TASKS[name].make(r)).key):
        pass
    return made
