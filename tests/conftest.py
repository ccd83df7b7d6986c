"""Settings of the whole test run."""

import os

# Threads that wait sleep instead of spinning: beside another busy process, two spinning threads on
# two cores made single tests take minutes. It must be set before torch loads OpenMP.
os.environ.setdefault("OMP_WAIT_POLICY", "passive")

# Read where kernels are defined. It must be set before Triton is imported, by torch too.
if not os.path.exists("/dev/nvidiactl"):
    os.environ.setdefault("TRITON_INTERPRET", "1")
