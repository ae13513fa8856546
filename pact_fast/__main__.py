"""`python -m pact_fast COMMAND ...`; `torchrun --nproc_per_node N -m pact_fast train CONFIG`, N ranks."""

import sys

from pact_fast.cli import main

if __name__ == "__main__":
    sys.exit(main())
