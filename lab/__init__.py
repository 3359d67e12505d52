"""The lab: three systemd hosts on this machine, booted with systemd-nspawn. Standard library only."""
