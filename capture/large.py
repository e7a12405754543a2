"""Prompts of the large example: `make capture-large` has the example's target answer them.

    python -m capture.large .cache/large

Templates of this project, filled with subjects. The same prompts come out each time, so that a stopped run of
the command goes on where it was. Answers are sampled at several temperatures, for each of which there is a
file of its own.
"""

from __future__ import annotations

import hashlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path

from capture.example import EXAMPLE_DATA
from pipeline.files import publish_bytes

TEMPERATURES = ("0.0", "0.3", "0.7", "1.0")
# Conversations from templates, besides the example's own. No question is asked at two
# temperatures: a held-out answer would have a twin.
CONVERSATIONS = 8_400
_FOLLOWED = 0.3
"""Share of the conversations with a second question."""

SUBJECTS = """
photosynthesis; black holes; the water cycle; earthquakes; volcanoes; the ozone layer; tides; comets; the
Moon's phases; gravity; magnets; lightning; rainbows; vaccines; antibiotics; the immune system; the human
heart; sleep; dreams; memory; the brain; muscles; bones; digestion; blood; DNA; evolution; dinosaurs;
whales; bees; ants; spiders; octopuses; penguins; owls; bats; wolves; elephants; horses; cats; dogs;
goldfish; oak trees; mushrooms; moss; cacti; coral reefs; rainforests; deserts; glaciers; rivers; lakes;
wetlands; soil; compost; recycling; solar panels; wind turbines; nuclear power; batteries; electric cars;
bicycles; trains; ships; aeroplanes; rockets; satellites; bridges; tunnels; skyscrapers; lighthouses;
windmills; clocks; compasses; telescopes; microscopes; cameras; printing presses; typewriters; telephones;
radios; televisions; computers; the internet; search engines; passwords; encryption; open source software;
databases; spreadsheets; version control; unit tests; recursion; binary search; hash tables; linked lists;
sorting; regular expressions; loops in Python; functions in JavaScript; SQL joins; web servers; prime
numbers; fractions; percentages; averages; probability; geometry; the Pythagorean theorem; negative numbers;
logarithms; money; inflation; interest rates; budgets; taxes; insurance; pensions; the stock market; small
businesses; job interviews; cover letters; meetings; presentations; teamwork; deadlines; remote work; public
speaking; negotiation; feedback; friendship; families; weddings; birthdays; holidays; moving house;
neighbours; renting a flat; gardening; houseplants; tomatoes; herbs; bread; pasta; rice; soup; salads;
cheese; chocolate; coffee; tea; honey; breakfast; leftovers; knives; cast iron pans; ovens; picnics;
camping; hiking; swimming; running; yoga; football; tennis; chess; card games; puzzles; board games; kites;
knitting; sewing; woodworking; painting; watercolours; photography; pottery; poetry; novels; short stories;
fairy tales; myths; theatre; films; jazz; classical music; folk songs; the guitar; the piano; the violin;
drums; choirs; dancing; museums; libraries; schools; homework; exams; learning a language; handwriting;
spelling; dictionaries; maps; capital cities; ancient Rome; ancient Egypt; the Middle Ages; the Renaissance;
the Industrial Revolution; the Silk Road; explorers; pirates; kings and queens; elections; constitutions;
courts; newspapers; postage stamps; coins; flags; umbrellas; shoes; hats; glasses; mirrors; candles; paper;
glass; steel; plastic; rubber; wool; cotton; bricks; concrete; paint; keys; locks; ladders; hammers; screws;
bicycles with flat tyres; leaking taps; blocked drains; squeaking doors; cold rooms; mould; dust; laundry;
stains; ironing; wardrobes; allergies; headaches; colds; sunburn; stress; good posture; first aid; teeth;
handwashing
"""

