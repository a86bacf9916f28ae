"""JSON: one value, or the elements of an array one after the other, so that an array may be larger than memory."""

import codecs
import json
from collections.abc import Iterator
from typing import IO

_READ = 1 << 18
_BYTE_ORDER_MARK = "\ufeff"
_SPACE = " \t\n\r"


class BadJsonError(Exception):
    """Bytes that are no JSON: the line, from 1, and what is wrong, as the rest of a sentence."""

    def __init__(self, line: int, problem: str) -> None:
        super().__init__(problem)
        self.line = line


def parsed(content: bytes) -> object:
    """The JSON value. Raises BadJsonError."""
    try:
        return json.loads(content.decode("utf-8-sig"))  # decoded here: json would guess at UTF-16
    except UnicodeDecodeError as error:
        raise BadJsonError(content[: error.start].count(b"\n") + 1, f"is not UTF-8 (byte {error.start + 1})") from error
    except json.JSONDecodeError as error:
        raise BadJsonError(error.lineno, f"is not JSON: {error.msg} at column {error.colno}") from error
    except ValueError as error:
        raise BadJsonError(1, _DIGITS) from error
    except RecursionError as error:
        raise BadJsonError(1, _NESTED) from error


_DIGITS = "holds a number of thousands of digits"
_NESTED = "is nested too deeply"


def elements(stream: IO[bytes], limit: int) -> Iterator[tuple[object, str]]:
    """The elements of an array of JSON, each with its text, which is in memory no longer than it takes.

    Raises BadJsonError, also where an element has more than `limit` characters.
    """
    text = _Text(stream, limit)
    text.expect("[", "Expecting value")
    if text.next() == "]":
        text.expect("]", "")
    else:
        yield text.value()
        while text.next() != "]":
            text.expect(",", "Expecting ',' delimiter")
            yield text.value()
        text.expect("]", "")
    if text.next():
        raise text.problem("Extra data")


class _Text:
    """The text of a stream from where it is read, as far as it was needed."""

    def __init__(self, stream: IO[bytes], limit: int) -> None:
        self._stream, self._limit = stream, limit
        self._decoder = codecs.getincrementaldecoder("utf-8")()
        self._json = json.JSONDecoder()
        self._text, self._at, self._bytes, self._ended = "", 0, 0, False
        self._line, self._column = 1, 1
        """Of the first character of the text that is held."""

    def next(self) -> str:
        """The next character that is no space, which stays; empty at the end."""
        while True:
            while self._at < len(self._text):
                if self._text[self._at] not in _SPACE:
                    return self._text[self._at]
                self._at += 1
            if not self._more(_READ):
                return ""

    def expect(self, character: str, otherwise: str) -> None:
        """Go past a character."""
        if self.next() != character:
            raise self.problem(otherwise)
        self._at += 1

    def value(self) -> tuple[object, str]:
        """Go past a value."""
        self.next()
        while True:
            try:
                value, end = self._json.raw_decode(self._text, self._at)
            except json.JSONDecodeError as error:  # which may be because the rest is yet to be read
                if len(self._text) - self._at > self._limit:
                    raise self.problem(f"a value of more than {self._limit >> 20} MiB, or one that is none: {error.msg}") from error
                if self._ended:
                    raise self.problem(error.msg, error.pos) from error
                self._more(max(_READ, len(self._text) - self._at))
            except (ValueError, RecursionError) as error:
                line, _ = self._place(self._at)
                raise BadJsonError(line, _NESTED if isinstance(error, RecursionError) else _DIGITS) from error
            else:
                if isinstance(value, (int, float)) and len(self._text) - end <= len("e+") and not self._ended:
                    self._more(_READ)  # of a number there may be more
                    continue
                start, self._at = self._at, end
                return value, self._text[start:end]

    def problem(self, message: str, at: int | None = None) -> BadJsonError:
        """What json would have said of the whole text."""
        line, column = self._place(self._at if at is None else at)
        return BadJsonError(line, f"is not JSON: {message} at column {column}")

    def _place(self, at: int) -> tuple[int, int]:
        """Line and column of a character that is held."""
        lines = self._text.count("\n", 0, at)
        return self._line + lines, at - self._text.rfind("\n", 0, at) if lines else self._column + at

    def _more(self, size: int) -> bool:
        """Forget what was gone past and read on; whether there was more."""
        if self._ended:
            return False
        self._line, self._column = self._place(self._at)
        self._text, self._at = self._text[self._at :], 0
        content = self._stream.read(size)
        self._ended = not content
        waiting = self._decoder.getstate()[0]  # the first bytes of a character
        try:
            read = self._decoder.decode(content, final=self._ended)
        except UnicodeDecodeError as error:
            line = self._line + self._text.count("\n") + (waiting + content)[: error.start].count(b"\n")
            raise BadJsonError(line, f"is not UTF-8 (byte {self._bytes - len(waiting) + error.start + 1})") from error
        if self._bytes == 0:
            read = read.removeprefix(_BYTE_ORDER_MARK)
        self._bytes += len(content)
        self._text += read
        return not self._ended
