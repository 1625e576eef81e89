"""A recipe tried in several ways: `caravan sweep`.

config.py says what is compared, trials.py makes one graph of it, results.py reads what came out of a store, pictures.py
and report.py show it.
"""
