"""What fasttrain is measured with: `pytest benchmarks/` is the quick suite, `python -m benchmarks.<name>` records."""
