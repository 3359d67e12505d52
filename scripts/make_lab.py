#!/usr/bin/env python3
"""`make lab`: boot the lab, provision it with site.yml, verify it, print one answer through its gateway.

Safe to repeat and to interrupt: every step converges on what is there already.
Exit codes: 0 all done, 1 no answer or no inventory, 130 interrupted, otherwise that of the step that failed.
"""

from __future__ import annotations

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from lab import interrupt
from scripts import _venv

if __name__ == "__main__":
    interrupt.exit_quietly()
    _venv.enter()

import json
import subprocess
import time

import httpx
from llama_common.problems import InventoryError

from lab.config import from_environment, typed
from scripts._inventory import ROOT, InventoryUnreadable, environment, load
from scripts._llm_box import GROUP, LlmBox

BIN = Path(sys.executable).parent
INVENTORY = "inventory/lab"
QUESTION = "What is the capital of France? Answer in one sentence."
STEP_TIMEOUT_S = 5400
CHAT_TIMEOUT_S = 120
STATUS_TIMEOUT_S = 30


class NotDone(Exception):
    """A step failed; the message is one line. `code` becomes the exit code."""

    def __init__(self, message: str, code: int = 1) -> None:
        super().__init__(message)
        self.code = code


def step(title: str, *command: str, timeout: float = STEP_TIMEOUT_S) -> float:
    """Run one step with its output shown. Returns its seconds. Raises NotDone when it fails or hangs."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    try:
        done = subprocess.run(command, cwd=ROOT, timeout=timeout, env=environment(), check=False)
    except subprocess.TimeoutExpired:
        raise NotDone(f"'{title}' was not done after {timeout:g} s; run it again, it goes on there") from None
    if done.returncode != 0:
        raise NotDone(
            f"'{title}' ended with exit code {done.returncode};"
            " mend what it says above and run `make lab` again, it goes on from there",
            done.returncode if done.returncode > 0 else 1,
        )
    return time.monotonic() - started


def ask(url: str, question: str, timeout: float = CHAT_TIMEOUT_S) -> tuple[str, float]:
    """Ask the model behind `url`. Returns its answer and the generation speed in tokens per second.

    Raises NotDone when there is no answer, or an empty one.
    """
    try:
        reply = httpx.post(
            f"{url}/v1/chat/completions",
            json={"messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0.0},
            timeout=timeout,
            trust_env=False,  # a proxy of the machine does not lead to a lab host
        )
        body = reply.raise_for_status().json()
        answer = str(body["choices"][0]["message"]["content"] or "").strip()
        speed = float(body["timings"]["predicted_per_second"])
    except httpx.HTTPError as error:
        said = str(error).partition("\n")[0] or type(error).__name__
        raise NotDone(f"no answer from {url}: {said}; look with: lmswitch logs on the host") from None
    except (ValueError, LookupError, TypeError):
        raise NotDone(
            f"{url} did not answer as llama-server does; look with: lmswitch logs on the host"
        ) from None
    if not answer:
        raise NotDone(f"the answer from {url} was empty; look with: lmswitch logs on the host")
    return answer, speed


def active(python: str, host: str, switch: str) -> str:
    """The preset that is ready on the host; "" when none is, or it cannot be asked."""
    try:
        asked = subprocess.run(
            [python, "-m", "lab", "ssh", host, f"{switch} status --json"],
            cwd=ROOT,
            env=environment(),
            capture_output=True,
            text=True,
            timeout=STATUS_TIMEOUT_S,
            check=False,
        )
        found = json.loads(asked.stdout)
        return str(found["active"]) if found["state"] == "ready" else ""
    except (subprocess.TimeoutExpired, ValueError, LookupError, TypeError):
        return ""


def main() -> None:
    """Run the steps and print the summary. Raises NotDone, InventoryUnreadable, InventoryError."""
    started = time.monotonic()
    python, playbook = sys.executable, str(BIN / "ansible-playbook")
    seconds = {"boot": step("Boot three hosts", python, "-m", "lab", "up")}
    seconds["provision"] = step("Provision them (site.yml)", playbook, "-i", INVENTORY, "site.yml")

    host = next((host for host in load(ROOT / INVENTORY) if GROUP in host.groups), None)
    if host is None:
        raise NotDone(f"{INVENTORY} has no host in the group {GROUP}")
    box = LlmBox.of(host.variables)
    preset = box.names("user")[0]
    switch = f"sudo -iu {box.user} lmswitch"
    serving = active(python, host.name, switch)
    if serving in box.names("user"):  # a repeat leaves what somebody chose meanwhile
        preset = serving
    seconds["switch"] = step(
        f"Start the preset {preset}", python, "-m", "lab", "ssh", host.name, f"{switch} {preset}"
    )
    seconds["verify"] = step("Verify", python, "scripts/verify_health.py", "--inventory", INVENTORY)

    url = box.url(host.address)
    answer, speed = ask(url, QUESTION)
    print(f"\n== One chat through {url}\n  you:   {QUESTION}\n  {preset}: {answer}\n  ({speed:.0f} tokens/s)")
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"\n== The lab is up ({time.monotonic() - started:.0f} s: {steps})")
    print(hints(from_environment().name, host.name, switch))


def hints(lab: str, host: str, switch: str) -> str:
    """What to type next; each command goes to this very lab. `switch` runs the switcher on the host."""
    return f"""\
  look around   {typed(f"python3 -m lab ssh {host}", lab)}
  switch model  {typed(f"python3 -m lab ssh {host} {switch} list", lab)}
  one screen    {typed(f".venv/bin/python scripts/fleet.py --inventory {INVENTORY}", lab)}
  run it again  {typed("make lab", lab)}          (changes nothing)
  remove it     {typed("make lab-down", lab)}"""


def run() -> int:
    """Entry point: one line about what failed, and its exit code."""
    try:
        main()
    except (NotDone, InventoryUnreadable, InventoryError) as error:
        print(f"make lab: {error}", file=sys.stderr)
        return error.code if isinstance(error, NotDone) else 1
    except KeyboardInterrupt:
        print("make lab: interrupted; run it again, it goes on from there", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    interrupt.raise_again()
    sys.exit(run())
