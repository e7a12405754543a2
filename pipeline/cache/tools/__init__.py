"""Commands on a cache: inspect, verify, convert."""
