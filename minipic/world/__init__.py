"""A procedural 3-D world with exact truth: scenes, pictures, captions, and the judge that reads pictures back."""
