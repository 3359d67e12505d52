#!/bin/sh
# A simulated nvidia-smi, which a test puts on a host without a card: it answers as the word in this file says.
case "$(cat /run/simulated-card)" in
normal) echo "61, 0x0000000000000001" ;;
capped) echo "76, 0x0000000000000004" ;;
hot) echo "91, 0x0000000000000004" ;;
slowed) echo "79, 0x0000000000000060" ;;
failed)
    echo "NVIDIA-SMI has failed because it couldn't communicate with the NVIDIA driver."
    exit 9
    ;;
garbage) head -c 200 /dev/urandom ;;
gone)
    echo "Unable to determine the device handle for GPU0000:01:00.0: Unknown Error"
    exit 255
    ;;
no-devices) echo "No devices were found" ;;
hung)
    trap '' TERM INT HUP
    while :; do sleep 1; done
    ;;
# Its parent has it in its own vfork: in uninterruptible sleep (D) until the other ends.
vfork) exec python3 -c "import ctypes, time; ctypes.CDLL(None).vfork() or time.sleep(600)" ;;
*) exit 1 ;;
esac
