"""From a file to the batch that a step takes."""
