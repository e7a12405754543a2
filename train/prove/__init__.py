"""Proof of an export: a real engine serves it, and its drafted tokens are compared with ours, one by one.

Acceptance shows no mistake: a draft that an engine reads with one layer too high, or another mask token, is
accepted nearly as often. So the tokens are compared, not their average.

    engine.py        an engine's answer, and running one as a process of its own
    vllm.py          vLLM; worker/ runs in its environment
    llama_cpp.py     llama.cpp's server
    compare.py       our drafts after the engine's own text, and where the two differ
"""
