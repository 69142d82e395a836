"""Views of one compilation: Python, torch IR, ATen IR, loops before and after fusion, generated code, linked.

collect.py    compile a target and keep every level
levels.py     weave the levels together: which line comes from which
code.py       kernels and their calls in generated source
source.py     the Python functions involved
roofline.py   what a kernel costs at best on a named device
"""
