"""Benchmarks: metrics of the paper's section 3, and the sets of records they are measured on.

metrics.py       every number, from log-probabilities, tokens or texts
benchmark.py     what a benchmark is: its records, the fact of each, its scores; looked up by name
counterfact.py   COUNTERFACT, facts with ES, PS, NS and S
zsre.py          zsRE, questions with efficacy, paraphrase and specificity
answers.py       whether what a model says to a question holds the answer
beside.py        what an edit does at neighbours and to the subject's other relations
health.py        what edits do to text that has nothing to do with them
texts.py         generated texts beside references
fetch.py         downloads of the published sets
"""
