"""Data: the order of samples, and how they come to the device. `order` and `plan` need no torch."""
