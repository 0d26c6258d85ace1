"""Units of one kind, pages or slots, each free or held by exactly one named owner.

Knows only numbers: not what a unit stores, not who may take it from whom. Imports no JAX.
"""


class Pool:
    """Units 1 to `count - 1`; unit 0 is null and never given out. Every operation takes constant time.

    The unit given back last is taken first, so the order of reuse is a function of the calls alone.
    Raises ValueError for fewer than one unit; a pool of one holds the null unit only.
    """

    def __init__(self, name: str, count: int) -> None:
        if count < 1:
            raise ValueError(f"wanted at least 1 unit of {name}, the null one, got {count}: make the pool larger")
        self.name = name
        self.count = count
        self._free: list[int] = []
        self._owners: dict[int, str] = {}
        self.reset()

    @property
    def free(self) -> int:
        """How many units nobody holds."""
        return len(self._free)

    def take(self, owner: str) -> int | None:
        """A free unit, now held by `owner`; None if none is free."""
        if not self._free:
            return None
        unit = self._free.pop()
        self._owners[unit] = owner
        return unit

    def give_back(self, unit: int, owner: str) -> None:
        """Make a unit free again. Raises ValueError if `owner` does not hold it."""
        self._require_held(unit, owner)
        del self._owners[unit]
        self._free.append(unit)

    def transfer(self, unit: int, owner: str, new_owner: str) -> None:
        """Hand a unit on. Raises ValueError if `owner` does not hold it."""
        self._require_held(unit, owner)
        self._owners[unit] = new_owner

    def reset(self) -> None:
        """Make every unit free, whoever holds it."""
        self._free = list(range(self.count - 1, 0, -1))
        self._owners = {}

    def owners(self) -> dict[int, str]:
        """Who holds each unit that is not free: a copy, for checks of the whole pool."""
        return dict(self._owners)

    def _require_held(self, unit: int, owner: str) -> None:
        holder = self._owners.get(unit)
        if holder is None or holder != owner:
            state = f"held by {holder!r}" if holder is not None else self._describe_absent(unit)
            raise ValueError(
                f"wanted a unit of {self.name} held by {owner!r}, got unit {unit}, {state}: "
                "give a unit back or hand it on once, and only by its owner"
            )

    def _describe_absent(self, unit: int) -> str:
        return "which is free" if 0 < unit < self.count else f"out of the range 1 to {self.count - 1}"
