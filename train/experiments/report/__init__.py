"""`dspark report`: one self-contained page about runs, on a screen and on paper."""
