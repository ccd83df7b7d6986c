"""What the compiled GPU code says about its speed where there is no GPU: `make sass`."""
