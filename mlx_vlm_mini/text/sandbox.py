"""Where chat templates are rendered: jinja2's sandbox, in which they reach nothing, with a count of what they use.

A template is a program, and jinja2's sandbox does not bound it: `'a' * 10**10` or two loops inside one another do.
Here every loop, call, filter and operation costs steps, by the size of what it makes, and a template that spends more
than its messages can need is stopped. Steps are counted, not timed: a template stops at the same place everywhere.

Sources: sandbox.py and compiler.py of pallets/jinja; utils/chat_template_utils.py of huggingface/transformers.
"""

import functools
import json
import re
import warnings
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence, Sized
from contextlib import contextmanager
from contextvars import ContextVar
from datetime import datetime
from typing import Any

import jinja2
import jinja2.ext
from jinja2 import nodes
from jinja2.compiler import CodeGenerator
from jinja2.exceptions import SecurityError
from jinja2.runtime import LoopContext, Macro, Undefined
from jinja2.sandbox import ImmutableSandboxedEnvironment
from jinja2.utils import Cycler, Namespace
from jinja2.visitor import NodeTransformer

LONGEST_TEMPLATE = 200_000  # characters; the longest published one has about 30,000
STEPS = 300_000  # that any template may take, about half a second
STEPS_OF_INPUT = 500  # more of them for each step that reading the messages takes
_UNIT = 64  # characters of a text that cost one step
_DEEPEST = 64  # lists inside one another
_WIDEST = 100_000  # of numbers that say how much a function makes
_LONGEST_NUMBER = 4096  # bits

_METHODS = frozenset({
    "capitalize", "casefold", "center", "copy", "count", "endswith", "find", "format", "get", "index",
    "isalnum", "isalpha", "isascii", "isdecimal", "isdigit", "isidentifier", "islower", "isnumeric", "isspace",
    "istitle", "isupper", "items", "join", "keys", "ljust", "lower", "lstrip", "partition", "removeprefix",
    "removesuffix", "replace", "rfind", "rindex", "rjust", "rpartition", "rsplit", "rstrip", "split",
    "splitlines", "startswith", "strip", "swapcase", "title", "upper", "values", "zfill",
})  # fmt: skip
"""Of texts, numbers and containers; the others change something, or make much of little."""
_SHALLOW = frozenset({
    "abs", "attr", "batch", "count", "d", "default", "first", "int", "items", "last", "length", "list", "map",
    "reject", "rejectattr", "reverse", "safe", "select", "selectattr", "slice",
})  # fmt: skip
"""Filters that do not look into what is in a container."""
_ORDERING = frozenset({"dictsort", "groupby", "max", "min", "sort", "unique"})
_NO_FILTERS = ("pprint", "striptags", "urlize", "wordwrap", "xmlattr")
_COUNTS = {"batch": _WIDEST, "center": _WIDEST, "indent": _UNIT, "round": 32, "slice": _WIDEST, "truncate": _WIDEST}
_WIDE_PERCENT, _WIDE_FORMAT = re.compile(r"%[^a-zA-Z%]*(\d{4}|\*)"), re.compile(r"\{[^{}]*:[^{}]*(\d{4}|\{)")
_VIEWS: Any = type({}.keys()), type({}.values()), type({}.items())
_JINJAS = ("_loop_vars", "_block_vars")
"""What jinja2 hands to every call inside a loop or a block, beside what the template gives; no method gets it."""
_COUNTED, _WEIGHED, _WRITTEN, _BUILT = "counted here", "weighed here", "written here", "built here"


class Stopped(SecurityError):
    """The template asks for more than a chat template may."""


