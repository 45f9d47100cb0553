"""Reading a growing text character by character for many patterns at once: where something may have begun to match.

An automaton over the trees of the patterns (`guardrails.syntax`), so it says yes at least where the patterns do. Its
states are made when a text first needs them; from then on a character costs one or two look-ups in a table.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence

from guardrails import syntax
from guardrails.syntax import Chars, Choice, Edge, Node, Repeat, Row

COPIES, FEW = 16, 3
"""How often a counted repeat of one character is written out, and of more; what is beyond becomes any number."""
STEPS = 100_000
"""How many steps are remembered before all are forgotten and made anew: a bound on memory, about 20 MB."""


class State:
    """What may be under way. next: the state after a character (None: nothing), as far as it is known; done: the
    patterns that may have matched now; alive: those that may go on."""

    __slots__ = ("alive", "done", "next", "places")

    def __init__(self, places: tuple[int, ...], done: frozenset[int], alive: frozenset[int]):
        self.places, self.done, self.alive = places, done, alive
        self.next: dict[str, State | None] = {}


class Scanner:
    """The automaton of many patterns by number."""

    def __init__(self, trees: Sequence[tuple[int, Node]]):
        # A place is one character in one pattern; it stands between two joints. Free ways lead from joint to joint.
        self._places: list[tuple[Chars, int, int]] = []  # what matches, the joint after it, the pattern's number
        self._at: list[list[int]] = []  # by joint: the places that start there
        self._ways: list[list[tuple[Chars | None, int]]] = []  # by joint: (what must stand before, joint)
        self._done: dict[int, int] = {}  # the pattern that is complete at a joint
        self._reached: dict[int, tuple[frozenset[int], frozenset[int]]] = {}
        self._states: dict[tuple[tuple[int, ...], frozenset[int]], State] = {}
        self._starts: list[tuple[Chars, int]] = []  # (what must stand before, place)
        self._steps = 0
        self.opened: dict[str, State | None] = {}
        """By two characters (one at the start of a text): what may have begun at the last of them, if known."""
        for number, tree in trees:
            first = self._joint()
            self._done[self._build(number, tree, first, True)] = number
            self._starts += self._firsts(first)

    def open(self, pair: str) -> State | None:
        """What may begin at the last character of `pair`, after the first; remembered in `opened`."""
        sign, before = pair[-1], pair[:-1]
        places = [place for beside, place in self._starts if not before or beside.has(before)]
        state = self.opened[pair] = self._after(places, sign)
        return state

    def step(self, state: State, sign: str) -> State | None:
        """What goes on after `sign`; remembered in `state.next`."""
        after = state.next[sign] = self._after(state.places, sign)
        return after

    def _after(self, places: Iterable[int], sign: str) -> State | None:
        self._steps += 1
        if self._steps > STEPS:
            self._steps = 0
            self.opened.clear()
            self._states.clear()
        joints = {joint for chars, joint, _ in map(self._places.__getitem__, places) if chars.has(sign)}
        reached = [self._reach(joint) for joint in joints]
        ahead = tuple(sorted({place for places, _ in reached for place in places}))
        done = frozenset(number for _, numbers in reached for number in numbers)
        if not ahead and not done:
            return None
        state = self._states.get((ahead, done))
        if state is None:
            state = self._states[ahead, done] = State(ahead, done, frozenset(self._places[i][2] for i in ahead))
        return state

    def _reach(self, joint: int) -> tuple[frozenset[int], frozenset[int]]:
        """(the places that follow a joint, the patterns that are complete there)."""
        if joint not in self._reached:
            seen, todo = {joint}, [joint]
            while todo:
                new = {other for _, other in self._ways[todo.pop()]} - seen
                seen |= new
                todo += new
            done = frozenset(self._done[one] for one in seen if one in self._done)
            self._reached[joint] = frozenset(place for one in seen for place in self._at[one]), done
        return self._reached[joint]

    def _firsts(self, joint: int) -> list[tuple[Chars, int]]:
        """The places at which a match may start, each with what must stand before it."""
        seen = {(joint, syntax.ANY)}
        todo = list(seen)
        while todo:
            one, beside = todo.pop()
            for edge, other in self._ways[one]:
                both = Chars(beside.mask & edge.mask, beside.wide and edge.wide) if edge else beside
                if (other, both) not in seen:
                    seen.add((other, both))
                    todo.append((other, both))
        return [(beside, place) for one, beside in seen for place in self._at[one]]

    def _joint(self) -> int:
        self._at.append([])
        self._ways.append([])
        return len(self._at) - 1

    def _build(self, number: int, node: Node, start: int, left: bool) -> int:
        """The joint after the node. left: whether no character of the pattern stands before it."""
        if isinstance(node, Chars):
            end = self._joint()
            self._at[start].append(len(self._places))
            self._places.append((node, end, number))
            return end
        if isinstance(node, Row):
            for part in syntax.edges(node.parts):
                start = self._build(number, part, start, left)
                left = left and (isinstance(part, Edge) or part == syntax.EMPTY)
            return start
        if isinstance(node, Choice):
            end = self._joint()
            for part in node.parts:
                self._ways[self._build(number, part, start, left)].append((None, end))
            return end
        if isinstance(node, Repeat):
            return self._repeat(number, node, start, left)
        if isinstance(node, Edge) and node.behind and left:
            end = self._joint()
            self._ways[start].append((node.chars, end))
            return end
        return start

    def _repeat(self, number: int, node: Repeat, start: int, left: bool) -> int:
        copies = min(node.least, COPIES if isinstance(node.part, Chars) else FEW)
        for i in range(copies):
            start = self._build(number, node.part, start, left and not i and node.most == 1)
        if node.most is not None and node.most - copies <= FEW:
            end = self._joint()
            for _ in range(node.most - copies):
                self._ways[start].append((None, end))
                start = self._build(number, node.part, start, left and node.most == 1)
            self._ways[start].append((None, end))
            return end
        loop = self._joint()
        self._ways[start].append((None, loop))
        self._ways[self._build(number, node.part, loop, False)].append((None, loop))
        return loop
