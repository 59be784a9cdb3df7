"""Twenty JSON Schemas that answers are kept to, by the keywords that people use."""

from typing import Any

WORD = {"type": "string", "maxLength": 6}


def record(**properties: Any) -> dict[str, Any]:
    """An object with these properties, all of them required, and no others."""
    return {"type": "object", "properties": properties, "required": [*properties], "additionalProperties": False}


SCHEMAS: dict[str, dict[str, Any]] = {
    "flags": record(yes={"type": "boolean"}, no={"type": "boolean"}),
    "enums": record(shape={"enum": ["circle", "square", "star"]}, level={"enum": [1, 2.5, None, "two"]}),
    "constants": record(kind={"const": "receipt"}, version={"const": 3}),
    "integers": record(count={"type": "integer", "minimum": 0, "maximum": 20}, year={"type": "integer", "minimum": 1990, "maximum": 2030}),
    "numbers": record(price={"type": "number", "minimum": 0, "exclusiveMaximum": 100}, low={"type": "number", "minimum": -5, "maximum": -1}),
    "multiples": record(cents={"type": "integer", "multipleOf": 5, "minimum": 0, "maximum": 1000}),
    "strings": record(title={"type": "string", "minLength": 1, "maxLength": 5}, note=WORD),
    "patterns": record(date={"type": "string", "pattern": "^[0-9]{4}-[01][0-9]$"}, code={"type": "string", "pattern": "^[A-Z]{2,3}(-[0-9])?$"}),
    "formats": record(day={"type": "string", "format": "date"}, at={"type": "string", "format": "ipv4"}),
    "unicode": record(**{"größe": {"enum": ["klein", "groß", "übergroß"]}, "単位": {"enum": ["円", "ドル", "🙂"]}}),
    "quotes": record(**{'a "b"': {"enum": ['say "hi"', "back\\slash", "line\nend", "tab\t"]}, "c/d": {"const": "e\\f"}}),
    "letters": record(word={"type": "string", "pattern": "^[é-ü]{1,3}$"}),
    "nested": record(shop=record(name=WORD, place=record(city=WORD, zip={"type": "string", "pattern": "^[0-9]{5}$"}))),
    "arrays": record(items={"type": "array", "minItems": 1, "maxItems": 3, "items": {"type": "integer", "minimum": 0, "maximum": 9}}),
    "tuples": {"type": "array", "prefixItems": [{"type": "boolean"}, {"enum": ["x", "y"]}], "items": False, "minItems": 2},
    "lines": record(
        lines={
            "type": "array", "minItems": 2, "maxItems": 2,
            "items": record(name=WORD, price={"type": "number", "minimum": 0, "maximum": 9}),
        }
    ),
    "optional": {
        "type": "object", "properties": {"a": {"type": "integer", "minimum": 0, "maximum": 5}, "b": {"type": "null"}, "c": WORD},
        "required": ["b"], "additionalProperties": False,
    },
    "either": record(value={"anyOf": [{"type": "null"}, {"type": "integer", "minimum": 1, "maximum": 3}, {"enum": ["none"]}]}),
    "both": record(size={"allOf": [{"type": "integer", "minimum": 2}, {"maximum": 7}]}),
    "tree": {
        "$defs": {
            "node": {
                "type": "object", "additionalProperties": False, "required": ["v", "next"],
                "properties": {"v": {"enum": [0, 1]}, "next": {"anyOf": [{"type": "null"}, {"$ref": "#/$defs/node"}]}},
            }
        },
        "$ref": "#/$defs/node",
    },
}  # fmt: skip
