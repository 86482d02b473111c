"""Pickles as data: an interpreter of its own that calls nothing a file names.

A pickle is a program for a small stack machine. Here it may build numbers, text, lists and dicts; a few globals stand
for what we make ourselves (`pickle_globals`), any other is refused by name, and what a file declares is checked against
its bytes. The opcodes are those of the standard library's `pickletools`.
"""

import pickletools
import struct
from collections.abc import Callable
from pathlib import Path
from typing import Any, BinaryIO

from isthmus.weights.formats.pickle_globals import (
    Array,
    Dtype,
    ForeignError,
    Inert,
    Text,
    call_global,
    find_global,
    set_items,
)
from isthmus.weights.formats.stored import Span, Stored

__all__ = ["Budget", "load"]

LINE = 1 << 16  # longest text of the old, line-based opcodes
SMALL = 4096  # bytes; longer strings stay in the file until somebody wants them
FREE_STEPS, BYTES_A_STEP = 250_000, 512
"""Steps that any file may take, and one more for so many of its bytes: objects cost memory that the file does not."""

SIZED = {
    "BINSTRING": ("<i", "latin-1"), "SHORT_BINSTRING": ("<B", "latin-1"),
    "BINUNICODE": ("<I", "utf-8"), "SHORT_BINUNICODE": ("<B", "utf-8"), "BINUNICODE8": ("<Q", "utf-8"),
    "BINBYTES": ("<I", ""), "SHORT_BINBYTES": ("<B", ""), "BINBYTES8": ("<Q", ""), "BYTEARRAY8": ("<Q", ""),
    "LONG1": ("<B", "int"), "LONG4": ("<i", "int"),
}  # fmt: skip
"""Opcodes with a length before their content: the length's format, and what the content is."""

OPCODES = {opcode.code.encode("latin-1"): opcode for opcode in pickletools.opcodes}
PLAIN = {"INT", "BININT", "BININT1", "BININT2", "LONG", "FLOAT", "BINFLOAT", "STRING", "UNICODE"}
CONSTANTS = {"NONE": None, "NEWTRUE": True, "NEWFALSE": False, "EMPTY_TUPLE": ()}
TUPLES = {"TUPLE1": 1, "TUPLE2": 2, "TUPLE3": 3}


class Budget:
    """How many steps the pickles of one file may take together."""

    def __init__(self, file_size: int) -> None:
        self.left = FREE_STEPS + file_size // BYTES_A_STEP

    def spend(self, steps: int) -> None:
        """Take off some; raises ValueError at the end."""
        self.left -= steps
        if self.left < 0:
            raise ValueError("more objects than weights need")


def load(file: BinaryIO, path: Path, end: int, budget: Budget, persistent: Callable[[Any], Any] | None = None) -> Any:
    """What one pickle, from the position of `file` on, stands for; the file is left behind it.

    Arrays are `Array`s with a `Stored` inside, tensors are `Stored`, sets are lists. `end` is where the bytes of the
    pickle end at the latest; `persistent` turns torch's references into storages. Raises ForeignError for a global
    that is no data, and anything else (ValueError, IndexError, ...) for a damaged pickle.
    """
    return _Machine(file, path, end, budget, persistent).run()


