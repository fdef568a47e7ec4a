"""Training loops with one fault each, and loops without any: what a profile must and must not find."""
