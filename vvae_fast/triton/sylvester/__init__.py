"""The Triton kernels of Sylvester flows, docs/math.md (57) to (64): a file for each pass, kernel and launcher."""