class _Machine:
    def __init__(
        self, file: BinaryIO, path: Path, end: int, budget: Budget, persistent: Callable[[Any], Any] | None
    ) -> None:
        self.file, self.path, self.end, self.budget, self.persistent = file, path, end, budget, persistent
        self.stack: list[Any] = []
        self.marks: list[list[Any]] = []
        self.memo: dict[int, Any] = {}

    def run(self) -> Any:
        while True:
            self.budget.spend(1)
            code = OPCODES.get(byte := self.file.read(1))
            if code is None:
                raise ValueError(f"{byte!r} in the place of an opcode" if byte else "a pickle without its end")
            if code.name == "STOP":
                return self.stack.pop()
            if code.name in SIZED:
                self.stack.append(self.sized(*SIZED[code.name]))
                continue
            reads: Any = code.arg and code.arg.reader
            self.step(code.name, reads and reads(self))
            if self.file.tell() > self.end:
                raise ValueError("a pickle that does not end")

    def read(self, count: int) -> bytes:
        """For pickletools: the few bytes of an opcode's number."""
        return self.file.read(count)

    def readline(self) -> bytes:
        """For pickletools: the text of an old opcode."""
        line = self.file.readline(LINE)
        self.budget.spend(len(line) // 64)
        return line

    def sized(self, format: str, kind: str) -> Any:  # noqa: A002
        """A string, bytes or an integer after its length; a Span where it is long."""
        (length,) = struct.unpack(format, self.file.read(struct.calcsize(format)))
        start = self.file.tell()
        if not 0 <= length <= self.end - start:
            raise ValueError(f"{length} bytes declared, {self.end - start} left")
        span = Span(self.path, start, length, text=kind == "utf-8")
        if not kind or length > SMALL:
            self.file.seek(start + length)
            return span if kind != "int" else Inert("a very large number")
        self.budget.spend(length // 64)
        content = self.file.read(length)
        if kind == "int":
            return int.from_bytes(content, "little", signed=True)
        text = Text(content, kind, "surrogatepass" if kind == "utf-8" else "strict")
        text.span = span
        return text

    def call(self, called: Any, arguments: Any) -> Any:
        if type(arguments) is tuple:
            self.weigh(arguments)
        return call_global(called, arguments)

    def weigh(self, parts: tuple[Any, ...]) -> None:
        """What is made of lists costs a step for every entry: a copy is cheap for the file and not for us."""
        self.budget.spend(sum(len(part) for part in parts if type(part) in (list, tuple, dict)))

    def pop_mark(self) -> list[Any]:
        items = self.stack
        self.stack = self.marks.pop()
        return items

    def step(self, name: str, arg: Any) -> None:
        stack = self.stack
        match name:
            case "BINGET" | "LONG_BINGET" | "GET":
                stack.append(self.memo[arg])
            case "BINPUT" | "LONG_BINPUT" | "PUT":
                self.memo[arg] = stack[-1]
            case "MEMOIZE":
                self.memo[len(self.memo)] = stack[-1]
            case _ if name in PLAIN:
                stack.append(arg)
            case _ if name in CONSTANTS:
                stack.append(CONSTANTS[name])
            case "MARK":
                self.marks.append(stack)
                self.stack = []
            case "EMPTY_LIST" | "EMPTY_SET":
                stack.append([])
            case "EMPTY_DICT":
                stack.append({})
            case "TUPLE1" | "TUPLE2" | "TUPLE3":
                items = [stack.pop() for _ in range(TUPLES[name])]
                stack.append(tuple(reversed(items)))
            case "TUPLE":
                items = self.pop_mark()
                self.stack.append(tuple(items))
            case "LIST" | "FROZENSET":
                items = self.pop_mark()
                self.stack.append(items)
            case "DICT":
                items = self.pop_mark()
                self.stack.append(set_items({}, items))
            case "APPEND":
                item = stack.pop()
                _extend(stack[-1], [item])
            case "APPENDS" | "ADDITEMS":
                items = self.pop_mark()
                _extend(self.stack[-1], items)
            case "SETITEM":
                value, key = stack.pop(), stack.pop()
                set_items(stack[-1], [key, value])
            case "SETITEMS":
                items = self.pop_mark()
                set_items(self.stack[-1], items)
            case "GLOBAL":
                stack.append(find_global(arg.replace(" ", ".", 1)))
            case "STACK_GLOBAL":
                attribute, module = stack.pop(), stack.pop()
                stack.append(find_global(f"{_text(module)}.{_text(attribute)}"))
            case "REDUCE" | "NEWOBJ":
                arguments, called = stack.pop(), stack.pop()
                stack.append(self.call(called, arguments))
            case "NEWOBJ_EX":
                _named, arguments, called = stack.pop(), stack.pop(), stack.pop()
                stack.append(self.call(called, arguments))
            case "OBJ":
                called, *arguments = self.pop_mark()
                self.stack.append(self.call(called, tuple(arguments)))
            case "INST":
                called = find_global(arg.replace(" ", ".", 1))
                self.stack.append(self.call(called, tuple(self.pop_mark())))
            case "BUILD":
                state, built = stack.pop(), stack[-1]
                if isinstance(built, Array | Dtype):
                    self.weigh(state)
                    built.build(state)
                elif not isinstance(built, dict | Stored | Inert):  # whose attributes nobody needs
                    raise ForeignError(type(built).__name__)
            case "BINPERSID" | "PERSID":
                reference = stack.pop() if name == "BINPERSID" else arg
                if self.persistent is None:
                    raise ValueError("a reference to something outside the file")
                stack.append(self.persistent(reference))
            case "POP":
                if stack:
                    stack.pop()
                else:
                    self.pop_mark()
            case "POP_MARK":
                self.pop_mark()
            case "DUP":
                stack.append(stack[-1])
            case "PROTO" | "FRAME":
                pass
            case "EXT1" | "EXT2" | "EXT4":
                raise ForeignError(f"extension_{arg}")
            case _:
                raise ValueError(f"opcode {name}")


def _text(value: Any) -> str:
    if not isinstance(value, str):
        raise TypeError("a global without a name")
    return str(value)


def _extend(target: Any, items: list[Any]) -> None:
    if type(target) is list:
        target.extend(items)
    elif not isinstance(target, Inert):
        raise ForeignError(type(target).__name__)
