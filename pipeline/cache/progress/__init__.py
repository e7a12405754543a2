"""The state of an incomplete cache: claims of workers, records of finished files."""
