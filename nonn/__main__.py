import os
import sys

from nonn.cli import main

main()
# Without the second that Python takes to take PyTorch and DVC apart, in each of a pipeline's jobs.
sys.stdout.flush()
sys.stderr.flush()
os._exit(0)