class _Budget:
    """Steps that are left, and what containers hold that were met: nothing in the sandbox can change one."""

    def __init__(self, steps: int) -> None:
        self.all = self.left = steps
        self.weights: dict[int, tuple[Any, int]] = {}

    def spend(self, steps: int) -> None:
        self.left -= steps
        if self.left < 0:
            raise Stopped(f"it takes more than {self.all:,} steps")

    def weigh(self, value: Any, depth: int = 0) -> int:
        """Steps that it takes to write a value out, or to compare it."""
        if isinstance(value, str | bytes):
            return 1 + len(value) // _UNIT
        if isinstance(value, Namespace) and depth:  # which alone can be changed later
            raise Stopped("it writes a namespace out, or puts one into a list")
        if not isinstance(value, list | tuple | dict | set | frozenset):
            return (
                1
                + (len(value) if isinstance(value, range) else 0)
                + sum(self.weigh(part, depth + 1) for part in (value if isinstance(value, _VIEWS) else ()))
            )
        known = self.weights.get(id(value))
        if known is not None:
            return known[1]
        if depth == _DEEPEST:
            raise Stopped(f"it puts more than {_DEEPEST} lists into one another")
        self.spend(len(value))
        parts: Iterable[Any] = (part for pair in value.items() for part in pair) if isinstance(value, dict) else value
        weight = 1
        for part in parts:
            weight += self.weigh(part, depth + 1)
            if weight > self.all:
                raise Stopped(f"it makes a list of more than {self.all:,} parts")
        self.weights[id(value)] = value, weight
        return weight


_budget: ContextVar[_Budget] = ContextVar("_budget")


@contextmanager
def counting(given: Any = ()) -> Iterator[None]:
    """Count steps inside, as many being allowed as what is given may need."""
    budget = _Budget(10**12)
    budget = _Budget(STEPS + STEPS_OF_INPUT * budget.weigh(given))
    token = _budget.set(budget)
    try:
        yield
    finally:
        _budget.reset(token)


def _counted(values: Any) -> Any:
    """What a loop goes through: it costs a step each."""
    if isinstance(values, str | Undefined):
        return values
    if isinstance(values, Sized):
        _budget.get().spend(len(values))
        return values
    return _each(values)


def _each(values: Iterable[Any]) -> Iterator[Any]:
    for value in values:
        _budget.get().spend(1)
        yield value


def _weighed(value: Any) -> Any:
    """What is compared."""
    budget = _budget.get()
    budget.spend(budget.weigh(value))
    return value


def _written(value: Any) -> Any:
    """What becomes text."""
    budget = _budget.get()
    budget.spend(budget.weigh(value, 1))
    return value


