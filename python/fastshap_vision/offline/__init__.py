"""Explaining more images than memory holds: by several processes, and going on where a run was stopped."""
