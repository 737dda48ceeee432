"""Editors that are trained: a network turns one gradient into an edit (KE, De Cao et al. 2021; MEND, Mitchell et al. 2022).

rows.py      texts as rows that run through the edited blocks alone
factors.py   the factors of a weight's gradient, token by token; terms added to weights while the model runs
mend.py      MEND's network
ke.py        KE's network
state.py     a trained network as a file, and what it belongs to
editor.py    both as editors
"""
