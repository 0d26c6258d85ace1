"""Reads a published config field by field: every field is read, checked, ignored by name, or an error.

An unknown field may change what the model computes, so it is never passed over in silence.
"""

import sys
from collections.abc import Iterable
from typing import Any

# Fields that say how a checkpoint was trained, saved or should be sampled, not what the network computes.
IGNORED = frozenset(
    "_name_or_path _provenance architectures auto_map model_type transformers_version torch_dtype dtype use_cache "
    "initializer_range attention_dropout embedding_dropout output_dropout hidden_dropout dropout resid_pdrop "
    "bos_token_id eos_token_id pad_token_id output_router_logits router_aux_loss_coef max_window_layers "
    "quantization_config generation_config chat_template tokenizer_class return_dict output_hidden_states "
    "output_attentions".split()
)

# A config of a few bytes must not make us build a million layers. Each bound is far above every published model.
MOST_LAYERS = 4096
MOST_EXPERTS = 65536
MOST_HEADS = 65536

LARGEST_WHOLE = 2**31 - 1  # sizes are 32-bit in the programs that are compiled from them

_MISSING = object()


def is_finite(value: Any) -> bool:
    """Whether a JSON value is a number that a float holds: not NaN, not infinite, no integer beyond the floats."""
    return not isinstance(value, bool) and isinstance(value, int | float) and abs(value) <= sys.float_info.max


def is_whole(value: Any, least: int, most: int) -> bool:
    """Whether a JSON value is a whole number from `least` to `most`; true and 1.0 are not."""
    return not isinstance(value, bool) and isinstance(value, int) and least <= value <= most


def check_multiple(name: str, value: int, of: str, part: int) -> None:
    """Raises ValueError where `value`, of the field or product `name`, is no multiple of `part`, of the field `of`."""
    if value % part:
        raise ValueError(f"config.json: wanted {name} to be a multiple of {part} ({of}), got {value}: correct either")


class Fields:
    """One published config being read. Call `done` at the end: it refuses what nobody asked for."""

    def __init__(self, hf: dict[str, Any], where: str) -> None:
        self._hf = hf
        self._where = where
        self._read: set[str] = set(IGNORED)

    def get(self, name: str, default: Any = _MISSING) -> Any:
        """The raw value. Raises ValueError where it is missing and has no default."""
        self._read.add(name)
        value = self._hf.get(name, default)
        if value is _MISSING:
            raise ValueError(f"{self._where}: wanted the field {name!r}, it is missing")
        return value

    def whole(self, name: str, default: Any = _MISSING, least: int = 1, most: int = LARGEST_WHOLE) -> int:
        """A whole number from `least` to `most`."""
        value = self.get(name, default)
        if not is_whole(value, least, most):
            raise self._wrong(name, f"a whole number of at least {least} and at most {most}", value)
        return value

    def whole_or_none(self, name: str, most: int = LARGEST_WHOLE) -> int | None:
        """A whole number from 1 to `most`, or None where the field is null, 0 or missing."""
        value = self.get(name, None)
        return None if value is None or is_whole(value, 0, 0) else self.whole(name, most=most)

    def words(self, name: str, allowed: Iterable[str], length: int | None = None) -> tuple[str, ...]:
        """A list of `allowed` words; of `length` items, where it is given."""
        known, value = tuple(allowed), self.get(name)
        fits = isinstance(value, list) and length in (None, len(value))
        if not fits or not all(isinstance(item, str) and item in known for item in value):
            raise self._wrong_list(name, length, f"the words {', '.join(known)}", value)
        return tuple(value)

    def wholes(self, name: str, least: int, most: int, length: int | None = None) -> tuple[int, ...]:
        """A list of whole numbers from `least` to `most`; of `length` items, where it is given."""
        value = self.get(name)
        fits = isinstance(value, list) and length in (None, len(value))
        if not fits or not all(is_whole(item, least, most) for item in value):
            raise self._wrong_list(name, length, f"whole numbers from {least} to {most}", value)
        return tuple(value)

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self.get(name, default)
        if not is_finite(value) or value <= 0:
            raise self._wrong(name, "a finite number above 0", value)
        return float(value)

    def flag(self, name: str, default: Any = _MISSING) -> bool:
        """True or false."""
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self._wrong(name, "true or false", value)
        return value

    def section(self, name: str) -> dict[str, Any]:
        """A nested object."""
        value = self.get(name)
        if not isinstance(value, dict):
            raise self._wrong(name, "an object", value)
        return value

    def accept(self, name: str, *values: Any) -> None:
        """Refuse any value of the field but `values`; a missing field is accepted."""
        value = self.get(name, values[0])
        if value not in values:
            raise self._wrong(name, " or ".join(repr(v) for v in values), value, "this is not implemented")

    def equal(self, name: str, value: Any) -> None:
        """Refuse a field that is given and disagrees with `value`, which other fields imply."""
        got = self.get(name, value)
        if got != value:
            raise self._wrong(name, repr(value), got, "other fields imply it")

    def absent(self, *names: str) -> None:
        """Refuse fields that belong to another architecture."""
        for name in names:
            if name in self._hf:
                raise ValueError(f"{self._where}: got the field {name!r}, which belongs to another architecture")

    def ignore(self, names: Iterable[str]) -> None:
        """Pass over fields that change nothing for this family."""
        self._read.update(names)

    def done(self) -> None:
        """Refuse fields that were neither read nor ignored."""
        unknown = sorted(set(self._hf) - self._read)
        if unknown:
            raise ValueError(f"{self._where}: got unknown fields {unknown}: they may change what the model computes")

    def _wrong(self, name: str, wanted: str, got: Any, why: str = "correct config.json") -> ValueError:
        return ValueError(f"{self._where}: wanted {name} to be {wanted}, got {got!r}: {why}")

    def _wrong_list(self, name: str, length: int | None, wanted: str, got: Any) -> ValueError:
        count = "a list of" if length is None else str(length)
        return ValueError(f"{self._where}: wanted {count} {name}, {wanted}, got {got!r}: correct config.json")
