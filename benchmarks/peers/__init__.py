"""What others make of the same jobs: one file a peer, each with a `build(job, threads)` that returns its arm."""
