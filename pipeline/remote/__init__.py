"""Addresses of object stores, and the objects there."""
