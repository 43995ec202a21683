"""Scripts that reproduce the studies of "Deconstructing Lottery Tickets"; see README.md."""

import os

# Studies go by the limits of dispatch that their configs hold, not by this machine's: before
# lottery_sparse is imported, which reads what was measured.
os.environ["LS_MACHINE"] = "0"
