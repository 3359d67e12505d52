#!/usr/bin/env python3
"""`make lab`: boot the lab, provision it with site.yml, verify it, print one answer through its port.

Safe to repeat and to interrupt: every step converges on what is there already.
Exit codes: 0 all done, 130 interrupted, otherwise that of the step that failed.
"""

from __future__ import annotations

import subprocess
import sys
import time
from pathlib import Path

import httpx

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from llama_common.fields import Address

from scripts._inventory import ROOT, environment, load
from scripts._llm_box import GROUP, LlmBox

BIN = Path(sys.executable).parent
INVENTORY = "inventory/lab"
QUESTION = "What is the capital of France? Answer in one sentence."
STEP_TIMEOUT_S = 5400
CHAT_TIMEOUT_S = 120


def step(title: str, *command: str) -> float:
    """Run one step with its output shown. Returns its seconds; exits with its code when it fails."""
    print(f"\n== {title}", flush=True)
    started = time.monotonic()
    done = subprocess.run(command, cwd=ROOT, timeout=STEP_TIMEOUT_S, env=environment(), check=False)
    if done.returncode != 0:
        print(
            f"make lab: '{title}' ended with exit code {done.returncode};"
            " mend what it says above and run `make lab` again, it goes on from there",
            file=sys.stderr,
        )
        sys.exit(done.returncode)
    return time.monotonic() - started


def ask(url: str, question: str) -> tuple[str, float]:
    """Ask the model behind `url`. Returns its answer and the generation speed in tokens per second."""
    reply = httpx.post(
        f"{url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0.0},
        timeout=CHAT_TIMEOUT_S,
        trust_env=False,  # a proxy of the machine does not lead to a lab host
    )
    reply.raise_for_status()
    body = reply.json()
    return body["choices"][0]["message"]["content"].strip(), body["timings"]["predicted_per_second"]


def main() -> int:
    """Run the steps and print the summary."""
    started = time.monotonic()
    python, playbook = sys.executable, str(BIN / "ansible-playbook")
    seconds = {"boot": step("Boot three hosts", python, "-m", "lab", "up")}
    seconds["provision"] = step("Provision them (site.yml)", playbook, "-i", INVENTORY, "site.yml")

    host = next(host for host in load(ROOT / INVENTORY) if GROUP in host.groups)
    box = LlmBox.of(host.variables)
    preset = box.names("user")[0]
    switch = f"sudo -iu {box.user} lmswitch"
    seconds["switch"] = step(
        f"Start the preset {preset}", python, "-m", "lab", "ssh", host.name, f"{switch} {preset}"
    )
    seconds["verify"] = step("Verify", python, "scripts/verify_health.py", "--inventory", INVENTORY)

    url = f"http://{host.address}:{Address.parse(host.variables['llama_presets_listen']).port}"
    answer, speed = ask(url, QUESTION)
    print(f"\n== One chat through {url}\n  you:   {QUESTION}\n  {preset}: {answer}\n  ({speed:.0f} tokens/s)")
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"""
== The lab is up ({time.monotonic() - started:.0f} s: {steps})
  look around   python3 -m lab ssh {host.name}
  switch model  python3 -m lab ssh {host.name} {switch} list
  one screen    .venv/bin/python scripts/fleet.py --inventory {INVENTORY}
  run it again  make lab          (changes nothing)
  remove it     make lab-down""")
    return 0


if __name__ == "__main__":
    try:
        sys.exit(main())
    except KeyboardInterrupt:
        print("make lab: interrupted; run it again, it goes on from there", file=sys.stderr)
        sys.exit(130)
