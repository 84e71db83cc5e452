"""Task files: rows as they stand there, and pairs read from them."""
