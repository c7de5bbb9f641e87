"""Guesses that one target forward verifies: a tree behind the last verified token, often a single line."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .messages import Branches


@dataclass(frozen=True)
class Guesses:
    """Guesses behind the verified tokens of a request: the likeliest line first, every one behind its parent.

    Attributes
    ----------
    token_ids : tuple of int
        The guesses.
    parents : tuple of int
        For each the place here of the guess before it; -1: it follows the last verified token.
    chances : tuple of float
        For each the estimated chance that it and all before it stand.
    are_looked_up : tuple of bool
        Whether each comes from the text so far, not from the draft.
    """

    token_ids: tuple[int, ...] = ()
    parents: tuple[int, ...] = ()
    chances: tuple[float, ...] = ()
    are_looked_up: tuple[bool, ...] = ()

    @classmethod
    def line(cls, token_ids: Sequence[int]) -> Guesses:
        """Draft tokens one behind the other."""
        num = len(token_ids)
        return cls(tuple(token_ids), tuple(range(-1, num - 1)), (1.0,) * num, (False,) * num)

    def __len__(self) -> int:
        return len(self.token_ids)

    @property
    def is_line(self) -> bool:
        """Whether each follows the one before it."""
        return all(parent == place - 1 for place, parent in enumerate(self.parents))

    def behind(self, place: int) -> list[int]:
        """The places of the guesses that directly follow the one at `place` (-1: the last verified token)."""
        return [child for child in range(place + 1, len(self.parents)) if self.parents[child] == place]

    def first(self, num_guesses: int) -> Guesses:
        """The first `num_guesses`."""
        if num_guesses >= len(self):
            return self
        cut = slice(num_guesses)
        return Guesses(self.token_ids[cut], self.parents[cut], self.chances[cut], self.are_looked_up[cut])

    def only(self, kept: Sequence[int]) -> Guesses:
        """Those at some places, ascending, of which none is without its parent."""
        new = {-1: -1, **{place: index for index, place in enumerate(kept)}}
        return Guesses(
            tuple(self.token_ids[place] for place in kept),
            tuple(new[self.parents[place]] for place in kept),
            tuple(self.chances[place] for place in kept),
            tuple(self.are_looked_up[place] for place in kept),
        )

    def branches(self, length: int) -> Branches | None:
        """What the tokens of a window attend to that holds the last verified token and all these guesses.

        `length` tokens of the sequence are before that window. None for a line: each token follows all before it.
        """
        if self.is_line:
            return None
        paths: list[tuple[int, ...]] = [(length,)]
        for place, parent in enumerate(self.parents):
            paths.append((*paths[parent + 1], length + 1 + place))
        return Branches(length, tuple(paths))


class GuessTree:
    """Guesses as they are collected from several sources; one that two sources name is one guess.

    Parameters
    ----------
    room : int
        Guesses that may follow each other at most.
    """

    def __init__(self, room: int) -> None:
        self._room = room
        self._token_ids: list[int] = []
        self._parents: list[int] = []
        self._depths: list[int] = []
        self._chances: list[float] = []  # that it stands if all before it do
        self._are_looked_up: list[bool] = []
        self._children: dict[int, dict[int, int]] = {}  # place (-1: the root) -> token -> place

    def add(self, parent: int, token_id: int, chance: float, is_looked_up: bool = False) -> int | None:
        """Guess a token behind the guess at `parent`; its place here, None without room."""
        siblings = self._children.setdefault(parent, {})
        place = siblings.get(token_id)
        if place is not None:
            self._chances[place] = max(self._chances[place], chance)
            return place
        depth = 1 if parent < 0 else self._depths[parent] + 1
        if depth > self._room:
            return None
        place = siblings[token_id] = len(self._token_ids)
        self._token_ids.append(token_id)
        self._parents.append(parent)
        self._depths.append(depth)
        self._chances.append(chance)
        self._are_looked_up.append(is_looked_up)
        return place

    def above(self, least: float, num_guesses: int) -> Guesses:
        """The likeliest `num_guesses` guesses that are likelier than `least` to be verified.

        Sources that contradict each other cannot all be right: chances of guesses for one position are scaled down
        where their sum is above 1.
        """
        chances: list[float] = []
        totals = {
            parent: sum(self._chances[place] for place in places.values()) for parent, places in self._children.items()
        }
        for parent, chance in zip(self._parents, self._chances, strict=True):
            before = 1.0 if parent < 0 else chances[parent]
            chances.append(before * chance / max(1.0, totals[parent]))
        likeliest = [place for place in range(len(chances)) if chances[place] > least]
        likeliest.sort(key=lambda place: -chances[place])  # Stable: a guess stays behind its parent.
        chosen = self._line_first(likeliest[:num_guesses])
        new = {-1: -1, **{place: index for index, place in enumerate(chosen)}}
        return Guesses(
            tuple(self._token_ids[place] for place in chosen),
            tuple(new[self._parents[place]] for place in chosen),
            tuple(chances[place] for place in chosen),
            tuple(self._are_looked_up[place] for place in chosen),
        )

    def _line_first(self, places: Sequence[int]) -> list[int]:
        """The likeliest line before all others: what stands of it need not be moved in the target's cache."""
        line = [-1]
        for place in places:
            if self._parents[place] == line[-1]:
                line.append(place)
        on_line = set(line)
        return [*line[1:], *(place for place in places if place not in on_line)]
