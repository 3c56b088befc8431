"""The CUDA sources, shipped as a package so that they can be found wherever it is installed."""
