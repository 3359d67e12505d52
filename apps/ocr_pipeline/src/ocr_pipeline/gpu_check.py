"""Whether what protects the GPU in this program works on this box: `python -m ocr_pipeline.gpu_check FILE`.

FILE are the pipeline's settings. It prints one JSON object: `gpu_lock`, and under `semaphore` and `hang` what
is wrong with each, "" when it works. Exit codes: 0 printed, 2 the settings cannot be used.
"""

from __future__ import annotations

import json
import socket
import sys
import threading

from ocr_pipeline import gpu, settings
from ocr_pipeline.errors import GpuHangError, OcrError
from ocr_pipeline.servers import Server
from ocr_pipeline.stages import Deadline

TURN_S = 0.5
ANSWER_S = 0.2


def semaphore(lock: str) -> str:
    """What is wrong with the turns that stages on the GPU take."""
    if not lock:
        return "gpu_lock is empty: stages of several photos may use the GPU at once"
    try:
        with gpu.turn(lock, Deadline(TURN_S)):
            try:
                with gpu.turn(lock, Deadline(0)):
                    return f"gpu_lock = {lock}: two had the GPU at once"
            except gpu.GpuBusyError:
                return ""
    except gpu.GpuBusyError:
        return ""  # a worker has it, and nobody else
    except OcrError as error:
        return str(error)


def hang() -> str:
    """What is wrong with how a client is told of a server that takes a photo and never answers."""
    ended = threading.Event()
    with socket.create_server(("127.0.0.1", 0)) as listener:

        def swallow() -> None:
            with listener.accept()[0]:
                listener.close()  # nor does it answer the look whether it lives
                ended.wait(10 * ANSWER_S)

        threading.Thread(target=swallow, daemon=True).start()
        server = Server(f"http://127.0.0.1:{listener.getsockname()[1]}", ANSWER_S)
        try:
            server.post("/", {}, Deadline(10 * ANSWER_S))
        except GpuHangError as error:
            return (
                ""
                if error.http_status == 503 and error.retry_after_s
                else "GpuHangError without 503 and when"
            )
        except OcrError as error:
            return f"a hang is told as {type(error).__name__}"
        finally:
            ended.set()
    return "a hang is told as nothing"


def main() -> int:
    """Check, and print what was found."""
    try:
        lock = settings.load(sys.argv[1]).gpu_lock
    except OcrError as error:
        print(error, file=sys.stderr)
        return error.exit_code
    print(json.dumps({"gpu_lock": lock, "semaphore": semaphore(lock), "hang": hang()}))
    return 0


if __name__ == "__main__":
    sys.exit(main())
