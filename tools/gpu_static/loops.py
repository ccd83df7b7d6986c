"""The hot loops of a kernel: how many instructions a warp issues in a trip, for how many bytes."""

import re
from collections.abc import Iterator
from dataclasses import dataclass, field

from gpu_static.sass import Function, Instruction

WARP = 32
REGISTER = re.compile(r"\bR(\d+)\b")


@dataclass
class Block:
    """Instructions that are reached and left together."""

    code: list[Instruction]
    followers: list[int] = field(default_factory=list)


@dataclass
class Trip:
    """One way through a loop, or through a kernel that has none."""

    code: list[Instruction]
    trips: list[int]  # how often each instruction is issued

    def bytes_of(self, *opcodes: str) -> int:
        """The bytes that a thread moves by these."""
        pairs = zip(self.code, self.trips, strict=True)
        return sum(i.width * n for i, n in pairs if i.name in opcodes and i.counted)

    @property
    def issued(self) -> int:
        """A warp's instructions."""
        return sum(self.trips)

    @property
    def loaded(self) -> int:
        """A thread's bytes from memory."""
        return self.bytes_of("LDG")

    @property
    def moved(self) -> int:
        """A thread's bytes from memory and to it."""
        return self.bytes_of("LDG", "STG")

    @property
    def issued_per_byte(self) -> float:
        """A warp's instructions for a byte of its threads'."""
        return self.issued / (WARP * self.moved)

    @property
    def in_flight(self) -> int:
        """The most bytes that a thread has asked for before it needs the first of them."""
        waiting: dict[int, tuple[int, int]] = {}  # register: its load's number and bytes
        most = number = 0
        for instruction in [*self.code, *self.code]:  # a load may be for the next trip
            registers = [int(r) for r in REGISTER.findall(instruction.operands)]
            used = [waiting[r] for r in registers if r in waiting]
            if used and instruction.name != "LDG":
                # Loads come back in their order.
                done = max(number for number, _ in used)
                waiting = {r: load for r, load in waiting.items() if load[0] > done}
            if instruction.name == "LDG" and instruction.counted:
                number += 1
                first = registers[0] if registers else 255
                for register in range(first, first + max(1, instruction.width // 4)):
                    waiting[register] = (number, instruction.width)
                most = max(most, sum(dict(waiting.values()).values()))
        return most


def blocks_of(code: list[Instruction]) -> list[Block]:
    """The blocks of a function and what follows each; slow ways for warps gone apart left out."""
    starts, blocks = {0}, []
    for i, instruction in enumerate(code):
        if instruction.labels:
            starts.add(i)
        if instruction.targets or instruction.ends:
            starts.add(i + 1)
    ordered = sorted(start for start in starts if start < len(code))
    at = {label: n for n, start in enumerate(ordered) for label in code[start].labels}
    for n, start in enumerate(ordered):
        end = ordered[n + 1] if n + 1 < len(ordered) else len(code)
        block, last = Block(code[start:end]), code[end - 1]
        if last.opcode != "BRA.DIV":
            block.followers = [at[label] for label in last.targets if label in at]
        if not last.ends and n + 1 < len(ordered):
            block.followers.append(n + 1)
        blocks.append(block)
    return blocks


def loops_of(blocks: list[Block]) -> dict[int, set[int]]:
    """The natural loops: a header, and the blocks from which it is reached again."""
    found: dict[int, set[int]] = {}
    before: list[list[int]] = [[] for _ in blocks]
    for n, block in enumerate(blocks):
        for follower in block.followers:
            before[follower].append(n)
    for tail, header in _back_edges(blocks):
        if tail == header and len(blocks[tail].code) == 1:
            continue  # where a kernel never gets: `BRA .`
        body, waiting = found.setdefault(header, {header}), [tail]
        while waiting:
            n = waiting.pop()
            if n not in body:
                body.add(n)
                waiting += before[n]
    return found


def _back_edges(blocks: list[Block]) -> Iterator[tuple[int, int]]:
    state, stack = {0: "open"}, [(0, iter(blocks[0].followers))]
    while stack:
        n, followers = stack[-1]
        for follower in followers:
            if state.get(follower) == "open":
                yield n, follower
            elif follower not in state:
                state[follower] = "open"
                stack.append((follower, iter(blocks[follower].followers)))
                break
        else:
            state[n] = "done"
            stack.pop()


@dataclass
class Way:
    """A way from a block to the end of a trip: its parts, and how often each is gone through."""

    moved: int = 0  # bytes of a thread
    issued: int = 0
    parts: tuple[tuple[Trip, int], ...] = ()

    def after(self, trip: Trip, moved: int, times: int) -> "Way":
        """Return the way that has `trip` in front."""
        issued = self.issued + trip.issued * times
        return Way(self.moved + moved * times, issued, ((trip, times), *self.parts))

    def trip(self) -> Trip:
        """Return its parts as one."""
        code = [i for part, _ in self.parts for i in part.code]
        return Trip(code, [n * times for part, times in self.parts for n in part.trips])


class Ways:
    """The ways through a function's loops, an inner one being gone through `inner` times."""

    def __init__(self, code: list[Instruction], inner: int) -> None:
        self.blocks = blocks_of(code)
        self.loops = loops_of(self.blocks)
        self.inner = inner

    def through(self, header: int | None = None) -> list[Way]:
        """For each number of bytes that a trip may move, the way of most instructions.

        Without a header: through the whole function.
        """
        body = set(range(len(self.blocks))) if header is None else self.loops[header]
        inside = self._loops_in(body, header)
        done: dict[int, dict[int, Way]] = {}

        def best(n: int) -> dict[int, Way]:
            if n in done:
                return done[n]
            done[n] = {}  # should a jump lead into the middle of a loop
            loop = inside.get(n)
            members = {n} if loop is None else self.loops[loop]
            after = [f for m in members for f in self.blocks[m].followers if f not in members]
            after += [f for f in self.blocks[n].followers if loop is None and f == n == header]
            tails: list[Way] = [Way()] if header is None and not after else []
            for follower in after:
                if follower == header:
                    tails.append(Way())
                elif follower in body:
                    tails += best(follower).values()
            if loop is None:
                block = self.blocks[n].code
                trip = Trip(block, [1] * len(block))
                heads = [(trip, trip.moved, 1)]
            else:
                heads = [(way.trip(), way.moved, self.inner) for way in self.through(loop)]
            for head in heads:
                for tail in tails:
                    way = tail.after(*head)
                    if way.moved not in done[n] or way.issued > done[n][way.moved].issued:
                        done[n][way.moved] = way
            return done[n]

        return list(best(0 if header is None else header).values())

    def _loops_in(self, body: set[int], header: int | None) -> dict[int, int]:
        """The outermost loop inside a body that each of its blocks is in."""
        nested = {h: m for h, m in self.loops.items() if h != header and m < body}
        outer = [h for h, m in nested.items() if not any(m < other for other in nested.values())]
        return {n: h for h in outer for n in nested[h]}


def hot_trips(function: Function, inner: int, least: float) -> list[Trip]:
    """The trips that move a kernel's tensors, the slowest way through each hot loop.

    A hot loop loads more than half of what any loads in a trip: the others take what is left over.
    Of its ways count those that move at least this share of the most bytes, and of them the one
    with the most instructions a byte: the slowest activation. A kernel without such loops is one
    trip.
    """
    ways = Ways(function.code, inner)
    loading = {h: body for h, body in ways.loops.items() if _loads(ways.blocks, body)}
    innermost = [h for h, body in loading.items() if not any(m < body for m in loading.values())]
    found = [trip for h in innermost if (trip := _slowest(ways.through(h), least)) is not None]
    if not found:
        whole = _slowest(ways.through(), least)
        return [] if whole is None else [whole]
    most = max(trip.loaded for trip in found)
    return [trip for trip in found if 2 * trip.loaded > most]


def _loads(blocks: list[Block], body: set[int]) -> bool:
    return any(i.name == "LDG" and i.counted for n in body for i in blocks[n].code)


def _slowest(ways: list[Way], least: float) -> Trip | None:
    most = max((way.moved for way in ways), default=0)
    fair = [way for way in ways if way.moved > 0 and way.moved >= least * most]
    return max(fair, key=lambda way: way.issued / way.moved).trip() if fair else None
