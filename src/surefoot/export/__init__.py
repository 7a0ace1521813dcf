"""Readers of the record: files, tables, pages, progress. They need no torch."""
