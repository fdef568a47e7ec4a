"""`compare`: which of two is faster, how sure that is, and why; and the receipt of a training."""
