"""Build, test, tune and measure on a machine with an NVIDIA GPU: `make gpu` (__main__.py)."""
