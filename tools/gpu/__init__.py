"""Build, prove, tune and measure on a machine with an NVIDIA card: `make gpu` (__main__.py)."""
