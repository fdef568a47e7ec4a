"""`bench`: arms of a workload against each other, in blocks of fresh processes."""
