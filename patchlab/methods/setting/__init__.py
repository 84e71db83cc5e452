"""What a run of a method is about, and the unpatched runs that it starts from."""
