"""The demo's task: chains of "more", "fewer" and "times as many", and the two writers who answer.

A question names 4 to 7 people, each counted from the one before. A response is a plan line, one
sentence of arithmetic per person, and the answer:

    Q: Ann has 7 pens. Ben has 3 times as many as Ann. Cal has 5 fewer than Ben. ...
    Plan: Ann start 7, Ben times 3, Cal take 5, ...
    ...
    #### 16

The plan decides and the rest executes it. That early tokens matter most is therefore true by
construction here; in real answers it is an observation of the paper. The careful writer always
plans right. The hasty one reads "fewer" and "times" as "add" four times in five, and then works
that plan out without a mistake, in other words than the careful one's.

Only the standard library is used, so problems can be made and graded without torch.
"""

import hashlib
import random
import re
from collections.abc import Sequence
from dataclasses import dataclass
from itertools import product

SPLITS = ("train", "validation", "test")
NAMES = ("Ann", "Ben", "Cal", "Dan", "Eve", "Fay", "Gus", "Hal", "Ivy", "Joe")
ITEMS = ("pens", "cups", "keys", "hats", "nuts", "figs")
MIN_PEOPLE, MAX_PEOPLE = 4, 7
# Of what a person has. A chain of nothing but "add" reaches 12 + 6 * 9 = 66 at most.
MIN_VALUE, MAX_VALUE = 2, 66
# A step is (verb, amount): the verb is the plan's word for it.
FACTS = {"add": "{} more than", "take": "{} fewer than", "times": "{} times as many as"}
SIGNS = {"add": "plus", "take": "minus", "times": "times"}
AMOUNTS = {"add": (2, 9), "take": (2, 9), "times": (2, 4)}
HASTY_MISREADS = 0.8
# Ten buckets of the hash of the question: one for validation, one for test, the rest for training.
SPLIT_OF_BUCKET = ("validation", "test", *["train"] * 8)

Step = tuple[str, int]


@dataclass(frozen=True)
class Problem:
    """One question. `steps` has num_people - 1 entries: how each person follows from the last."""

    prompt: str  # ends in a newline, which is always a token of its own
    answer: int
    num_people: int
    names: tuple[str, ...]
    item: str
    start: int
    steps: tuple[Step, ...]


def make_problems(split: str, count: int, *, seed: int = 0) -> list[Problem]:
    """`count` different problems of a split, the same ones for the same arguments.

    A problem belongs to the split that a hash of its question picks, so the splits share no
    problem whatever the seeds. A larger count extends the list of a smaller one.
    """
    if split not in SPLITS:
        raise ValueError(f"split must be one of {SPLITS}, got {split!r}")
    if count < 0:
        raise ValueError(f"count must be at least 0, got {count}")
    rng = random.Random(f"{split} {seed}")
    problems: dict[str, Problem] = {}
    while len(problems) < count:
        problem = _draw_problem(rng)
        if problem is not None and split_of(problem.prompt) == split:
            problems.setdefault(problem.prompt, problem)
    return list(problems.values())


def split_of(prompt: str) -> str:
    """The split a question belongs to. It does not depend on the seed, the process or Python."""
    digest = hashlib.sha256(prompt.encode()).digest()
    return SPLIT_OF_BUCKET[int.from_bytes(digest[:8], "big") % len(SPLIT_OF_BUCKET)]


def write_careful(problem: Problem) -> str:
    """The right plan, worked out in full sentences."""
    names, item = problem.names, problem.item
    values = run_steps(problem.start, problem.steps)
    lines = [
        _plan_line(problem, problem.steps),
        f"{names[0]} is the first of them, so {names[0]} has {values[0]} {item} in all.",
    ]
    for i, (verb, amount) in enumerate(problem.steps):
        before, after = values[i], values[i + 1]
        lines.append(
            f"To find how many {item} {names[i + 1]} has, we take the {before} {item} "
            f"that {names[i]} has {SIGNS[verb]} {amount}. We see that {before} {SIGNS[verb]} "
            f"{amount} is {after}, so now we know that {names[i + 1]} has {after} {item} in all."
        )
    lines.append(f"#### {values[-1]}")
    return "\n".join(lines)


