"""A writer of content points behind OpenAI's HTTP interface, without a model: it quotes the passages' sentences that a text agrees with.

It stands in for the language model that a real job would name in `generator`, so that the closed loop runs on any machine.

    python examples/extractive_writer.py --port 8099
"""

import argparse
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

SHARED = 0.6
"""Share of a sentence's words that the text has, from which on the sentence is one of its points."""
MARK = re.compile(r"^\[\d+\]\s*")


def points(instruction: str) -> str:
    """The points that `data.preparation.contentPoints` asks for with its own instruction."""
    passages, _, text = instruction.partition("\nText:\n")
    text = text.partition("\nContent points:")[0]
    spoken = words(text)
    lines = [MARK.sub("", line) for line in passages.partition("Passages:\n")[2].splitlines()]
    sentences = [sentence.strip() for line in lines for sentence in re.split(r"(?<=[.!?])\s+", line)]
    whole = [sentence for sentence in sentences if sentence.endswith((".", "!", "?"))]  # headings are none
    found = [sentence for sentence in whole if len(words(sentence) & spoken) >= SHARED * len(words(sentence))]
    return "\n".join(f"- {sentence}" for sentence in dict.fromkeys(found))


def words(text: str) -> set[str]:
    """The words of a text, in lower case."""
    return set(re.findall(r"[\w-]+", text.lower()))


class Writer(BaseHTTPRequestHandler):
    """Answers POST /v1/chat/completions."""

    def do_POST(self) -> None:
        """The points of the last message."""
        asked = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        message = {"role": "assistant", "content": points(asked["messages"][-1]["content"])}
        body = json.dumps({"choices": [{"index": 0, "message": message, "finish_reason": "stop"}]}).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def log_message(self, *_: object) -> None:
        """Nothing: the job tells how far it is."""


def served(port: int = 0) -> ThreadingHTTPServer:
    """The server, running in a thread of its own; port 0 takes a free one."""
    server = ThreadingHTTPServer(("127.0.0.1", port), Writer)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    return server


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--host", default="127.0.0.1", help="0.0.0.0 where others are to reach it, as in a pod")
    parser.add_argument("--port", type=int, default=8099)
    options = parser.parse_args()
    ThreadingHTTPServer((options.host, options.port), Writer).serve_forever()