def _built(value: Any) -> Any:
    """What an operation made."""
    budget = _budget.get()
    if isinstance(value, str | bytes):
        budget.spend(1 + len(value) // _UNIT)
    elif isinstance(value, list | tuple | dict | set | frozenset):
        budget.weigh(value)
        budget.spend(1 + len(value))
    elif isinstance(value, int) and value.bit_length() > _LONGEST_NUMBER:
        raise Stopped(f"it computes a number of more than {_LONGEST_NUMBER} bits")
    elif isinstance(value, Iterator) and not isinstance(value, LoopContext | Cycler):
        return _each(value)
    return value


def _check_repeat(value: Any, times: Any) -> None:
    if isinstance(times, int) and isinstance(value, str | bytes | list | tuple):
        size = len(value) // _UNIT + 1 if isinstance(value, str | bytes) else len(value)
        _budget.get().spend(size * max(times, 0))


def _check_replace(text: Any, old: Any = "", new: Any = "", *_: Any, **__: Any) -> None:
    if isinstance(text, str) and isinstance(old, str) and isinstance(new, str):
        _budget.get().spend((len(text) + text.count(old) * len(new)) // _UNIT)


def _joined(values: Any, between: Any) -> list[Any]:
    """What is put together, as a list, paid for."""
    held, budget = list(_each(values)), _budget.get()
    budget.spend(sum(budget.weigh(value, 1) for value in held) + len(held) * len(str(between)) // _UNIT)
    return held


def _check_count(value: Any, most: int) -> None:
    if (isinstance(value, int) and abs(value) > most) or (isinstance(value, str) and len(value) > most):
        raise Stopped(f"it asks a function for {value:,}" if isinstance(value, int) else "it fills with a long text")


def _to_json(
    value: Any, ensure_ascii: bool = False, indent: Any = None, separators: Any = None, sort_keys: bool = False
) -> str:
    _check_count(indent, 8)
    for each in separators or ():
        _check_count(each, 8)
    budget = _budget.get()
    budget.spend(budget.weigh(value, 1) * 8)
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(form: str) -> str:
    if len(form) > 1000 or re.search(r"%[^a-zA-Z%]*\d", form):
        raise Stopped("it asks for a long date")
    return datetime.now().strftime(form)


class _Generation(jinja2.ext.Extension):
    """`{% generation %}` marks what the assistant says, for training; here its body renders as it is."""

    tags = {"generation"}  # noqa: RUF012 - jinja2's interface

    def parse(self, parser: Any) -> Any:
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


class _Counts(NodeTransformer):
    """Puts the count into a template: in front of loops' and macros' bodies, and around what costs by its size."""

    def generic_visit(self, node: nodes.Node, *args: Any, **kwargs: Any) -> nodes.Node:
        super().generic_visit(node, *args, **kwargs)
        if isinstance(node, nodes.For | nodes.Macro | nodes.CallBlock):
            text = sum(len(each.data) for each in node.find_all(nodes.TemplateData))
            node.body.insert(0, nodes.ExprStmt(nodes.Const(1 + text // _UNIT, lineno=node.lineno), lineno=node.lineno))
        if isinstance(node, nodes.For):
            node.iter = self._wrap(node.iter, _COUNTED)
        elif isinstance(node, nodes.Compare | nodes.Operand):
            node.expr = self._wrap(node.expr, _WEIGHED)
        elif isinstance(node, nodes.Concat):
            node.nodes = [self._wrap(each, _WRITTEN) for each in node.nodes]
        elif isinstance(node, nodes.Getitem) and not isinstance(node.arg, nodes.Slice | nodes.Const):
            node.arg = self._wrap(node.arg, _WEIGHED)
        elif (
            (isinstance(node, nodes.Getitem) and isinstance(node.arg, nodes.Slice))
            or isinstance(node, nodes.List | nodes.Dict)
            or (isinstance(node, nodes.Tuple) and node.ctx == "load")
        ):
            return self._wrap(node, _BUILT)
        return node

    @staticmethod
    def _wrap(node: Any, name: str) -> nodes.Filter:
        return nodes.Filter(node, name, [], [], None, None, lineno=node.lineno)


class _Compiler(CodeGenerator):
    def visit_ExprStmt(self, node: nodes.ExprStmt, frame: Any) -> None:
        """Only `_Counts` makes such statements."""
        self.newline(node)
        self.write(f"environment.spend({getattr(node.node, 'value', 1)!r})")


class Sandbox(ImmutableSandboxedEnvironment):
    """The environment that chat templates expect; to be used inside `counting`."""

    code_generator_class = _Compiler
    intercepted_binops = frozenset({"+", "-", "*", "/", "//", "%", "**"})

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True,
            lstrip_blocks=True,
            extensions=[_Generation, jinja2.ext.loopcontrols],
            optimized=False,  # nothing is computed while a template is read
            finalize=_shown,
        )
        self.filters["tojson"] = _to_json
        for name in _NO_FILTERS:
            del self.filters[name]
        filters: dict[str, Any] = self.filters
        self.filters = {name: self._guard(name, function, 1) for name, function in filters.items()}
        self.filters |= {_COUNTED: _counted, _WEIGHED: _weighed, _WRITTEN: _written, _BUILT: _built}
        tests: dict[str, Any] = self.tests
        self.tests = {name: self._guard(name, function, 0) for name, function in tests.items()}
        del self.globals["lipsum"]
        self.globals |= {"raise_exception": _raise_exception, "strftime_now": _strftime_now}

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree: nodes.Template = _Counts().visit(super()._parse(source, name, filename))
        return tree

    def spend(self, steps: int) -> None:
        """Count steps; what `_Counts` puts into templates calls it."""
        _budget.get().spend(steps)

    def call_binop(self, context: Any, operator: str, left: Any, right: Any) -> Any:
        if operator == "*":
            _check_repeat(left, right)
            _check_repeat(right, left)
        elif operator == "**" and isinstance(left, int) and isinstance(right, int):
            if left.bit_length() * max(right, 0) > _LONGEST_NUMBER:
                raise Stopped(f"it computes a number of more than {_LONGEST_NUMBER} bits")
        elif operator == "%" and isinstance(left, str):
            self._check_format(left, right, _WIDE_PERCENT)
        return _built(super().call_binop(context, operator, left, right))

    @staticmethod
    def _check_format(form: str, values: Any, wide: re.Pattern[str]) -> None:
        if wide.search(form):
            raise Stopped("it fills a text to a width of thousands")
        for value in (
            values.values() if isinstance(values, Mapping) else values if isinstance(values, tuple) else [values]
        ):
            _check_repeat([0] * _budget.get().weigh(value, 1), 1 + form.count("%") + form.count("{"))

    def call(__self, __context: Any, __obj: Any, *args: Any, **kwargs: Any) -> Any:
        if isinstance(__obj, Macro) or __obj is Namespace:
            __self.spend(10)
            return super().call(__context, __obj, *args, **kwargs)
        if isinstance(__obj, LoopContext):
            __self.spend(10)
            return super().call(__context, __obj, *map(_counted, args), **kwargs)
        method = getattr(__obj, "__wrapped__", __obj)
        owner, name = getattr(method, "__self__", None), getattr(method, "__name__", "")
        if isinstance(owner, str | bytes | int | float | list | tuple | dict | set | frozenset):
            given = {key: value for key, value in kwargs.items() if key not in _JINJAS}
            args = __self._check_method(owner, name, args, given)
        __self.spend(2)
        return _built(super().call(__context, __obj, *args, **kwargs))

    def _check_method(self, owner: Any, name: str, args: tuple[Any, ...], kwargs: dict[str, Any]) -> tuple[Any, ...]:
        if name not in _METHODS:
            raise Stopped(f"it calls {type(owner).__name__}.{name}, which no chat template needs")
        if isinstance(owner, str) or name in ("count", "index"):
            _weighed(owner)
        if name == "join" and len(args) == 1:
            return (_joined(args[0], owner),)
        for value in (*args, *kwargs.values()):
            _weighed(value)
            _check_count(value if isinstance(value, int) else 0, _WIDEST)
        if name == "replace":
            _check_replace(owner, *args, **kwargs)
        if name == "format":
            self._check_format(owner, (*args, *kwargs.values()), _WIDE_FORMAT)
        return args

    def _guard(self, name: str, function: Callable[..., Any], depth: int) -> Callable[..., Any]:
        """A filter, which may write a value out (`depth` 1), or a test (0), that is paid for."""
        first = 1 if hasattr(function, "jinja_pass_arg") else 0  # jinja2's own argument

        @functools.wraps(function)
        def guarded(*args: Any, **kwargs: Any) -> Any:
            head, values = args[:first], list(args[first:])
            self.spend(2)
            if name not in _SHALLOW:
                budget, given = _budget.get(), [*values, *kwargs.values()]
                values = self._check_filter(name, values, kwargs)
                budget.spend(sum(budget.weigh(value, depth) for value in given) * (16 if name in _ORDERING else 1))
            for value in (*values[1:], *kwargs.values()):
                if name in _COUNTS:
                    _check_count(value, _COUNTS[name])
            return _built(function(*head, *values, **kwargs))

        return guarded

    def _check_filter(self, name: str, values: list[Any], kwargs: dict[str, Any]) -> list[Any]:
        if name == "join" and values:
            values[0] = _joined(values[0], kwargs.get("d", values[1] if len(values) > 1 else ""))
        elif name == "replace":
            _check_replace(*values, **kwargs)
        elif name == "format" and values:
            self._check_format(str(values[0]), (*values[1:], *kwargs.values()), _WIDE_PERCENT)
        elif name == "indent" and values and isinstance(values[0], str):
            self.spend(len(values[0]))
        elif name == "sum" and not isinstance(kwargs.get("start", values[2] if len(values) > 2 else 0), int | float):
            raise Stopped("it sums up what are no numbers")
        return values


@jinja2.pass_context  # which keeps jinja2 from computing it while a template is read
def _shown(context: Any, value: Any) -> Any:
    """What is written into the prompt."""
    return _written(value)


def compile_template(source: str) -> jinja2.Template:
    """A chat template, ready to be rendered inside `counting`.

    Raises:
        jinja2.TemplateError: it is no template, or longer than one needs to be.
    """
    if len(source) > LONGEST_TEMPLATE:
        raise Stopped(f"it has {len(source):,} characters; at most {LONGEST_TEMPLATE:,} are read")
    with counting(), warnings.catch_warnings():
        warnings.simplefilter("ignore")  # Python's about what jinja2 makes of it
        return Sandbox().from_string(source)


def render(template: jinja2.Template, given: Mapping[str, Any], messages: Sequence[Any]) -> str:
    """The text of a template.

    Raises:
        Stopped: it asks for more than these messages can need.
    """
    with counting(messages):
        return template.render(messages=messages, **given)
