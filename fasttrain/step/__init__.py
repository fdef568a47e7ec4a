"""A step: the user's forward, loss and optimizer, and the engines that run them."""
