"""Commands on a cache: inspect, verify, convert, and samples as text."""
