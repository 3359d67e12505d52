#!/usr/bin/env python3
"""`make lab`: boot the lab, provision it with site.yml, verify it, and print a real answer that came through :1234.

Safe to repeat and to interrupt: every step converges on what is there already.
Exit codes: 0 all done, otherwise that of the step that failed.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from dataclasses import dataclass
from pathlib import Path

import httpx

ROOT = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
INVENTORY = "inventory/lab"
QUESTION = "What is the capital of France? Answer in one sentence."
STEP_TIMEOUT_S = 5400
CHAT_TIMEOUT_S = 120


@dataclass(frozen=True)
class Step:
    """One command of `make lab`, with the heading a person sees above its output."""

    title: str
    command: list[str]


def run(step: Step) -> float:
    """Run one step with its output shown. Returns its seconds; exits with its code when it fails."""
    print(f"\n== {step.title}", flush=True)
    started = time.monotonic()
    done = subprocess.run(step.command, cwd=ROOT, timeout=STEP_TIMEOUT_S, env=environment(), check=False)
    if done.returncode != 0:
        print(f"make lab: '{step.title}' ended with exit code {done.returncode}; mend what it says above and run "
              "`make lab` again, it goes on from there", file=sys.stderr)
        sys.exit(done.returncode)
    return time.monotonic() - started


def environment() -> dict[str, str]:
    """The environment of every step: this venv first on PATH, the repository's Ansible configuration."""
    return {**os.environ, "PATH": f"{BIN}:{os.environ['PATH']}", "ANSIBLE_CONFIG": str(ROOT / "ansible.cfg")}


def lab_variables() -> tuple[str, dict[str, object]]:
    """The name and variables of the lab's LLM box, as Ansible sees them."""
    listed = subprocess.run(
        [str(BIN / "ansible-inventory"), "-i", INVENTORY, "--list"],
        cwd=ROOT, timeout=60, env=environment(), check=True, capture_output=True, text=True,
    )
    inventory = json.loads(listed.stdout)
    host = inventory["llm_servers"]["hosts"][0]
    return host, inventory["_meta"]["hostvars"][host]


def ask(url: str, question: str) -> tuple[str, float]:
    """Ask the model behind `url`. Returns its answer and the generation speed in tokens per second."""
    reply = httpx.post(
        f"{url}/v1/chat/completions",
        json={"messages": [{"role": "user", "content": question}], "max_tokens": 60, "temperature": 0.0},
        timeout=CHAT_TIMEOUT_S,
    )
    reply.raise_for_status()
    body = reply.json()
    return body["choices"][0]["message"]["content"].strip(), body["timings"]["predicted_per_second"]


def main() -> int:
    """Run the steps and print the summary."""
    started = time.monotonic()
    seconds = {"boot": run(Step("Boot three hosts", [sys.executable, "-m", "lab", "up"]))}
    seconds["provision"] = run(Step("Provision them (site.yml)",
                                    [str(BIN / "ansible-playbook"), "-i", INVENTORY, "site.yml"]))
    host, variables = lab_variables()
    presets = variables["llama_presets"]
    assert isinstance(presets, dict)
    preset = next(iter(presets))
    seconds["switch"] = run(Step(f"Start the preset {preset}",
                                 [sys.executable, "-m", "lab", "ssh", host, f"sudo -iu llm lmswitch {preset}"]))
    seconds["verify"] = run(Step("Verify", [sys.executable, "scripts/verify_health.py", "--inventory", INVENTORY]))

    url = f"http://{variables['ansible_host']}:1234"
    answer, speed = ask(url, QUESTION)
    print(f"\n== One chat through {url}\n  you:   {QUESTION}\n  {preset}: {answer}\n  ({speed:.0f} tokens/s)")
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in seconds.items())
    print(f"""
== The lab is up ({time.monotonic() - started:.0f} s: {steps})
  look around   python3 -m lab ssh {host}
  switch model  python3 -m lab ssh {host} sudo -iu llm lmswitch list
  one screen    .venv/bin/python scripts/fleet.py --inventory {INVENTORY}
  run it again  make lab          (changes nothing)
  remove it     make lab-down""")
    return 0


if __name__ == "__main__":
    sys.exit(main())
