"""What tests marked `gpu` run on: the card, or what stands for it where there is none.

`make gpu` runs those tests on a machine with a card. Elsewhere they run with all others: Triton's
kernels in its interpreter, so that what a card is asked is known to be asked rightly; what only a
card can answer is skipped.
"""

import pytest
import torch

HAS_CARD = torch.cuda.is_available()
DEVICE = torch.device("cuda" if HAS_CARD else "cpu")

needs_a_card = pytest.mark.skipif(not HAS_CARD, reason="needs a GPU")
