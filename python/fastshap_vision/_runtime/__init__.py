"""Why it is fast on this machine: oneDNN's linear layers, packed attention for timm, the allocator, precision."""
