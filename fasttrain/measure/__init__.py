"""The instrument: benchmarks in blocks of fresh processes, profiles that explain, and a comparison with a verdict."""
