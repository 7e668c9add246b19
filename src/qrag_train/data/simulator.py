"""Endless bAbI stories: a small world that is narrated and asked about in bAbI's own sentences."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import NamedTuple, TypeVar

import numpy as np

from qrag_retriever.errors import ConfigError
from qrag_train.data.sample import SupportSample

PLACES = ("bathroom", "bedroom", "garden", "hallway", "kitchen", "office")
OBJECTS = ("apple", "football", "milk")
PEOPLE = ("Daniel", "John", "Mary", "Sandra")
GIVERS = ("Bill", "Fred", "Jeff", "Mary")
MOVES = ("journeyed to", "moved to", "travelled to", "went back to", "went to")
TAKES = ("got", "grabbed", "picked up", "took")
DROPS = ("discarded", "dropped", "left", "put down")
GIVES = ("gave", "handed", "passed")
OPPOSITE = {"east": "west", "west": "east", "north": "south", "south": "north"}

# How often an action is tried, as measured in the en-10k files; what is impossible is drawn again.
_ACTIONS = {1: ("move",), 2: ("move", "take", "drop"), 3: ("move", "take", "drop")}
_ACTIONS[5] = (*_ACTIONS[2] * 2, *("give",) * 7)
_ACTIONS[14] = _ACTIONS[3]
TASKS = (1, 2, 3, 4, 5, 14)
# Actions between two questions; there are more where most questions can be answered.
_ACTS = {14: 10}
_ADD_THERE = 0.2
# Nobody is asked about what was last told more statements ago than this.
_MEMORY = 5

T = TypeVar("T")


class _Question(NamedTuple):
    text: str
    answer: str
    support: tuple[int, ...]


class _Spot(NamedTuple):
    """A place, and the statement that tells who or what is there."""

    place: str
    statement: int


class _Gift(NamedTuple):
    giver: str
    thing: str
    receiver: str
    statement: int


class BabiSimulator:
    """Draws questions on new stories in the language of bAbI's en-10k files.

    Same verbs, names, places, objects and sentence frames; every answer and support is derived
    as in those files, and only questions that the story so far answers are asked. Task 14 asks
    where somebody was before a place, on stories of task 3, whose order needs no time words: an
    encoder learns there to look for the place that a question names, which task 3 seldom teaches.

    Args:
        task: 1, 2 or 3 (supporting facts), 4 (two-argument relations), 5 (three-argument
            relations) or 14 (time reasoning, told in order).
        moves: How much more often people move than in the files: with 3, things are carried
            further, and the question is more often about a place that was left long ago.
        places: Number of places of a story, drawn anew for each; where there are few, people meet
            and things change hands more often.
        things: Number of things of a story, drawn in the same way.

    Raises:
        ConfigError: If there is no such task, nobody would move, or there are not so many places
            or things.

    Example:
        >>> sample = BabiSimulator(task=2).sample(np.random.default_rng(3))
        >>> sample.question, sample.answer
        ('Where is the milk?', 'hallway')
        >>> [sample.chunks[i] for i in sample.support]
        ['John put down the milk.', 'John moved to the hallway.']
    """

    QUESTIONS_PER_STORY = 5

    def __init__(
        self,
        task: int,
        moves: int = 1,
        places: int = len(PLACES),
        things: int = len(OBJECTS),
    ) -> None:
        if task not in TASKS:
            raise ConfigError(f"task={task!r} is not simulated; give 1, 2, 3, 4, 5 or 14.")
        if moves < 1:
            raise ConfigError(f"moves={moves!r}; give at least 1, which is as in the files.")
        if not 2 <= places <= len(PLACES):
            raise ConfigError(f"places={places!r}; give 2 to {len(PLACES)}.")
        if not 1 <= things <= len(OBJECTS):
            raise ConfigError(f"things={things!r}; give 1 to {len(OBJECTS)}.")
        self.task = task
        self._moves = moves
        self._places = places
        self._things = things

    def story(self, rng: np.random.Generator) -> list[SupportSample]:
        """All five questions of one new story (task 4: one), each with the statements above it."""
        return self._narrate(rng, 1 if self.task == 4 else self.QUESTIONS_PER_STORY)

    def sample(self, rng: np.random.Generator) -> SupportSample:
        """One question of a new story: with equal chance its first, second … or fifth."""
        if self.task == 4:
            return self._narrate(rng, 1)[0]
        return self._narrate(rng, int(rng.integers(self.QUESTIONS_PER_STORY)) + 1)[-1]

    def _narrate(self, rng: np.random.Generator, questions: int) -> list[SupportSample]:
        name = f"qa{self.task}-{rng.integers(2**63):016x}"
        if self.task == 4:
            chunks, question = _directions(rng)
            return [_sample(f"{name}/1", chunks, question)]
        places, things = _some(PLACES, self._places, rng), _some(OBJECTS, self._things, rng)
        world = _World(self.task, rng, self._moves, places, things)
        samples: list[SupportSample] = []
        while len(samples) < questions:
            for _ in range(_ACTS.get(self.task, 2)):
                world.act()
            asked = world.ask()
            if asked is not None:
                samples.append(_sample(f"{name}/{len(samples) + 1}", world.statements, asked))
        return samples


def _sample(name: str, statements: Sequence[str], question: _Question) -> SupportSample:
    return SupportSample(name, question.text, tuple(statements), question.support, question.answer)


class _World:
    """Where everybody and everything is, and what a listener was told of it."""

    def __init__(
        self,
        task: int,
        rng: np.random.Generator,
        moves: int,
        places: Sequence[str],
        things: Sequence[str],
    ) -> None:
        self._rng = rng
        self._task = task
        self._places = places
        self._things = things
        extra = ("move",) * (_ACTIONS[task].count("move") * (moves - 1))
        self._actions = _ACTIONS[task] + extra
        people = GIVERS if task == 5 else PEOPLE
        self._position = {person: self._pick(places) for person in people}
        self._lies_in: dict[str, str | None] = {thing: self._pick(places) for thing in things}
        self._holder: dict[str, str | None] = dict.fromkeys(things)
        self._ask: dict[int, Callable[[], _Question | None]] = {
            1: self._where_is_person,
            2: self._where_is_thing,
            3: self._where_was_thing,
            5: self._who_gave_what,
            14: self._where_was_person,
        }
        # What was told.
        self.statements: list[str] = []
        self._told_position: dict[str, _Spot] = {}
        self._last_event: dict[str, int] = {}
        self._left_at: dict[str, _Spot] = {}
        self._path: dict[str, list[_Spot]] = {}  # of a thing, since it was last taken
        self._visits: dict[str, list[_Spot]] = {person: [] for person in people}
        self._last_gift: _Gift | None = None

    def _pick(self, options: Sequence[T]) -> T:
        return options[int(self._rng.random() * len(options))]

    def act(self) -> None:
        """Somebody does something possible, and it is told."""
        actions = {"move": self._move, "take": self._take, "drop": self._drop, "give": self._give}
        person = self._pick(tuple(self._position))
        while not actions[self._pick(self._actions)](person):
            person = self._pick(tuple(self._position))

    def ask(self) -> _Question | None:
        """A question, or ``None`` if the one drawn cannot be answered from what was told."""
        return self._ask[self._task]()

    def _tell(self, statement: str) -> int:
        self.statements.append(statement)
        return len(self.statements) - 1

    def _there(self, always: bool = False) -> str:
        return " there." if always or self._rng.random() < _ADD_THERE else "."

    def _move(self, person: str) -> bool:
        place = self._pick(self._places)
        if place == self._position[person]:
            return False
        self._position[person] = place
        spot = _Spot(place, self._tell(f"{person} {self._pick(MOVES)} the {place}."))
        self._told_position[person] = spot
        self._visits[person].append(spot)
        for thing in self._things_of(person):
            self._path[thing].append(spot)
        return True

    def _take(self, person: str) -> bool:
        here = [thing for thing in self._things if self._lies_in[thing] == self._position[person]]
        if not here:
            return False
        thing = self._pick(here)
        self._holder[thing], self._lies_in[thing] = person, None
        # Only task 3 says "there" by chance when something is taken.
        there = self._there(always=self._task != 3)
        self._last_event[thing] = self._tell(f"{person} {self._pick(TAKES)} the {thing}{there}")
        self._path[thing] = []
        self._left_at.pop(thing, None)
        return True

    def _drop(self, person: str) -> bool:
        things = self._things_of(person)
        if not things:
            return False
        thing = self._pick(things)
        self._holder[thing], self._lies_in[thing] = None, self._position[person]
        statement = f"{person} {self._pick(DROPS)} the {thing}{self._there()}"
        self._last_event[thing] = self._tell(statement)
        if person in self._told_position:
            self._left_at[thing] = self._told_position[person]
        return True

    def _give(self, person: str) -> bool:
        things = self._things_of(person)
        near = [
            other
            for other, place in self._position.items()
            if other != person and place == self._position[person]
        ]
        if not things or not near:
            return False
        thing, receiver = self._pick(things), self._pick(near)
        self._holder[thing] = receiver
        told = self._tell(f"{person} {self._pick(GIVES)} the {thing} to {receiver}.")
        self._last_gift = _Gift(person, thing, receiver, told)
        return True

    def _things_of(self, person: str) -> list[str]:
        return [thing for thing in self._things if self._holder[thing] == person]

    def _recent(self, statement: int) -> bool:
        return len(self.statements) - statement <= _MEMORY

    def _where_is_person(self) -> _Question:
        told = self._told_position
        person = self._pick([name for name, spot in told.items() if self._recent(spot.statement)])
        return _Question(f"Where is {person}?", told[person].place, (told[person].statement,))

    def _where_is_thing(self) -> _Question | None:
        answers = []
        for thing, event in self._last_event.items():
            if self._holder[thing] is None:
                spot = self._left_at.get(thing)
            else:  # only once its holder has moved with it
                spot = self._path[thing][-1] if self._path[thing] else None
            if spot is not None and self._recent(event):
                support = (event, spot.statement)
                answers.append(_Question(f"Where is the {thing}?", spot.place, support))
        return self._pick(answers) if answers else None

    def _where_was_thing(self) -> _Question | None:
        answers = []
        for thing, event in self._last_event.items():
            path = self._path[thing] if self._recent(event) else []
            for before, after in _last_visits(path):
                text = f"Where was the {thing} before the {after.place}?"
                support = (event, after.statement, before.statement)
                answers.append(_Question(text, before.place, support))
        return self._pick(answers) if answers else None

    def _where_was_person(self) -> _Question | None:
        answers = []
        for person, path in self._visits.items():
            for before, after in _last_visits(path):
                text = f"Where was {person} before the {after.place}?"
                support = (after.statement, before.statement)
                answers.append(_Question(text, before.place, support))
        return self._pick(answers) if answers else None

    def _who_gave_what(self) -> _Question | None:
        # The latest gift of all: of older ones, "What did Bill give to Fred?" may be ambiguous.
        if self._last_gift is None or not self._recent(self._last_gift.statement):
            return None
        giver, thing, receiver, statement = self._last_gift
        what = (f"What did {giver} give to {receiver}?", thing)
        text, answer = self._pick(
            (
                what,
                what,  # in the files, twice as frequent as each of the others
                (f"Who gave the {thing}?", giver),
                (f"Who gave the {thing} to {receiver}?", giver),
                (f"Who received the {thing}?", receiver),
                (f"Who did {giver} give the {thing} to?", receiver),
            )
        )
        return _Question(text, answer, (statement,))


def _some(all_: Sequence[str], count: int, rng: np.random.Generator) -> Sequence[str]:
    if count == len(all_):  # nothing to draw
        return all_
    return [all_[i] for i in rng.permutation(len(all_))[:count]]


def _last_visits(path: Sequence[_Spot]) -> list[tuple[_Spot, _Spot]]:
    """The last visit to each place of a way, after the visit before it."""
    last = {spot.place: i for i, spot in enumerate(path) if i}
    return [(path[visit - 1], path[visit]) for visit in last.values()]


def _directions(rng: np.random.Generator) -> tuple[list[str], _Question]:
    """A story of task 4: three places in a row, two relations, one question."""
    first, middle, last = (PLACES[i] for i in rng.permutation(len(PLACES))[:3])
    direction = tuple(OPPOSITE)[rng.integers(4)]
    facts = []
    for place, towards in ((first, direction), (last, OPPOSITE[direction])):
        if rng.random() < 1 / 3:
            facts.append((middle, OPPOSITE[towards], place))
        else:
            facts.append((place, towards, middle))
    asked = int(rng.integers(2))
    subject, towards, origin = facts[asked]
    question = (
        f"What is {towards} of the {origin}?"
        if rng.random() < 0.5
        else f"What is the {origin} {OPPOSITE[towards]} of?"
    )
    chunks = [f"The {a} is {way} of the {b}." for a, way, b in facts]
    return chunks, _Question(question, subject, (asked,))
