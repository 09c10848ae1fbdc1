"""The report: one self-contained HTML page about a run, made to be read offline by a person."""
