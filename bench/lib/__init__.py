"""What all measurements share: the timer, the results files, the targets, the processor's name."""
