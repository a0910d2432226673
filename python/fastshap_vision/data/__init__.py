"""What a batch holds: data sets, mirror images, recorded coalitions."""
