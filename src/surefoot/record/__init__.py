"""The record of a run: step log, events, identity, ledger. Needs no torch."""
