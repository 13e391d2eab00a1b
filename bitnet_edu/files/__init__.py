"""Model files, by format: reader and writer side by side. No engine in here."""
