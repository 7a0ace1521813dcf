"""The guard: permits updates on the device, reviews rows on the host."""
