"""`gpu-guard`: watches the card and the kernel log, and takes the card out of service before it is harmed.

nvidia-smi hangs when the driver does, so nothing here that decides may wait: looks are made in threads of
their own, and the verdict comes from what they have delivered and from the monotonic clock.
"""
