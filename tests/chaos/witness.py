"""The witness: a small real HTTP server outside of Foldflow that notes every call that reaches it, before it answers.

What stands in its file happened, whatever the ledger says; the checker compares the two. A caller says how long the answer shall
take. Some calls are refused (503) or hung up on, by a hash of run, step and attempt: the same load fares the same again.
Only first and second attempts are treated so: a step that may try three times succeeds.

`python witness.py --file witness.jsonl` prints its port and serves until it is told to stop.
"""

import argparse
import json
import os
import socket
import sys
import time
from hashlib import blake2b
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Final, Literal

Fate = Literal["answer", "refuse", "hang up"]
UNLUCKY_ATTEMPTS: Final = 2
FIELDS: Final = ("call_id", "run_id", "step", "attempt", "tool")


def fate(run_id: str, step: str, attempt: int, share: float) -> Fate:
    """Return what happens to a call; `share` (0 to 1) of the first attempts are refused or hung up on, half each."""
    if attempt > UNLUCKY_ATTEMPTS:
        return "answer"
    draw = int.from_bytes(blake2b(f"{run_id}/{step}/{attempt}".encode(), digest_size=8).digest()) / 2**64
    if draw >= share:
        return "answer"
    return "refuse" if draw < share / 2 else "hang up"


class Witness(ThreadingHTTPServer):
    """Serves `POST /` with JSON: `call_id`, `run_id`, `step`, `attempt`, `tool`, and `delay_s`."""

    daemon_threads = True
    request_queue_size = 1024  # workers that start again come with all their connections at once

    def __init__(self, port: int, file: Path, share: float) -> None:
        super().__init__(("127.0.0.1", port), _Call)
        self.share = share
        # One `write` to a file opened for appending is one line, whichever thread it comes from.
        self.notes = os.open(file, os.O_WRONLY | os.O_CREAT | os.O_APPEND)


class _Call(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"  # connections are kept: a call costs no handshake
    disable_nagle_algorithm = True
    wbufsize = 65536  # head and body of an answer in one packet
    server: Witness

    def do_POST(self) -> None:
        length = int(self.headers["Content-Length"])
        body = self.rfile.read(length)
        if len(body) < length:  # the caller was killed while it spoke
            self.close_connection = True
            return
        asked = json.loads(body)
        note = {"at_ms": time.time_ns() // 1_000_000} | {name: asked[name] for name in FIELDS}
        os.write(self.server.notes, json.dumps(note).encode() + b"\n")
        time.sleep(asked.get("delay_s", 0.0))
        match fate(asked["run_id"], asked["step"], asked["attempt"], self.server.share):
            case "hang up":
                self.close_connection = True
                self.connection.shutdown(socket.SHUT_RDWR)
            case "refuse":
                self._answer(503, {"problem": "not now"})
            case "answer":
                self._answer(200, {"seen": asked["call_id"]})

    def _answer(self, status: int, said: dict[str, str]) -> None:
        body = json.dumps(said).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.send_header("Content-Type", "application/json")
        self.end_headers()
        self.wfile.write(body)

    def handle_one_request(self) -> None:
        try:
            super().handle_one_request()
        except OSError:  # the caller was killed meanwhile
            self.close_connection = True

    def log_message(self, format: str, *args: object) -> None:  # noqa: A002 - the library's name for it
        """Say nothing: the file says it all."""


def main() -> None:
    """Serve."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--file", type=Path, required=True, help="where calls are noted")
    parser.add_argument("--port", type=int, default=0)
    parser.add_argument("--share", type=float, default=0.04, help="how many of the first attempts are refused or hung up on")
    options = parser.parse_args()
    with Witness(options.port, options.file, options.share) as server:
        sys.stdout.write(f"{server.server_address[1]}\n")
        sys.stdout.flush()
        server.serve_forever()


if __name__ == "__main__":
    main()
