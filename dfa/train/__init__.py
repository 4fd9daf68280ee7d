"""One training step, the engines that run it, and the loop of one worker."""