def write_hasty(problem: Problem, rng: random.Random) -> str:
    """A plan in which most "fewer" and "times" became "add", worked out in shorter sentences."""
    names, item = problem.names, problem.item
    steps, values = _misread(problem, rng)
    lines = [_plan_line(problem, steps), f"{names[0]} has {values[0]} {item}."]
    for i, (verb, amount) in enumerate(steps):
        lines.append(
            f"Then {names[i + 1]} has what {names[i]} has {SIGNS[verb]} {amount}, "
            f"and {values[i]} {SIGNS[verb]} {amount} is {values[i + 1]} {item} for {names[i + 1]}."
        )
    lines.append(f"#### {values[-1]}")
    return "\n".join(lines)


def grade(response: str, answer: int) -> bool:
    """Whether the response ends in the line "#### n" with n the answer.

    White space after that line is ignored. Two lines that begin with "####", even equal ones,
    count as no answer, and so does anything else on the line.
    """
    lines = response.rstrip().split("\n")
    marked = [line for line in lines if line.startswith("####")]
    return marked == [f"#### {answer}"] and lines[-1] == marked[0]


def plan_result(response: str) -> int | None:
    """What the response's own plan comes to, right or wrong; None if it has no readable plan.

    `grade(response, plan_result(response))` says whether a response executes its own plan.
    """
    first_line = response.split("\n", 1)[0]
    match = re.fullmatch(r"Plan: \w+ start (\d+)((?:, \w+ (?:add|take|times) \d+)+)\.", first_line)
    if match is None:
        return None
    steps = [(verb, int(n)) for verb, n in re.findall(r"(add|take|times) (\d+)", match[2])]
    return run_steps(int(match[1]), steps)[-1]


def run_steps(start: int, steps: Sequence[Step]) -> list[int]:
    """What each person has: len(steps) + 1 values, the first of them `start`."""
    values = [start]
    for verb, amount in steps:
        value = values[-1]
        values.append(
            {"add": value + amount, "take": value - amount, "times": value * amount}[verb]
        )
    return values


def _plan_line(problem: Problem, steps: Sequence[Step]) -> str:
    parts = [f"{problem.names[0]} start {problem.start}"]
    parts += [
        f"{name} {verb} {n}" for name, (verb, n) in zip(problem.names[1:], steps, strict=True)
    ]
    return f"Plan: {', '.join(parts)}."


def _misread(problem: Problem, rng: random.Random) -> tuple[list[Step], list[int]]:
    """The hasty writer's steps and what they come to, drawn again until every value is in range."""
    while True:
        steps = [
            ("add", amount) if verb != "add" and rng.random() < HASTY_MISREADS else (verb, amount)
            for verb, amount in problem.steps
        ]
        values = run_steps(problem.start, steps)
        if _in_range(values):
            return steps, values


def _in_range(values: Sequence[int]) -> bool:
    return all(MIN_VALUE <= value <= MAX_VALUE for value in values)


def _draw_problem(rng: random.Random) -> Problem | None:
    """One draw; None if a value leaves its range or a misread plan would come to the answer."""
    num_people = rng.randint(MIN_PEOPLE, MAX_PEOPLE)
    names = tuple(rng.sample(NAMES, num_people))
    item = rng.choice(ITEMS)
    start = rng.randint(MIN_VALUE, 12)
    verbs = [rng.choice(("add", "take", "times")) for _ in range(num_people - 1)]
    steps = tuple((verb, rng.randint(*AMOUNTS[verb])) for verb in verbs)
    values = run_steps(start, steps)
    if not _in_range(values):
        return None
    if not {"take", "times"} <= set(verbs) or _misreading_can_be_right(start, steps, values[-1]):
        return None
    facts = [f"{names[0]} has {start} {item}."]
    for i, (verb, amount) in enumerate(steps):
        facts.append(f"{names[i + 1]} has {FACTS[verb].format(amount)} {names[i]}.")
    prompt = f"Q: {' '.join(facts)} How many {item} does {names[-1]} have?\n"
    return Problem(prompt, values[-1], num_people, names, item, start, steps)


def _misreading_can_be_right(start: int, steps: Sequence[Step], answer: int) -> bool:
    """Whether some plan the hasty writer could wrongly make comes to the answer all the same."""
    readings = product(*[{(verb, amount), ("add", amount)} for verb, amount in steps])
    return any(
        run_steps(start, reading)[-1] == answer for reading in readings if reading != tuple(steps)
    )
