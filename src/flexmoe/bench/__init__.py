"""Measuring: speed beside what memory allows, and beside other engines; each figure a row of JSON."""
