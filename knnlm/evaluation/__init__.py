"""How good a mixture is, and with which temperature and lambda: splits, collecting, fitting, perplexity, pages."""
