"""The experiment on photographs: accuracy, fidelity and every method of explanation, plain beside self-explaining."""
