"""Parts that block drafters share: a block of slots at an anchor, drafted in one forward."""
