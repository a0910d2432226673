"""v(S) of many coalitions: chunks, memory, CUDA graphs."""
