"""What fasttrain is measured with: `pytest benchmarks/` for the quick suite, `python -m benchmarks.<name>` for records."""
