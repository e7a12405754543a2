"""Many runs over one cache: sweep, compare, report."""
