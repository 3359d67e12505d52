"""The lab as an Ansible inventory."""

from __future__ import annotations

import shlex
from typing import Any

from lab import root
from lab.config import SUDO_USER, Lab


def inventory(lab: Lab) -> dict[str, Any]:
    """Return what an Ansible inventory script prints for `--list`."""
    machines = [lab.vm] if root.made(lab, lab.vm) else []
    common = shlex.join(lab.ssh_options())
    hostvars = {
        host.name: {
            "ansible_host": host.address,
            "ansible_user": SUDO_USER,
            "ansible_ssh_private_key_file": str(lab.ssh_key),
            "ansible_ssh_common_args": common,
        }
        for host in (*lab.hosts, *machines)
    }
    return {
        "_meta": {"hostvars": hostvars},
        "all": {
            "children": ["lab"],
            "vars": {
                "lab_network": lab.subnet,
                "lab_source_git": lab.source_git,
                "lab_source_http": lab.source_http,
                "lab_ssh_public_key": lab.ssh_public_key,
            },
        },
        "lab": {"children": ["llama_hosts", "clients", "routers", "lab_machines"]},
        "llama_hosts": {"children": ["llm_servers", "ocr_servers"]},
        "llm_servers": {"hosts": ["lab-llm"]},
        "ocr_servers": {"hosts": ["lab-ocr"]},
        "clients": {"hosts": ["lab-client"]},
        "routers": {"hosts": []},  # tests/lab/test_router.py
        # The UEFI machine while there is one; site.yml has nothing for it.
        "lab_machines": {"hosts": [host.name for host in machines]},
    }
