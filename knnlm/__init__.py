"""knnlm: nearest-neighbour language models (Khandelwal et al. 2019, arXiv 1911.00172), as a library.

Importing this package loads numpy and nothing heavier; torch lives in `knnlm.lm`, faiss in `knnlm.index`.
"""

__version__ = "0.1.0"
