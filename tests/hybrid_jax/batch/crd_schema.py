"""Cuts the schema of a custom resource down to what manifests use, so that it can be kept beside the test.

python -m tests.hybrid_jax.batch.crd_schema CRD.yaml SOURCE MANIFEST.yaml... > KIND.json

At every level that a manifest reaches, all names of the resource stay, with `true` for those that none uses: a name
that the resource does not have is still found. What the resource's definition says in CEL is dropped.
"""

import json
import sys
from pathlib import Path
from typing import Any

import yaml

KEPT = ("type", "enum", "pattern", "required", "minimum", "maximum", "minLength", "maxLength", "minItems", "maxItems")
Schema = dict[str, Any]


def kept_schema(definition: Schema, source: str, manifests: list[Any]) -> Schema:
    """The schema of the stored version of a resource, as far as these manifests go."""
    spec = definition["spec"]
    version = next(version for version in spec["versions"] if version["storage"])
    schema = cut(version["schema"]["openAPIV3Schema"], manifests)
    schema["properties"]["apiVersion"] = {"const": f"{spec['group']}/{version['name']}"}
    schema["properties"]["kind"] = {"const": spec["names"]["kind"]}
    schema["required"] = ["apiVersion", "kind", "metadata", "spec"]
    return {"$comment": f"cut from {source}"} | schema


def cut(schema: Schema, values: list[Any]) -> Schema:
    """The part of a schema that speaks of these values."""
    found = {name: schema[name] for name in KEPT if name in schema}
    if schema.get("x-kubernetes-int-or-string"):
        found["type"] = ["integer", "string"]
    if "properties" in schema:
        found["additionalProperties"] = bool(schema.get("x-kubernetes-preserve-unknown-fields"))
        found["properties"] = {
            name: cut(part, [value[name] for value in values if name in value])
            if any(name in value for value in values)
            else True
            for name, part in sorted(schema["properties"].items())
        }
    elif isinstance(schema.get("additionalProperties"), dict):
        found["additionalProperties"] = cut(
            schema["additionalProperties"], [each for value in values for each in value.values()]
        )
    if "items" in schema:
        found["items"] = cut(schema["items"], [each for value in values for each in value])
    return found


def main() -> None:
    """Print it."""
    crd, source, *manifests = sys.argv[1:]
    definition = yaml.safe_load(Path(crd).read_text())
    kind = definition["spec"]["names"]["kind"]
    found = [
        value for path in manifests for value in yaml.safe_load_all(Path(path).read_text()) if value["kind"] == kind
    ]
    print(json.dumps(kept_schema(definition, source, found), indent=1))


if __name__ == "__main__":
    main()
