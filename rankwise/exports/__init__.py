"""Anyone's finished PEFT LoRA adapter: read, compressed, and written for the program that serves it.

adapter_files.py, declared.py  read and written without its base; what its configuration declares
programs.py      how PEFT, vLLM, TGI, SGLang and llama.cpp scale what they load
inspecting.py    what an adapter holds against what it declares
bases.py, origins.py  the base model as far as it can be had; where an adapter comes from
cuts.py          updates cut to a rank and stored in a precision, and what that costs
formats.py       every format by name
uniform.py, siblings.py  one rank, scale 1, no patterns; fused modules filled with zeros
patterned.py, merged.py, gguf_file.py  anchored patterns; folded into the base; a file for llama.cpp
trainers.py      the plan for axolotl, TRL and Unsloth
card.py          the model card of what was written
shrink.py, losses.py  compressed to a budget; what that costs on rows
"""