TEMPLATES = """
Explain {a} to a ten-year-old.
What should everybody know about {a}?
Write a short paragraph about {a}.
Give me five facts about {a}.
What are common mistakes that people make about {a}?
How did people think about {a} a hundred years ago?
Why does it matter to understand {a}?
Write a poem of eight lines about {a}.
Write a short story in which {a} and {b} both play a part.
Compare {a} with {b}.
What do {a} and {b} have in common?
List three advantages and three disadvantages of {a}.
Make a table with four rows about {a}: one column for a term, one for its meaning.
Give me a list of ten questions that I could ask an expert on {a}.
I have to give a talk of two minutes about {a}. Write it for me.
Summarise what you know about {a} in three sentences.
Write an email to a friend who has just discovered {a}.
Suggest a title and an outline for an article about {a}.
Invent a dialogue between two people who disagree about {a}.
What is a good way to begin learning about {a}?
Describe {a} without using the word itself.
Write a quiz with four questions about {a}, and give the answers.
What would the world be like without {a}?
Tell me a joke about {a}, then explain why it is funny.
Write a Python class that models something to do with {a}, with a comment on each method.
Write a JSON object with five made-up records about {a}.
Write a product description for something that has to do with {a} and {b}.
Which words come to mind when you hear of {a}? Give twelve and group them.
A child asks why {a} exist at all. What do you answer?
Plan a weekend around {a}.
Write a step-by-step guide for beginners about {a}.
Give a definition of {a}, an example, and a counterexample.
Translate this into simpler words: "Few subjects have been misunderstood as thoroughly as {a}."
Rewrite this so that it sounds friendly: "You know nothing about {a}, so stop talking about {b}."
How would a scientist, a poet and a cook each describe {a}?
What is the most surprising thing about {a}?
Make a plan for a lesson of an hour on {a} for a class of twelve.
Write a short review of an imaginary book called "{a} and {b}".
If I have 3 boxes with 12 things to do with {a} in each and give away 7, how many are left? Show your steps.
Write a news report of five sentences about an unusual event involving {a}.
""".strip().splitlines()

FOLLOW_UPS = """
Can you make that shorter?
Give me an example.
Why is that?
What would you add for somebody who knows it already?
Now say the same as a list.
Which of these matters most, and why?
Are you sure? Check it again.
And how does {b} fit in?
Rewrite your answer for a six-year-old.
What should I read next?
Can you turn that into a poem?
What is the opposite view?
""".strip().splitlines()


def subjects() -> list[str]:
    """Return the subjects, in the order of this file."""
    return [each.strip() for each in SUBJECTS.replace("\n", " ").split(";")]


def _number(*key: object) -> int:
    """Return a hash of a key, which no version of Python changes."""
    return int.from_bytes(hashlib.sha256(repr(key).encode()).digest()[:8], "big")


def _pick(options: list[str], *key: object) -> str:
    return options[_number(*key) % len(options)]


def conversations() -> Iterator[dict[str, object]]:
    """Yield the conversations, each user turn followed by a turn to replace."""
    every, asked = subjects(), set()
    number = 0
    while len(asked) < CONVERSATIONS:
        number += 1
        words = {name: _pick(every, number, name) for name in "ab"}
        question = _pick(TEMPLATES, number, "template").format(**words)
        if words["a"] == words["b"] or question in asked:
            continue
        asked.add(question)
        turns = [question]
        if _number(number, "turns") < _FOLLOWED * 2**64:
            turns.append(_pick(FOLLOW_UPS, number, "follow-up").format(**words))
        messages = []
        for turn in turns:
            messages += [{"role": "user", "content": turn}, {"role": "assistant", "content": "-"}]
        yield {"id": f"large-{number:05d}", "messages": messages}
    yield from (json.loads(line) for line in EXAMPLE_DATA.read_text().splitlines())


def main(folder: Path) -> None:
    """Write `prompts/T.jsonl` of every temperature T to a folder."""
    prompts = folder / "prompts"
    prompts.mkdir(parents=True, exist_ok=True)
    lines = [json.dumps(each, ensure_ascii=False) + "\n" for each in conversations()]
    for i, temperature in enumerate(TEMPERATURES):
        file, own = prompts / f"{temperature}.jsonl", lines[i :: len(TEMPERATURES)]
        publish_bytes(file, "".join(own).encode())
        print(f"{file}: {len(own):,} conversations to answer at temperature {temperature}")


if __name__ == "__main__":
    main(Path(sys.argv[1]))
