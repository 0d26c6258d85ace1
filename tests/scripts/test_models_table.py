"""docs/models.md says what the code and the fixtures say."""

import sys
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path.insert(0, str(ROOT / "scripts"))
from models_table import table  # noqa: E402


def test_the_table_of_families_is_current():
    assert (ROOT / "docs" / "models.md").read_text() == table(), "run: python scripts/models_table.py > docs/models.md"
