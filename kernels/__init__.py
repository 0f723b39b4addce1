"""The arithmetic that a server runs hot: attention over pages, quantized matrices, adapters, small fusions.
One lesson a file."""
