"""A worker that does what its requests say: answer, print, fail, spin, sleep, allocate or end."""

import os
import time
from typing import Any

from nemo_jepo.rewards.process import serve


def answer_of(request: dict[str, Any]) -> Any:
    """The request's `answer`, after whatever else it asks for."""
    if "print" in request:
        print(request["print"], flush=True)
        os.write(1, request["print"].encode())
    if "raise" in request:
        raise ValueError(request["raise"])
    if "power" in request:  # one call into C: no Python signal handler could run before its end
        _ = 9 ** request["power"]
    if "sleep" in request:
        time.sleep(request["sleep"])
    if "allocate" in request:
        _ = bytearray(request["allocate"])
    if "exit" in request:
        os._exit(request["exit"])
    return request.get("answer")


if __name__ == "__main__":
    serve(answer_of)
