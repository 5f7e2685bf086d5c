"""The syntax of CEL: an expression as a tree, for the checker. What runs it is the CEL library, which keeps its own tree."""

import re
from dataclasses import dataclass, field
from typing import Final

from events.frozen import frozen

_TOKEN: Final = re.compile(
    r"""(?P<space>\s+|//[^\n]*)
    |(?P<text>[rR]?(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'))
    |(?P<bytes>(?:[bB][rR]?|[rR][bB])(?:\"{3}.*?\"{3}|'{3}.*?'{3}|"(?:\\.|[^"\\])*"|'(?:\\.|[^'\\])*'))
    |(?P<double>\d+\.\d+(?:[eE][+-]?\d+)?|\d+[eE][+-]?\d+|\.\d+(?:[eE][+-]?\d+)?)|(?P<uint>(?:0[xX][0-9a-fA-F]+|\d+)[uU])
    |(?P<int>0[xX][0-9a-fA-F]+|\d+)|(?P<name>[A-Za-z_][A-Za-z0-9_]*)|(?P<mark>&&|\|\||[=!<>]=|[-+*/%!<>?:.,()\[\]{}])""",
    re.DOTALL | re.VERBOSE,
)
_LEVELS: Final = (("||",), ("&&",), ("==", "!=", "<", "<=", ">", ">=", "in"), ("+", "-"), ("*", "/", "%"))
"""Operators between two operands, weakest first."""
_WORDS: Final = {"true": "bool", "false": "bool", "null": "null"}


class SyntaxUnknownError(Exception):
    """This is not the CEL that is read here; it may be CEL all the same."""


@frozen
class Node:
    """A part of an expression; `source`: as it is written."""

    source: str


@frozen
class Literal(Node):
    """A constant. `value`: that of a text or a whole number, None if it isn't read here."""

    kind: str
    value: str | int | None = None


@frozen
class Name(Node):
    """A variable."""


@frozen
class Select(Node):
    """`of.key`."""

    of: Node
    key: str


@frozen
class Index(Node):
    """`of[at]`."""

    of: Node
    at: Node


@frozen
class Call(Node):
    """`function(arguments)`, or `target.function(arguments)`."""

    function: str
    target: Node | None
    arguments: tuple[Node, ...]


@frozen
class Operation(Node):
    """An operator and its operands; `?` has three."""

    operator: str
    operands: tuple[Node, ...]


@frozen
class Items(Node):
    """A list."""

    items: tuple[Node, ...]


@frozen
class Entries(Node):
    """A map."""

    entries: tuple[tuple[Node, Node], ...]


def parse(source: str) -> Node:
    """Return the tree of an expression that compiles. Raises SyntaxUnknownError."""
    parser = _Parser(source)
    try:
        tree = parser.ternary()
    except RecursionError as error:
        raise SyntaxUnknownError("nested too deep") from error
    if parser.kind:
        raise SyntaxUnknownError(f"`{parser.word}` is left over")
    return tree


@dataclass
class _Parser:
    source: str
    _tokens: list[tuple[str, str, int, int]] = field(default_factory=list)
    _at: int = 0

    def __post_init__(self) -> None:
        end = 0
        while end < len(self.source):
            match = _TOKEN.match(self.source, end)
            if match is None:
                raise SyntaxUnknownError(f"`{self.source[end]}` is not known")
            if match.lastgroup != "space":
                self._tokens.append((str(match.lastgroup), match.group(), match.start(), match.end()))
            end = match.end()

    @property
    def kind(self) -> str:
        """The next token's kind; empty at the end."""
        return self._tokens[self._at][0] if self._at < len(self._tokens) else ""

    @property
    def word(self) -> str:
        """The next token."""
        return self._tokens[self._at][1] if self._at < len(self._tokens) else ""

    def ternary(self) -> Node:
        """Read an expression."""
        start = self._at
        condition = self._binary(0)
        if not self._took("?"):
            return condition
        then = self._binary(0)
        self._expect(":")
        otherwise = self.ternary()
        return Operation(self._since(start), "?", (condition, then, otherwise))

    def _binary(self, level: int) -> Node:
        if level == len(_LEVELS):
            return self._unary()
        start = self._at
        left = self._binary(level + 1)
        while self.word in _LEVELS[level] and self.kind in ("mark", "name"):
            operator = self._next()
            right = self._binary(level + 1)
            left = Operation(self._since(start), operator, (left, right))
        return left

    def _unary(self) -> Node:
        start = self._at
        if self.kind == "mark" and self.word in ("!", "-"):
            operator = self._next()
            operand = self._unary()
            return Operation(self._since(start), operator, (operand,))
        return self._member()

    def _member(self) -> Node:
        start = self._at
        node = self._primary()
        while True:
            if self._took("."):
                name = self._name()
                if self._took("("):
                    arguments = self._until(")")
                    node = Call(self._since(start), name, node, arguments)
                else:
                    node = Select(self._since(start), node, name)
            elif self._took("["):
                at = self.ternary()
                self._expect("]")
                node = Index(self._since(start), node, at)
            else:
                return node

    def _primary(self) -> Node:
        start, kind, word = self._at, self.kind, self.word
        if kind == "name" and word not in _WORDS and word != "in":
            self._next()
            if not self._took("("):
                return Name(word)
            arguments = self._until(")")
            return Call(self._since(start), word, None, arguments)
        if kind not in ("", "mark", "name"):
            self._next()
            return Literal(word, kind, _read(kind, word))
        if word in _WORDS:
            self._next()
            return Literal(word, _WORDS[word])
        if self._took("("):
            node = self.ternary()
            self._expect(")")
            return node
        if self._took("["):
            items = self._until("]")
            return Items(self._since(start), items)
        if self._took("{"):
            entries = self._entries()
            return Entries(self._since(start), entries)
        raise SyntaxUnknownError(f"`{word}` is not known")

    def _until(self, end: str) -> tuple[Node, ...]:
        """Read what stands between brackets."""
        found: list[Node] = []
        while not self._took(end):
            found.append(self.ternary())
            if self.word != end:
                self._expect(",")
        return tuple(found)

    def _entries(self) -> tuple[tuple[Node, Node], ...]:
        found: list[tuple[Node, Node]] = []
        while not self._took("}"):
            key = self.ternary()
            self._expect(":")
            found.append((key, self.ternary()))
            if self.word != "}":
                self._expect(",")
        return tuple(found)

    def _name(self) -> str:
        if self.kind != "name":
            raise SyntaxUnknownError(f"`{self.word}` is no name")
        return self._next()

    def _next(self) -> str:
        word = self.word
        self._at += 1
        return word

    def _took(self, mark: str) -> bool:
        if self.kind != "mark" or self.word != mark:
            return False
        self._at += 1
        return True

    def _expect(self, mark: str) -> None:
        if not self._took(mark):
            raise SyntaxUnknownError(f"`{self.word}` stands where `{mark}` should")

    def _since(self, start: int) -> str:
        """Return the source from a token to the last one that was read."""
        return self.source[self._tokens[start][2] : self._tokens[self._at - 1][3]]


def _read(kind: str, word: str) -> str | int | None:
    """Return the value of a text or a whole number, None if reading it takes more than is done here."""
    if kind == "int":
        return int(word, 0) if word[:2].lower() == "0x" else int(word[:20])
    if kind != "text" or word[0] in "rR" or "\\" in word or word[:3] in ('"""', "'''"):
        return None
    return word[1:-1]
