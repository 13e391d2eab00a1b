"""What only the chapters of the book use."""
