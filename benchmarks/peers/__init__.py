"""What others make of the same jobs: one file a peer, each with a `make_arm(job)`, found by the peer's name."""

NAMES = ("jax-scan", "jax-step", "native", "scikit-learn", "lightning", "lightning-barebones", "accelerate")
"""By which `python -m fasttrain bench --arms` asks for them; the module of `jax-scan` is `jax_scan`."""
