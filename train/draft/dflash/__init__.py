"""The DFlash draft: a parallel block backbone whose slots are drafted independently."""
