"""Reads a published config field by field: every field is read, checked, ignored by name, or an error.

An unknown field may change what the model computes, so it is never passed over in silence.
"""

import math
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

_MISSING = object()


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

    def whole(self, name: str, default: Any = _MISSING, least: int = 1) -> int:
        """A whole number of at least `least`."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int) or not least <= value < 2**31:
            raise self._wrong(name, f"a whole number of at least {least}", value)
        return value

    def whole_or_none(self, name: str) -> int | None:
        """A whole number of at least 1, or None where the field is null, 0 or missing."""
        return self.whole(name) if self.get(name, None) else None

    def number(self, name: str, default: Any = _MISSING) -> float:
        """A finite number above zero."""
        value = self.get(name, default)
        if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value) or value <= 0:
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
